"""The agreement benchmark: its distances by hand, and that each part finds what is wrong."""

import copy
import math
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import agreement
import agreement_choose
import agreement_figures
import agreement_loader
import agreement_resume
import agreement_steps
import harness as measure
import pytest
import torch
import training_forms
from agreement_choose import find_kernels, make_scores, measure_choosing
from agreement_figures import Bench, relative, tables, ulps, unequal
from agreement_loader import measure_loaders
from agreement_resume import measure_resume
from agreement_steps import Case, farthest, launches_in_trace, measure_steps
from training_forms import Trainer, Unavailable

from infobatch_fast import infobatch as infobatch_module
from infobatch_fast.data.cifar import Dataset, make_synthetic
from infobatch_fast.data.loader import Epoch, TorchLoader
from infobatch_fast.errors import UserError
from infobatch_fast.infobatch import Batch, InfoBatch
from infobatch_fast.kernels import prune_torch, reference
from infobatch_fast.kernels.select import Kernels
from infobatch_fast.train.cli import Interrupted

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return replace(make_synthetic(700, 70), mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    lines = measure.Lines(tmp_path / "o.jsonl", "agreement", CPU, {}, quick=True)
    return Bench(CPU, lines, lambda line: None, True, 3)


def rows(bench: Bench, **case: Any) -> list[dict[str, Any]]:
    return [line for line in bench.lines.lines if case.items() <= line["case"].items()]


def kept(bench: Bench, **case: Any) -> dict[str, bool]:
    return {r["case"]["what"]: r["more"]["kept"] for r in rows(bench, **case) if not r["absent"]}


# Distances


@pytest.mark.parametrize(
    ("dtype", "spacing"),  # of the numbers from 1 to 2
    [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 2**-23)],
)
def test_units_in_the_last_place(dtype, spacing):
    def distance(a: float, b: float) -> float:
        values = [torch.tensor([0.5, v, -3.0], dtype=torch.float64).to(dtype) for v in (a, b)]
        assert ulps(*values) == ulps(*reversed(values))
        return ulps(*values)

    assert distance(1.0, 1.0) == 0
    assert distance(1.0, 1 + spacing) == 1
    assert distance(1.0, 1 - spacing / 2) == 1  # below a power of two they lie twice as dense
    assert distance(-1.0, -1 - 3 * spacing) == 3
    assert distance(0.0, -0.0) == 0
    smallest = torch.finfo(dtype).smallest_normal * spacing
    assert distance(0.0, smallest) == 1
    assert distance(-smallest, smallest) == 2
    assert distance(torch.finfo(dtype).max, math.inf) == 1
    assert distance(1.0, 2.0) == 1 / spacing
    assert distance(math.nan, math.nan) == 0
    assert distance(math.nan, 1.0) == math.inf
    ends = torch.tensor([torch.finfo(dtype).max, -math.inf], dtype=dtype)
    bits = 16 if dtype != torch.float32 else 32
    infinite = int(torch.tensor(math.inf, dtype=dtype).view(agreement_figures._BITS[dtype]))
    assert ulps(ends, -ends) == 2 * infinite < 2**bits  # farther than half the whole numbers go


def test_units_in_the_last_place_of_nothing_and_of_other_shapes():
    assert ulps(torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(ValueError, match=r"^got must be torch.float32 of shape \(2,\) like want, "):
        ulps(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"got torch.float16 of shape \(2,\)$"):
        ulps(torch.zeros(2).half(), torch.zeros(2))


def test_relative_differences():
    want = torch.tensor([4.0, -8.0, math.nan])
    assert relative(want.clone(), want) == 0
    assert relative(torch.tensor([5.0, -8.0, math.nan]), want) == 1 / 8
    assert relative(torch.tensor([4.0, -8.0, 1.0]), want) == math.inf
    assert relative(torch.tensor([4.0, math.nan, math.nan]), want) == math.inf
    assert relative(torch.zeros(2), torch.zeros(2)) == 0
    assert relative(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative(torch.ones(2), torch.ones(3)) == math.inf
    assert relative(torch.tensor(7), torch.tensor(8)) == 1 / 8
    off_by_an_ulp = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    assert relative(off_by_an_ulp, torch.tensor(1.0)) == 2**-23


def test_unequal_elements():
    assert unequal(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])) == 0
    assert unequal(torch.tensor([1, 2, 3]), torch.tensor([1, 3, 2])) == 2
    assert unequal(torch.tensor([1, 2]), torch.tensor([1, 2, 3])) == 3
    assert unequal(torch.tensor([1, 2, 3]), torch.tensor([])) == 3


