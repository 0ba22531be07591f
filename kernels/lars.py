"""LARS for all tensors of a model in three launches, in place and without a host sync.

The plain form is that of `infobatch_fast.train.optim`. Dimensions: T float32 tensors of n elements
each (n differs), cut into B blocks of at most 4096 elements, one program a block. Norms are summed
in a fixed order, so a step is deterministic. Bytes moved, of P elements in all: the norms read 8 P,
the update reads 12 P and writes 8 P.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check, launch

BLOCK = 4096  # elements: 16 a thread, four 16-byte loads in flight from each tensor
WARPS = 8
PARTIALS = 1024  # a rates program sums the partial sums of so many blocks at a time

# Whose alignment must not make another variant: one that is compiled inside a capture breaks it.
_SCALARS = ["found", "scale", "lr", "momentum"]

_WHOLE, _PART = tl.constexpr(True), tl.constexpr(False)  # whether a block is filled


class Lars:
    """T parameters with their momenta, cut into blocks: `measure`, then `update`, make a step.

    Args:
        params: (n,) of any shape, float32, on one device, dense without overlap, none empty.
        momenta: of the same shapes and strides.

    Raises:
        TypeError, ValueError: a tensor is not as said; the message names it.
    """

    def __init__(self, params: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
        self.params, self.momenta = list(params), list(momenta)
        self.device = device = params[0].device
        for p, m in zip(params, momenta, strict=True):
            for name, tensor in (("params", p), ("momenta", m)):
                check(name, tensor.detach().as_strided((1,), (1,)), torch.float32, (1,), device)
            if not is_dense(p.shape, p.stride()):
                raise ValueError(f"params must be dense, got {tuple(p.shape)}, {p.stride()}")
        sizes = [p.numel() for p in params]
        counts = [-(-size // BLOCK) for size in sizes]
        first = torch.tensor([*itertools.accumulate(counts, initial=0)])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(counts))
        number = torch.arange(owner.numel()) - first[owner]
        self.blocks = owner.numel()  # B
        self.owner = owner.to(device, torch.int32)  # (B,) which tensor a block is of
        self.number = number.to(device, torch.int32)  # (B,) how many of its blocks come before
        self.first = first.to(device, torch.int32)  # (T + 1,) where a tensor's blocks begin
        self.sizes = torch.tensor(sizes, device=device)  # (T,) int64
        self.sums = torch.zeros(2 * self.blocks, dtype=torch.float32, device=device)  # by block
        self.rates = torch.zeros(len(sizes), dtype=torch.float32, device=device)
        values = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float32, device=device)
        self.zero, self.one, self.unread = values.split(1)
        self._alive: list[Tensor] = []  # the gradients, until the step is launched
        self._held = _Addresses(2 * len(sizes), device)
        self._grads = _Addresses(len(sizes), device)
        self._point(self.params)  # now: a capture then needs no filling

    def measure(
        self, grads: Sequence[Tensor], scale: Tensor | None = None, found: Tensor | None = None
    ) -> None:
        """The norms of parameters and gradients.

        Args:
            grads: T. One of another dtype, device or memory order is copied.
            scale: () or (1,) float32 that the gradients are divided by, here and in `update`.
            found: () or (1,) float32, set to 1 if a gradient is not finite, else left as it is.
        """
        for name, value in (("scale", scale), ("found", found)):
            if value is not None:
                check(name, value, torch.float32, (), self.device)
        self.scale = self.one if scale is None else scale
        self._point(grads)
        launch(
            _norms_kernel,
            self.blocks,
            *(self.held, self.grads, self.owner, self.number, self.sizes, self.sums),
            *(self.scale, self.unread if found is None else found),
            ALIGNED=self.aligned,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )

    def update(
        self,
        lr: Tensor,
        momentum: Tensor,
        *,
        weight_decay: float,
        eta: float,
        max_trust: float,
        clip: float,
        found: Tensor | None = None,
    ) -> None:
        """Momenta and parameters, by the gradients that were measured, in place.

        Args:
            lr: () or (1,) float32.
            momentum: () or (1,) float32.
            weight_decay: times the parameter, added to the gradient.
            eta: times the norm of the parameter, over that of the gradient: the trust ratio.
            max_trust: the largest trust ratio.
            clip: the largest magnitude of a decayed gradient's element.
            found: () or (1,) float32; where it is not 0 nothing is written.
        """
        found = self.zero if found is None else found
        for name, value in (("lr", lr), ("momentum", momentum), ("found", found)):
            check(name, value, torch.float32, (), self.device)
        launch(
            _rates_kernel,
            len(self.params),
            *(self.sums, self.first, self.rates, lr),
            *(float(eta), float(weight_decay), float(max_trust)),
            PARTIALS=PARTIALS,
            num_warps=WARPS,
        )
        launch(
            _update_kernel,
            self.blocks,
            *(self.held, self.grads, self.owner, self.number, self.sizes, self.rates),
            *(momentum, self.scale, found, float(weight_decay), float(clip), len(self.params)),
            ALIGNED=self.aligned,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        self._alive = []
        # As torch's own operations do: autograd then sees what was changed in place.
        torch.autograd.graph.increment_version([*self.params, *self.momenta])

    def _point(self, grads: Sequence[Tensor]) -> None:
        """Find where the tensors are. Three small launches where one of a kind has moved.

        In a captured graph the gradients' addresses are written by each replay, to memory of the
        graph's own: several graphs and eager steps do not disturb each other.
        """
        grads = list(grads)
        for i, (p, m, g) in enumerate(zip(self.params, self.momenta, grads, strict=True)):
            if p.stride() != m.stride():
                raise ValueError(f"params[{i}] must be {m.stride()} in memory, got {p.stride()}")
            alike = g.dtype == torch.float32 and g.device == self.device and not g.is_neg()
            if g.shape != p.shape or not (alike and _same_order(p.shape, g.stride(), p.stride())):
                grads[i] = torch.empty_like(p, requires_grad=False).copy_(g)
        held = [tensor.data_ptr() for tensor in (*self.params, *self.momenta)]
        places = [g.data_ptr() for g in grads]
        self.aligned = not any(place % 16 for place in (*held, *places))
        table = self._grads
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Not the kept table: an eager step may write that anew between two replays.
            table = _Addresses(len(grads), self.device)
        self.grads, self.held = table.of(places), self._held.of(held)
        self._alive = grads


class _Addresses:
    """A table of addresses on the device (T,) int64, written where one has changed.

    They travel as arguments of multi-tensor kernels: no host buffer has to outlive a copy or stay
    unwritten meanwhile, and a captured graph holds them.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.table = torch.empty(count, dtype=torch.int64, device=device)
        self.written: list[int] = []

    def of(self, addresses: list[int]) -> Tensor:
        if addresses != self.written:
            self.table.zero_()
            torch._foreach_add_(self.table.unbind(), addresses)
            self.written = addresses
        return self.table


