"""One training step: autocast, loss, backward, optimizer, update; the host never waits in it.

A step whose gradients are not all finite changes nothing: no parameter, buffer, optimizer state or
score; a mean of the weights goes on towards them. That is decided on the device (`found_inf`, as
torch's fused optimizers have it), counted there, and read at the epoch's end.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from infobatch_fast.errors import reason
from infobatch_fast.infobatch import Batch, InfoBatch
from infobatch_fast.kernels import reference
from infobatch_fast.kernels.select import triton_kernels
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train.distributed import Ranks
from infobatch_fast.train.optim import LARS
from infobatch_fast.train.schedule import set_schedule

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_SCALE = 2.0**16
INDUCTOR = {"combo_kernels": True}  # on a GPU: r50's captured step 2.7% faster on an H200
WARM_UP = 3  # steps of a shape on a GPU that may compile, tune and allocate
DDP_WARM_UP = 11  # with DDP, which until then times itself, and may not be captured


class Counts(NamedTuple):
    """What the device counted since the epoch's start; a row of skipped steps may begin before.

    The loss is the sum of weight * loss over the sum of weights of the steps taken, or NaN.
    """

    loss: float
    skipped: int
    longest: int


class TrainStep:
    """The training step and the device state that belongs to it.

    Args:
        model: in training mode, on its device, channels_last.
        optimizer: one of `optim.make_optimizer`.
        infobatch: takes the scores; None trains on the plain mean of the losses, without any.
        compile: torch.compile the model, each batch size once; a dictionary is more of inductor's
            options.
        say: told if the model cannot be compiled, which then runs as it is; None raises instead.
        loss_kernel: take the cross-entropy's kernel where there is one; a benchmark compares.
        ema: decay of an exponential mean of the weights, in [0, 1); 0 keeps none.
        mixup: blend each image, and its loss, with those of the one before it in the batch.
        ranks: that train together, each on batches of its own; None is this process alone.

    Attributes:
        by_kernels: whether the device has our Triton kernels.
        average: the exponential mean of the model, if there is one.
        share: () of its own image in a blended one, at least a half: a sample's score is the loss
            of its own label there.
        forward: the network, compiled or not.
        seen: steps run here, by the shape of their images; a graph's replays are not.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        infobatch: InfoBatch | None,
        *,
        amp: str,
        label_smoothing: float,
        compile: bool | dict[str, Any],
        phases: Phases,
        say: Callable[[str], None] | None = None,
        loss_kernel: bool = True,
        ranks: Ranks | None = None,
        ema: float = 0.0,
        mixup: bool = False,
    ) -> None:
        self._say, self.ranks = say, ranks or Ranks()
        self.model, self.optimizer, self.infobatch = model, optimizer, infobatch
        self.label_smoothing, self.phases = label_smoothing, phases
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None
        self._follow: Any = get_ema_multi_avg_fn(ema)
        self._means = [_floats(each) for each in (self.average, model) if each is not None]
        self.mixup, self.share = mixup, torch.ones((), device=next(model.parameters()).device)
        self.forward: Any = self.ranks.parallel(model)
        self._plain = self.forward
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        if compile:
            options = INDUCTOR if device.type == "cuda" else {}
            options = options | (compile if isinstance(compile, dict) else {})
            self.forward = torch.compile(self._plain, dynamic=False, options=options or None)
        self.autocast = torch.autocast(device.type, AUTOCAST.get(amp), enabled=amp != "off")
        self.buffers = _Guard(model.buffers())
        # Proven here, not in the first step, which may be timed or forbid host syncs.
        kernels = triton_kernels(device)
        self.by_kernels, self._kernels = kernels is not None, kernels if loss_kernel else None
        self.seen: Counter[torch.Size] = Counter()
        self._ones: dict[int, Tensor] = {}  # weights of plain training, by B
        self.scaling = amp == "fp16"
        self.scale = torch.full((), INITIAL_SCALE if self.scaling else 1.0, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), device=device)
        # float64: sum of weight * loss, sum of weights, skipped, skipped in a row, longest row
        self.counts = torch.zeros(5, dtype=torch.float64, device=device)

    @property
    def compiled(self) -> bool:
        """Whether the network runs as torch.compile made it."""
        return self.forward is not self._plain

    @property
    def warm_up(self) -> int:
        """Eager steps of a shape on a GPU, after which it may be captured."""
        return WARM_UP if self.ranks.world == 1 else DDP_WARM_UP

    def is_new(self, shape: torch.Size) -> bool:
        """Whether the next step on images of this shape is start-up, which compiles and tunes.

        On a GPU the first `warm_up` of a shape are, on a CPU the first if the network is compiled.
        """
        warm_up = self.warm_up if self.found_inf.is_cuda else int(self.compiled)
        return self.seen[shape] < warm_up

    def __call__(
        self, images: Tensor, labels: Tensor, batch: Batch, lr: float, momentum: float
    ) -> None:
        """Train on images (B, C, H, W) float32, channels_last, and labels (B,) int64.

        The momentum is beta1 of adam and lamb.
        """
        self.seen[images.shape] += 1
        set_schedule(self.optimizer, lr, momentum)
        self.advance(images, labels, batch, self.phases)

    def advance(self, images: Tensor, labels: Tensor, batch: Batch, phases: Phases) -> None:
        """The device's part of a step; the phases are not enabled where a graph is captured."""
        loss, losses = self._gradients(images, labels, batch, phases)
        optimizer: Any = self.optimizer
        optimizer.found_inf = self.found_inf
        if isinstance(optimizer, LARS):  # it marks them as it reads them for their norms
            optimizer.finds_inf = True
            optimizer.grad_scale = self.scale if self.scaling else None
        else:
            gradients: Any = [p.grad for p in self.parameters]
            self.found_inf.zero_()
            torch._amp_foreach_non_finite_check_and_unscale_(
                gradients, self.found_inf, self.scale.reciprocal()
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.keep_or_restore(self.found_inf)
        if self.average is not None:
            self._follow(*self._means, None)
        if self.scaling:
            torch._amp_update_scale_(self.scale, self.growth, self.found_inf, 2.0, 0.5, 2000)
        weight: float | Tensor = labels.numel()
        if self.infobatch is not None:
            with phases("update"):
                self.infobatch.record(losses, batch, self.found_inf)
                weight = batch.weights.sum(dtype=torch.float64)
        self._count(loss, labels.numel(), weight)

    def _gradients(
        self, images: Tensor, labels: Tensor, batch: Batch, phases: Phases
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward; without the compiler from the step on in which it fails."""
        try:
            return self._forward_backward(images, labels, batch, phases)
        except RuntimeError as error:  # at a first call: the backward is compiled at its own
            from torch._dynamo.exc import TorchDynamoException  # a second to import

            cause = getattr(error, "inner_exception", None)
            if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
                raise cause from error  # which is no failure of the compiler's
            if self._say is None or not isinstance(error, TorchDynamoException):
                raise
            self._say(f"WARNING: the network is not compiled: {reason(error)}")
        # Not within the except: what the failed pass stored for its backward is free by now.
        self.forward = self._plain
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.restore()
        return self._forward_backward(images, labels, batch, phases)

    def _forward_backward(
        self, images: Tensor, labels: Tensor, batch: Batch, phases: Phases
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the loss times the scale; the loss () and the losses (B,), detached."""
        plain, scale = self.infobatch is None, self.scale if self.scaling else None
        if self.mixup:
            images = torch.lerp(images.roll(1, 0), images, self.share)
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast:
            logits = self.forward(images)
        kernels = None if self.mixup else self._kernels
        if kernels is not None and logits.shape[1] <= kernels.max_classes:
            weights = batch.weights
            if plain:  # made in a first step, which no graph holds: plain steps launch no more
                if len(labels) not in self._ones:
                    self._ones[len(labels)] = torch.ones_like(weights)
                weights = self._ones[len(labels)]
            # One launch, or two where classes are many, in the place of a dozen.
            loss, losses, gradient = kernels.cross_entropy_gradient(
                logits,
                labels,
                weights,
                label_smoothing=self.label_smoothing,
                scale=scale,
            )
            logits.backward(gradient)
            return loss, losses
        how: Any = {"reduction": "none", "label_smoothing": self.label_smoothing}
        losses = blended = F.cross_entropy(logits.float(), labels, **how)
        if self.mixup:
            others = F.cross_entropy(logits.float(), labels.roll(1, 0), **how)
            blended = torch.lerp(others, losses, self.share)
        with phases("update"):
            loss = blended.mean() if plain else reference.rescaled_mean(blended, batch.weights)
        (loss if scale is None else loss * scale).backward()
        return loss.detach(), losses.detach()

    @torch.no_grad()
    def _count(self, loss: Tensor, size: int, weight: float | Tensor) -> None:
        skipped = self.found_inf.double()
        total, weights, skips, row, longest = self.counts.unbind()
        row = (row + 1) * skipped
        counts = [
            total + (loss.double() * size).masked_fill(skipped != 0, 0.0),
            weights + weight * (1 - skipped),
            skips + skipped,
            row,
            torch.maximum(longest, row),
        ]
        self.counts.copy_(torch.stack(counts))

    def begin_epoch(self) -> None:
        """Count anew, but for the skipped steps in a row."""
        self.counts[:3].zero_()

    def read_counts(self) -> Counts:
        """What all ranks counted since `begin_epoch`; the host waits for the epoch's steps."""
        total, weight, skipped, _, longest = self.counts.tolist()
        total, weight = self.ranks.total(total, weight)
        return Counts(total / weight if weight else math.nan, int(skipped), int(longest))

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, scores, loss scale and counters, for a checkpoint; of all ranks."""
        total, weight, *rest = self.counts.tolist()
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "infobatch": self.infobatch.state_dict() if self.infobatch is not None else None,
            "scale": self.scale,
            "growth": self.growth,
            "counts": self.counts.new_tensor([*self.ranks.total(total, weight), *rest]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of `state_dict()`; any error is of another model or shape."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.infobatch is not None:
            self.infobatch.load_state_dict(state["infobatch"])
        for name in ("scale", "growth", "counts"):
            getattr(self, name).copy_(state[name])
        if not self.ranks.first:
            self.counts[:2].zero_()
        self.buffers.keep()

    def spread_buffers(self) -> None:
        """Give all ranks the first one's buffers, to evaluate the same model."""
        for model in (self.model, self.average):
            self.ranks.spread(model.buffers() if model is not None else ())
        self.buffers.keep()

    @property
    def result(self) -> nn.Module:
        """What is evaluated and kept: the model, or its exponential mean."""
        return self.model if self.average is None else self.average


def _floats(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *(each for each in model.buffers() if each.is_floating_point())]


class _Guard:
    """The model's buffers as they were before the step, to go back to without asking the host."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self.groups = []
        for group in by_dtype.values():
            good = torch.cat([buffer.reshape(-1) for buffer in group])
            now = torch.empty_like(good)
            views = (_views(flat, group) for flat in (good, now))
            self.groups.append((group, good, now, *views))

    def keep(self) -> None:
        """Take the buffers as they are for good ones."""
        for buffers, _, _, good_views, _ in self.groups:
            torch._foreach_copy_(good_views, buffers)

    def restore(self) -> None:
        """Put the last good ones back."""
        for buffers, _, _, good_views, _ in self.groups:
            torch._foreach_copy_(buffers, good_views)

    @torch.no_grad()
    def keep_or_restore(self, found_inf: Tensor) -> None:
        """Keep the buffers where found_inf is 0, put the last good ones back where it is not."""
        for buffers, good, now, good_views, now_views in self.groups:
            torch._foreach_copy_(now_views, buffers)
            torch.where(found_inf == 0, now, good, out=good)
            torch._foreach_copy_(buffers, good_views)


def _views(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
