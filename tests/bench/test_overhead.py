"""The overhead benchmark: its sides do the same work, and its rows say what was measured."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import harness as measure
import numpy as np
import overhead
import overhead_parts
import overhead_report
import overhead_sides
import pytest
import torch
from numpy_pruning import INSTALL, NumpyPruning, OriginalPackage, Side, other_work
from overhead import Options
from overhead_parts import Bench
from overhead_sides import Contender, FullData, OnDevice, Steps
from torch.utils.data.dataloader import _BaseDataLoaderIter
from tqdm import tqdm

from infobatch_fast.errors import UserError
from infobatch_fast.report.text import seconds as tabled
from infobatch_fast.telemetry.phases import Phases

CPU = torch.device("cpu")
SETTING = Options((600,), batch_size=20, model="small").settle(False)
TINY = "--device cpu --model small --sizes 600 1500 --batch-size 20 --quick".split()

# The package's interface, with no more inside it than these tests need.
PEER = """
import numpy as np, torch
from torch.utils.data.dataloader import _BaseDataLoaderIter
_BaseDataLoaderIter.__next__ = lambda self: None
class Sampler:
    def __init__(self, owner): self.owner, self.order = owner, []
    def __iter__(self): self.order = self.owner.prune(); return self
    def __next__(self): raise StopIteration
    def __getitem__(self, at): return self.order[at]
class InfoBatch:
    updates = 0
    def __init__(self, dataset, num_epochs, prune_ratio, delta):
        self.keep = 1 - prune_ratio
        self.scores, self.weights = torch.ones(len(dataset)) * 3, torch.ones(len(dataset))
    sampler = property(Sampler)
    def prune(self):
        well = (self.scores < self.scores.mean()).numpy()
        kept = np.random.choice(np.where(well)[0], int(self.keep * well.sum()), replace=False)
        self.weights[:] = 1
        self.weights[kept] = 1 / self.keep
        order = np.where(~well)[0].tolist() + kept.tolist()
        np.random.shuffle(order)
        return order
    def set_active_indices(self, indices): self.indices = indices
    def update(self, values):
        InfoBatch.updates += 1
        if InfoBatch.updates > LIMIT: raise KeyError("of the peer")
        self.scores[self.indices] = values.detach().clone()
        return values.mul_(self.weights[self.indices]).mean()
"""


@pytest.fixture
def brief(monkeypatch):
    """Five to six rounds of everything."""
    monkeypatch.setattr(Bench, "budget", lambda self, full, quick: 0.0)
    monkeypatch.setattr(overhead_parts, "SWEEP", 2**16)


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """A machine that no one else uses."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 9.0, 9.0))


