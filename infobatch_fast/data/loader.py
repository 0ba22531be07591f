"""Batches of augmented images in the order of an index list, from images resident on the device.

`DaliLoader` is a DALI pipeline, `TorchLoader` its twin in plain torch: both yield the same batches.
Dimensions: N samples, K of them in the epoch, B batch, H x W image, C = 3 channels.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from infobatch_fast.data.augment import augmentation, reflect
from infobatch_fast.errors import UserError, reason, unknown_name

KINDS = ("auto", "dali", "torch")
CHANNELS = 3

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


class EpochPlan(Protocol[BatchT_co]):
    """What a loader must know of an epoch of K samples; `infobatch.Plan` is one."""

    @property
    def epoch(self) -> int:
        """Its number, from 0; with the seed it decides the augmentation."""
        ...

    @property
    def indices(self) -> Tensor:
        """(K,) int64 on the images' device: the samples' numbers, in order of use."""
        ...

    def __len__(self) -> int: ...

    def batch(self, start: int, stop: int) -> BatchT_co:
        """What goes with the samples at positions start to stop, handed on as it is."""
        ...


class Epoch(Generic[BatchT]):
    """The batches of one epoch: `len()` of them, from its start at each iteration.

    Yields (images, labels, batch): images (B, C, H, W) float32 in channels_last memory, labels (B,)
    int64, batch what the plan gave for these samples. The last batch may hold fewer than B.
    """

    def __init__(
        self, length: int, iterate: Callable[[], Iterator[tuple[Tensor, Tensor, BatchT]]]
    ) -> None:
        self._length = length
        self._iterate = iterate

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, BatchT]]:
        return self._iterate()


def _check(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    pad: int,
) -> None:
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != CHANNELS:
        raise ValueError(
            f"images must be uint8 of shape (N, H, W, {CHANNELS}), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be int64 of shape ({images.shape[0]},), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device != images.device:
        raise ValueError(f"labels must be on {images.device} like images, got {labels.device}")
    _check_at_least_1(batch_size=batch_size)
    side = min(images.shape[1:3])
    if not 0 <= pad < side:
        raise ValueError(f"pad must be in [0, {side}), the images' shorter side, got {pad}")
    if len(mean) != CHANNELS:
        raise ValueError(f"mean must hold {CHANNELS} numbers, got {mean}")
    if len(std) != CHANNELS or min(std) <= 0:
        raise ValueError(f"std must hold {CHANNELS} numbers above 0, got {std}")


def _check_at_least_1(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


class _Loader:
    """What both loaders do: check, pad the images once, cut a plan into batches."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        pad: int = 4,
        augment: bool = True,
    ) -> None:
        _check(images, labels, batch_size, mean, std, pad)
        self.batch_size = batch_size
        self.seed = seed
        self.pad = pad if augment else 0
        self.augment = augment
        self._device = images.device
        self._labels = labels
        # In the pixels' units, 0 to 255.
        self._mean = [255 * value for value in mean]
        self._std = [255 * value for value in std]
        # A host sync each, here and not in the first epoch: the numbers come from the host.
        scale = 1 / torch.tensor(self._std, dtype=torch.float32, device=images.device)
        mean_on_device = torch.tensor(self._mean, dtype=torch.float32, device=images.device)
        self._normalisation = mean_on_device, scale
        self._size = height, width = images.shape[1], images.shape[2]
        if self.pad:
            rows = reflect(height, self.pad, images.device)
            columns = reflect(width, self.pad, images.device)
            images = images[:, rows[:, None], columns]
        # With nothing to pad this is the caller's own tensor: a test set is not held twice.
        self._padded = images.contiguous()

    def epoch(self, plan: EpochPlan[BatchT], start_batch: int = 0) -> Epoch[BatchT]:
        """The batches of `plan`, from number start_batch on.

        Args:
            plan: the epoch; its indices must stay as they are until its last batch is out.
            start_batch: batches to leave out, in [0, all]; those that follow do not depend on it.

        Raises:
            ValueError: start_batch is out of range, or the plan's indices are not int64 or not on
                the images' device.
        """
        indices = plan.indices
        if indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(
                "plan.indices must be int64 of shape (K,), "
                f"got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        if indices.device != self._device:
            raise ValueError(
                f"plan.indices must be on {self._device} like images, got {indices.device}"
            )
        batches = -(-len(plan) // self.batch_size)
        if not 0 <= start_batch <= batches:
            raise ValueError(f"start_batch must be in [0, {batches}], got {start_batch}")
        first = min(start_batch * self.batch_size, len(plan))
        return Epoch(batches - start_batch, lambda: self._batches(plan, first))

    def _batches(
        self, plan: EpochPlan[BatchT], first: int
    ) -> Iterator[tuple[Tensor, Tensor, BatchT]]:
        raise NotImplementedError

    def _crops(
        self, plan: EpochPlan[Any], first: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`augmentation` from position first to K: twenty operations an epoch, not a batch."""
        if self.augment:
            return augmentation(self.seed, plan.epoch, first, len(plan), self.pad, device)
        zeros = torch.zeros(len(plan) - first, dtype=torch.int64, device=device)
        return zeros, zeros, zeros.bool()


class TorchLoader(_Loader):
    """The loader in plain torch, which neither syncs with the host nor copies the indices to it.

    Args:
        images: (N, H, W, 3) uint8, on the device that the batches are made on.
        labels: (N,) int64, on the same device.
        batch_size: B.
        mean: of the three channels, in units of the full scale (0 to 1).
        std: the same; images come out as (x / 255 - mean) / std.
        seed: of the augmentation; with the epoch its one source of randomness.
        pad: pixels of reflect padding that the random crop moves in, less than H and W.
        augment: False yields the images themselves, neither cropped nor flipped.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def _batches(
        self, plan: EpochPlan[BatchT], first: int
    ) -> Iterator[tuple[Tensor, Tensor, BatchT]]:
        mean, scale = self._normalisation
        # A view of every crop there is: one gather takes sample, row and column at once.
        n, line, pixel, channel = self._padded.stride()
        offsets = 2 * self.pad + 1
        windows = self._padded.as_strided(
            (len(self._padded), offsets, offsets, *self._size, CHANNELS),
            (n, line, pixel, line, pixel, channel),
        )
        offset_y, offset_x, flip = self._crops(plan, first, self._device)
        flip = flip.view(-1, 1, 1, 1)
        for start in range(first, len(plan), self.batch_size):
            stop = min(start + self.batch_size, len(plan))
            at = slice(start - first, stop - first)
            indices = plan.indices[start:stop]
            pixels = windows[indices, offset_y[at], offset_x[at]]  # (B, H, W, C) uint8
            if self.augment:
                pixels = torch.where(flip[at], pixels.flip(2), pixels)
            images = torch.sub(pixels, mean).mul_(scale).permute(0, 3, 1, 2)
            yield images, self._labels.index_select(0, indices), plan.batch(start, stop)


class DaliLoader(_Loader):
    """The loader as a DALI pipeline, which makes the next batches while one is trained on.

    The pipeline serves one iteration at a time: a new one ends the one before, which raises
    RuntimeError when it is asked for more. Batches already out stay valid.

    Args:
        images: as for `TorchLoader`, and so are labels, batch_size, mean, std, seed, pad, augment.
        prefetch: DALI iterations in flight, the one in use included; 1 looks no further ahead.
        chunk: batches made by one DALI iteration, which share its fixed cost.
        threads: CPU threads of the pipeline; on a GPU they hand arguments over and no more.

    Raises:
        ImportError: DALI is not installed.
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        pad: int = 4,
        augment: bool = True,
        prefetch: int = 2,
        chunk: int = 1,
        threads: int = 2,
    ) -> None:
        super().__init__(
            images, labels, batch_size, mean=mean, std=std, seed=seed, pad=pad, augment=augment
        )
        _check_at_least_1(prefetch=prefetch, chunk=chunk, threads=threads)
        # Imported here: the package and the torch loader work without DALI.
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
        from nvidia.dali.types import DALIDataType

        self._span = batch_size * chunk
        self._iteration = object()  # the one that the pipeline serves
        self._source = source = _Source(self._padded, self._span)
        # DALI's graph holds its callbacks in a cycle; they must not hold the images in it too.
        held = weakref.proxy(source)
        self._pipeline = Pipeline(
            batch_size=self._span,
            num_threads=threads,
            device_id=self._device.index,  # None on the CPU
            prefetch_queue_depth=prefetch,
        )
        with self._pipeline:
            pixels = fn.external_source(
                lambda iteration: held.pixels(iteration),
                device="cpu" if source.stream is None else "gpu",
                layout="HWC",
                dtype=DALIDataType.UINT8,
                # On a GPU, True is a race: nothing orders DALI's reading after the gather.
                no_copy=False,
                cuda_stream=source.stream,
            )
            crop_y, crop_x, flip = fn.external_source(
                lambda iteration: held.crops(iteration),
                num_outputs=3,
                dtype=[DALIDataType.FLOAT, DALIDataType.FLOAT, DALIDataType.INT32],
                ndim=0,
            )
            images_out = fn.crop_mirror_normalize(
                pixels,
                crop=self._size,
                crop_pos_y=crop_y,
                crop_pos_x=crop_x,
                mirror=flip,
                mean=self._mean,
                std=self._std,
                dtype=DALIDataType.FLOAT,
                output_layout="HWC",
            )
            self._pipeline.set_outputs(images_out)
        self._pipeline.build()

    def _batches(
        self, plan: EpochPlan[BatchT], first: int
    ) -> Iterator[tuple[Tensor, Tensor, BatchT]]:
        self._iteration = mine = object()
        self._drain()
        self._source.start(plan.indices, first, self.pad, self._crops(plan, first, "cpu"))
        # Outputs come in the order of their inputs, and the n-th input is of the n-th span.
        for begin in range(first, len(plan), self._span):
            (output,) = self._run()
            # Without a copy. DALI frees what it gave out by DLPack once the tensor and its views
            # are gone and after that a thread of its own has waited for the whole device: a buffer
            # is not used anew while a kernel, of whichever stream, still reads it.
            images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
            for start in range(begin, min(begin + self._span, len(plan)), self.batch_size):
                stop = min(start + self.batch_size, len(plan))
                labels = self._labels.index_select(0, plan.indices[start:stop])
                yield images[start - begin : stop - begin], labels, plan.batch(start, stop)
                if self._iteration is not mine:
                    raise RuntimeError("this iteration has ended: its loader has begun another one")
        self._drain()

    def _run(self) -> Any:
        if self._source.stream is None:
            return self._pipeline.run()
        # The current stream waits for the output; the host does not.
        return self._pipeline.run(torch.cuda.current_stream(self._device))

    def _drain(self) -> None:
        """Stop the source and drop what it has prefetched, so that the next epoch starts clean."""
        self._source.stop()
        with suppress(StopIteration):
            while True:
                self._run()
        self._pipeline.reset()


class _Source:
    """What a pipeline asks for its input, in the consumer's thread, `prefetch` iterations ahead.

    Args:
        padded: (N, H + 2 pad, W + 2 pad, C) uint8.
        span: samples of an iteration; the last one of an epoch has fewer.
    """

    def __init__(self, padded: Tensor, span: int) -> None:
        self.stream: torch.cuda.Stream | None = None
        self._padded = padded
        self._span = span
        self._indices: Tensor | None = None
        if padded.is_cuda:
            self.stream = torch.cuda.Stream(padded.device)
            # Its memory must not be used anew while a gather in this stream still reads it.
            padded.record_stream(self.stream)

    def start(
        self, indices: Tensor, first: int, pad: int, crops: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Serve the samples from position first on, augmented by crops, (K - first,) each."""
        # DALI takes an offset as a share of the room, and rounds what it makes of it.
        self._crops = [
            crops[0].float().div_(max(2 * pad, 1)).numpy(),
            crops[1].float().div_(max(2 * pad, 1)).numpy(),
            crops[2].int().numpy(),
        ]
        self._indices = indices[first:]
        if self.stream is not None:
            # The images were padded and the plan was drawn in the consumer's stream.
            self.stream.wait_stream(torch.cuda.current_stream(indices.device))
            indices.record_stream(self.stream)

    def stop(self) -> None:
        """Serve nothing more, and let the plan go."""
        self._indices = None

    def pixels(self, iteration: int) -> Any:
        """(span, H + 2 pad, W + 2 pad, C) uint8."""
        indices = self._at(iteration)
        if self.stream is None:
            # As numpy: of a torch tensor DALI wants to know the CUDA stream, and there is none.
            return self._padded.index_select(0, indices).numpy()
        with torch.cuda.stream(self.stream):
            # DALI copies it in this stream, which its memory belongs to: dropped right after, it
            # can only go to a later gather in this stream, which runs behind the copy.
            return self._padded.index_select(0, indices)

    def crops(self, iteration: int) -> tuple[Any, ...]:
        """Crop positions in [0, 1], y and x (span,) float32 each, and flips (span,) int32."""
        self._at(iteration)
        span = slice(iteration * self._span, (iteration + 1) * self._span)
        return tuple(values[span] for values in self._crops)

    def _at(self, iteration: int) -> Tensor:
        start = iteration * self._span
        if self._indices is None or start >= self._indices.numel():
            raise StopIteration
        return self._indices[start : start + self._span]


def make_loader(
    kind: str,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    prefetch: int = 2,
    chunk: int = 1,
    threads: int = 2,
    **options: Any,
) -> tuple[DaliLoader | TorchLoader, str | None]:
    """A loader by name: auto is DALI where it works, else torch.

    Args:
        kind: auto, dali or torch.
        images: as for `TorchLoader`.
        labels: the same.
        batch_size: the same.
        prefetch: as for `DaliLoader`; torch has no use for it.
        chunk: the same.
        threads: the same.
        options: mean, std, seed, pad and augment of `TorchLoader`.

    Returns:
        The loader; and where auto is torch, one line that says why, else None.

    Raises:
        UserError: there is no such kind, or dali was asked for and does not import.
        ValueError: an argument is out of range; the message names it.
    """
    if kind not in KINDS:
        raise UserError(unknown_name("loader", kind, KINDS))
    _check_at_least_1(prefetch=prefetch, chunk=chunk, threads=threads)
    note = None
    if kind != "torch":
        ahead = {"prefetch": prefetch, "chunk": chunk, "threads": threads}
        try:
            _import_dali()
            return DaliLoader(images, labels, batch_size, **ahead, **options), None
        except ImportError as error:
            if kind == "dali":
                raise UserError(
                    f"loader dali needs NVIDIA DALI, which does not import ({reason(error)}): "
                    'pip install "nvidia-dali-cuda130>=2.4,<2.5", or choose the loader torch'
                ) from error
            note = f"WARNING: loader auto is torch, as DALI does not import ({reason(error)})"
        except torch.OutOfMemoryError:
            raise  # not DALI's, and the torch loader would need the same
        except RuntimeError as error:  # of DALI itself: a driver too old for it, say
            if kind == "dali":
                raise UserError(f"loader dali does not work here: {reason(error)}") from error
            note = f"WARNING: loader auto is torch, as DALI does not work here ({reason(error)})"
    return TorchLoader(images, labels, batch_size, **options), note


def _import_dali() -> None:
    try:
        import_module("nvidia.dali.fn")
    except Exception as error:  # of a library that does not load, or of DALI under python -OO
        raise ImportError(reason(error)) from error
