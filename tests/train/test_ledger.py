"""What a run spends on what, and what is kept of each sample, against counts of our own."""

import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import lines_of, resume, run, summary_of

from infobatch_fast import InfoBatch
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.kernels import reference
from infobatch_fast.plan import Plan
from infobatch_fast.train import folder as record
from infobatch_fast.train import ledger, loop
from infobatch_fast.train.config import Config
from infobatch_fast.train.distributed import Ranks
from infobatch_fast.train.ledger import PICTURED, TRACKED, Diverged, Ledger, SampleRecord
from infobatch_fast.train.step import Counts

STEP = loop.TrainStep
CPU = torch.device("cpu")


class FakeMeter:
    """A card that takes 100 W by the tests' clock."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> "FakeMeter":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def joules(self) -> float | None:
        return 100 * time.perf_counter() if self.enabled else None

    def read(self) -> dict:
        return {"samples": 3, "missed": {}, "absent": {} if self.enabled else {"all": "off"}}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that moves only where we say, and a card that takes power by it.

    A step takes 1 s, of it 0.25 s of update twice; choosing 5 s; waiting for a batch 0.125 s;
    evaluating 100 s, its one batch included; a checkpoint 1000 s, and so the weights; adding an
    epoch's line 10,000 s, and so writing them anew.
    """
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds: float, owner, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    takes(0.5, STEP, "__call__")
    takes(0.25, reference, "rescaled_mean")
    takes(0.25, InfoBatch, "record")
    takes(5, InfoBatch, "sample")
    takes(0.125, Plan, "batch")
    takes(100 - 0.125, loop, "evaluate")
    takes(1000, record, "save")
    takes(10_000, ledger.records, "write_epochs")
    monkeypatch.setattr(loop, "Nvml", FakeMeter)
    return now


def test_seconds_and_joules_are_told_apart_and_counted_once(tmp_path, clock, capsys) -> None:
    words = ("--epochs", 2, "--delta", 0, "--checkpoint-every", 4, "--out", tmp_path)
    assert run(*words) == 0
    summary = summary_of(tmp_path)
    # 6 steps an epoch; checkpoints after step 4 of both epochs, and at the end.
    phases = {
        **{"choose": 2 * 5, "wait": 12 * 0.125, "step": 12 * 0.5, "update": 12 * 0.5},
        **{
            "merge": 0,
            "startup": 0,
            "evaluation": 2 * 100,
            "checkpoint": 3 * 1000,
            "other": 21_000,
        },
    }
    assert summary["phases"] == pytest.approx(phases)
    assert list(summary["phases"]) == list(phases)
    of = {
        **{"train_seconds": 12 * 0.625, "pruning_seconds": 12 * 0.5 + 2 * 5},
        **{"evaluation_seconds": 200, "checkpoint_seconds": 3000, "startup_seconds": 0},
        **{"seconds": sum(phases.values()), "epoch_seconds": 6 * 1.125 + 5},
        **{"images_per_second": 240 / (12 * 1.125 + 10), "joules": 100 * sum(phases.values())},
        **{"train_joules": 100 * (12 * 1.125 + 10), "joules_saved": 0},
        **{"joules_per_image": 100 * (12 * 1.125 + 10) / 240},
    }
    assert {name: summary[name] for name in of} == pytest.approx(of)
    assert clock[0] == pytest.approx(summary["seconds"])
    assert summary["nvml"] == {"since_epoch": 1, "samples": 3, "missed": {}, "absent": {}}
    first, second = lines_of(tmp_path)
    assert first["images_per_second"] == pytest.approx(120 / (6 * 1.125 + 5))
    assert first["seconds"] == pytest.approx(6 * 1.125 + 5 + 100 + 1000)
    # What came after the line was closed is of the next: its writing.
    assert second["seconds"] == pytest.approx(first["seconds"] + 10_000)
    assert second["train_joules"] == pytest.approx(100 * (6 * 1.125 + 5))
    assert "J an image trained on, and by that about 0 J saved" in capsys.readouterr().out


class Captured:
    """A step that is captured as on a GPU: between epochs, once its size has come three times."""

    captured = property(lambda self: self.replays)

    def __init__(self, step, say) -> None:
        self.step, self.replays = step, False

    pending = property(lambda self: not self.replays and any(self.step.seen.values()))

    def capture(self) -> None:
        time_passes(2000)
        self.replays = True

    def __call__(self, *args) -> None:
        new = self.step.is_new(args[0].shape)
        self.step(*args)
        if new:
            time_passes(30)


