"""The part "step" of `agreement.py`: forms of the step from equal weights on equal batches.

Of each form: how far its losses lie from the eager form's, the host syncs of its steps, and what
the host launches in a step. Losses stay on the device until the last step is done.

Training carries a rounding on and makes it larger, by what depends on network, batch size and
learning rate. So the eager form is run twice more: from weights that are off by a rounding, which
is the difference that no form can be sure to stay below, and without learning, which is one that
the limit must be below if it is to find anything.

Dimensions: B batch.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from agreement_figures import Bench, like_for_like
from torch import Tensor
from training_forms import MOMENTUM, Form, Trainer, Unavailable, feed, make_epoch

from infobatch_fast.data.cifar import Dataset
from infobatch_fast.data.loader import TorchLoader
from infobatch_fast.errors import reason
from infobatch_fast.plan import Batch
from infobatch_fast.telemetry.syncs import chrome_trace, host_syncs
from infobatch_fast.train.graph import WARM_UP, GraphStep
from infobatch_fast.train.step import TrainStep

PART = "step"
NUDGED, UNTRAINED = "eager, weights off by a rounding", "eager, learning rate 0"
FORMS: dict[str, dict[str, Any]] = {
    "eager": {},
    NUDGED: {},
    UNTRAINED: {},
    "compiled": {"compile": True},
    "graph": {"graph": True},
    "compiled + graph": {"compile": True, "graph": True},
}
LIMITS = {"off": 1e-3, "bf16": 2e-2}  # of the losses, relative
RATIO = 0.5
TRACED = 3  # steps under the profiler
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")

Batches = Sequence[tuple[Tensor, Tensor, Batch]]


@dataclass(frozen=True)
class Case:
    """What is trained, in every form.

    Attributes:
        model: name of the network.
        data: on the device.
        batch_size: B.
        steps: of each form, more than `WARM_UP`.
        lr: learning rate.
    """

    model: str
    data: Dataset
    batch_size: int
    steps: int
    lr: float


def measure_steps(bench: Bench, case: Case) -> None:
    """Rows of each form in float32 and under bfloat16 autocast.

    Args:
        bench: whose rows they are.
        case: trained.
    """
    loader = TorchLoader(
        case.data.images,
        case.data.labels,
        case.batch_size,
        mean=case.data.mean,
        std=case.data.std,
        seed=bench.seed,
    )
    epoch = make_epoch(len(case.data.labels), case.batch_size, RATIO, bench.seed, bench.device)
    whole = min(case.steps, len(epoch.plan) // case.batch_size)
    batches = list(islice(cycle(list(feed(loader, epoch.plan, whole))), case.steps))
    if not bench.cuda:
        bench.add_absent(PART, {"what": "launches"}, "nothing is launched on a CPU")
    for amp, limit in LIMITS.items():
        eager: Tensor | None = None
        for side in FORMS:
            with like_for_like(), bench.guard(PART, {"what": "loss", "side": side, "amp": amp}):
                losses = _measure_form(bench, case, loader, batches, side, amp)
                if losses is None:
                    continue
                if side == "eager":
                    eager = losses
                    continue
                if eager is None:
                    raise RuntimeError("there is no eager form to compare it with")
                off = farthest(losses, eager)
                more = {"first_loss": eager[0].item(), "last_loss": eager[-1].item()}
                row = {"what": "loss", "side": side, "amp": amp}
                most = None if side in (NUDGED, UNTRAINED) else limit
                bench.add(PART, row, off, "relative", most, more=more)
            torch.compiler.reset()
            gc.collect()


def farthest(losses: Tensor, eager: Tensor) -> float:
    """The largest relative difference of two runs' losses, step by step; NaN where one is NaN."""
    return ((losses - eager).abs() / eager.abs()).max().item()


