"""The kernels' benchmark: bytes and shares by hand, checks that refuse, what a CPU counts."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import harness as measure
import kernels_bench
import kernels_host
import kernels_timing
import pytest
import torch
from harness import Lines
from kernels_cases import make_cases
from kernels_checks import (
    Mismatch,
    agree,
    check_epoch,
    check_partition,
    check_permutation,
    lamb_loop,
    lars_loop,
)
from kernels_counts import counting, total
from kernels_report import draw, tables
from kernels_step import make_layerwise
from kernels_timing import Bench, Timed, measure_case, moved_figures, proven
from kernels_work import COPIED_BYTES, Case, Work, bytes_moved, compiled, copies_of
from torch import Tensor
from tqdm import tqdm

from infobatch_fast.train.cli import Interrupted

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
BATCHES = ((20, 10), (24, 100))
OPTIONS = {"seed": 0, "load_average": 0.0, "cores": 2}
BENCH = Path(kernels_bench.__file__).parent


def small_params() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    weight = torch.empty(16, 8, 3, 3).normal_(0, 0.1, generator=random)
    # A tensor of zeros, and one whose trust ratio is cut.
    rest = [torch.zeros(5), torch.full((3, 7), 1e3), torch.ones(11)]
    return [weight.to(memory_format=torch.channels_last), *rest]


def refuse() -> Any:
    raise RuntimeError("no kernels here")


def cases(kernels=refuse, sizes=(5000,)) -> list[Case]:
    return make_cases(sizes, BATCHES, cache(small_params), kernels, CPU, 0)


def make_bench(folder: Path) -> Bench:
    bar = tqdm(disable=True)
    lines = Lines(folder / "kernels_bench.jsonl", "kernels", CPU, OPTIONS, quick=True)
    return Bench(CPU, lines, lambda line: None, bar, True, 0)


def rows(lines, table, **case):
    return [r for r in lines if r["part"] == table and case.items() <= r["case"].items()]


# --- bytes and shares -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "sizes", "by_hand"),
    [
        ("threshold", {"n_all": 1000}, 4_000),
        ("partition", {"n_all": 1000}, 12_000),  # scores twice, positions once
        ("partition", {"n_all": 2**31}, 16 * 2**31),  # positions of 8 bytes
        ("choose", {"n_all": 1000, "kept": 600}, 9_600),  # 4 in, 8 and 4 out
        ("choose", {"n_all": 2**31, "kept": 600}, 12_000),
        ("shuffle", {"n_all": 1000}, 8_000),
        ("choosing", {"n_all": 1000, "kept": 600}, 4_000 + 12_000 + 9_600),
        ("sample", {"n_all": 2**31, "kept": 600}, 4 * 2**31 + 16 * 2**31 + 12_000),
        ("update", {"batch": 200}, 6_400),
        ("record", {"batch": 200}, 3_200),
        ("cross_entropy", {"batch": 200, "classes": 10}, 2 * 2 * 2000 + 200 * (8 + 4 + 4)),
        ("lars", {"params": 23_520_842}, 658_583_576),
        ("lamb", {"params": 100}, 4_400),
        ("launch", {}, 0),
    ],
)
def test_bytes_by_hand(kernel, sizes, by_hand):
    assert bytes_moved(kernel, **sizes) == by_hand


def test_bytes_of_no_kernel():
    with pytest.raises(ValueError, match="kernel must be one of those above, got sort"):
        bytes_moved("sort")


def test_copies():
    assert copies_of(0) == copies_of(1) == copies_of(2**24) == 64
    assert copies_of(2**27) == 8
    assert copies_of(2**30) == copies_of(2**40) == 1


def test_shares_by_hand():
    # 8 MB in 2 us are 4,000 GB/s, 80% of a copy's 5,000.
    assert moved_figures(2e-6, 8_000_000, 5e12) == pytest.approx(
        {"moved_bytes": 8_000_000, "moved_GB/s": 4000.0, "copy_limit_percent": 80.0}
    )
    assert moved_figures(2e-6, 0, 5e12) == {}


# --- checks ---------------------------------------------------------------------------------------


def epoch() -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Indices, weights, prunable, n, k of an epoch that is as it must be."""
    random = torch.Generator().manual_seed(1)
    prunable = torch.rand(4000, generator=random) < 0.7
    n = int(prunable.sum())
    k = n // 2
    first = prunable.nonzero().view(-1)
    kept = torch.cat(
        [(~prunable).nonzero().view(-1), first[torch.randperm(n, generator=random)[:k]]]
    )
    indices = kept[torch.randperm(len(kept), generator=random)]
    return indices, torch.where(prunable[indices], n / k, 1.0), prunable, n, k