def time_passes(seconds: float) -> None:
    Captured.clock[0] += seconds  # type: ignore[attr-defined]


def test_start_up_is_no_training(tmp_path, clock, monkeypatch, capsys) -> None:
    Captured.clock = clock  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "obstacle", lambda step: None)
    monkeypatch.setattr(loop, "GraphStep", Captured)
    monkeypatch.setattr(STEP, "is_new", lambda self, shape: self.seen[shape] < 3)
    monkeypatch.setattr("infobatch_fast.train.config.settle", lambda settings, *_: settings)
    words = ("--graph", "--whole-batches", "--epochs", 4, "--delta", 0, "--batch-size", 32)
    assert run(*words, "--device", "cpu", "--out", tmp_path) == 0
    lines, summary = lines_of(tmp_path), summary_of(tmp_path)
    # Of 32, 32, 32 and 24 samples the three first of 32, and those of 24 of three epochs.
    assert [line["startup_images"] for line in lines] == [96 + 24, 24, 24, 0]
    startup = [2000 + 4 * 31, 31, 31, 0]
    assert [line["startup_seconds"] for line in lines] == pytest.approx(startup)
    assert lines[0]["images_per_second"] is None or lines[0]["images_per_second"] < 1
    timed = [5 + 4 * 0.125 + steps for steps in (0, 3, 3, 4)]
    spent = [line["train_seconds"] + line["pruning_seconds"] for line in lines]
    assert spent == pytest.approx(timed)
    images = [0, 96, 96, 120]
    speeds = [n / t if n else None for n, t in zip(images, timed, strict=True)]
    assert [line["images_per_second"] for line in lines] == [
        None if speed is None else pytest.approx(speed) for speed in speeds
    ]
    assert summary["startup_seconds"] == pytest.approx(sum(startup))
    assert summary["phases"]["startup"] == pytest.approx(sum(startup))
    assert summary["images_per_second"] == pytest.approx(sum(images) / sum(timed))
    assert summary["epoch_seconds"] == pytest.approx(timed[3])
    assert summary["train_joules"] == pytest.approx(100 * sum(timed))
    assert summary["joules_per_image"] == pytest.approx(100 * sum(timed) / sum(images))
    assert (summary["captured"], summary["update_timed"]) == (True, False)
    assert f"start-up {sum(startup):.1f} s" in capsys.readouterr().out


def test_what_ran_is_recorded_not_what_was_asked(tmp_path, monkeypatch, capsys) -> None:
    from torch._dynamo.exc import Unsupported

    def broken(model, **kwargs):
        def forward(images):
            raise Unsupported("no compiler here")

        forward.train = model.train  # type: ignore[attr-defined]
        return forward

    words = ("--compile", "--epochs", 1, "--batch-size", 60, "--out")
    monkeypatch.setattr(torch, "compile", broken)
    assert run(*words, tmp_path / "broken") == 0
    assert "WARNING: the network is not compiled" in capsys.readouterr().out
    assert summary_of(tmp_path / "broken")["compiled"] is False
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: torch.nn.Sequential(model))
    assert run(*words, tmp_path / "compiled") == 0
    summary, (line,) = summary_of(tmp_path / "compiled"), lines_of(tmp_path / "compiled")
    assert summary["compiled"] is True
    assert line["startup_images"] == 60  # the first step of the one size
    assert line["startup_seconds"] > 0


def stop_at(monkeypatch, count: int) -> None:
    calls, step = [], STEP.__call__

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(STEP, "__call__", stop)


def test_what_was_spent_before_an_interruption_is_not_lost(tmp_path, clock, monkeypatch) -> None:
    stop_at(monkeypatch, 4)
    assert run("--epochs", 1, "--host-syncs", "count", "--out", tmp_path) == 130
    clock[0] += 777  # of these the run knows nothing
    assert resume(tmp_path) == 0
    (line,) = lines_of(tmp_path)
    # All but the first checkpoint, which does not hold its own time, what was restored, and what
    # came after the line.
    everything = clock[0] - 777 - 1000 - 10_000 - 10_000 - 2 * 1000
    assert line["seconds"] == pytest.approx(everything)
    assert line["phases"]["step"] == pytest.approx(6 * 0.5)
    assert line["joules"] == pytest.approx(100 * everything)
    summary = summary_of(tmp_path)
    assert line["host_syncs"] is summary["host_syncs"] is None  # of the first part not known
    assert summary["nvml"]["since_epoch"] == 1


