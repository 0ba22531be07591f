"""LARS and LAMB for all tensors of a model in a few launches, in place and without a host sync.

The specification is the plain torch of `LARS` and `LAMB`. Dimensions: T float32 tensors of n
elements each (n differs), cut into B blocks of at most 4096 elements, one program a block; M is the
length of a flat state buffer. Norms are summed in a fixed order, so a step is deterministic.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements: 16 a thread, four 16-byte loads in flight from each tensor
WARPS = 8
PARTIALS = 1024  # a rates program sums the partial sums of so many blocks at a time
COUNTS = 256  # tensors whose step counts one program advances
UNIT = 16  # state elements: each tensor's state starts at a multiple, 64 bytes

# Whose alignment must not make another variant: one that is compiled inside a capture breaks it.
_SCALARS = ["found", "scale", "lr", "momentum", "beta1"]

_WHOLE, _PART = tl.constexpr(True), tl.constexpr(False)  # whether a block is filled


class Blocks:
    """T tensors cut into B blocks: the tables by which a program finds its elements.

    Args:
        params: float32, on one device, dense without overlap, none of them empty.
        starts: where each tensor's state begins in a flat state buffer, in elements; multiples of
            16.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a tensor is empty, has holes or is elsewhere; a start is wrong; or the kernels
            do not run on the device.
    """

    def __init__(self, params: Sequence[Tensor], starts: Sequence[int]) -> None:
        if not params or len(starts) != len(params):
            raise ValueError(f"starts must be one a tensor, got {len(starts)} of {len(params)}")
        self.device = device = params[0].device
        if device.type != "cuda" and isinstance(_norms_kernel, triton.JITFunction):
            rule = "must be on a CUDA device (or TRITON_INTERPRET=1 be set at import)"
            raise ValueError(f"params {rule}, got {device}")
        for p in params:
            if p.dtype != torch.float32:
                raise TypeError(f"params must be float32, got {p.dtype}")
            if p.device != device:
                raise ValueError(f"params must be on one device, {device}, got {p.device}")
            if not p.numel() or not is_dense(p.shape, p.stride()):
                got = f"shape {tuple(p.shape)}, strides {p.stride()}"
                raise ValueError(f"params must be dense and not empty, got {got}")
        if any(start < 0 or start % UNIT for start in starts):
            raise ValueError(f"starts must be multiples of {UNIT}, got {list(starts)}")
        self.shapes = [p.shape for p in params]
        self.strides = [p.stride() for p in params]
        sizes = [p.numel() for p in params]
        self.state_size = max(start + size for start, size in zip(starts, sizes, strict=True))
        counts = [-(-size // BLOCK) for size in sizes]
        first = torch.tensor([*itertools.accumulate(counts, initial=0)])
        owner = torch.repeat_interleave(torch.arange(len(params)), torch.tensor(counts))
        number = torch.arange(owner.numel()) - first[owner]
        self.owner = owner.to(device, torch.int32)  # (B,) which tensor a block is of
        self.number = number.to(device, torch.int32)  # (B,) how many of its blocks come before
        self.first = first.to(device, torch.int32)  # (T + 1,) where a tensor's blocks begin
        self.sizes = torch.tensor(sizes, device=device)  # (T,) int64
        self.starts = torch.tensor(starts, device=device)  # (T,) int64
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self.sums = zeros(2 * owner.numel())  # (B, 2) of squares, by block
        self.rates = zeros(len(params))  # (T,) learning rate times trust
        self.factors = zeros(2 * len(params))  # (T, 2) of LAMB's denominator
        self.zero, self.one = zeros(1), zeros(1).fill_(1.0)
        self.unread = zeros(1)  # takes a mark that nobody asked for
        self._params = _Addresses(len(params), device)
        self._grads = _Addresses(len(params), device)
        self._params.of([p.data_ptr() for p in params])  # now: a capture then needs no filling

    def __len__(self) -> int:
        return self.owner.numel()

    def point(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> "Pointers":
        """Where the tensors are now. Costs three small launches where one of a kind has moved.

        In a captured graph the gradients' addresses are written by each replay, to memory of the
        graph's own: several graphs and eager steps do not disturb each other.

        Args:
            params: (T) tensors of the shapes, strides and device that the blocks were made for.
            grads: their gradients. One of another dtype, device or memory order is copied.

        Raises:
            ValueError: a shape or a parameter's strides differ.
        """
        grads, copies = list(grads), []
        if not len(params) == len(grads) == len(self.shapes):
            rule = f"must be {len(self.shapes)} each"
            raise ValueError(f"params and grads {rule}, got {len(params)} and {len(grads)}")
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            shape, strides = self.shapes[i], self.strides[i]
            if p.shape != shape or p.stride() != strides:
                got = f"{tuple(p.shape)}, {p.stride()}"
                raise ValueError(f"params[{i}] must be {tuple(shape)}, {strides}, got {got}")
            if g.shape != shape:
                rule = f"must have shape {tuple(shape)}"
                raise ValueError(f"grads[{i}] {rule}, got {tuple(g.shape)}")
            alike = g.dtype == torch.float32 and g.device == self.device and not g.is_neg()
            if not (alike and _same_order(shape, g.stride(), strides)):
                copies.append(i)
        made = [torch.empty_like(params[i], requires_grad=False) for i in copies]
        if copies:
            torch._foreach_copy_(made, [grads[i] for i in copies])
        for i, copied in zip(copies, made, strict=True):
            grads[i] = copied
        with torch.cuda.device_of(self.one):
            cuda = self.device.type == "cuda"
            capturing = cuda and torch.cuda.is_current_stream_capturing()
        places = [g.data_ptr() for g in grads]
        if capturing:
            # Not the kept table: an eager step may write that anew between two replays.
            table = _Addresses(len(grads), self.device).of(places)
        else:
            table = self._grads.of(places)
        mine = [p.data_ptr() for p in params]
        if capturing and mine != self._params.held:
            ours = _Addresses(len(params), self.device).of(mine)
        else:
            ours = self._params.of(mine)
        aligned = not any(place % 16 for place in (*places, *mine))
        return Pointers(ours, table, aligned, made)


class Pointers(NamedTuple):
    """Where a step's tensors are; keep it, and the gradients, until the step is launched.

    Attributes:
        params: (T,) int64, addresses on the device.
        grads: (T,) int64.
        aligned: all of them multiples of 16 bytes, which vector loads need.
        copies: of gradients that could not be pointed at.
    """

    params: Tensor
    grads: Tensor
    aligned: bool
    copies: list[Tensor]


class _Addresses:
    """A table of addresses on the device (T,) int64, written where one has changed.

    They travel as arguments of multi-tensor kernels: no host buffer has to outlive a copy or stay
    unwritten meanwhile, and a captured graph holds them.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.table = torch.empty(count, dtype=torch.int64, device=device)
        self.held: list[int] = []
        self._places = self.table.unbind()

    def of(self, addresses: list[int]) -> Tensor:
        if addresses != self.held:
            self.held = []  # Whatever fails from here on, the table is not taken for written.
            self.table.zero_()
            torch._foreach_add_(self._places, addresses)
            self.held = addresses
        return self.table