def is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether elements of this layout fill one piece of memory, each its own place."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(shape: torch.Size, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    # Along a dimension of size 1 a stride has no meaning, and gradients differ there.
    return one == other or all(
        a == b for size, a, b in zip(shape, one, other, strict=True) if size != 1
    )


@triton.jit
def _of_block(owner, number, sizes, block, BLOCK: tl.constexpr):
    tensor = tl.load(owner + block)
    begin = tl.load(number + block).to(tl.int64) * BLOCK
    return tensor, begin, tl.load(sizes + tensor) - begin


@triton.jit
def _pointer(table, tensor, ALIGNED: tl.constexpr):
    pointer = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(pointer, at, left, WHOLE: tl.constexpr):
    # Only loads without a mask, or with one that is the same for four elements, become vectors.
    mask = None if WHOLE else at < left
    return tl.load(pointer + at, mask=mask, other=None if WHOLE else 0.0)


@triton.jit
def _write(pointer, at, left, values, WHOLE: tl.constexpr):
    tl.store(pointer + at, values, mask=None if WHOLE else at < left)


@triton.jit
def _unscaled(gradient, scale):
    divisor = tl.load(scale)
    if divisor != 1.0:
        gradient = tl.div_rn(gradient, tl.zeros_like(gradient) + divisor)
    return gradient


@triton.jit
def _is_nonfinite(values):
    return (tl.abs(values) < float("inf")) == 0


@triton.jit
def _mark_nonfinite(found, gradient):
    # Several programs may write at once: all write the same.
    tl.store(found, 1.0, mask=tl.max(_is_nonfinite(gradient).to(tl.int32), axis=0) != 0)