@pytest.fixture
def sleep(monkeypatch):
    """A sleep of no time that `measure.wall` takes for one."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def wall(call, device):
        start = now[0]
        call()
        return now[0] - start

    monkeypatch.setattr(measure, "wall", wall)
    return sleep


@pytest.fixture
def no_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "infobatch", None)


@pytest.fixture
def peer(monkeypatch, tmp_path):
    def install(limit: int | str) -> None:
        folder = tmp_path / "peer" / "infobatch"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(PEER.replace("LIMIT", str(limit)))
        monkeypatch.syspath_prepend(folder.parent)

    monkeypatch.delitem(sys.modules, "infobatch", raising=False)
    yield install
    sys.modules.pop("infobatch", None)


def run(folder: Path, *more: str) -> tuple[int, list[dict]]:
    code = overhead.main([*TINY, "--out", str(folder), *more])
    path = folder / "overhead.jsonl"
    return code, measure.read_lines(path) if path.exists() else []


def rows(lines, part, **case):
    return [r for r in lines if r["part"] == part and case.items() <= r["case"].items()]


def line(part, case, median, more=None, absent=None, p20=None, p80=None):
    count = None if absent else 7
    figures = {"median": median, "p20": p20 or median, "p80": p80 or median, "count": count}
    options = {"load_average": 0.0, "cores": 2}
    of = {"options": options, "quick": False, "complete": True}
    return {"part": part, "case": case, **figures, "more": more or {}, "absent": absent, **of}


@pytest.mark.parametrize(("samples", "ratio"), [(50_000, 0.5), (1000, 0.3), (101, 0.9)])
def test_the_numpy_side_does_what_infobatch_does(samples, ratio):
    scores = overhead_sides.draw_scores(samples, seed=3)
    well_learned = scores < np.mean(scores, dtype=np.float64)
    n = int(well_learned.sum())
    ours, host = OnDevice(scores, ratio, 0, CPU), NumpyPruning(scores, ratio, 0)
    plan, order = ours.choose(), host.choose()
    weights = host.weights[order]
    others = set(np.flatnonzero(~well_learned))
    for indices in (plan.indices.tolist(), order.tolist()):
        assert len(set(indices)) == len(indices) == samples - n + round((1 - ratio) * n)
        assert others <= set(indices)
    assert plan.num_prunable == n
    assert np.array_equal(np.sort(weights), np.sort(plan.weights.numpy()))
    assert weights.sum(dtype=np.float64) == pytest.approx(samples, rel=1e-6)
    assert np.array_equal(weights > 1, well_learned[order])
    assert not np.array_equal(order, host.choose())


def test_the_numpy_side_with_nothing_to_prune_keeps_all():
    host = NumpyPruning(np.ones(10, np.float32), 0.5, 0)
    assert sorted(host.choose()) == list(range(10))
    assert np.array_equal(host.weights, np.ones(10))


def test_a_numpy_update_by_hand():
    host = NumpyPruning(np.arange(6, dtype=np.float32), 0.5, 0)
    host.weights[:] = [1, 2, 1, 4, 1, 1]
    losses = torch.tensor([0.5, 3.0], requires_grad=True)
    loss = host.update(losses, np.array([3, 1]))
    loss.backward()
    assert loss.item() == (4 * 0.5 + 2 * 3.0) / 2
    assert losses.grad is not None
    assert losses.grad.tolist() == [2.0, 1.0]
    assert host.scores.tolist() == [0, 3.0, 2, 0.5, 4, 5]


def test_every_side_passes_the_check(peer):
    peer("10**9")
    scores, losses = overhead_sides.draw_scores(5000, 0), torch.rand(50) + 0.5
    sides: list[Side] = [
        OnDevice(scores, 0.5, 0, CPU),
        NumpyPruning(scores, 0.5, 0),
        OriginalPackage(scores, 0.5),
    ]
    for side in sides:
        assert other_work(side, scores, 0.5, losses) is None
        assert side.recorded(side.epoch(side.choose())[0]) is not None
    assert other_work(FullData(5000, 0, CPU), scores, 0.0, losses) is None


def twice(host, order):
    return np.concatenate([order, order[:1]])


def without_one_that_must_stay(host, order):
    return np.delete(order, host.weights[order].argmin())


def without_nine(host, order):
    return np.delete(order, np.argsort(host.weights[order])[-9:])


def well_learned_last(host, order):
    return order[np.argsort(host.weights[order])]


def in_natural_order(host, order):
    return np.sort(order)


def not_rescaled(host, order):
    host.weights.fill(1)
    return order


def all_rescaled_a_little(host, order):
    host.weights *= 1.02
    return order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, "an index that is out of range or occurs twice"),
        (without_one_that_must_stay, "leaves out a sample that is not well-learned"),
        (without_nine, "well-learned samples at ratio 0.5"),
        (well_learned_last, "the epoch is not shuffled"),
        (in_natural_order, "the epoch is not shuffled"),
        (not_rescaled, "a weight is not n/k"),
        (all_rescaled_a_little, "a weight is not n/k"),
    ],
)
def test_another_epoch_is_found(change, message):
    class Mutant(NumpyPruning):
        def choose(self):
            return change(self, super().choose())

    scores = overhead_sides.draw_scores(5000, 0)
    assert message in str(other_work(Mutant(scores, 0.5, 0), scores, 0.5, torch.rand(50)))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda side, losses, batch: losses.mean(), "the loss is not"),
        (lambda side, losses, batch: NumpyPruning.update(side, losses, batch) * 1.01, "the loss"),
        (
            lambda side, losses, batch: (
                NumpyPruning.update(side, losses.detach(), batch) + losses.sum() - losses.sum()
            ),
            "the gradient is not",
        ),
        (
            lambda side, losses, batch: (
                NumpyPruning.update(side, losses, batch.copy()[::-1])
                and (losses * torch.from_numpy(side.weights[batch])).mean()
            ),
            "the scores are not",
        ),
    ],
)
def test_another_update_is_found(update, message):
    side = NumpyPruning(scores := overhead_sides.draw_scores(5000, 0), 0.5, 0)
    side.update = lambda losses, batch: update(side, losses, batch)
    assert message in str(other_work(side, scores, 0.5, torch.rand(50) + 0.5))


def test_a_full_epoch_where_pruning_is_due_is_found_and_a_pruned_one_where_it_is_not():
    scores, losses = overhead_sides.draw_scores(5000, 0), torch.rand(50)
    assert "keeps" in str(other_work(FullData(5000, 0, CPU), scores, 0.5, losses))
    assert "keeps" in str(other_work(OnDevice(scores, 0.5, 0, CPU), scores, 0.0, losses))


def test_importing_the_package_leaves_torch_as_it_was(peer):
    peer("10**9")
    before = _BaseDataLoaderIter.__next__
    OriginalPackage(overhead_sides.draw_scores(100, 0), 0.5)
    assert "infobatch" in sys.modules
    assert _BaseDataLoaderIter.__next__ is before


def test_shares_by_hand():
    got = overhead_parts.shares(0.5, 0.01, 0.1, kept=3001, samples=5000, batch_size=100)
    assert got == pytest.approx(
        {
            "overhead_seconds": 0.81,  # 0.5 + 31 * 0.01
            "choose_seconds": 0.5,
            "updates_seconds": 0.31,
            "pruned_epoch_steps": 31,
            "full_epoch_steps": 50,
            "pruned_epoch_percent": 100 * 0.81 / 3.1,
            "full_epoch_percent": 16.2,  # 0.81 of 5 s
        }
    )


def test_the_reported_shares():
    assert pytest.approx(69.33, abs=0.005) == overhead_report.REPORTED_FULL
    of = [overhead_report.REPORTED_OVERHEAD / epoch for epoch in (44.532, 69.33)]
    assert of == pytest.approx([0.0231, 0.01486], abs=5e-5)


@pytest.mark.parametrize(("slower", "inside"), [((0, 0.01), True), ((0.02, 0.03), False)])
def test_what_an_update_adds_is_held_against_what_the_steps_differ_by(
    brief, tmp_path, monkeypatch, sleep, slower, inside
):
    monkeypatch.setattr(OnDevice, "update", lambda self, x, b: sleep(0.005) or x.mean())
    monkeypatch.setattr(FullData, "update", lambda self, x, b: sleep(0.001) or x.mean())

    class Asleep:
        training = {"model": "small"}  # noqa: RUF012
        steps = dict.fromkeys(["with", "without"])
        turns = itertools.cycle(slower)

        def run(self, side, count, phases):
            sleep(0.02 + (next(self.turns) if side == "with" else 0))

    overhead_parts.measure_steps(bench_of(tmp_path), Asleep())  # pyright: ignore[reportArgumentType]
    lines = measure.read_lines(tmp_path / "o.jsonl")
    (gap,) = rows(lines, "step", side="difference")
    more = gap["more"]
    assert more["low_seconds"] == pytest.approx(slower[0])
    assert more["high_seconds"] == pytest.approx(slower[1])
    assert gap["median"] == pytest.approx(sum(slower) / 2)
    assert more["update_wall_seconds"] == pytest.approx(0.004)
    assert more["update_wall_inside"] is inside
    without = rows(lines, "step", side="without")[0]["median"]
    assert without == pytest.approx(0.02)


def test_no_memory_for_the_update_in_whole_steps_is_no_figure(brief, tmp_path, monkeypatch):
    def fail(self, losses, batch):
        raise MemoryError

    monkeypatch.setattr(OnDevice, "update", fail)
    bench = bench_of(tmp_path)
    overhead._measure_whole(bench)
    lines = measure.read_lines(tmp_path / "o.jsonl")
    assert [r["part"] for r in lines] == ["step", "epoch", "telemetry"]
    assert {r["absent"] for r in lines} == {f"out of memory: {overhead.OUT_OF_MEMORY}"}


def test_the_tables_in_full():
    def pruning(part, samples, side, median, absent=None):
        case = {"samples": samples, "side": side, "clock": "wall"}
        return line(part, case, median, absent=absent)

    def epoch(side, choose, updates):
        more = {"choose_seconds": choose, "updates_seconds": updates}
        more |= {"pruned_epoch_steps": 164, "full_epoch_steps": 250}
        more |= {"pruned_epoch_percent": 3.0, "full_epoch_percent": 2.0}
        return line("epoch", {"samples": 50_000, "side": side}, choose + updates, more)

    lines = [
        pruning("choose", 50_000, "device", 1e-3),
        pruning("choose", 50_000, "numpy", 2.5e-3),
        pruning("choose", 50_000, "original", None, "not there"),
        pruning("choose", 10**6, "original", None, "not there"),
        pruning("update", 50_000, "none", 1e-5),
        epoch("device", 1e-3, 2e-3),
        epoch("none", 1e-3, 1e-3),
        line("epoch", {"samples": 50_000, "side": "numpy"}, None, absent="left out"),
        line("host", {"what": "choose", "side": "device"}, 1.5, {"host_syncs": 1}),
        line("host", {"what": "choose", "side": "numpy"}, 0.5, {"host_syncs": None}),
    ]
    assert (
        "\n".join(overhead_report.tables(lines))
        == """