# Rows


def test_rows_say_whether_their_limit_is_kept(bench):
    bench.add("p", {"what": "a"}, 1.0, "ULP", 1)
    bench.add("p", {"what": "b"}, 1.5, "ULP", 1)
    bench.add("p", {"what": "c"}, 0.99, "equal", 1.0, at_least=True)
    bench.add("p", {"what": "d"}, 9.0, "a step")
    assert [r["more"].get("kept") for r in bench.lines.lines] == [True, False, False, None]
    assert bench.broken == [
        "p b: 1.5 ULP, at most 1 allowed",
        "p c: 0.99 equal, at least 1 allowed",
    ]
    assert bench.failures == []
    for value in (math.nan, math.inf):
        bench.add("p", {"what": "e"}, value, "relative", 1)
    assert bench.failures == ["p e: the figure is nan", "p e: the figure is inf"]
    with bench.guard("p", {"what": "f"}):
        raise KeyError("x")
    assert bench.lines.lines[-1]["absent"] == "it failed: KeyError: 'x'"
    assert len(bench.failures) == 3
    for error in (UserError("disk full"), Interrupted(2, "")):
        with pytest.raises(type(error)), bench.guard("p", {"what": "f"}):
            raise error


def test_the_tables(bench):
    bench.add("choose", {"what": "threshold", "samples": 127}, 2.0, "ULP", 1)
    bench.add("choose", {"what": "threshold", "samples": 50_000}, 0.0, "ULP", 1)
    bench.add("step", {"what": "loss", "side": "graph", "amp": "off"}, 1e-6, "relative", 1e-3)
    bench.add("step", {"what": "loss", "side": "graph", "amp": "bf16"}, 1e-3, "relative", 2e-2)
    bench.add("step", {"what": "launches", "side": "graph", "amp": "off"}, 5.0, "a step")
    bench.add_absent("step", {"what": "loss", "side": "compiled", "amp": "off"}, "no compiler")
    bench.add_absent("resume", {"what": "all"}, "no disk")
    assert (
        "\n".join(tables(bench.lines.lines))
        == """
## choose

| what      | unit |    N = 127 | N = 50,000 | limit |
| --------- | ---- | ---------: | ---------: | ----: |
| threshold | ULP  | 2 NOT KEPT |          0 |  <= 1 |

## step

| what     | side  | unit     | float32 |  bf16 |             limit |
| -------- | ----- | -------- | ------: | ----: | ----------------: |
| loss     | graph | relative |   1e-06 | 0.001 | <= 0.001, <= 0.02 |
| launches | graph | a step   |       5 |     - |              none |

- absent: loss, compiled, float32: no compiler

## resume

- absent: all: no disk"""
    )


# Loaders


class Changed:
    """A loader whose batches go through `change`."""

    def __init__(self, loader: TorchLoader, change: Any) -> None:
        self.loader, self.change = loader, change

    def epoch(self, plan: Any) -> Epoch[Batch]:
        epoch = self.loader.epoch(plan)
        changed = [self.change(number, *batch) for number, batch in enumerate(epoch)]
        return Epoch(len(changed), lambda: iter(changed))


@pytest.fixture
def compare(monkeypatch, bench, data):
    """Compares a changed torch loader, in the place of DALI's, with the torch loader."""

    def make(change: Any) -> Bench:
        def make_loader(kind, images, labels, size, **how):
            loader = TorchLoader(images, labels, size, **how)
            return (Changed(loader, change) if kind == "dali" else loader), None

        monkeypatch.setattr(agreement_loader, "make_loader", make_loader)
        measure_loaders(bench, data, 64)
        return bench

    return make


def test_equal_loaders(compare, data):
    bench = compare(lambda number, *batch: batch)
    found = [r for r in rows(bench) if not r["absent"]]
    assert [r["median"] for r in found] == [1, 1, 1, 0, 0]
    assert kept(bench) == dict.fromkeys(kept(bench), True)
    assert found[0]["case"] == {
        "what": "crops and flips",
        "side": "dali cpu",
        "against": "torch cpu",
    }
    more = found[0]["more"]
    assert 350 < more["samples"] < 700  # a pruned pass, all of it
    assert more["last_batch_images"] == more["samples"] % 64 > 0