def _measure_form(
    bench: Bench, case: Case, loader: TorchLoader, batches: Batches, side: str, amp: str
) -> Tensor | None:
    from torch._dynamo.exc import TorchDynamoException  # a second to import

    form = Form(side, amp=amp, **FORMS[side])
    row = {"side": side, "amp": amp}
    epoch = make_epoch(len(case.data.labels), case.batch_size, RATIO, bench.seed, bench.device)
    watched = bench.cuda or not form.compile
    try:
        trainer = Trainer(case.model, form, epoch, case.data, loader, bench.seed)
        if side == NUDGED:
            nudge(trainer, form.dtype, bench.seed)
        lr = 0.0 if side == UNTRAINED else case.lr
        losses, syncs = train(trainer, batches, lr, bench.device, watched)
    except (Unavailable, TorchDynamoException) as error:
        # On a GPU there must be all of them; a CPU may lack what a form needs.
        bench.add_absent(PART, {"what": "loss", **row}, reason(error), failed=bench.cuda)
        return None
    if side in (NUDGED, UNTRAINED):
        return losses
    if watched:
        more = {"steps": len(batches) - WARM_UP}
        bench.add(PART, {"what": "host syncs", **row}, syncs, "in all steps", 0, more=more)
    else:
        why = "what watches the reads on a CPU would keep torch.compile from compiling"
        bench.add_absent(PART, {"what": "host syncs", **row}, why)
    if bench.cuda:
        count, why = 0, "the profiler saw none"
        try:
            count = launches(lambda: _advance(trainer, batches[:TRACED], case.lr, []))
        except (OSError, RuntimeError, ValueError) as error:  # of a profiler without its rights
            why = reason(error)
        if count:
            bench.add(PART, {"what": "launches", **row}, count / TRACED, "a step")
        else:
            bench.add_absent(PART, {"what": "launches", **row}, why)
    return losses


@torch.no_grad()
def nudge(trainer: Trainer, dtype: torch.dtype, seed: int) -> None:
    """Move each weight by up to a rounding of a dtype.

    Args:
        trainer: whose network it is.
        dtype: of the matrix products.
        seed: of the moves.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in _inner(trainer).parameters:
        move = torch.rand(parameter.shape, generator=generator).to(parameter.device) * 2 - 1
        parameter.mul_(1 + move * torch.finfo(dtype).eps / 2)


def train(
    trainer: Trainer, batches: Batches, lr: float, device: torch.device, watched: bool
) -> tuple[Tensor, int]:
    """Train on each batch once.

    Args:
        trainer: with its first weights.
        batches: on the device, more than `WARM_UP`; after those a graph is captured.
        lr: learning rate.
        device: of the trainer.
        watched: count the host syncs behind the warm-up.

    Returns:
        The loss of each step, on the CPU in float64, NaN where it was skipped; the host syncs.

    Raises:
        Unavailable: the capture failed.
    """
    taken: list[Tensor] = []
    _advance(trainer, batches[:WARM_UP], lr, taken)
    if isinstance(trainer.step, GraphStep):
        trainer.step.capture()
        if trainer.step.failure:
            raise Unavailable(trainer.step.failure)
    with host_syncs(device, "count" if watched else "off") as watch:
        _advance(trainer, batches[WARM_UP:], lr, taken)
    counts = torch.stack(taken).cpu()  # the one read of all of them
    return counts[:, 0] / counts[:, 1], watch.count


def _advance(trainer: Trainer, batches: Batches, lr: float, taken: list[Tensor]) -> None:
    inner = _inner(trainer)
    for images, labels, batch in batches:
        inner.begin_epoch()
        trainer.step(images, labels, batch, lr, MOMENTUM)
        taken.append(inner.counts[:2].clone())  # weight * loss and weight of this step


def _inner(trainer: Trainer) -> TrainStep:
    return trainer.step.step if isinstance(trainer.step, GraphStep) else trainer.step


def launches(call: Callable[[], object]) -> int:
    """What the host hands to a GPU in a call, by a trace of torch's profiler.

    Args:
        call: run once, after it has run before.
    """
    return launches_in_trace(chrome_trace(call))


def launches_in_trace(trace: dict[str, Any]) -> int:
    """Calls of the CUDA runtime and driver that launch a kernel or a graph, copy or fill.

    Args:
        trace: of the profiler, in Chrome's format.
    """
    return sum(
        event.get("ph") == "X"
        and event.get("cat") in ("cuda_runtime", "cuda_driver")
        and any(name in event["name"] for name in _LAUNCHES)
        for event in trace.get("traceEvents", ())
    )