## Choose an epoch: threshold, choice and shuffle of N samples

| N         | clock |  device |   numpy | none | original |
| --------- | ----- | ------: | ------: | ---: | -------: |
| 50,000    | wall  | 1.00 ms | 2.50 ms |    - |        - |
| 1,000,000 | wall  |       - |       - |    - |        - |

## Update with a batch: rescaled mean, backward, record

| N      | clock | device | numpy |    none | original |
| ------ | ----- | -----: | ----: | ------: | -------: |
| 50,000 | wall  |      - |     - | 10.0 us |        - |

## Overhead of a pruned epoch at N = 50,000

A pruned epoch has 164 steps, a full one 250; shares are of steps without it.

| side               |  choose | updates |    both | beyond none | of pruned epoch | of full epoch |
| ------------------ | ------: | ------: | ------: | ----------: | --------------: | ------------: |
| device             | 1.00 ms | 2.00 ms | 3.00 ms |     1.00 ms |           3.00% |         2.00% |
| numpy              |       - |       - |       - |           - |               - |             - |
| none               | 1.00 ms | 1.00 ms | 2.00 ms |        0 us |           3.00% |         2.00% |
| original           |       - |       - |       - |           - |               - |             - |
| reported, one A100 |       - |       - |  1.03 s |           - |           2.31% |         1.49% |