@lru_cache(4096)
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


def norms(
    blocks: Blocks,
    pointers: Pointers,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """LARS's first half: the sums of squares of parameters and gradients, kept in `blocks`.

    Args:
        blocks: of the parameters.
        pointers: of the step.
        grad_scale: () or (1,) float32 that the gradients are divided by.
        found_inf: () or (1,) float32, set to 1 if a gradient is not finite, else left as it is.

    Raises:
        TypeError, ValueError: a dtype, size or device is wrong.
    """
    scale = _scalar(blocks, "grad_scale", grad_scale, blocks.one)
    found = _scalar(blocks, "found_inf", found_inf, blocks.unread)
    _launch(
        _norms_kernel,
        len(blocks),
        *(pointers.params, pointers.grads, blocks.owner, blocks.number, blocks.sizes),
        *(blocks.sums, scale, found),
        ALIGNED=pointers.aligned,
        BLOCK=BLOCK,
    )


def find_nonfinite(
    blocks: Blocks, pointers: Pointers, found_inf: Tensor, *, grad_scale: Tensor | None = None
) -> None:
    """Mark whether a gradient is not finite, without a sum: what LAMB has to know beforehand.

    Args:
        blocks: of the parameters.
        pointers: of the step.
        found_inf: () or (1,) float32, set to 1 if a gradient is not finite, else left as it is.
        grad_scale: () or (1,) float32 that the gradients are divided by.

    Raises:
        TypeError, ValueError: a dtype, size or device is wrong.
    """
    scale = _scalar(blocks, "grad_scale", grad_scale, blocks.one)
    found = _scalar(blocks, "found_inf", found_inf)
    _launch(
        _find_kernel,
        len(blocks),
        *(pointers.grads, blocks.owner, blocks.number, blocks.sizes, scale, found),
        ALIGNED=pointers.aligned,
        BLOCK=BLOCK,
    )


def lars(
    blocks: Blocks,
    pointers: Pointers,
    buffer: Tensor,
    lr: Tensor,
    momentum: Tensor,
    *,
    weight_decay: float,
    eta: float,
    max_trust: float,
    clip: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """LARS's second half, after `norms`: momentum and parameters, in place.

    Args:
        blocks: of the parameters.
        pointers: of the step, those given to `norms`.
        buffer: (M,) float32, the momentum.
        lr: () or (1,) float32.
        momentum: () or (1,) float32.
        weight_decay: times the parameter, added to the gradient.
        eta: times the norm of the parameter, over that of the gradient: the trust ratio.
        max_trust: the largest trust ratio.
        clip: the largest magnitude of a decayed gradient's element.
        grad_scale: () or (1,) float32 that the gradients are divided by.
        found_inf: () or (1,) float32; where it is not 0 nothing is written.

    Raises:
        TypeError, ValueError: a dtype, size or device is wrong.
    """
    _check_state(blocks, "buffer", buffer, blocks.state_size)
    lr, momentum = _scalar(blocks, "lr", lr), _scalar(blocks, "momentum", momentum)
    scale = _scalar(blocks, "grad_scale", grad_scale, blocks.one)
    found = _scalar(blocks, "found_inf", found_inf, blocks.zero)
    _launch(
        _rates_kernel,
        len(blocks.rates),
        *(blocks.sums, blocks.first, blocks.rates, lr),
        *(float(eta), float(weight_decay), float(max_trust)),
        ADAM=False,
        PARTIALS=PARTIALS,
    )
    _launch(
        _lars_kernel,
        len(blocks),
        *(pointers.params, pointers.grads, buffer, blocks.owner, blocks.number, blocks.sizes),
        *(blocks.starts, blocks.rates, momentum, scale, found),
        *(float(weight_decay), float(clip)),
        ALIGNED=pointers.aligned,
        BLOCK=BLOCK,
        UNIT=UNIT,
    )


def lamb(
    blocks: Blocks,
    pointers: Pointers,
    mean: Tensor,
    square: Tensor,
    count: Tensor,
    lr: Tensor,
    beta1: Tensor,
    *,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_trust: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of LAMB with bias correction, in place.

    Args:
        blocks: of the parameters.
        pointers: of the step.
        mean: (M,) float32, the first moment.
        square: (M,) float32, the second moment.
        count: (T,) float32, the steps taken.
        lr: () or (1,) float32.
        beta1: () or (1,) float32.
        beta2: how much of the second moment stays.
        eps: added to its root, once corrected.
        weight_decay: times the parameter, added to the direction.
        max_trust: the largest trust ratio.
        grad_scale: () or (1,) float32 that the gradients are divided by.
        found_inf: () or (1,) float32; where it is not 0 nothing is written.

    Raises:
        TypeError, ValueError: a dtype, size or device is wrong.
    """
    tensors = len(blocks.rates)
    _check_state(blocks, "mean", mean, blocks.state_size)
    _check_state(blocks, "square", square, blocks.state_size)
    _check_state(blocks, "count", count, tensors)
    lr, beta1 = _scalar(blocks, "lr", lr), _scalar(blocks, "beta1", beta1)
    scale = _scalar(blocks, "grad_scale", grad_scale, blocks.one)
    found = _scalar(blocks, "found_inf", found_inf, blocks.zero)
    tables = blocks.owner, blocks.number, blocks.sizes, blocks.starts
    shape: dict[str, Any] = {"ALIGNED": pointers.aligned, "BLOCK": BLOCK, "UNIT": UNIT}
    _launch(
        _counts_kernel,
        -(-tensors // COUNTS),
        *(count, blocks.factors, beta1, found, float(beta2), float(eps), tensors),
        COUNTS=COUNTS,
    )
    _launch(
        _moments_kernel,
        len(blocks),
        *(pointers.params, pointers.grads, mean, square, *tables, blocks.sums, blocks.factors),
        *(beta1, scale, found, float(beta2), 1.0 - beta2, float(weight_decay)),
        **shape,
    )
    _launch(
        _rates_kernel,
        tensors,
        *(blocks.sums, blocks.first, blocks.rates, lr, 0.0, 0.0, float(max_trust)),
        ADAM=True,
        PARTIALS=PARTIALS,
    )
    _launch(
        _lamb_kernel,
        len(blocks),
        *(pointers.params, mean, square, *tables, blocks.rates, blocks.factors, found),
        float(weight_decay),
        **shape,
    )


def _scalar(
    blocks: Blocks, name: str, value: Tensor | None, default: Tensor | None = None
) -> Tensor:
    if value is None and default is not None:
        return default
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        raise TypeError(f"{name} must be a float32 tensor, got {getattr(value, 'dtype', value)}")
    if value.numel() != 1 or value.device != blocks.device:
        got = f"{value.numel()} on {value.device}"
        raise ValueError(f"{name} must be one element on {blocks.device}, got {got}")
    return value


def _check_state(blocks: Blocks, name: str, value: Tensor, size: int) -> None:
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {value.dtype}")
    if value.dim() != 1 or value.numel() < size or value.stride() != (1,):
        got = f"shape {tuple(value.shape)}, strides {value.stride()}"
        raise ValueError(f"{name} must be a vector of at least {size} elements, got {got}")
    if value.device != blocks.device:
        raise ValueError(f"{name} must be on {blocks.device}, got {value.device}")


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=WARPS, enable_fp_fusion=True)


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
    params,  # (T,) int64, addresses of (n,) float32
    grads,  # (T,) int64, addresses of (n,) float32
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
    w_at = _pointer(params, tensor, ALIGNED) + begin
    g_at = _pointer(grads, tensor, ALIGNED) + begin
    mine = sums + 2 * block
    if left >= BLOCK:
        _norms_block(w_at, g_at, mine, scale, found, left, _WHOLE, BLOCK)
    else:
        _norms_block(w_at, g_at, mine, scale, found, left, _PART, BLOCK)


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _find_kernel(
    grads,  # (T,) int64, addresses of (n,) float32
    owner,  # (B,) int32
    number,  # (B,) int32
    sizes,  # (T,) int64
    scale,  # (1,) float32
    found,  # (1,) float32, written
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tensor, begin, left = _of_block(owner, number, sizes, block, BLOCK)
    g_at = _pointer(grads, tensor, ALIGNED) + begin
    at = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _mark_nonfinite(found, _unscaled(_read(g_at, at, left, _WHOLE), scale))
    else:
        _mark_nonfinite(found, _unscaled(_read(g_at, at, left, _PART), scale))


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _rates_kernel(
    sums,  # (B, 2) float32: of w w, and of g g (LARS) or u u (LAMB)
    first,  # (T + 1,) int32
    rates,  # (T,) float32, written
    lr,  # (1,) float32
    eta,
    decay,
    max_trust,
    ADAM: tl.constexpr,
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
    if ADAM:
        trust = tl.div_rn(weight, gradient)
    else:
        trust = tl.div_rn(eta * weight, gradient + decay * weight)
    trust = tl.where((weight == 0) | (gradient == 0), 1.0, trust)
    # Compared, not tl.minimum: NaN stays NaN, as with torch's clamp.
    trust = tl.where(trust > max_trust, max_trust, trust)
    tl.store(rates + tensor, tl.load(lr) * trust)


@triton.jit
def _lars_block(
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


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _lars_kernel(
    params,  # (T,) int64, addresses of (n,) float32, written
    grads,  # (T,) int64, addresses of (n,) float32
    buffer,  # (M,) float32, written
    owner,  # (B,) int32
    number,  # (B,) int32
    sizes,  # (T,) int64
    starts,  # (T,) int64
    rates,  # (T,) float32
    momentum,  # (1,) float32
    scale,  # (1,) float32
    found,  # (1,) float32
    decay,
    clip,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    # From the last block: what the norms read last is still in the L2 cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if tl.load(found) == 0:
        tensor, begin, left = _of_block(owner, number, sizes, block, BLOCK)
        w_at = _pointer(params, tensor, ALIGNED) + begin
        g_at = _pointer(grads, tensor, ALIGNED) + begin
        m_at = buffer + tl.multiple_of(tl.load(starts + tensor), UNIT) + begin
        rate = tl.load(rates + tensor)
        inertia = tl.load(momentum)
        if left >= BLOCK:
            _lars_block(w_at, g_at, m_at, rate, inertia, scale, decay, clip, left, _WHOLE, BLOCK)
        else:
            _lars_block(w_at, g_at, m_at, rate, inertia, scale, decay, clip, left, _PART, BLOCK)


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=_SCALARS)
def _counts_kernel(
    count,  # (T,) float32, written
    factors,  # (T, 2) float32, written: what the root of the second moment is scaled and offset by
    beta1,  # (1,) float32
    found,  # (1,) float32
    beta2,
    eps,
    tensors,
    COUNTS: tl.constexpr,
):
    if tl.load(found) == 0:
        tensor = tl.program_id(0) * COUNTS + tl.arange(0, COUNTS)
        inside = tensor < tensors
        steps = tl.load(count + tensor, mask=inside, other=0.0) + 1.0
        tl.store(count + tensor, steps, mask=inside)
        # In float64, since 1 - 0.999 loses four digits of seven. exp(n log b) is b to the n.
        steps = steps.to(tl.float64)
        first = 1.0 - tl.exp(steps * tl.log(tl.load(beta1).to(tl.float64)))
        second = 1.0 - tl.exp(steps * tl.log(tl.full((COUNTS,), beta2, tl.float32).to(tl.float64)))
        tl.store(factors + 2 * tensor, (first / tl.sqrt(second)).to(tl.float32), mask=inside)
        tl.store(factors + 2 * tensor + 1, (eps * first).to(tl.float32), mask=inside)


@triton.jit
def _direction(w, m, v, stretch, offset, decay):
    return tl.div_rn(m, offset + tl.sqrt_rn(v) * stretch) + decay * w


@triton.jit
def _moments_block(
    w_at,
    g_at,
    m_at,
    v_at,
    sums,
    stretch,
    offset,
    beta1,
    scale,
    beta2,
    gain,
    decay,
    left,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    w = _read(w_at, at, left, WHOLE)
    g = _unscaled(_read(g_at, at, left, WHOLE), scale)
    m = _read(m_at, at, left, WHOLE)
    v = _read(v_at, at, left, WHOLE)
    blend = 1.0 - beta1
    # From the nearer end, as torch's lerp: exact where blend is 1.
    m = tl.where(blend < 0.5, m + blend * (g - m), g - (g - m) * (1.0 - blend))
    v = v * beta2 + gain * g * g
    _write(m_at, at, left, m, WHOLE)
    _write(v_at, at, left, v, WHOLE)
    u = _direction(w, m, v, stretch, offset, decay)
    u = tl.where(at < left, u, 0.0)
    tl.store(sums, tl.sum(w * w, axis=0))
    tl.store(sums + 1, tl.sum(u * u, axis=0))


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _moments_kernel(
    params,  # (T,) int64, addresses of (n,) float32
    grads,  # (T,) int64, addresses of (n,) float32
    mean,  # (M,) float32, written
    square,  # (M,) float32, written
    owner,  # (B,) int32
    number,  # (B,) int32
    sizes,  # (T,) int64
    starts,  # (T,) int64
    sums,  # (B, 2) float32, written
    factors,  # (T, 2) float32
    beta1,  # (1,) float32
    scale,  # (1,) float32
    found,  # (1,) float32
    beta2,
    gain,
    decay,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    block = tl.program_id(0)
    if tl.load(found) == 0:
        tensor, begin, left = _of_block(owner, number, sizes, block, BLOCK)
        w_at = _pointer(params, tensor, ALIGNED) + begin
        g_at = _pointer(grads, tensor, ALIGNED) + begin
        place = tl.multiple_of(tl.load(starts + tensor), UNIT) + begin
        m_at = mean + place
        v_at = square + place
        mine = sums + 2 * block
        stretch = tl.load(factors + 2 * tensor)
        offset = tl.load(factors + 2 * tensor + 1)
        beta = tl.load(beta1)
        if left >= BLOCK:
            _moments_block(
                w_at,
                g_at,
                m_at,
                v_at,
                mine,
                stretch,
                offset,
                beta,
                scale,
                beta2,
                gain,
                decay,
                left,
                _WHOLE,
                BLOCK,
            )
        else:
            _moments_block(
                w_at,
                g_at,
                m_at,
                v_at,
                mine,
                stretch,
                offset,
                beta,
                scale,
                beta2,
                gain,
                decay,
                left,
                _PART,
                BLOCK,
            )


@triton.jit
def _lamb_block(
    w_at, m_at, v_at, stretch, offset, rate, decay, left, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    w = _read(w_at, at, left, WHOLE)
    m = _read(m_at, at, left, WHOLE)
    v = _read(v_at, at, left, WHOLE)
    u = _direction(w, m, v, stretch, offset, decay)
    _write(w_at, at, left, w - u * rate, WHOLE)


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _lamb_kernel(
    params,  # (T,) int64, addresses of (n,) float32, written
    mean,  # (M,) float32
    square,  # (M,) float32
    owner,  # (B,) int32
    number,  # (B,) int32
    sizes,  # (T,) int64
    starts,  # (T,) int64
    rates,  # (T,) float32
    factors,  # (T, 2) float32
    found,  # (1,) float32
    decay,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    # From the last block: what the moments' kernel wrote last is still in the L2 cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if tl.load(found) == 0:
        tensor, begin, left = _of_block(owner, number, sizes, block, BLOCK)
        w_at = _pointer(params, tensor, ALIGNED) + begin
        place = tl.multiple_of(tl.load(starts + tensor), UNIT) + begin
        m_at = mean + place
        v_at = square + place
        stretch = tl.load(factors + 2 * tensor)
        offset = tl.load(factors + 2 * tensor + 1)
        rate = tl.load(rates + tensor)
        if left >= BLOCK:
            _lamb_block(w_at, m_at, v_at, stretch, offset, rate, decay, left, _WHOLE, BLOCK)
        else:
            _lamb_block(w_at, m_at, v_at, stretch, offset, rate, decay, left, _PART, BLOCK)
