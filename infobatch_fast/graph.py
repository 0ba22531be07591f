"""The training step as CUDA graphs: one launch a step where the eager one has thousands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infobatch_fast.errors import reason
from infobatch_fast.infobatch import Batch
from infobatch_fast.schedule import set_schedule
from infobatch_fast.step import TrainStep
from infobatch_fast.telemetry import Phases

WARM_UP = 3  # eager steps of a size before its capture: they tune, compile and allocate
MOST = 2  # graphs: of the full batch, and of the one partial batch of full epochs


class GraphStep:
    """A training step whose device part is captured once for each batch size and then replayed.

    The first steps of a size run eagerly, on real batches, so that capturing trains on nothing. The
    batch is copied into static buffers; learning rate and momentum are written into the tensors
    that the optimizer holds. A size beyond the first `MOST` to come often stays eager.

    The time of the update is in that of the step: events inside a graph cannot be read.

    Args:
        step: whose state the graphs work on; see `obstacle`.
        say: told, once, if a capture fails; every step is eager then.

    Raises:
        ValueError: the step cannot be captured.
    """

    def __init__(self, step: TrainStep, say: Callable[[str], None]) -> None:
        why = obstacle(step)
        if why is not None:
            raise ValueError(f"step must be one that a CUDA graph can hold: {why}")
        self.step, self._say = step, say
        self._most = MOST
        self._untimed = Phases(step.found_inf.device, enabled=False)
        self._seen: dict[int, int] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    def __call__(
        self, images: Tensor, labels: Tensor, batch: Batch, lr: float, momentum: float
    ) -> None:
        """Train on one batch; as `TrainStep`'s."""
        size = labels.numel()
        inputs = (images, labels, *batch)
        if size not in self._graphs:
            self._seen[size] = self._seen.get(size, 0) + 1
            if self._seen[size] <= WARM_UP or len(self._graphs) >= self._most:
                return self.step(images, labels, batch, lr, momentum)
            try:
                self._graphs[size] = self._capture(inputs)
            except RuntimeError as error:  # nothing was trained: what is captured does not run
                self._most = 0
                self.step.optimizer.zero_grad(set_to_none=True)
                self._say(f"WARNING: no CUDA graph, every step runs eagerly: {reason(error)}")
                return self.step(images, labels, batch, lr, momentum)
        graph, static = self._graphs[size]
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        set_schedule(self.step.optimizer, lr, momentum)
        graph.replay()

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        static = tuple(torch.empty_like(tensor) for tensor in inputs)
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        images, labels, indices, weights = static
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        # The loader's threads go on with CUDA calls of their own, which are none of the graph's.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.step.advance(images, labels, Batch(indices, weights), self._untimed)
        return graph, static


def obstacle(step: TrainStep) -> str | None:
    """Why a step cannot be captured, in words; None if it can.

    Args:
        step: looked at.
    """
    if step.found_inf.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    for group in step.optimizer.param_groups:
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        if not isinstance(group["lr"], Tensor) or not isinstance(momentum, Tensor):
            name = type(step.optimizer).__name__
            return f"{name} holds its learning rate or momentum as a number, which a graph freezes"
    return None