## The host

| call   | side   | until it returns |        host syncs |
| ------ | ------ | ---------------: | ----------------: |
| choose | device |           1.50 s |                 1 |
| choose | numpy  |           500 ms | not seen on a CPU |

## Absent

- original at N = 50,000 and 1,000,000: not there"""
    )


@pytest.mark.parametrize(
    ("low", "high", "claim"),
    [(-1.0, 0.9, "yes"), (1.0, 2.0, "no"), (0.5, 1.0, "not decided by this interval")],
)
def test_the_claim_about_telemetry_follows_its_interval(low, high, claim):
    more = {"median_percent": 0.5, "low_percent": low, "high_percent": high}
    lines = [
        line("telemetry", {"side": "on"}, 0.2, {"group_steps": 2}),
        line("telemetry", {"side": "off"}, 0.1),
        line("telemetry", {"side": "difference"}, 0.1, more),
    ]
    text = "\n".join(overhead_report.tables(lines))
    row = next(row for row in text.splitlines() if "below 1% of a step" in row)
    assert [cell.strip() for cell in row.split("|")[2:3]] == [claim]
    assert f"{low:.3g}" in text or f"{low:.2f}" in text
    assert "| median of paired differences | " in text


@pytest.mark.parametrize(
    ("update", "low", "words"),
    [
        (1e-3, -1e-3, "inside the interval, which is 4.00 times as wide as it: too wide to tell"),
        (-5e-4, -1e-3, "inside the interval, which is 8.00 times as wide as it: too wide to tell"),
        (1e-3, 0.0, "inside the interval, which is 3.00 times as wide as it: too wide to tell"),
        (2e-3, 1e-3, "inside the interval, which is 1.00 times as wide as it"),
        (0.0, -1e-3, "inside the interval: too wide to tell"),
        (1e-3, 2e-3, "NOT inside the interval"),
    ],
)
def test_the_step_table_says_whether_the_update_lies_in_the_interval(update, low, words):
    more = {"low_seconds": low, "high_seconds": 3e-3}
    more |= {"update_wall_seconds": update, "update_wall_inside": low <= update}
    case = {"model": "small", "amp": "off", "batch_size": 20}
    lines = [
        line("step", {**case, "side": "with"}, 0.12),
        line("step", {**case, "side": "without"}, 0.11),
        line("step", {**case, "side": "difference"}, 2e-3, more),
    ]
    table = overhead_report.tables(lines)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    interval = f"{tabled(low)} to 3.00 ms (95%)"
    assert ["median of paired differences", "2.00 ms", interval, "7"] in cells
    name = "update less plain mean, alone (wall)"
    assert [name, tabled(update), words, ""] in cells


def test_quick_end_to_end(brief, no_peer, tmp_path, capsys):
    code, lines = run(tmp_path / "out")
    output = capsys.readouterr()
    assert (code, output.err) == (0, "")
    sides = ["device", "numpy", "none", "original"]
    for part in ("choose", "update"):
        got = [(r["case"]["samples"], r["case"]["side"]) for r in rows(lines, part)]
        assert got == [(samples, side) for samples in (600, 1500) for side in sides]
    for r in lines:
        if r["case"].get("side") == "original":
            assert r["median"] is None
            assert r["absent"] == (INSTALL if r["part"] != "epoch" else r["absent"])
        else:
            assert r["absent"] is None
            assert r["median"] > 0 or r["case"]["side"] == "difference"
        assert r["quick"]
        assert r["complete"]
        assert r["options"]["sizes"] == [600, 1500]
        assert "out" not in r["options"]
    syncs = {
        (r["case"]["what"], r["case"]["side"]): r["more"]["host_syncs"]
        for r in rows(lines, "host")
        if r["absent"] is None
    }
    assert syncs == {
        ("choose", "device"): 1,
        ("choose", "numpy"): None,
        ("choose", "none"): 0,
        ("update", "device"): 0,
        ("update", "numpy"): None,
        ("update", "none"): 0,
        ("step", "with"): 0,
        ("step", "without"): 0,
    }
    (step,) = rows(lines, "step", side="without")
    (gap,) = rows(lines, "step", side="difference")
    (choose,) = rows(lines, "choose", samples=600, side="numpy")
    (update,) = rows(lines, "update", samples=600, side="numpy")
    (epoch,) = rows(lines, "epoch", side="numpy")
    steps = epoch["more"]["pruned_epoch_steps"]
    assert steps == -(-Steps(SETTING, CPU).kept // 20)
    assert epoch["median"] == pytest.approx(choose["median"] + steps * update["median"])
    share = epoch["median"] / (30 * step["median"])
    assert epoch["more"]["full_epoch_percent"] == pytest.approx(100 * share)
    added = gap["more"]["update_wall_seconds"]
    assert abs(added) < 0.01
    within = gap["more"]["low_seconds"] <= added <= gap["more"]["high_seconds"]
    assert gap["more"]["update_wall_inside"] is within
    (png,) = (tmp_path / "out").glob("*.png")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    name = lines[0]["device"]["name"]
    said = output.out.splitlines()
    step_line, telemetry_line = (
        next(row for row in said if row.startswith(f"{part} ")) for part in ("step", "telemetry")
    )
    for row in (step_line, telemetry_line):
        assert ", median of paired differences " in row
    assert "busy" not in output.out
    assert name in said[0]
    assert any(name in row for row in said[-3:])
    assert "too short to quote" in "\n".join(said[-4:])
    assert f"- original at N = 600 and 1,500: {INSTALL}" in said


def test_a_peer_that_works_has_rows(brief, peer, tmp_path):
    peer("10**9")
    code, lines = run(tmp_path / "out")
    assert code == 0
    assert [r["absent"] for r in lines] == [None] * len(lines)
    assert len(rows(lines, "epoch", side="original")) == 1


def test_a_peer_that_fails_in_the_middle_is_absent_from_there_on_and_the_rest_runs(
    brief, peer, tmp_path
):
    peer(4)  # one in the check, one to warm up, the third of the rounds
    code, lines = run(tmp_path / "out")
    assert code == 0
    why = "it failed: KeyError: 'of the peer'"
    assert {r["absent"] for r in rows(lines, "update", side="original")} == {why}
    assert {r["absent"] for r in rows(lines, "choose", side="original")} == {None}
    rest = [r for r in lines if r["case"]["side"] != "original"]
    assert {r["absent"] for r in rest} == {None}
    assert {r["part"] for r in rest} == {"choose", "update", "host", "step", "epoch", "telemetry"}


def test_a_peer_that_does_other_work_is_not_timed(brief, peer, tmp_path, monkeypatch):
    peer("10**9")
    monkeypatch.setattr(OriginalPackage, "choose", lambda self: sorted(iter(self._sampler)[:]))
    _, lines = run(tmp_path / "out")
    absent = {r["absent"] for r in lines if r["case"]["side"] == "original"}
    assert "it does other work: the epoch is not shuffled" in absent
    assert None not in absent


def test_out_of_memory_is_an_absent_row_and_a_defect_of_ours_is_none(monkeypatch):
    def contender():
        return Contender("device", 1000, lambda: overhead_sides.draw_scores(1000, 0), SETTING, CPU)

    def fail(error):
        def choose(self):
            raise error

        monkeypatch.setattr(OnDevice, "choose", choose)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    side = contender()
    side.choose()
    assert side.failure == "out of memory"
    fail(ValueError("a defect"))
    side.choose()  # no call is made any more
    with pytest.raises(ValueError, match="a defect"):
        contender().choose()


def test_out_of_memory_in_whole_steps_leaves_the_rest(brief, no_peer, tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(Steps, "run", fail)
    code, lines = run(tmp_path / "out")
    assert code == 0
    for part in ("step", "epoch", "telemetry"):
        (row,) = rows(lines, part)
        assert row["absent"] == f"out of memory: {overhead.OUT_OF_MEMORY}"
    assert rows(lines, "update", side="device")[0]["median"] > 0


def test_a_size_that_memory_does_not_allow_is_absent(brief, no_peer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead_sides, "free_memory", lambda device: 10**9)
    code, lines = run(tmp_path / "out", "--sizes", "600", str(10**9), str(10**30))
    assert code == 0
    big = rows(lines, "choose", samples=10**9)
    assert big[0]["absent"] == (
        "it needs about 57.0 GB of the host's memory, of which 1.00 GB are free"
    )
    assert all(r["absent"] for r in big)
    assert len(rows(lines, "choose", samples=10**30)) == 4
    assert rows(lines, "choose", samples=600)[0]["median"] > 0


def test_no_size_that_fits_is_the_users_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead_sides, "free_memory", lambda device: 1000)
    code, lines = run(tmp_path / "out")
    assert (code, lines, (tmp_path / "out").exists()) == (2, [], False)
    assert capsys.readouterr().err == (
        "error: sizes must hold one that fits, got 600: it needs about 0.0000342 GB of the host's "
        "memory, of which 0.00000100 GB are free\n"
    )


def test_free_memory_is_a_fifth_more_than_may_be_used(monkeypatch):
    free = overhead_sides.free_memory(CPU)
    assert free is not None
    assert 10**6 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = overhead_sides.HOST_BYTES["numpy"] * 1000
    monkeypatch.setattr(overhead_sides, "free_memory", lambda device: need / 0.8)
    assert overhead_sides.lack_of_memory("numpy", 1000, CPU) is None
    assert overhead_sides.lack_of_memory("numpy", 1001, CPU) is not None
    monkeypatch.setattr(overhead_sides, "free_memory", lambda device: None)
    assert overhead_sides.lack_of_memory("numpy", 10**15, CPU) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratio 0", "ratio must be in (0, 1), got 0.0"),
        ("--ratio 1", "ratio must be in (0, 1), got 1.0"),
        ("--ratio nan", "ratio must be in (0, 1), got nan"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        (
            "--batch-size 301",
            "sizes must be at least 602 with batch_size 301 and ratio 0.5, for a whole batch in "
            "every epoch, got 600",
        ),
        (
            "--sizes 1 50 --batch-size 1 --ratio 0.7",
            "sizes must be at least 4 with batch_size 1 and ratio 0.7, for a whole batch in every "
            "epoch, got 1",
        ),
        ("--sizes 600 0", "sizes must be at least 1, got 0"),
        ("--seed -1", "seed must be in [0, 2**63), got -1"),
        ("--device gpu", "device must be one of auto, cuda, cpu, got gpu (did you mean cuda?)"),
        (
            "--model r17",
            "model must be one of r18, r34, r50, r101, small, got r17 (did you mean r18?)",
        ),
    ],
)
def test_a_mistake_in_the_input_is_one_line(arguments, message, tmp_path, capsys):
    code, lines = run(tmp_path / "out", *arguments.split())
    output = capsys.readouterr()
    assert (code, lines, output.out, output.err) == (2, [], "", f"error: {message}\n")
    assert not (tmp_path / "out").exists()


def test_a_batch_that_no_default_size_has(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert overhead.main(["--device", "cpu", "--batch-size", "25001", *out]) == 2
    assert capsys.readouterr().err == (
        "error: batch_size must be at most 25000, the samples that an epoch of the smallest size "
        "is sure to keep, got 25001\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_the_least_size_is_the_first_with_a_whole_batch(ratio):
    for batch_size in (1, 2, 7, 100, 200):
        size = overhead_sides.least_size(batch_size, ratio)
        kept = [overhead_sides.sure_to_keep(n, ratio) >= batch_size for n in (size - 1, size)]
        assert kept == [False, True]


@pytest.mark.parametrize("arguments", ["--sizes many", "--siezs 5", "--seed"])
def test_a_flag_that_does_not_parse_is_one_line(arguments, tmp_path, capsys):
    assert overhead.main([*arguments.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert run(tmp_path / "out", "--device", "cuda") == (2, [])
    assert "device must be cpu or auto" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    assert run(tmp_path / "out") == (2, [])
    assert "out must be a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]


def test_sizes_and_model_follow_the_device():
    assert Options().settle(False).sizes == (50_000, 1_000_000, 1_280_000, 10_000_000)
    assert Options().settle(True).sizes[-1] == 100_000_000
    assert Options(quick=True).settle(True).sizes == (50_000, 1_000_000)
    assert Options((900, 400, 900)).settle(False).sizes == (400, 900)
    assert [Options().settle(cuda).model for cuda in (False, True)] == ["small", "r50"]
    assert Options(model="r18").settle(True).model == "r18"
    assert Options((400, 50_000)).settle(False).training_size == 50_000
    assert Options((900, 400)).settle(False).training_size == 400


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("again", [False, True])
def test_a_signal_keeps_what_was_measured(
    number, code, again, brief, no_peer, tmp_path, monkeypatch, capsys
):
    choose = NumpyPruning.choose

    def interrupted(self):
        if len(self.scores) == 1500:
            os.kill(os.getpid(), number)
        return choose(self)

    def impatient(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(NumpyPruning, "choose", interrupted)
    if again:
        monkeypatch.setattr(overhead, "draw", impatient)
    got, lines = run(tmp_path / "out")
    output = capsys.readouterr()
    assert got == code
    assert {r["case"]["samples"] for r in lines} == {600}
    assert {r["part"] for r in lines} == {"choose", "update", "host"}
    assert {r["complete"] for r in lines} == {False}
    path = tmp_path / "out" / "overhead.jsonl"
    assert output.err == f"stopped; {len(lines)} rows are kept in {path}\n"
    assert "stopped" not in output.out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"overhead.jsonl"} | (set() if again else {"overhead.png"})


def title_of(monkeypatch, lines, path):
    titles = []
    monkeypatch.setattr(overhead_report.Figure, "suptitle", lambda self, text: titles.append(text))
    assert overhead_report.draw(lines, "a device", path)
    return titles[0].splitlines()


def test_a_stopped_run_of_any_length_has_its_plot(brief, no_peer, tmp_path, monkeypatch):
    _, lines = run(tmp_path / "out", "--sizes", "600")
    whole = title_of(monkeypatch, lines, tmp_path / "x.png")
    assert whole == ["Pruning overhead on a device", "a --quick run: too short to quote"]
    assert not overhead_report.draw([], "a device", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    for count in (1, 4, 8, 16, len(lines) - 4, len(lines)):
        stopped = [{**r, "complete": False} for r in lines[:count]]
        assert title_of(monkeypatch, stopped, tmp_path / "x.png")[-1] == "stopped midway"


def test_others_at_work_are_told_of(brief, no_peer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    loads = iter([(2.1, 0.0, 0.0)])
    monkeypatch.setattr(os, "getloadavg", lambda: next(loads))
    code, lines = run(tmp_path / "out", "--sizes", "600")
    assert code == 0
    busy = "the machine is busy: load average 2.10 of 4 cores: it is faster than these figures"
    said = capsys.readouterr().out.splitlines()
    assert said[2] == said[-3] == f"WARNING: {busy}"
    assert title_of(monkeypatch, lines, tmp_path / "x.png")[-1] == busy
    assert {(r["options"]["load_average"], r["options"]["cores"]) for r in lines} == {(2.1, 4)}
    assert measure.cautions({"load_average": 2.0, "cores": 4}, False) == []


def test_the_script_measures_the_checkout_it_lies_in(tmp_path):
    (tmp_path / "infobatch_fast").mkdir()
    (tmp_path / "infobatch_fast" / "__init__.py").write_text("raise SystemExit('another copy')")
    done = subprocess.run(
        [sys.executable, overhead.__file__, "--ratio", "2"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: ratio must be in (0, 1), got 2.0\n")


def test_the_steps_differ_in_infobatch_alone():
    steps = Steps(SETTING, CPU)
    with_it, without = steps.steps["with"], steps.steps["without"]
    assert with_it.infobatch is not None
    assert without.infobatch is None
    assert with_it.model is without.model
    assert with_it.optimizer is without.optimizer
    before = with_it.infobatch.scores.clone()
    weight = with_it.parameters[0].detach().clone()
    off = Phases(CPU, enabled=False)
    steps.run("without", 1, off)
    assert torch.equal(with_it.infobatch.scores, before)
    assert not torch.equal(with_it.parameters[0], weight)
    steps.run("with", 2, off)
    changed = (with_it.infobatch.scores != before).nonzero().view(-1)
    used = torch.cat([batch.indices for _, _, batch in steps.batches[:2]])
    assert torch.equal(changed, used.sort().values)
    assert with_it.read_counts().skipped == 0


def bench_of(tmp_path: Path) -> Bench:
    lines = measure.Lines(tmp_path / "o.jsonl", "overhead", CPU, {}, quick=True)
    return Bench(SETTING, CPU, lines, lambda line: None, tqdm(file=io.StringIO()))


def test_telemetry_is_on_in_one_side_alone_and_its_sampler_starts_outside_the_clock(
    brief, tmp_path, monkeypatch, sleep
):
    entered, phases = [], set()

    @contextmanager
    def sampler(device, *, enabled):
        entered.append(enabled)
        sleep(9.0)
        yield
        sleep(9.0)

    class Asleep:
        training = {"model": "small"}  # noqa: RUF012

        def run(self, side, count, of):
            phases.add((side, count, of.enabled))
            sleep(0.203 if of.enabled else 0.2)

    monkeypatch.setattr(overhead_parts, "Nvml", sampler)
    bench = bench_of(tmp_path)
    bench.lines.add("step", {"side": "with"}, "s", {"median": 0.1})
    overhead_parts.measure_telemetry(bench, Asleep())  # pyright: ignore[reportArgumentType]
    assert phases == {("with", 2, True), ("with", 2, False)}
    assert entered.count(True) == entered.count(False) == 7  # six rounds after the first
    lines = measure.read_lines(tmp_path / "o.jsonl")
    on, off, gap = (rows(lines, "telemetry", side=s)[0] for s in ("on", "off", "difference"))
    times = [on["median"], off["median"], gap["median"]]
    assert times == pytest.approx([0.1015, 0.1, 0.0015])  # a step, of a group of two
    assert gap["more"] == pytest.approx(
        {"median_percent": 1.5, "low_percent": 1.5, "high_percent": 1.5}
    )


def test_caches_are_emptied_before_the_clock_starts(brief, tmp_path):
    bench = bench_of(tmp_path)
    order = []

    def timer(call, device):
        order.append(int(bench._sweep[-1]))
        call()
        return 0.0

    timed = bench.cold(timer)
    for _ in range(2):
        timed(lambda: order.append("call"), CPU)
    assert order == [1, "call", 2, "call"]
    assert list(bench.clocks) == ["wall"]


def test_host_time_ends_when_the_call_returns():
    assert 0.02 <= overhead_parts.host_time(lambda: time.sleep(0.02), CPU) < 2


def test_options_refuse_what_the_command_line_would():
    with pytest.raises(UserError, match="ratio must be"):
        Options(ratio=2.0)


@pytest.mark.gpu
def test_on_a_gpu_both_clocks_have_rows_and_no_step_waits(brief, no_peer, tmp_path):
    arguments = ["--device", "cuda", "--model", "small", "--sizes", "600", "--batch-size", "20"]
    assert overhead.main([*arguments, "--quick", "--out", str(tmp_path / "out")]) == 0
    lines = measure.read_lines(tmp_path / "out" / "overhead.jsonl")
    clocks = [r["case"]["clock"] for r in rows(lines, "update", side="device")]
    assert clocks == ["wall", "device"]
    syncs = {
        (r["case"]["what"], r["case"]["side"]): r["more"].get("host_syncs")
        for r in rows(lines, "host")
    }
    assert syncs["choose", "device"] == 1
    assert syncs["update", "device"] == syncs["step", "with"] == syncs["step", "without"] == 0
    assert syncs["update", "numpy"] >= 2
    assert json.dumps(lines)