def flipped(number, images, labels, batch):
    if number == 2:
        images = images.clone()
        images[5] = images[5].flip(2)
    return images, labels, batch


def in_the_partial_batch(number, images, labels, batch):
    return (images if len(labels) == 64 else images.roll(1, 3)), labels, batch


def mislabelled(number, images, labels, batch):
    return images, labels.roll(1) if number == 1 else labels, batch


def another_sample(number, images, labels, batch):
    return images, labels, Batch(batch.indices + (number == 0), batch.weights)


def another_weight(number, images, labels, batch):
    return images, labels, Batch(batch.indices, batch.weights * 1.001)


def a_little_darker(number, images, labels, batch):
    return images - 1e-5, labels, batch


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (flipped, {"crops and flips", "normalised float32", "cast to float16"}),
        (in_the_partial_batch, {"crops and flips", "normalised float32", "cast to float16"}),
        (mislabelled, {"labels"}),
        (another_sample, {"indices and weights"}),
        (another_weight, {"indices and weights"}),
        (a_little_darker, {"normalised float32", "cast to float16"}),
    ],
)
def test_a_wrong_loader_is_found(compare, change, broken):
    bench = compare(change)
    assert {what for what, well in kept(bench).items() if not well} == broken
    if change is flipped:
        row = rows(bench, what="crops and flips")[0]
        assert row["median"] == pytest.approx(1 - 1 / row["more"]["samples"], abs=1e-12)
    if change is a_little_darker:
        # 1e-5 off by what float32 rounds near 2, in units of 1e-7
        assert rows(bench, what="normalised float32")[0]["median"] == pytest.approx(100, abs=3)


def test_a_loader_that_yields_nan_is_found(compare):
    def spoil(number, images, labels, batch):
        return images * math.nan if number == 1 else images, labels, batch

    bench = compare(spoil)
    assert bench.failures == [
        "loader normalised float32, dali cpu, torch cpu: the figure is nan",
        "loader cast to float16, dali cpu, torch cpu: the figure is inf",
    ]
    assert not kept(bench)["crops and flips"]


def test_a_loader_that_ends_early_is_found(monkeypatch, compare):
    whole = Changed.epoch

    def shorter(self, plan):
        batches = list(whole(self, plan))[:-1]
        return Epoch(len(batches), lambda: iter(batches))

    monkeypatch.setattr(Changed, "epoch", shorter)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        compare(lambda number, *batch: batch)


def test_no_dali_is_said(monkeypatch, bench, data):
    def make_loader(kind, images, labels, size, **how):
        if kind == "dali":
            raise UserError("loader dali needs NVIDIA DALI")
        return TorchLoader(images, labels, size, **how), None

    monkeypatch.setattr(agreement_loader, "make_loader", make_loader)
    measure_loaders(bench, data, 64)
    assert [r["absent"] for r in rows(bench, side="dali cpu")] == ["loader dali needs NVIDIA DALI"]
    assert bench.failures == []


# Choosing

NONE: Any = None
TWINS = Kernels(
    reference.threshold,
    prune_torch.partition,
    prune_torch.choose,
    prune_torch.shuffle,
    update=NONE,
    record=NONE,
    cross_entropy_gradient=NONE,
    max_classes=0,
)


def choosing(monkeypatch, bench: Bench, kernels: Kernels, sizes=(1, 127, 5000)) -> dict[str, bool]:
    monkeypatch.setattr(infobatch_module, "triton_kernels", lambda device: kernels)
    measure_choosing(bench, kernels, "", sizes)
    return {what: all(r["more"]["kept"] for r in rows(bench, what=what)) for what in kept(bench)}


def test_kernels_that_do_as_torch_does(monkeypatch, bench):
    found = choosing(monkeypatch, bench, TWINS)
    assert found == dict.fromkeys(found, True)
    assert set(found) == {
        "threshold", "partition", "choose", "shuffle", "epoch as torch draws it on the CPU",
        "number kept", "duplicates", "sum of the weights", "the same call twice", "resumed",
    }  # fmt: skip
    assert len(rows(bench)) == 30
    assert bench.failures == []