def test_check_epoch():
    indices, weights, prunable, n, k = epoch()
    check_epoch((indices, weights), prunable, n, k)

    def refused(match, indices=indices, weights=weights):
        with pytest.raises(Mismatch, match=match):
            check_epoch((indices, weights), prunable, n, k)

    refused("samples and not", indices[1:], weights[1:])
    twice = indices.clone()
    twice[0] = twice[1]
    refused("twice", twice)
    other = indices.clone()
    out = (prunable & ~torch.zeros_like(prunable).index_fill(0, indices, True)).nonzero()[0]
    other[(~prunable[indices]).nonzero()[0]] = out  # one of the others left out for it
    refused("prunable", other)
    refused("weight", weights=torch.where(weights == 1, weights, 1 / 0.5 + 0.01))
    refused("weight", weights=weights.roll(1))
    order = indices.argsort()
    refused("indices: not shuffled", indices[order], weights[order])
    parted = weights.argsort(stable=True)
    refused("not shuffled", indices[parted], weights[parted])


def test_check_partition():
    prunable = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.6
    n = int(prunable.sum())
    good = torch.cat([prunable.nonzero(), (~prunable).nonzero()]).view(-1)
    check_partition((good, torch.tensor(n)), prunable, n)
    swapped = good.clone()
    swapped[[0, -1]] = good[[-1, 0]]
    back = good.clone()
    back[[0, 1]] = good[[1, 0]]
    for positions, count, match in (
        (good, n + 1, "counts"),
        (good[1:], n, "counts"),
        (swapped, n, "wrong part"),
        (back, n, "ascend"),
    ):
        with pytest.raises(Mismatch, match=match):
            check_partition((positions, torch.tensor(count)), prunable, n)


def test_check_permutation():
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    check_permutation(500, (order,))
    twice = order.clone()
    twice[3] = twice[4]
    for wrong, match in ((twice, "no permutation"), (order.sort().values, "not shuffled")):
        with pytest.raises(Mismatch, match=match):
            check_permutation(500, (wrong,))


def test_agree():
    want = torch.tensor([1.0, torch.nan, 100.0])
    agree("x", torch.tensor([1.0009, torch.nan, 100.0]), want, 1e-3)
    for wrong in ([1.01, torch.nan, 100.0], [1.0, 0.0, 100.0], [1.0, torch.nan]):
        with pytest.raises(Mismatch, match="x: "):
            agree("x", torch.tensor(wrong), want, 1e-3)
    with pytest.raises(Mismatch):
        agree("x", want.nextafter(torch.zeros(3)), want, 0.0)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_loops_are_the_optimizers(name):
    """Whatever a loop over tensors is timed and checked as, it is LARS and LAMB."""
    weights = [torch.nn.Parameter(p.clone()) for p in small_params()]
    optimizer = make_layerwise(name, weights, fused=False)
    mine = [w.detach().clone() for w in weights]
    state = [[torch.zeros_like(w) for w in mine] for _ in range(2)]
    count = torch.zeros(())
    group = optimizer.param_groups[0]
    for number in range(3):
        grads = [torch.full_like(w, 0.3 - number).sin_() * 30 for w in mine]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        optimizer.step()
        if name == "lars":
            lars_loop(mine, grads, state[0], group["lr"], group["momentum"])
        else:
            beta1 = group["betas"][0]
            lamb_loop(mine, grads, state[0], state[1], count, group["lr"], beta1)
        for got, want in zip(mine, weights, strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)


# --- cases ----------------------------------------------------------------------------------------


def test_torchs_sides_do_what_they_must():
    kinds = set()
    for case in cases():
        work = case.build()
        assert work.moved > 0
        for side in set(case.sides) - {"ours", "compiled"}:
            work.check(work.sides[side]()(0))
            kinds.add((case.kernel, side))
            if work.copies > 1:  # the last repetition has buffers of its own
                work.sides[side]()(work.copies - 1)
        if case.kernel == "shuffle":
            assert work.moved == 40_000
            assert work.copies == 64
        if case.kernel == "choose":
            kept = work.more["kept_samples"]
            assert work.more["moved_sectors_bytes"] - work.moved == 28 * kept
            assert 2500 < kept < 4000
        if case.kernel == "lars":
            assert work.more == {"parameter_tensors": 4, "parameter_elements": 1189}
    assert len(kinds) == 6 + 2 + 1 + 4


