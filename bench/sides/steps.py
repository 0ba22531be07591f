"""Training steps in their forms, as the trainer takes them.

Dimensions: B batch, K samples of an epoch.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from harness import Absent, Side, require
from torch import Tensor, nn

from infobatch_fast import InfoBatch
from infobatch_fast.data.loader import Loader
from infobatch_fast.errors import reason
from infobatch_fast.plan import Batch, Plan
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train.graph import GraphStep
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import WARM_UP, TrainStep
from sides.loaders import first

LR, MOMENTUM = 0.01, 0.9  # a step's time does not depend on them
Fed = tuple[Tensor, Tensor, Batch]
Model = Literal["small", "r18", "r34", "r50", "r101"]


@dataclass(frozen=True)
class Form:
    """How a network is trained.

    Attributes:
        channels_last: memory format of weights and images; else contiguous.
        amp: off or bf16.
        compile: torch.compile the network.
        graph: replay the step as a CUDA graph.
        inductor: options of the compiler beside the trainer's.
        loss_kernel: our cross-entropy where there is a kernel, else torch's.
        fused: our LARS where there is a kernel; False is torch's foreach operations.
    """

    channels_last: bool = True
    amp: str = "bf16"
    compile: bool = False
    graph: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)
    loss_kernel: bool = True
    fused: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return torch.bfloat16 if self.amp == "bf16" else torch.float32

    @property
    def layout(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


FORMS = {  # each adds to the one before
    "eager": Form(channels_last=False, amp="off"),
    "channels_last": Form(amp="off"),
    "amp": Form(),
    "compiled": Form(compile=True),
    "graph": Form(compile=True, graph=True),
}
SWITCHES: dict[str, Callable[[Form], Form]] = {  # what is compared beside the last form asked for
    "max_autotune": lambda form: replace(
        form, inductor={"max_autotune": True, "conv_1x1_as_mm": True}
    ),
    "foreach_lars": lambda form: replace(form, fused=False),
    "torch_cross_entropy": lambda form: replace(form, loss_kernel=False),
}


class Trained:
    """A network that is trained in one form; its step is ready once `warm_up` has returned."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        infobatch: InfoBatch | None,
        form: Form,
    ) -> None:
        if form.inductor and not form.compile:
            raise Absent("the compiler's options need a form that is compiled")
        self.network, self.optimizer, self.form = network, optimizer, form
        self.device = next(network.parameters()).device
        self.plain = TrainStep(
            network,
            optimizer,
            infobatch,
            amp=form.amp,
            label_smoothing=0.1,
            compile=dict(form.inductor) or form.compile,
            phases=Phases(self.device, enabled=False),
            loss_kernel=form.loss_kernel,
        )
        if not (form.fused and form.loss_kernel) and not self.plain.by_kernels:
            raise Absent("the kernels that it would do without are not here")
        # Which raises where a capture fails.
        self.step = GraphStep(self.plain) if form.graph else self.plain

    def warm_up(self, fed: Fed) -> None:
        """The steps that compile and tune; then those of a graph are captured."""
        self.train([fed] * WARM_UP)
        if isinstance(self.step, GraphStep):
            try:
                self.step.capture()
            except Exception as error:
                # Of the capture's end, it says less than what went wrong within.
                raise Absent(f"not captured: {reason(error.__context__ or error)}") from None
            if not self.step.captured:
                raise Absent("not captured")
            self.train([fed])
        if self.form.compile and not self.plain.compiled:
            raise Absent("the network was not compiled")

    def train(self, batches: Iterable[Fed]) -> None:
        """A step of each batch."""
        for images, labels, batch in batches:
            images = images.contiguous(memory_format=self.form.layout)
            self.step(images, labels, batch, LR, MOMENTUM)


def make_network(model: str, layout: torch.memory_format, seed: int, device: torch.device) -> Any:
    """A network in training mode, on the device."""
    network: Any = make_model(model, seed=seed).train()
    return network.to(device=device, memory_format=layout)


