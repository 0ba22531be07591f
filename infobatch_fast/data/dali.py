"""The loader as a DALI pipeline, which makes the next batch while one is trained on."""

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from torch import Tensor

from infobatch_fast.data.loader import Batches, Loader, ResidentLoader

if TYPE_CHECKING:
    from infobatch_fast.plan import Batch, Plan

PREFETCH = 2  # batches in flight, the one in use included
THREADS = 2  # on a GPU they hand arguments over and no more
# Elements up to which torch works in the calling thread alone. Of epochs that drew their crops in
# larger operations one in four began 65 ms late on an H200's host, of smaller ones none.
SERIAL = 32_768


class Pipelined(Loader):
    """A loader by a DALI pipeline, which serves one iteration at a time.

    A new one ends the one before, which raises RuntimeError when it is asked for more. Batches
    already out stay valid. Between epochs nothing of it waits to be released (see `_batches`), so
    that a CUDA graph can be captured.
    """

    _pipeline: Pipeline
    _stream: Any = None  # of what is gathered for DALI
    _held: Tensor | None = None  # see _batches
    _indices: Tensor  # (K - first,): of the iteration served; none between two
    _serving: object = None  # that iteration

    def _new_pipeline(self, batch_size: int, threads: int, prefetch: int = PREFETCH) -> Pipeline:
        return Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self._device.index,  # None on the CPU
            prefetch_queue_depth=prefetch,
        )

    def _normalised(self, pixels: Any, flip: Any, **crop: Any) -> Any:
        """Within a pipeline: pixels as floats, flipped and cropped."""
        return fn.crop_mirror_normalize(
            pixels,
            mirror=flip,
            mean=[255 * value for value in self.mean],
            std=[255 * value for value in self.std],
            dtype=DALIDataType.FLOAT,
            output_layout="HWC",
            **crop,
        )

    def _batches(self, plan: "Plan", first: int) -> Batches:
        self._serving = mine = object()
        self._drain()
        self._start(plan, first)
        for start, stop in self._spans(plan, first):
            # Without a copy. DALI frees what it gave out by DLPack once the tensor and its views
            # are gone and after that a thread of its own has waited for the whole device: a buffer
            # is not used anew while a kernel, of whichever stream, still reads it. But that wait
            # ends the process if a CUDA graph is being captured. So the last output is held here
            # until the next epoch's first takes its place, whether this epoch ends or is left, and
            # whatever the caller does with its batch; all others are gone well before, by the time
            # that the device has done the epoch's last step.
            output = self._output(plan, start)
            self._held = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
            labels = self.labels.index_select(0, plan.indices[start:stop])
            yield self._held, labels, self._batch(plan, start, stop)
            if self._serving is not mine:
                raise RuntimeError("this iteration has ended: its loader has begun another one")
        self._drain()

    def _start(self, plan: "Plan", first: int) -> None:
        """Serve the samples from position first on."""
        self._epoch, self._positions = plan.epoch, plan.positions("cpu")[first:]

    def _output(self, plan: "Plan", start: int) -> Any:
        """The next batch's, whose first sample is at position start."""
        return self._run()

    def _batch(self, plan: "Plan", start: int, stop: int) -> "Batch":
        return plan.batch(start, stop)

    def _drain(self) -> None:
        """Let the plan go, and drop what was made ahead, so that the next epoch starts clean."""
        self._indices = self.labels[:0]
        with suppress(StopIteration):
            while True:
                self._run()
        self._pipeline.reset()

    def _run(self) -> Any:
        """The next batch (B, H, W, C), for which the current stream waits, and the host does not.

        Batches come in the order in which their pixels and crops were asked for.
        """
        cuda = self._device.type == "cuda"
        (output,) = self._pipeline.run(torch.cuda.current_stream(self._device) if cuda else None)
        return output

    def _span(self, number: int) -> slice:
        """Of batch `number` among the samples served; DALI asks `PREFETCH` batches ahead."""
        start = number * self.batch_size
        if start >= len(self._indices):
            raise StopIteration
        return slice(start, start + self.batch_size)


class DaliLoader(Pipelined, ResidentLoader):
    """The batches of `TorchLoader`, by a DALI pipeline."""

    def __post_init__(self, images: Tensor) -> None:
        super().__post_init__(images)
        self._arguments: tuple[Any, ...] = ()  # crops of the next batches, see `_crops_of`
        if images.is_cuda:
            self._stream = torch.cuda.Stream(images.device)
            # Its memory must not be used anew while a gather in this stream still reads it.
            self._padded.record_stream(self._stream)
        # DALI's graph holds its callbacks in a cycle; they must not hold the images in it too.
        me = weakref.proxy(self)
        self._pipeline = self._new_pipeline(self.batch_size, THREADS)
        with self._pipeline:
            pixels = fn.external_source(
                lambda number: me._pixels(number),
                device="gpu" if images.is_cuda else "cpu",
                layout="HWC",
                dtype=DALIDataType.UINT8,
                # On a GPU, True is a race: nothing orders DALI's reading after the gather.
                no_copy=False,
                cuda_stream=self._stream,
            )
            crop_y, crop_x, flip = fn.external_source(
                lambda number: me._crops_of(number),
                num_outputs=3,
                dtype=[DALIDataType.FLOAT, DALIDataType.FLOAT, DALIDataType.INT32],
                ndim=0,
            )
            crop = {"crop": self._size, "crop_pos_y": crop_y, "crop_pos_x": crop_x}
            self._pipeline.set_outputs(self._normalised(pixels, flip, **crop))
        self._pipeline.build()

    def _start(self, plan: "Plan", first: int) -> None:
        super()._start(plan, first)
        self._indices = plan.indices[first:]
        if self._stream is not None:
            # The images were padded and the plan was drawn in the consumer's stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            plan.indices.record_stream(self._stream)

    def _crops_of(self, number: int) -> list[Any]:
        """Crop positions in [0, 1], y and x (B,) float32 each, and flips (B,) int32."""
        span, together = self._span(number), max(1, SERIAL // self.batch_size)
        if number % together == 0:
            positions = self._positions[span.start : span.start + together * self.batch_size]
            y, x, flip = self._crops(self._epoch, positions)
            # DALI takes an offset as a share of the room, and rounds what it makes of it.
            room = max(2 * self.pad, 1)
            drawn = y.float() / room, x.float() / room, flip.int()
            self._arguments = tuple(each.numpy() for each in drawn)
        at = number % together * self.batch_size
        return [values[at : at + self.batch_size] for values in self._arguments]

    def _pixels(self, number: int) -> Any:
        """(B, H + 2 pad, W + 2 pad, C) uint8."""
        indices = self._indices[self._span(number)]
        if self._stream is None:
            # As numpy: of a torch tensor DALI wants to know the CUDA stream, and there is none.
            return self._padded.index_select(0, indices).numpy()
        with torch.cuda.stream(self._stream):
            # DALI copies it in this stream, which its memory belongs to: dropped right after, it
            # can only go to a later gather in this stream, which runs behind the copy.
            return self._padded.index_select(0, indices)