def test_wrong_results_are_refused():
    """A side that is a little off in any output is none that is timed."""
    for case in cases():
        work = case.build()
        outputs = list(work.sides["torch"]()(0))
        for number, output in enumerate(outputs):
            wrong = output.clone().detach()
            flat = wrong.view(-1) if wrong.is_contiguous() else wrong.flatten()
            if wrong.is_floating_point():
                flat[flat.isfinite().nonzero()[0]] += 0.1 + flat.nan_to_num(0).abs().max()
            else:
                flat[0] = flat[-1] if flat.numel() > 1 else flat[0] + 1
            changed = [*outputs[:number], flat.view_as(wrong), *outputs[number + 1 :]]
            with pytest.raises(Mismatch):
                work.check(tuple(changed))


def test_the_kernels_do_what_they_must():
    """All of ours, by Triton's interpreter in a process of its own."""
    pytest.importorskip("triton")
    code = (
        "from kernels_cases import launch_case\n"
        "from test_kernels_bench import *\n"
        "for case in cases(proven(CPU)):\n"
        "    work = case.build()\n"
        "    work.check(work.sides['ours']()(0))\n"
        "    print(case.kernel)\n"
        "launch_case(CPU).build().sides['ours']()(0)\n"
    )
    path = os.pathsep.join([str(BENCH), str(Path(__file__).parent)])
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.split()) == len(cases())


def test_unproven_kernels_give_their_reason(monkeypatch):
    monkeypatch.setattr(kernels_timing.select, "load", refuse)
    with pytest.raises(RuntimeError, match="the kernels are not used: no kernels here"):
        proven(CPU)()


def test_a_break_is_not_compiled():
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(Exception, match="graph_break"):
        compiled(broken)(torch.ones(2))


# --- timing ---------------------------------------------------------------------------------------


def work_of(sides: dict[str, Any], moved: int, copies: int = 1, **more: int) -> Work:
    def check(outputs: Any) -> None:
        if outputs != (1,):
            raise Mismatch("not one")

    return Work({name: (lambda call=call: call) for name, call in sides.items()}, check, moved,
                copies, more)  # fmt: skip


