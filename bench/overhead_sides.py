"""The sides of the overhead benchmark: ways to prune, and training with and without it.

What each of them includes is told in `overhead.py`. Dimensions: N samples, K kept in an epoch, B
batch.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy_pruning import Floats, Indices, NumpyPruning, OriginalPackage, Side, other_work
from torch import Tensor

from infobatch_fast.errors import reason
from infobatch_fast.infobatch import Batch, InfoBatch, Plan
from infobatch_fast.kernels import reference
from infobatch_fast.report.text import figures
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train.cli import is_out_of_memory
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import TrainStep

SIDES = ("device", "numpy", "none", "original")
# Bytes a sample at the peak of building and choosing. On a CPU 38, 28, 16 and 74 were measured at
# N = 10M, and half as much again is allowed for; on a GPU randperm sorts, which takes some more.
HOST_BYTES = {"device": 57, "numpy": 42, "none": 24, "original": 111}
DEVICE_BYTES = {"device": 96, "none": 64}
HEADROOM = 0.8  # of the free memory

TURNS = 64  # batches that updates take in turn
LR, MOMENTUM = 1e-3, 0.9  # a step's time does not depend on them

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Setting:
    """What is measured, as the options and the device have it.

    Attributes:
        sizes: data set sizes N, ascending.
        quick: figures too short to quote.
        batch_size: B.
        model: of the whole steps.
        ratio: share of the well-learned samples that an epoch leaves out.
        seed: of the scores, the plans and the model.
    """

    sizes: tuple[int, ...]
    quick: bool
    batch_size: int
    model: str
    ratio: float
    seed: int

    @property
    def training_size(self) -> int:
        """N of the whole steps: CIFAR's if it is among the sizes."""
        return 50_000 if 50_000 in self.sizes else self.sizes[0]


class OnDevice:
    """InfoBatch as it is used in training."""

    def __init__(self, scores: Floats, ratio: float, seed: int, device: torch.device) -> None:
        self.infobatch = InfoBatch(len(scores), 1, ratio, 1.0, seed, device)
        self.infobatch.scores.copy_(torch.from_numpy(scores))
        self._found_inf = torch.zeros((), device=device)

    def choose(self) -> Plan:
        """The epoch's plan."""
        return self.infobatch.sample(0)

    def epoch(self, chosen: Plan) -> tuple[Indices, Floats]:
        """Indices (K,) and weights (K,)."""
        return chosen.indices.cpu().numpy(), chosen.weights.cpu().numpy()

    def batch(self, chosen: Plan, start: int, stop: int) -> Batch:
        """Indices and weights on the device."""
        return chosen.batch(start, stop)

    def update(self, losses: Tensor, batch: Batch) -> Tensor:
        """The rescaled mean, record and sum of weights that a step has; kernels may join them."""
        self.infobatch.record(losses, batch, self._found_inf)
        batch.weights.sum(dtype=torch.float64)
        return reference.rescaled_mean(losses, batch.weights)

    def recorded(self, indices: Indices) -> Floats | None:
        """Scores (B,)."""
        return self.infobatch.scores.cpu().numpy()[indices]


class FullData(OnDevice):
    """Training without pruning."""

    def __init__(self, samples: int, seed: int, device: torch.device) -> None:
        self.infobatch = InfoBatch(samples, 1, delta=0.0, seed=seed, device=device)

    def update(self, losses: Tensor, batch: Batch) -> Tensor:
        """The plain mean."""
        return losses.mean()

    def recorded(self, indices: Indices) -> None:
        """No scores."""


