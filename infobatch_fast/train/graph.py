"""The training step as CUDA graphs: one launch a step where the eager one has thousands."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infobatch_fast.errors import reason
from infobatch_fast.plan import Batch
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train.schedule import set_schedule
from infobatch_fast.train.step import TrainStep

MOST = 2  # graphs: of the full batch, and of the one partial batch of full epochs
QUIET = 0.05  # s for a loader's threads to come to rest


class GraphStep:
    """A training step whose device part is captured once for each batch size and then replayed.

    Steps run eagerly until `capture`, on real batches, so that capturing trains on nothing. The
    batch is copied into static buffers; learning rate and momentum are written into the tensors
    that the optimizer holds. A size beyond the first `MOST` to come often stays eager.

    Where there is no InfoBatch, images and labels are all that is copied.

    The time of the update is in that of the step: events inside a graph cannot be read.

    Args:
        step: whose state the graphs work on; ValueError where there is an `obstacle`.
        say: told, once, if a capture fails; every step is eager then. None raises instead.
    """

    def __init__(self, step: TrainStep, say: Callable[[str], None] | None = None) -> None:
        why = obstacle(step)
        if why is not None:
            raise ValueError(f"step must be one that a CUDA graph can hold: {why}")
        self.step, self._say = step, say
        self._device = step.found_inf.device
        self._untimed = Phases(self._device, enabled=False)
        self._static: dict[torch.Size, tuple[Tensor, ...]] = {}
        self._graphs: dict[torch.Size, torch.cuda.CUDAGraph] = {}
        self._stream: Any = None  # of all captures: they share a pool, whose memory is a stream's
        self._failed = False

    @property
    def captured(self) -> bool:
        """Whether the step of the largest batch so far is replayed from its graph."""
        return max(self.step.seen, default=None, key=lambda shape: shape[0]) in self._graphs

    @property
    def pending(self) -> bool:
        """Whether `capture` has something to do."""
        return not self._failed and len(self._graphs) < len(self._static)

    def __call__(
        self, images: Tensor, labels: Tensor, batch: Batch, lr: float, momentum: float
    ) -> None:
        """Train on one batch, as `TrainStep`."""
        infobatch, shape = self.step.infobatch, images.shape
        graph = self._graphs.get(shape)
        if graph is None:
            self.step(images, labels, batch, lr, momentum)
            room = len(self._static) < MOST and shape not in self._static
            if room and self.step.seen[shape] >= self.step.warm_up:
                inputs = (images, labels, *batch)
                self._static[shape] = tuple(torch.empty_like(tensor) for tensor in inputs)
            return
        inputs = (images, labels) if infobatch is None else (images, labels, *batch)
        for target, source in zip(self._static[shape], inputs, strict=False):
            target.copy_(source)
        if infobatch is not None:
            infobatch.count(len(labels))
        set_schedule(self.step.optimizer, lr, momentum)
        graph.replay()

    def capture(self) -> None:
        """Capture the sizes that have come often enough.

        Call it when no loader is at work, after an epoch or one that was left. A thread of DALI's
        waits for the whole device when an output is released, which ends the process if a capture
        is under way then: its loader holds the last one until it begins anew, what waits for the
        garbage collector is released before, and the threads of those before it have time to
        finish. A collected Triton module may not be unloaded in a capture either.
        """
        while self.pending:
            shape = next(shape for shape in self._static if shape not in self._graphs)
            try:
                self._graphs[shape] = self._capture(*self._static[shape])
            except Exception as error:  # nothing was trained: what is captured does not run
                self.step.optimizer.zero_grad(set_to_none=True)
                self._failed = True
                if self._say is None:
                    raise
                # Of the capture's end, it says less than what went wrong within.
                why = reason(error.__context__ or error)
                self._say(f"WARNING: no CUDA graph, every step runs eagerly: {why}")

    def _capture(self, images: Tensor, labels: Tensor, indices: Tensor, weights: Tensor) -> Any:
        pool = next((graph.pool() for graph in self._graphs.values()), None)
        with torch.cuda.device(self._device):
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._stream = self._stream or torch.cuda.Stream(self._device)
            how = {"stream": self._stream, "capture_error_mode": "thread_local"}
            collecting, infobatch = gc.isenabled(), self.step.infobatch
            counted = infobatch and (infobatch.recorded, infobatch._unmerged)
            gc.collect()
            gc.disable()
            try:
                torch.cuda.synchronize()
                time.sleep(QUIET)
                with torch.cuda.graph(graph, pool, **how):
                    self.step.advance(images, labels, Batch(indices, weights), self._untimed)
            finally:
                torch.cuda.set_stream(before)  # torch leaves its own where a capture fails
                if infobatch and counted:  # `record` counted a batch, but none was trained
                    infobatch.recorded, infobatch._unmerged = counted
                if collecting:
                    gc.enable()
        return graph


def obstacle(step: TrainStep) -> str | None:
    """Why a step cannot be captured, in words; None if it can."""
    if step.found_inf.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    for group in step.optimizer.param_groups:
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        if not isinstance(group["lr"], Tensor) or not isinstance(momentum, Tensor):
            name = type(step.optimizer).__name__
            return f"{name} holds its learning rate or momentum as a number, which a graph freezes"
    return None
