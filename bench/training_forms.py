"""The forms in which `throughput.py` trains a network, on all the data and on pruned epochs.

Of each: the images/s of whole steps on one batch that stays on the device (the network and its
optimizer alone) and of the same steps fed by our loader. A call is a number of steps, so that the
start of a loader's epoch and the last wait are shared by them.

Dimensions: N samples, K of them in an epoch, B batch.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infobatch_fast.data.cifar import Dataset
from infobatch_fast.data.loader import Loader
from infobatch_fast.infobatch import Batch, InfoBatch, Plan
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train.graph import WARM_UP, GraphStep, obstacle
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import TrainStep

LR, MOMENTUM = 0.01, 0.9
# Scores are drawn, since a network that was not trained has none: exp of normal numbers, of which
# this deviation puts 81% below the mean. The reported runs imply 77% to 86%.
SCORE_DEVIATION = 1.75


@dataclass(frozen=True)
class Form:
    """How a network is trained: each form of `FORMS` adds to the one before.

    Attributes:
        about: in words.
        channels_last: memory format of weights and images; else contiguous.
        amp: off or bf16, of `TrainStep`.
        compile: torch.compile the network.
        graph: replay the step as a CUDA graph.
    """

    about: str
    channels_last: bool = True
    amp: str = "bf16"
    compile: bool = False
    graph: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return torch.bfloat16 if self.amp == "bf16" else torch.float32


FORMS = {
    "eager": Form("contiguous float32", channels_last=False, amp="off"),
    "channels_last": Form("channels_last float32", amp="off"),
    "amp": Form("channels_last, bfloat16 autocast"),
    "compiled": Form("the same under torch.compile", compile=True),
    "graph": Form("the same, the step captured as a CUDA graph", compile=True, graph=True),
}


class Unavailable(Exception):
    """A form that cannot be had here, in words."""


@dataclass(frozen=True)
class Epoch:
    """An epoch that is trained on.

    Attributes:
        infobatch: takes the scores; None for full data.
        plan: (K,) samples.
        choose: draws the plan, always the same one.
    """

    infobatch: InfoBatch | None
    plan: Plan
    choose: Callable[[], Plan]


def make_epoch(
    samples: int, batch_size: int, ratio: float, seed: int, device: torch.device
) -> Epoch:
    """A full epoch (ratio 0), or a pruned one in whole batches, of the scores described above.

    Args:
        samples: N.
        batch_size: B.
        ratio: share of the well-learned samples that is left out.
        seed: of scores and plan.
        device: where both are.
    """
    if ratio == 0:
        full = InfoBatch(samples, 1, 0.0, seed=seed, device=device)
        return Epoch(None, full.sample(0), lambda: full.sample(0))
    infobatch = InfoBatch(samples, 1, ratio, delta=1.0, seed=seed, device=device)
    normal = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    infobatch.scores.copy_((SCORE_DEVIATION * normal).exp())
    chooser = copy.deepcopy(infobatch)  # whose scores no step overwrites
    return Epoch(infobatch, chooser.sample(0, batch_size), lambda: chooser.sample(0, batch_size))


class Trainer:
    """One form of one network, ready to train.

    Args:
        model: name of the network.
        form: of `FORMS`.
        epoch: its plan is trained on, from its start.
        data: on the device.
        loader: of batches of B.
        seed: of the initial weights.

    Raises:
        Unavailable: the step cannot be captured as a graph, and the form asks for one.
    """

    def __init__(
        self,
        model: str,
        form: Form,
        epoch: Epoch,
        data: Dataset,
        loader: Loader,
        seed: int,
    ) -> None:
        device = data.images.device
        self.layout = torch.channels_last if form.channels_last else torch.contiguous_format
        network = make_model(model, data.num_classes, seed=seed)
        network = network.to(device=device, memory_format=self.layout)  # pyright: ignore
        step = TrainStep(
            network.train(),
            make_optimizer("lars", network, lr=LR, weight_decay=5e-4, momentum=MOMENTUM),
            epoch.infobatch,
            amp=form.amp,
            label_smoothing=0.1,
            compile=form.compile,
            phases=Phases(device, enabled=False),
        )
        self.step: TrainStep | GraphStep = step
        if form.graph:
            if why := obstacle(step):
                raise Unavailable(why)
            self.step = GraphStep(step, lambda message: None)
        self.plan, self.loader = epoch.plan, loader
        self.batch = next(self._batches(1))

    def _batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor, Batch]]:
        for images, labels, batch in feed(self.loader, self.plan, steps):
            yield images.contiguous(memory_format=self.layout), labels, batch

    def warm_up(self) -> None:
        """Take the first steps: they compile, and those of a graph capture it.

        Raises:
            Unavailable: the capture failed.
        """
        self.resident(WARM_UP)
        if isinstance(self.step, GraphStep):
            self.step.capture()
            if self.step.failure:  # it would go on without: no figure for a form of that name
                raise Unavailable(self.step.failure)
            self.resident(1)

    def resident(self, steps: int) -> None:
        """Train on one batch that stays on the device."""
        for _ in range(steps):
            self.step(*self.batch, LR, MOMENTUM)

    def fed(self, steps: int) -> None:
        """Train on what the loader gives; a form that wants contiguous images pays for the copy."""
        for images, labels, batch in self._batches(steps):
            self.step(images, labels, batch, LR, MOMENTUM)


def feed(loader: Loader, plan: Plan, steps: int) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """The first batches of a plan, as an epoch of their own."""
    count = steps * loader.batch_size
    part = replace(plan, indices=plan.indices[:count], weights=plan.weights[:count])
    return iter(loader.epoch(part))


def whole_steps(seconds_a_step: float, target: float, most: int) -> int:
    """Steps of a call that takes about `target` seconds, at least 1 and at most `most`."""
    return max(1, min(most, math.ceil(target / seconds_a_step)))


def dataset_rate(samples: int, kept: int, images_per_second: float, choose: float) -> float:
    """Images of the data set a second: N / the epoch's time, of which choosing is a part.

    Args:
        samples: N.
        kept: K, trained on in an epoch.
        images_per_second: of training.
        choose: s, to draw the epoch's plan.
    """
    return samples / (choose + kept / images_per_second)