def test_rows(tmp_path, monkeypatch):
    failing = iter([(1,)])

    def out_of_memory(i: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def worn(i: int) -> Any:
        try:
            return next(failing)
        except StopIteration:
            raise RuntimeError("worn\nout") from None

    sides: dict[str, Any] = {
        "ours": lambda i: (1,),
        "torch": lambda i: (2,),
        "compiled": out_of_memory,
        "loop": worn,
    }

    def interleave(timed, device, **rest):
        for side in timed.values():
            side()
        return {name: [1e-6, 2e-6, 4e-6] for name in timed}

    monkeypatch.setattr(measure, "interleave", interleave)
    bench = make_bench(tmp_path)
    work = work_of(sides, 8_000_000, moved_sectors_bytes=9_000_000)
    case = Case("choose", {"samples": 7}, ("ours", "torch", "compiled", "loop"), lambda: work)
    measure_case(bench, case, 5e12)
    assert [row["case"] for row in bench.lines.lines] == [
        {"kernel": "choose", "samples": 7, "side": side} for side in case.sides
    ]
    ours, *others = bench.lines.lines
    assert (ours["median"], ours["unit"], ours["count"]) == (2e-6, "s", 3)
    assert (ours["p20"], ours["p80"]) == pytest.approx((1.4e-6, 3.2e-6))
    assert ours["more"] == pytest.approx(
        {
            "moved_bytes": 8_000_000,
            "moved_GB/s": 4000.0,
            "copy_limit_percent": 80.0,
            "sectors_copy_limit_percent": 90.0,
            "moved_sectors_bytes": 9_000_000,
            "graph_repetitions": 1,
            "clock": "wall",
        }
    )
    assert [row["absent"] for row in others] == [
        "Mismatch: not one",
        "out of memory",
        "RuntimeError: worn out",
    ]


def test_buffers_that_do_not_fit(tmp_path):
    def build() -> Work:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench = make_bench(tmp_path)
    measure_case(bench, Case("choose", {"samples": 7}, ("ours", "torch"), build), 1.0)
    assert [row["absent"] for row in bench.lines.lines] == ["out of memory"] * 2


def test_graph_or_backlog(monkeypatch):
    """Up to 1 GiB all repetitions are one graph, warmed up first; else one call of them in turn."""
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    captured: list[int] = []
    called: list[int] = []

    def call(i: int) -> Any:
        called.append(i)
        return (1,)

    def capture(calls):
        captured.append(len(calls))
        return lambda: None

    def ready(moved, clock="device", device=CUDA):
        captured.clear()
        called.clear()
        work = work_of({"ours": call}, moved, 3)
        case = Case("choose", {}, ("ours",), lambda: work, clock)
        return kernels_timing._ready(case, work, work.sides["ours"], device)

    monkeypatch.setattr(kernels_timing, "_captured", capture)
    timed = ready(COPIED_BYTES)
    assert (timed.clock, timed.repetitions, captured) == ("graph", 3, [3])
    assert called == [0, 0, 1, 2]
    for moved, clock, device, name in (
        (COPIED_BYTES + 1, "device", CUDA, "backlog"),
        (8, "wall", CUDA, "wall"),
        (8, "device", CPU, "wall"),
    ):
        timed = ready(moved, clock, device)
        assert (timed.clock, timed.repetitions, captured) == (name, 1, [])
        for _ in range(4):
            timed()
        assert called == [0, 0, 1, 2, 0]

    def refuse_capture(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(kernels_timing, "_captured", refuse_capture)
    timed = ready(8)
    assert (timed.clock, timed.repetitions, timed.failure) == ("backlog", 1, None)


def test_a_repetitions_time(tmp_path, monkeypatch):
    """The sweep comes before the clock, and a graph's time is shared by its repetitions."""
    order: list[str] = []

    def clock(name, seconds):
        def timer(call, device):
            order.append(name)
            return seconds

        return timer

    monkeypatch.setattr(kernels_timing, "_sweep", lambda device: lambda: order.append("sweep"))
    monkeypatch.setattr(measure, "on_device", clock("device", 64e-6))
    monkeypatch.setattr(measure, "wall", clock("wall", 5e-6))
    timed = {"a": Timed(lambda: None, 64, "graph"), "b": Timed(lambda: None, 1, "wall")}
    took = kernels_timing._time(make_bench(tmp_path), timed, lambda share: None)
    assert set(took["a"]) == {1e-6}
    assert set(took["b"]) == {5e-6}
    assert len(took["a"]) >= 10
    assert set(order[::2]) == {"sweep"}
    assert set(order[1::2]) == {"device", "wall"}


# --- counts ---------------------------------------------------------------------------------------


def test_counting():
    x = torch.ones(4, requires_grad=True)
    with counting() as counter:
        y = counter.wrap("product", lambda: (x.view(2, 2) * 3).sum())()
        y.backward()
        counter.part = "lists"
        torch._foreach_add_([torch.empty(3), torch.empty(2)], 1.0)
    assert counter.parts["product"] == {
        "operations": 2, "foreach": 0, "host_only": 1, "launches": 0
    }  # fmt: skip
    assert counter.parts["rest"]["operations"] >= 2  # ones_like, and the product's backward
    assert counter.parts["lists"] == {
        "operations": 1, "foreach": 1, "host_only": 2, "launches": 0
    }  # fmt: skip
    assert total(counter.parts)["foreach"] == 1


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[int, str, Path]:
    folder = tmp_path_factory.mktemp("kernels") / "out"
    said = io.StringIO()
    words = "--device cpu --quick --sizes 3000 2000 3000 --out".split()
    with contextlib.redirect_stdout(said):
        code = kernels_bench.main([*words, str(folder)])
    return code, said.getvalue(), folder


@pytest.mark.slow
def test_a_run(quick):
    code, said, folder = quick
    assert code == 0
    lines = measure.read_lines(folder / "kernels_bench.jsonl")
    assert (folder / "kernels_bench.png").read_bytes().startswith(b"\x89PNG")
    assert {line["benchmark"] for line in lines} == {"kernels"}
    assert all(line["complete"] for line in lines)
    options = lines[0]["options"]
    assert options["sizes"] == [2000, 3000]
    assert options.keys() == {"sizes", "quick", "device", "seed", "load_average", "cores"}
    choosing = rows(lines, "choosing")
    assert [tuple(row["case"].values()) for row in choosing] == [
        (n, side) for n in (2000, 3000) for side in ("ours", "numpy", "ours / numpy")
    ]
    for ours, numpy, ratio in (choosing[:3], choosing[3:]):
        assert ours["absent"] is numpy["absent"] is None
        assert ours["count"] == numpy["count"] == ratio["count"] >= 3
        assert 0.2 < ratio["median"] / (ours["median"] / numpy["median"]) < 5
    assert "device" in said.splitlines()[0]
    assert said.splitlines()[-2].startswith("All figures are of ")


@pytest.mark.slow
def test_counts_of_a_run(quick):
    pytest.importorskip("triton")
    lines = measure.read_lines(quick[2] / "kernels_bench.jsonl")

    def launched(what: str, side: str = "ours") -> tuple[int, int]:
        (row,) = rows(lines, "launches", what=what, side=side)
        more = row["more"]
        assert row["median"] == more["triton_launches"] + more["torch_operations"]
        return more["triton_launches"], more["torch_operations"]

    # As the modules of kernels/ say of themselves.
    assert launched("threshold") == launched("partition") == (2, 0)
    assert launched("choose") == launched("shuffle") == launched("record") == (1, 0)
    assert launched("update") == (1, 1)
    assert launched("cross_entropy, B = 200, C = 10") == (1, 0)
    assert launched("cross_entropy, B = 1024, C = 100") == (2, 0)
    # And the mark of a gradient that is not finite, set to 0.
    assert launched("lars, ResNet-50") == (3, 1)
    assert launched("lamb, ResNet-50") == (5, 1)
    assert launched("shuffle", "torch") == (0, 1)
    assert launched("lars, ResNet-50", "loop") == (0, 19 * 161)  # operations of `lars_loop`
    assert 20 < launched("lars, ResNet-50", "torch")[1] < 40

    for model in ("small", "r50"):
        for side in ("ours", "torch"):
            found = rows(lines, "step", model=model, side=side)
            by = {row["case"]["part"]: row["median"] for row in found}
            parts = {p: n for p, n in by.items() if not p.startswith("all")}
            assert by["all"] == sum(parts.values())
            assert by["record"] == {"ours": 1, "torch": 5}[side]
            assert by["all without InfoBatch"] < by["all"]
    ours, torchs = (
        rows(lines, "step", model="r50", part="forward", side=s) for s in ("ours", "torch")
    )
    assert ours[0]["median"] == torchs[0]["median"] > 53 * 2  # convolutions and norms


def test_no_triton(tmp_path, monkeypatch):
    """Its rows are absent with the reason; the others are there."""
    monkeypatch.setattr(kernels_host, "count_all", lambda side: {
        "kernels": {"record": {"operations": 5, "foreach": 0, "host_only": 1, "launches": 0}},
        "steps": {}, "without": {},
    })  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('No module named triton')")
    bench = make_bench(tmp_path / "out")
    kernels_host.record_counts(bench)
    (absent,) = rows(bench.lines.lines, "launches", side="ours")
    assert absent["absent"] == "RuntimeError: ModuleNotFoundError: No module named triton"
    (torchs,) = rows(bench.lines.lines, "launches", side="torch", what="record")
    assert torchs["median"] == 5


def test_a_size_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_host, "MOST_SECONDS", 1e-9)
    bench = make_bench(tmp_path)
    kernels_host.measure_choosing(bench, (1000, 2000), asked=False)
    first, second = (rows(bench.lines.lines, "choosing", samples=n) for n in (1000, 2000))
    assert [row["absent"] for row in first] == [None] * 3
    assert "--sizes 2000 asks" in second[0]["absent"]
    assert second[2]["absent"] == "a side of it is absent"
    kernels_host.measure_choosing(bench, (1000, 2000), asked=True)
    assert all(row["absent"] is None for row in bench.lines.lines[6:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sizes 999", "sizes must be in [1000, 2**31], got 999"),
        ("--sizes 1000 2147483649", "sizes must be in [1000, 2**31], got 2147483649"),
        ("--device gpu", "device must be one of auto, cuda, cpu, got gpu (did you mean cuda?)"),
        ("--seed -1", "seed must be in [0, 2**63), got -1"),
        ("--out OUT", "out must be"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words = [str(tmp_path / "full") if word == "OUT" else word for word in words.split()]
    assert kernels_bench.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]


def test_ctrl_c_keeps_the_rows(tmp_path, monkeypatch, capsys):
    def record_counts(bench):
        row = {"what": "x", "side": "ours"}
        bench.lines.add("launches", row, "launches at least", {"median": 1}, {})
        raise Interrupted(signal.SIGINT, "stopped")

    monkeypatch.setattr(kernels_bench, "record_counts", record_counts)
    folder = tmp_path / "out"
    assert kernels_bench.main(["--device", "cpu", "--out", str(folder)]) == 130
    assert "stopped; 1 rows are kept in" in capsys.readouterr().err
    (line,) = measure.read_lines(folder / "kernels_bench.jsonl")
    assert line["complete"] is False
    assert (folder / "kernels_bench.png").exists()  # of what there is


# --- tables and plot ------------------------------------------------------------------------------


def gpu_lines(folder: Path) -> list[dict[str, Any]]:
    """Rows as a GPU gives them, made up."""
    lines = make_bench(folder).lines
    lines.add("limits", {"limit": "copy"}, "B/s", measure.spread([4.3e12]))
    pace = {"ours": 1.2, "torch": 8.0, "compiled": 3.0, "loop": 60.0}
    every = [
        *((k, {"samples": n}) for k in kernels_bench_kernels() for n in kernels_bench.GPU_SIZES),
        *((k, {"batch_size": b}) for k in ("update", "record") for b in (200, 1024)),
        *(("cross_entropy", {"batch_size": b, "classes": c}) for b, c in kernels_bench.BATCHES),
        *(("lars", {}), ("lamb", {}), ("launch", {})),
    ]
    for kernel, size in every:
        n, b = size.get("samples", 0), size.get("batch_size", 0)
        moved = bytes_moved(
            kernel, n_all=n, kept=n * 2 // 3, batch=b, classes=size.get("classes", 0),
            params=23_520_842,
        )  # fmt: skip
        sides = ("ours", "torch", "compiled", *(("loop",) if kernel in ("lars", "lamb") else ()))
        for side in sides:
            row = {"kernel": kernel, **size, "side": side}
            if side != "ours" and n == 10**9:
                lines.add_absent("kernels", row, "out of memory")
                continue
            took = pace[side] * (moved / 4.3e12 + 2e-6)
            spread = {"median": took, "p20": 0.95 * took, "p80": 1.1 * took, "count": 50}
            more = {"clock": "graph", **moved_figures(took, moved, 4.3e12)}
            lines.add("kernels", row, "s", spread, more)
    return lines.lines


def kernels_bench_kernels() -> tuple[str, ...]:
    return ("threshold", "partition", "choose", "shuffle", "choosing", "sample")


def test_tables_and_plot_of_a_gpu(tmp_path):
    lines = gpu_lines(tmp_path)
    text = "\n".join(tables(lines))
    found = next(
        line for line in text.splitlines() if line.startswith("| threshold, N = 1,280,000")
    )
    # 5.12 MB: 1.2 * (1.19 us + 2 us)
    assert [cell.strip() for cell in found.strip("|").split("|")][1:] == [
        "ours", "graph", "3.83 us", "3.64 us to 4.21 us", "5.12", "1,337", "31.1%"
    ]  # fmt: skip
    assert "threshold, N = 1,000,000,000, torch" in text
    assert text.count("out of memory") == 1
    path = tmp_path / "kernels_bench.png"
    assert draw(lines, "a GPU", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not draw([], "a GPU", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
def test_a_run_on_a_gpu(tmp_path):
    folder = tmp_path / "out"
    assert kernels_bench.main(["--quick", "--sizes", "50000", "--out", str(folder)]) == 0
    lines = measure.read_lines(folder / "kernels_bench.jsonl")
    for side in ("ours", "torch"):
        found = rows(lines, "kernels", side=side)
        assert {row["absent"] for row in found} == {None}, side
        shares = [row["more"]["copy_limit_percent"] for row in found if row["more"]["moved_bytes"]]
        assert all(0 < share < 150 for share in shares), side
    assert json.dumps(lines).count('"clock": "graph"') > 20
