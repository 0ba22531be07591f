"""Folders of images by DALI: files by an index list, decoded on a GPU where there is one."""

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIInterpType
from torch import Tensor

from infobatch_fast.data.dali import PREFETCH, Pipelined
from infobatch_fast.data.folder import GREY_WINDOW, Files

if TYPE_CHECKING:
    from infobatch_fast.plan import Batch, Plan

READERS, PART = 16, 16  # threads that wait for the disk, and files that one reads at a time


class DaliFolderLoader(Pipelined):
    """The batches of `WorkerLoader` of the same files, by a DALI pipeline.

    Pixels before the resizing are Pillow's on a CPU; after it they differ by rounding. A GPU's
    decoder rounds otherwise, and smooths colours less.

    A batch with a file that DALI cannot decode ends its pipeline. The file is then looked for, a
    grey image of weight 0 takes its place from here on, and a new pipeline goes on.
    """

    smooth = False  # colours as on a CPU: slower on a GPU, and for comparisons

    def __post_init__(self, images: Files) -> None:
        super().__post_init__(images)
        self._files, self._threads = images, ThreadPoolExecutor(READERS)
        self._build()

    def _build(self) -> None:
        me, files = weakref.proxy(self), self._files
        side = files.sides[0] if self.augment else files.test_side
        self._pipeline = self._new_pipeline(self.batch_size, max(1, files.workers))
        with self._pipeline:
            encoded, anchor, shape, flip = fn.external_source(
                lambda number: me._encoded(number),
                num_outputs=4,
                dtype=[DALIDataType.UINT8, *[DALIDataType.INT32] * 3],
                ndim=[1, 1, 1, 0],
            )
            pixels: Any = fn.decoders.image_slice(
                encoded,
                anchor,
                shape,
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                **self._decoding(),
            )
            pixels = fn.resize(pixels, size=[side, side], interp_type=DALIInterpType.INTERP_LINEAR)
            self._pipeline.set_outputs(self._normalised(pixels, flip))
        self._pipeline.build()

    def _decoding(self) -> dict[str, Any]:
        if self._device.type == "cuda":
            return {"device": "mixed", "jpeg_fancy_upsampling": self.smooth}
        return {"device": "cpu"}

    def _start(self, plan: "Plan", first: int) -> None:
        super()._start(plan, first)
        self._indices = plan.indices[first:].cpu()  # the epoch's one host sync
        self._first = first
        self._reading: dict[int, Iterator[Any]] = {}

    def _encoded(self, number: int) -> tuple[Any, ...]:
        """Files' bytes, windows and flips of batch `number`; the next one's are read meanwhile."""
        span, files = self._span(number), self._files
        for each in (number, number + 1):
            if each not in self._reading:
                rows = files.rows[self._numbers(each * self.batch_size)]
                self._reading[each] = self._threads.map(self._read, rows.split(PART))
        read_all = chain.from_iterable(self._reading.pop(number))
        contents, read, why = zip(*read_all, strict=True)
        numbers = self._numbers(span.start)
        files.note(numbers, list(zip(read, why, strict=True)))
        positions = self._positions[span]
        windows, flips = files.windows(numbers, self.seed, self._epoch, positions, self.augment)
        anchors, shapes = (each.int().contiguous().numpy() for each in windows.split(2, 1))
        return list(contents), anchors, shapes, flips.int().numpy()

    def _read(self, rows: Tensor) -> list[tuple[Any, int, str]]:
        return [self._files.read(row) for row in rows.tolist()]

    def _numbers(self, start: int, batches: int = 1) -> Tensor:
        """Of the samples from `start` on among those served."""
        return self._indices[start : start + batches * self.batch_size]

    def _batch(self, plan: "Plan", start: int, stop: int) -> "Batch":
        numbers = self._numbers(start - self._first)
        return self._files.weighed(plan.batch(start, stop), numbers)

    def _output(self, plan: "Plan", start: int) -> Any:
        while True:
            try:
                return self._run()
            except RuntimeError:
                numbers = self._numbers(start - self._first, PREFETCH + 1)
                if not (found := self._undecodable(numbers)):
                    raise
            # Not within the except, which holds the failed pipeline's frames.
            self._files.note(torch.tensor(list(found)), [(0, why) for why in found.values()])
            self._build()
            self._start(plan, start)

    def _drain(self) -> None:
        try:
            super()._drain()
        except RuntimeError:  # of a batch that was made ahead, and that nobody takes
            self._build()

    def _undecodable(self, numbers: Tensor) -> dict[int, str]:
        """Which of these samples DALI fails at, one by one, and what Pillow says of them.

        By itself a sample's failure leaves no work behind: that of its batch crashed DALI 2.4.
        """
        found, pipeline = {}, None
        rows = self._files.rows[numbers].tolist()
        for number, row in zip(numbers.tolist(), rows, strict=True):
            pipeline = pipeline or self._decoder()
            try:
                pipeline.feed_input("encoded", [self._files.read(row)[0]])
                pipeline.run()
            except RuntimeError:
                pipeline = None
                _, (_, why) = self._files.fetch((row, GREY_WINDOW, False, 1))
                found[number] = why or "not decoded by DALI"
        return found

    def _decoder(self) -> Pipeline:
        pipeline = self._new_pipeline(1, 1, prefetch=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(encoded, **self._decoding()))
        pipeline.build()
        return pipeline