class Contender:
    """A side at one N. After its first failure its calls do nothing, so that the rest goes on.

    Attributes:
        failure: why there is no figure; None while all is well.
    """

    def __init__(
        self,
        name: str,
        samples: int,
        draw: Callable[[], Floats],
        setting: Setting,
        device: torch.device,
    ) -> None:
        self.name, self.samples = name, samples
        self._of = draw, setting, device
        self.failure = lack_of_memory(name, samples, device)
        self.side: Side | None = self.attempt(self._build)

    def attempt(self, call: Callable[[], ResultT]) -> ResultT | None:
        """Make a call, unless one has failed."""
        if self.failure is None:
            try:
                return call()
            except Exception as error:
                if is_out_of_memory(error):
                    self.failure = "out of memory"
                elif isinstance(error, ModuleNotFoundError) and error.name == "infobatch":
                    self.failure = reason(error)
                elif self.name == "original":  # the others are ours: a failure is a defect
                    self.failure = f"it failed: {type(error).__name__}: {reason(error)}"
                else:
                    raise
        return None

    def check(self, losses: Tensor) -> None:
        """Compare its work with InfoBatch's, on another instance, since scores change in it."""
        draw, setting, _ = self._of
        ratio = setting.ratio if self.name != "none" else 0.0
        problem = self.attempt(lambda: other_work(self._build(), draw(), ratio, losses))
        if problem is not None:
            self.failure = f"it does other work: {problem}"

    def choose(self) -> None:
        """Draw an epoch."""
        if self.side is not None:
            self.attempt(self.side.choose)

    def updates(self, values: Tensor) -> Callable[[], object]:
        """A call that updates with the next batch of an epoch, its losses the (B,) values."""
        batches = itertools.cycle(self.attempt(lambda: self._batches(values.numel())) or ())
        # A copy stands for the network's losses: the package rescales in place, which no leaf bears
        leaf = values.clone().requires_grad_()

        def update() -> None:
            assert self.side is not None
            leaf.grad = None
            self.side.update(leaf.clone(), next(batches)).backward()

        return lambda: self.attempt(update)

    def _batches(self, b: int) -> list[Any]:
        assert self.side is not None
        chosen = self.side.choose()
        count = min(TURNS, sure_to_keep(self.samples, self._of[1].ratio) // b)
        return [self.side.batch(chosen, i * b, (i + 1) * b) for i in range(count)]

    def _build(self) -> Side:
        draw, setting, device = self._of
        if self.name == "none":
            return FullData(self.samples, setting.seed, device)
        if self.name == "device":
            return OnDevice(draw(), setting.ratio, setting.seed, device)
        if self.name == "numpy":
            return NumpyPruning(draw(), setting.ratio, setting.seed)
        return OriginalPackage(draw(), setting.ratio)


class Steps:
    """Whole training steps with and without InfoBatch, on the same weights and batches.

    Both train the same model by the same optimizer, so that neither lies better in memory.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        cuda = device.type == "cuda"
        samples, b = setting.training_size, setting.batch_size
        scores = draw_scores(samples, setting.seed)
        infobatch = OnDevice(scores, setting.ratio, setting.seed, device).infobatch
        plan = infobatch.sample(0)
        self.kept = len(plan)
        self._turns: dict[str, Iterator[Any]] = {}
        random = torch.Generator(device).manual_seed(setting.seed)
        self.batches = []
        for start in range(0, min(8, len(plan) // b) * b, b):
            images = torch.randn(b, 3, 32, 32, generator=random, device=device)
            labels = torch.randint(10, (b,), generator=random, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            self.batches.append((images, labels, plan.batch(start, start + b)))
        torch.backends.cudnn.benchmark = True  # as the trainer has it
        model = make_model(setting.model, seed=setting.seed).train()
        model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
        self.training = {
            "model": setting.model,
            "amp": "bf16" if cuda else "off",
            "optimizer": "lars" if cuda else "sgd",
        }
        optimizer = make_optimizer(self.training["optimizer"], model, lr=LR, weight_decay=5e-4)
        self.steps = {
            side: TrainStep(
                model,
                optimizer,
                pruning,
                amp=self.training["amp"],
                label_smoothing=0.1,
                compile=False,
                phases=Phases(device, enabled=False),
            )
            for side, pruning in (("with", infobatch), ("without", None))
        }

    def run(self, side: str, count: int, phases: Phases) -> None:
        """Train `count` steps, as the trainer's loop does."""
        step = self.steps[side]
        step.phases = phases
        turns = self._turns.setdefault(side, itertools.cycle(self.batches))
        batches = itertools.islice(turns, count)
        for images, labels, batch in phases.each("wait", batches):
            with phases("step"):
                step(images, labels, batch, LR, MOMENTUM)


def sure_to_keep(samples: int, ratio: float) -> int:
    """The least K that an epoch can have."""
    return math.floor((1 - ratio) * samples)


def least_size(batch_size: int, ratio: float) -> int:
    """The least N of which every epoch has a whole batch."""
    size = math.floor(batch_size / (1 - ratio))
    while sure_to_keep(size, ratio) < batch_size:  # rounding
        size += 1
    return size


def draw_scores(samples: int, seed: int) -> Floats:
    """Scores (N,) as losses lie in the middle of a training: log-normal, 69% below their mean."""
    random = torch.Generator().manual_seed(seed)
    return torch.empty(samples).log_normal_(-1.0, 1.0, generator=random).numpy()


def lack_of_memory(side: str, samples: int, device: torch.device) -> str | None:
    """Why a side does not fit into the memory that is free; None if it does."""
    needs = {"host": HOST_BYTES[side] * samples}
    if device.type == "cuda" and side in DEVICE_BYTES:
        # On the host only the scores that all sides share, and what checks them.
        needs = {"host": 16 * samples, "GPU": DEVICE_BYTES[side] * samples}
    for place, need in needs.items():
        free = free_memory(device if place == "GPU" else torch.device("cpu"))
        if free is not None and need > HEADROOM * free:
            return (
                f"it needs about {figures(need / 1e9)} GB of the {place}'s memory, "
                f"of which {figures(free / 1e9)} GB are free"
            )
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = (line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:"))
    kilobytes = next(found, None)
    return None if kilobytes is None else int(kilobytes) * 1024