def test_telemetry_off_and_an_epoch_half_of_which_was_not_measured(
    tmp_path, clock, monkeypatch, capsys
) -> None:
    stop_at(monkeypatch, 10)
    words = ("--epochs", 3, "--delta", 0, "--no-telemetry", "--out", tmp_path)
    assert run(*words) == 130
    assert "pruning 0" not in capsys.readouterr().out
    first = lines_of(tmp_path)[0]
    assert first["score_histogram"] is None
    assert first["train_seconds"] == pytest.approx(6 * 1.125 + 5)
    assert first["images_per_second"] == pytest.approx(120 / (6 * 1.125 + 5))
    assert resume(tmp_path, "--telemetry") == 0
    lines, summary = lines_of(tmp_path), summary_of(tmp_path)
    for name in ("phases", "joules", "train_joules", "pruning_seconds"):
        assert [line[name] is None for line in lines] == [True, True, False]
        assert summary[name] is None
    assert "energy     not measured: " in capsys.readouterr().out
    assert lines[2]["phases"]["step"] == pytest.approx(6 * 0.5)
    assert summary["nvml"]["since_epoch"] == 2


@pytest.mark.parametrize(
    ("counts", "steps", "bad"),
    [
        (Counts(1.0, 19, 19), None, False),
        (Counts(1.0, 20, 20), None, True),
        (Counts(1.0, 5, 5), 10, False),
        (Counts(1.0, 6, 3), 10, True),
        (Counts(math.inf, 0, 0), 10, True),
        (Counts(math.nan, 1, 1), None, False),
    ],
)
def test_when_a_run_has_diverged(tmp_path, counts: Counts, steps: int | None, bad: bool) -> None:
    step = SimpleNamespace(infobatch=InfoBatch(3, 1, device="cpu"), ranks=Ranks())
    meter = FakeMeter(CPU, enabled=False)
    book = Ledger(Config(), step, tmp_path, meter)  # type: ignore[arg-type]
    if not bad:
        return book.check(counts, steps)
    with pytest.raises(Diverged, match=r"in epoch 1: lower --max-lr \(now 5.2\)"):
        book.check(counts, steps)


def plan_of(indices: list[int], n: int) -> Plan:
    return Plan(0, n, 0, torch.tensor(indices), torch.ones(len(indices)))


@pytest.mark.parametrize("n", [1, 3, 95, 96, 97, 1024, 2047])
def test_arrays_of_a_run(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(n)
    samples, again = SampleRecord(n, CPU), SampleRecord(n, CPU)
    kept, scores = np.zeros(n, int), np.full((5, n), np.nan, np.float32)
    for epoch in range(5):
        order = rng.permutation(n)[: rng.integers(1, n + 1)].tolist()
        scores[epoch] = np.where(rng.random(n) < 0.9, rng.random(n), np.nan)
        kept[order] += 1
        samples.close_epoch(plan_of(order, n), torch.from_numpy(scores[epoch]).clone())
        if epoch == 2:  # goes on where it was saved
            record.save(tmp_path / "state", samples.state_dict())
            again.load_state_dict(record.load_tensors(tmp_path / "state"))
            samples, again = again, samples
    (tmp_path / "state").unlink()
    data = make_synthetic(n, 2, 2, seed=1)
    samples.write(tmp_path, data, torch.from_numpy(scores[-1]))
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in tmp_path.iterdir()}
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        **{"kept": "int32", "scores": "float32", "labels": "int32", "tracked": "int64"},
        **{"score_history": "float32", "pictured": "int64", "pictures": "uint8"},
    }
    m, half, pictured = min(n, TRACKED), min(PICTURED, n) // 2, arrays["pictured"]
    assert arrays["tracked"].tolist() == [i * n // m for i in range(m)]
    np.testing.assert_array_equal(arrays["kept"], kept)
    np.testing.assert_array_equal(arrays["scores"], scores[-1])
    np.testing.assert_array_equal(arrays["labels"], data.labels.numpy())
    np.testing.assert_array_equal(arrays["score_history"], scores[:, arrays["tracked"]])
    assert len(set(pictured.tolist())) == len(pictured) == 2 * half
    np.testing.assert_array_equal(kept[pictured[:half]], np.sort(kept)[:half])
    np.testing.assert_array_equal(kept[pictured[half:]], np.sort(kept)[::-1][:half])
    np.testing.assert_array_equal(arrays["pictures"], data.images.numpy()[pictured])