def swapped(operation):
    def swap(*args, **kwargs):
        out = operation(*args, **kwargs)
        order = out if isinstance(out, torch.Tensor) else out[0]
        if order.numel() > 2:
            order[:2] = order[:2].flip(0)
        return out

    return swap


def ulps_above(count):
    def threshold(scores):
        limit = reference.threshold(scores)
        for _ in range(count):
            limit = limit.nextafter(torch.tensor(math.inf))
        return limit

    return threshold


def heavier(*args, **kwargs):
    indices, weights = prune_torch.choose(*args, **kwargs)
    return indices, weights * (1 + 1e-5)


def one_twice(*args, **kwargs):
    indices, weights = prune_torch.choose(*args, **kwargs)
    indices[-1] = indices[0]
    return indices, weights


EPOCH = "epoch as torch draws it on the CPU"


@pytest.mark.parametrize(
    ("name", "wrong", "broken"),
    [
        ("threshold", ulps_above(1), set()),
        ("threshold", ulps_above(2), {"threshold"}),
        ("partition", swapped(prune_torch.partition), {"partition", EPOCH}),
        ("choose", swapped(prune_torch.choose), {"choose", EPOCH}),
        ("choose", heavier, {"choose", EPOCH, "sum of the weights"}),
        ("choose", one_twice, {"choose", EPOCH, "duplicates"}),
        ("shuffle", swapped(prune_torch.shuffle), {"shuffle"}),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, bench, name, wrong, broken):
    found = choosing(monkeypatch, bench, TWINS._replace(**{name: wrong}), (127, 5000))
    assert {what for what, well in found.items() if not well} == broken


def test_an_infobatch_that_keeps_too_many_is_found(monkeypatch, bench):
    monkeypatch.setattr(InfoBatch, "_keep", lambda self, n, target, batch_size: round(target) + 1)
    measure_choosing(bench, None, "none", (5000,))
    assert [what for what, well in kept(bench).items() if not well] == ["number kept"]
    assert rows(bench, what="number kept")[0]["median"] == 1


def test_an_infobatch_that_draws_anew_or_forgets_is_found(monkeypatch, bench):
    sample, calls = InfoBatch.sample, []

    def restless(self, epoch, batch_size=None):
        calls.append(epoch)
        plan = sample(self, epoch, batch_size)
        return replace(plan, indices=plan.indices.roll(len(calls)))

    monkeypatch.setattr(InfoBatch, "sample", restless)
    measure_choosing(bench, None, "none", (5000,))
    assert {w for w, well in kept(bench).items() if not well} == {"the same call twice", "resumed"}
    monkeypatch.setattr(InfoBatch, "sample", sample)
    monkeypatch.setattr(InfoBatch, "load_state_dict", lambda self, state: None)
    bench.lines.lines.clear()
    measure_choosing(bench, None, "none", (5000,))
    assert {w for w, well in kept(bench).items() if not well} == {"resumed"}


def test_no_kernels_are_absent_on_a_cpu_and_a_failure_on_a_gpu(monkeypatch, bench):
    kernels, why = find_kernels(CPU)
    measure_choosing(bench, kernels, why, (127,))
    assert [r["absent"] for r in rows(bench, what="kernels")] == [why]
    assert why.startswith("no kernels on a CPU")
    assert bench.failures == []

    def complain(device):
        import warnings

        warnings.warn("torch's operations stand in: the kernel choose differs", stacklevel=1)

    monkeypatch.setattr(agreement_choose, "triton_kernels", complain)
    kernels, why = find_kernels(torch.device("cuda"))
    assert (kernels, why) == (None, "torch's operations stand in: the kernel choose differs")
    monkeypatch.setattr(Bench, "cuda", True)
    measure_choosing(bench, kernels, why, ())
    assert bench.failures == [f"choose kernels: {why}"]


def test_the_scores_have_some_that_were_not_seen():
    scores = make_scores(127, 0)
    assert scores.isnan().sum() == 8
    assert not make_scores(1, 0).isnan().any()


# Steps


def steps_case(data: Dataset, steps: int = 8) -> Case:
    return Case("small", data, 32, steps, 0.2)


@pytest.fixture
def two_forms(monkeypatch):
    """The eager form and one that tests change."""
    monkeypatch.setattr(agreement_steps, "FORMS", {"eager": {}, "other": {}})


def test_equal_forms(two_forms, bench, data):
    measure_steps(bench, steps_case(data))
    losses = rows(bench, what="loss", side="other")
    assert [r["median"] for r in losses] == [0, 0]
    assert [r["more"]["limit"] for r in losses] == [1e-3, 2e-2]
    assert losses[0]["more"]["first_loss"] == pytest.approx(math.log(10), rel=0.1)
    assert losses[0]["more"]["first_loss"] != losses[0]["more"]["last_loss"]
    syncs = rows(bench, what="host syncs")
    assert [(r["median"], r["more"]["steps"]) for r in syncs] == [(0, 5)] * 4
    assert bench.broken == bench.failures == []


def change_other(monkeypatch, change) -> None:
    init = Trainer.__init__

    def changed(self, model, form, *rest):
        init(self, model, form, *rest)
        if form.about == "other":
            change(self)

    monkeypatch.setattr(Trainer, "__init__", changed)


def without_learning(trainer):
    step = trainer.step.optimizer.step
    trainer.step.optimizer.step = lambda: None
    assert callable(step)


def with_other_weights(trainer):
    with torch.no_grad():
        trainer.step.model.fc.weight.mul_(1.5)


def without_momentum(trainer):
    call = trainer.step.advance

    def advance(*args):
        for group in trainer.step.optimizer.param_groups:
            group["momentum"].zero_()
        call(*args)

    trainer.step.advance = advance


@pytest.mark.parametrize("change", [without_learning, with_other_weights, without_momentum])
def test_a_diverging_form_is_found(monkeypatch, two_forms, bench, data, change):
    monkeypatch.setattr(agreement_steps, "LIMITS", {"off": 1e-3})
    change_other(monkeypatch, change)
    measure_steps(bench, steps_case(data))
    assert [r["more"]["kept"] for r in rows(bench, what="loss", side="other")] == [False]


def test_a_form_whose_steps_are_skipped_or_wait_or_fail_is_found(
    monkeypatch, two_forms, bench, data
):
    monkeypatch.setattr(agreement_steps, "LIMITS", {"off": 1e-3})

    def spoil(trainer):
        call = trainer.step.advance

        def advance(images, *rest):
            images.sum().item()
            call(images * math.nan, *rest)

        trainer.step.advance = advance

    change_other(monkeypatch, spoil)
    measure_steps(bench, steps_case(data))
    assert bench.failures == ["step loss, other, float32: the figure is nan"]
    assert rows(bench, what="host syncs", side="other")[0]["median"] == 5
    assert len(bench.broken) == 1

    def fail(trainer):
        raise RuntimeError("of the form")

    change_other(monkeypatch, fail)
    measure_steps(bench, steps_case(data))
    assert bench.failures[1:] == ["step loss, other, float32: it failed: RuntimeError: of the form"]


@pytest.mark.parametrize("cuda", [False, True])
def test_a_form_that_cannot_be_had_is_a_failure_on_a_gpu_alone(
    monkeypatch, two_forms, bench, data, cuda
):
    def refuse(trainer):
        raise Unavailable("no graph here")

    change_other(monkeypatch, refuse)
    monkeypatch.setattr(Bench, "cuda", cuda)
    monkeypatch.setattr(agreement_steps, "launches", lambda call: 12)
    measure_steps(bench, steps_case(data))
    assert [r["absent"] for r in rows(bench, what="loss", side="other")] == ["no graph here"] * 2
    assert len(bench.failures) == (2 if cuda else 0)
    found = [r["median"] for r in rows(bench, what="launches", side="eager")]
    assert found == ([4, 4] if cuda else [])


def test_the_limit_lies_between_a_rounding_and_no_training(monkeypatch, bench, data):
    sides = (agreement_steps.NUDGED, agreement_steps.UNTRAINED)
    monkeypatch.setattr(agreement_steps, "FORMS", {side: {} for side in ("eager", *sides)})
    measure_steps(bench, steps_case(data))
    (off, bf16), (still, _) = (rows(bench, what="loss", side=side) for side in sides)
    assert 0 < off["median"] < 1e-4
    assert off["median"] < bf16["median"] < 2e-2
    assert still["median"] > 1e-3
    assert "limit" not in off["more"]
    assert "limit" not in still["more"]
    assert len(rows(bench, what="host syncs")) == 2  # of the eager form


def test_losses_by_hand():
    eager = torch.tensor([2.0, 4.0, -1.0])
    assert farthest(torch.tensor([2.0, 3.0, -1.0]), eager) == 0.25
    assert math.isnan(farthest(torch.tensor([2.0, math.nan, -1.0]), eager))


def test_the_loss_of_each_step(monkeypatch, data):
    loader = TorchLoader(data.images, data.labels, 32, mean=data.mean, std=data.std)
    epoch = training_forms.make_epoch(700, 32, 0.5, 0, CPU)
    form = training_forms.Form("", amp="off")
    batches = list(training_forms.feed(loader, epoch.plan, 5))
    trainers = [Trainer("small", form, epoch, data, loader, 0) for _ in range(2)]
    losses, _ = agreement_steps.train(trainers[0], batches, 0.2, CPU, False)
    step: Any = trainers[1].step
    for batch, loss in zip(batches, losses.tolist(), strict=True):
        model = copy.deepcopy(step.model)
        logits = model(batch[0])
        each = torch.nn.functional.cross_entropy(
            logits, batch[1], reduction="none", label_smoothing=0.1
        )
        weights = batch[2].weights
        assert loss == pytest.approx(((each * weights).sum() / weights.sum()).item(), rel=1e-5)
        step(*batch, 0.2, training_forms.MOMENTUM)


def test_a_profiler_that_fails_costs_no_other_figure(monkeypatch, two_forms, bench, data):
    def fail(call):
        raise RuntimeError("no rights")

    monkeypatch.setattr(Bench, "cuda", True)
    monkeypatch.setattr(agreement_steps, "launches", fail)
    measure_steps(bench, steps_case(data, 4))
    assert {r["absent"] for r in rows(bench, what="launches")} == {"no rights"}
    assert [r["median"] for r in rows(bench, what="loss")] == [0, 0]
    assert bench.failures == []


def test_launches_in_a_trace():
    def event(name, category="cuda_runtime", phase="X"):
        return {"name": name, "cat": category, "ph": phase}

    events = [
        event("cudaLaunchKernel"),
        event("cudaLaunchKernelExC"),
        event("cuLaunchKernelEx", "cuda_driver"),
        event("cudaGraphLaunch"),
        event("cudaMemcpyAsync"),
        event("cudaMemsetAsync"),
        event("cudaStreamSynchronize"),
        event("void some_kernel()", "kernel"),
        event("cudaLaunchKernel", "cpu_op"),
        event("cudaLaunchKernel", phase="i"),
        {"ph": "M", "name": "process_name"},
    ]
    assert launches_in_trace({"traceEvents": events}) == 6
    assert launches_in_trace({}) == 0


def test_a_trace_is_taken_and_read():
    called = []
    assert agreement_steps.launches(lambda: called.append(torch.ones(2).sum())) == 0
    assert len(called) == 1


# Resume


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(agreement_resume, "STEPS", 4)
    monkeypatch.setattr(agreement_resume, "STOP", 2)


def test_a_resumed_run_is_the_undisturbed_one(short, bench, data):
    measure_resume(bench, data, "small", 32, 0.2)
    assert kept(bench) == {"parameters and buffers": True, "scores": True}
    assert [r["median"] for r in rows(bench)] == [0, 0]
    assert [r["more"]["limit"] for r in rows(bench)] == [0, 0]


@pytest.mark.parametrize("lost", ["optimizer", "scores"])
def test_a_checkpoint_that_lost_something_is_found(monkeypatch, short, bench, data, lost):
    through = agreement_resume.train_through

    def lose(*args):
        saved = through(*args)
        if lost == "optimizer":
            for state in saved["step"]["optimizer"]["state"].values():
                for value in state.values():
                    value.zero_()
        else:
            saved["step"]["infobatch"]["scores"] += 1
        return saved

    monkeypatch.setattr(agreement_resume, "train_through", lose)
    measure_resume(bench, data, "small", 32, 0.2)
    # One step is left, whose losses come before its update.
    assert kept(bench) == {"parameters and buffers": lost == "scores", "scores": lost != "scores"}


def test_a_run_without_the_checkpoint_is_a_failure(monkeypatch, short, bench, data):
    monkeypatch.setattr(agreement_resume, "STOP", 4)  # as many steps as the epoch has, or more
    with pytest.raises(RuntimeError, match="there was no checkpoint after 4 steps"):
        measure_resume(bench, data, "small", 32, 0.2)


# The command


@pytest.fixture
def small(monkeypatch, data):
    """Synthetic images, few of them, in small batches."""
    monkeypatch.setattr(agreement, "make_synthetic", lambda seed: data)
    monkeypatch.setattr(agreement, "QUICK_SHARE", 1.0)
    of = agreement.Scope.of
    scope = types.MethodType(
        lambda cls, quick, cuda: replace(of(quick, cuda), batch_size=32, steps=5), agreement.Scope
    )
    monkeypatch.setattr(agreement.Scope, "of", scope)


def run(tmp_path: Path, *more: str) -> int:
    out = str(tmp_path / "out")
    words = ["--device", "cpu", "--quick", "--data-dir", str(tmp_path / "no"), "--out", out]
    return agreement.main([*words, *more])


def test_the_whole_on_synthetic_images(monkeypatch, small, short, tmp_path, capsys):
    # As it compiles, but for the code that it makes in the end, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "WARNING: SYNTHETIC images: data_dir" in out
    assert "NOT KEPT" not in out
    assert "FAILED" not in out
    lines = measure.read_lines(tmp_path / "out" / "agreement.jsonl")
    assert list(dict.fromkeys(line["part"] for line in lines)) == [
        "loader",
        "choose",
        "resume",
        "step",
    ]
    assert all(line["complete"] and line["quick"] for line in lines)
    assert lines[0]["options"]["source"] == "synthetic"
    assert str(tmp_path) not in str(lines)
    kept_rows = sum(line["more"].get("kept") is True for line in lines)
    assert kept_rows >= 17 + 2
    last = out.splitlines()[-2]
    assert last.startswith(f"{kept_rows} limits are kept, 0 are not; ")
    graphs = {line["absent"] for line in lines if "graph" in line["case"].get("side", "")}
    assert graphs == {"CUDA graphs need a CUDA device"}


@pytest.mark.parametrize("fault", ["limit", "failure"])
def test_a_limit_that_is_not_kept_and_a_failure_are_exit_code_1(
    monkeypatch, small, tmp_path, capsys, fault
):
    def nothing(*args):
        pass

    def wrong(bench, *args):
        if fault == "failure":
            raise ValueError("of the part")
        bench.add("choose", {"what": "threshold"}, 2.0, "ULP", 1)

    for name in ("measure_loaders", "measure_resume", "measure_steps"):
        monkeypatch.setattr(agreement, name, nothing)
    monkeypatch.setattr(agreement, "measure_choosing", wrong)
    assert run(tmp_path) == 1
    said = {
        "limit": "NOT KEPT: choose threshold: 2 ULP, at most 1 allowed",
        "failure": "FAILED: choose all: it failed: ValueError: of the part",
    }
    assert said[fault] in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device cdua", "error: device must be one of auto, cuda, cpu, got cdua"),
        ("--seed -1", "error: seed must be in [0, 2**63), got -1"),
        ("--steps 3", "error: "),
    ],
)
def test_bad_options_are_one_line(words, message, tmp_path, capsys):
    assert run(tmp_path, *words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_a_broken_data_set_are_one_line(small, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert run(tmp_path) == 2
    assert "out must be a new or empty folder" in capsys.readouterr().err
    (tmp_path / "no" / "cifar-10-batches-bin").mkdir(parents=True)
    assert run(tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_signal_keeps_the_rows(monkeypatch, small, tmp_path, capsys):
    def stop(bench, *args):
        bench.add("loader", {"what": "labels"}, 1.0, "equal", 1.0, at_least=True)
        raise Interrupted(2, "")

    monkeypatch.setattr(agreement, "measure_loaders", stop)
    assert run(tmp_path) == 130
    assert "stopped; 1 rows are kept in" in capsys.readouterr().err
    (line,) = measure.read_lines(tmp_path / "out" / "agreement.jsonl")
    assert not line["complete"]