@triton.jit
def _norms_block(w_at, g_at, sums, scale, found, left, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    w = _read(w_at, at, left, WHOLE)
    g = _unscaled(_read(g_at, at, left, WHOLE), scale)
    squares = tl.sum(g * g, axis=0)
    tl.store(sums, tl.sum(w * w, axis=0))
    tl.store(sums + 1, squares)
    # A sum of squares that is finite has finite terms; one that is not may have overflowed.
    if _is_nonfinite(squares):
        _mark_nonfinite(found, g)


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _norms_kernel(
    held,  # (2 T,) int64, addresses of (n,) float32: the parameters, the momenta
    grads,  # (T,) int64
    owner,  # (B,) int32
    number,  # (B,) int32
    sizes,  # (T,) int64
    sums,  # (B, 2) float32, written
    scale,  # (1,) float32
    found,  # (1,) float32, written
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tensor, begin, left = _of_block(owner, number, sizes, block, BLOCK)
    w_at = _pointer(held, tensor, ALIGNED) + begin
    g_at = _pointer(grads, tensor, ALIGNED) + begin
    mine = sums + 2 * block
    if left >= BLOCK:
        _norms_block(w_at, g_at, mine, scale, found, left, _WHOLE, BLOCK)
    else:
        _norms_block(w_at, g_at, mine, scale, found, left, _PART, BLOCK)


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _rates_kernel(
    sums,  # (B, 2) float32: of w w, and of g g
    first,  # (T + 1,) int32
    rates,  # (T,) float32, written
    lr,  # (1,) float32
    eta,
    decay,
    max_trust,
    PARTIALS: tl.constexpr,
):
    tensor = tl.program_id(0)
    begin = tl.load(first + tensor)
    end = tl.load(first + tensor + 1)
    of_w = tl.zeros((PARTIALS,), tl.float64)
    of_g = tl.zeros((PARTIALS,), tl.float64)
    while begin < end:  # no range: Triton 3.6's interpreter cannot take its bounds from tensors
        block = begin + tl.arange(0, PARTIALS)
        of_w += tl.load(sums + 2 * block, mask=block < end, other=0.0).to(tl.float64)
        of_g += tl.load(sums + 2 * block + 1, mask=block < end, other=0.0).to(tl.float64)
        begin += PARTIALS
    weight = tl.sqrt(tl.sum(of_w, axis=0)).to(tl.float32)
    gradient = tl.sqrt(tl.sum(of_g, axis=0)).to(tl.float32)
    trust = tl.div_rn(eta * weight, gradient + decay * weight)
    trust = tl.where((weight == 0) | (gradient == 0), 1.0, trust)
    # Compared, not tl.minimum: NaN stays NaN, as with torch's clamp.
    trust = tl.where(trust > max_trust, max_trust, trust)
    tl.store(rates + tensor, tl.load(lr) * trust)


@triton.jit
def _update_block(
    w_at,
    g_at,
    m_at,
    rate,
    momentum,
    scale,
    decay,
    clip,
    left,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    w = _read(w_at, at, left, WHOLE)
    g = _unscaled(_read(g_at, at, left, WHOLE), scale)
    m = _read(m_at, at, left, WHOLE)
    g += decay * w
    g = tl.where(g > clip, clip, g)
    g = tl.where(g < -clip, -clip, g)
    m = g + m * momentum
    _write(m_at, at, left, m, WHOLE)
    _write(w_at, at, left, w - m * rate, WHOLE)


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=_SCALARS)
def _update_kernel(
    held,  # (2 T,) int64, addresses of (n,) float32, which are written
    grads,  # (T,) int64
    owner,  # (B,) int32
    number,  # (B,) int32
    sizes,  # (T,) int64
    rates,  # (T,) float32
    momentum,  # (1,) float32
    scale,  # (1,) float32
    found,  # (1,) float32
    decay,
    clip,
    tensors,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # From the last block: what the norms read last is still in the L2 cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if tl.load(found) == 0:
        tensor, begin, left = _of_block(owner, number, sizes, block, BLOCK)
        w_at = _pointer(held, tensor, ALIGNED) + begin
        m_at = _pointer(held, tensors + tensor, ALIGNED) + begin
        g_at = _pointer(grads, tensor, ALIGNED) + begin
        rate = tl.load(rates + tensor)
        inertia = tl.load(momentum)
        if left >= BLOCK:
            _update_block(w_at, g_at, m_at, rate, inertia, scale, decay, clip, left, _WHOLE, BLOCK)
        else:
            _update_block(w_at, g_at, m_at, rate, inertia, scale, decay, clip, left, _PART, BLOCK)