def trained_sides(
    model: str, form: Form, loader: Loader, plan: Plan, steps: int, seed: int
) -> dict[str, Callable[[], Side]]:
    """A network alone, on one batch that stays on the device, and the same fed by our loader."""
    resident = list(feed(loader, plan, 1)) * steps  # held: DALI must not release it in a capture

    @cache
    def trained() -> Trained | Exception:
        infobatch = InfoBatch(len(plan), 1, device=plan.indices.device)
        network = make_network(model, form.layout, seed, infobatch.scores.device)
        try:
            how = {"lr": LR, "weight_decay": 5e-4, "fused": form.fused}
            optimizer = make_optimizer("lars", network, **how)
            made = Trained(network, optimizer, infobatch, form)
            made.warm_up(resident[0])
        except Exception as error:  # not tried again for the other side
            return error
        return made

    def ready(batches: Callable[[], Iterable[Fed]]) -> Side:
        made = trained()
        if isinstance(made, Exception):
            raise made
        return Side(lambda: made.train(batches()))

    return {
        "alone": lambda: ready(lambda: resident),
        "fed": lambda: ready(lambda: feed(loader, plan, steps)),
    }


def feed(loader: Loader, plan: Plan, steps: int) -> Iterator[Fed]:
    """The first batches of a plan, as an epoch of their own."""
    return iter(loader.epoch(first(plan, steps * loader.batch_size)))


class WithAndWithout:
    """Steps with InfoBatch and without, on the same network, optimizer and batches.

    They share them so that neither lies better in memory; all they differ in is InfoBatch.

    Args:
        model: name of the network.
        optimizer: lars, or sgd where that is trained with.
        form: of the steps.
        infobatch: with scores; its first plan's batches are trained on.
        batch_size: B.
        seed: of weights and images.
    """

    def __init__(
        self,
        model: str,
        optimizer: str,
        form: Form,
        infobatch: InfoBatch,
        batch_size: int,
        seed: int,
    ) -> None:
        device, b = infobatch.scores.device, batch_size
        random = torch.Generator(device).manual_seed(seed)
        plan = infobatch.sample(0)
        self.kept = len(plan)
        self.batches: list[Fed] = []
        for start in range(0, min(8, len(plan) // b) * b, b):
            images = torch.randn(b, 3, 32, 32, generator=random, device=device)
            labels = torch.randint(10, (b,), generator=random, device=device)
            images = images.contiguous(memory_format=form.layout)
            self.batches.append((images, labels, plan.batch(start, start + b)))
        network = make_network(model, form.layout, seed, device)
        shared = make_optimizer(optimizer, network, lr=LR, weight_decay=5e-4)
        self.sides = {
            name: Trained(network, shared, pruning, form)
            for name, pruning in (("with", infobatch), ("without", None))
        }
        self._check()
        for side in self.sides.values():
            side.warm_up(self.batches[0])

    def _check(self) -> None:
        """Raise Absent unless a step of either does the same work, where all weights are 1."""
        images, labels, batch = self.batches[0]
        fed = (images, labels, Batch(batch.indices, torch.ones_like(batch.weights)))
        trained = self.sides["with"]
        trained.train([fed])  # whatever the optimizer allocates at its first step is there now
        model, optimizer = (
            copy.deepcopy(part.state_dict()) for part in (trained.network, trained.optimizer)
        )
        start = [parameter.detach().clone() for parameter in trained.plain.parameters]
        changes = []
        for side in self.sides.values():
            side.network.load_state_dict(model)
            side.optimizer.load_state_dict(copy.deepcopy(optimizer))
            side.plain.buffers.keep()
            side.step(*fed, 1.0, MOMENTUM)  # a rate at which LARS changes more than a rounding
            changes.append(
                [p.detach() - w for p, w in zip(side.plain.parameters, start, strict=True)]
            )
        for one, other, w in zip(*changes, start, strict=True):
            # Between them lies the order of sums, at amp's precision.
            slack = 0.05 * one.abs().max().item() + 1e-6 * w.abs().max().item()
            require((one - other).abs().max() <= slack, "at equal weights steps differ")

    def side(self, name: str, steps: int, phases: Phases | None = None) -> Side:
        """So many steps a call, by the trainer's loop."""
        trained, turns = self.sides[name], itertools.cycle(self.batches)
        quiet = Phases(trained.device, enabled=False)

        def call() -> None:
            clock = phases or quiet
            trained.plain.phases = clock
            for images, labels, batch in clock.each("wait", itertools.islice(turns, steps)):
                with clock("step"):
                    trained.step(images, labels, batch, LR, MOMENTUM)
            if phases is not None:
                phases.read()

        return Side(call, repetitions=steps)
