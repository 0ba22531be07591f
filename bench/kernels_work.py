"""What a case of the kernels' benchmark is made of, and the bytes that each kernel moves.

Dimensions: N samples, K kept in all, B batch, C classes, P elements of the parameters, R
repetitions with buffers of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from kernels_checks import agree
from torch import Tensor

from infobatch_fast.kernels.select import Kernels

MOST_COPIES, COPIED_BYTES = 64, 2**30

Outputs = tuple[Tensor, ...]
Call = Callable[[int], Outputs]  # works on the buffers of one of the R repetitions
GetKernels = Callable[[], Kernels]  # raises where they failed to prove themselves


@dataclass(frozen=True)
class Work:
    """A case with its buffers in memory.

    Attributes:
        sides: what makes each side's call, by name.
        check: raises Mismatch unless the outputs of a first call, on repetition 0, are right.
        moved: bytes that a repetition moves, of `bytes_moved`.
        copies: R.
        more: for the row.
    """

    sides: dict[str, Callable[[], Call]]
    check: Callable[[Outputs], None]
    moved: int
    copies: int = 1
    more: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        kernel: its name.
        size: for the row.
        sides: names, ours first.
        build: allocates the buffers.
        clock: "device", or "wall" where the host's part is to be in it.
    """

    kernel: str
    size: dict[str, int]
    sides: tuple[str, ...]
    build: Callable[[], Work]
    clock: str = "device"


def bytes_moved(
    kernel: str, *, n_all: int = 0, kept: int = 0, batch: int = 0, classes: int = 0, params: int = 0
) -> int:
    """Bytes that our launches read and write; every side's GB/s are of these.

    - threshold: reads 4 N of scores.
    - partition: reads them twice, to count and to place, and writes 4 N of positions (8 N from
      N = 2**31 on).
    - choose: reads K positions, 4 each (the sector that each lies in has 32), and writes 8 K of
      indices and 4 K of weights.
    - shuffle: writes 8 N of indices.
    - choosing, sample: threshold, partition and choose.
    - update: reads 16 a sample (loss, weight, index of 8) and writes 4 of score and 4 of slope;
      its backward pass reads the slope and writes the gradient, 4 each.
    - record: reads loss and index, writes the score: 16 a sample.
    - cross_entropy: reads and writes B C logits and gradients in bfloat16; a sample's label of 8,
      its weight and its loss of 4 besides. Left out is that a launch of its own reads losses and
      weights where a batch is large: 8 a sample, under 2%.
    - lars: its norms read parameters and gradients, its step reads these and the momentum, and
      writes parameters and momentum: 7 P float32.
    - lamb: reads the gradients for one that is not finite; parameters, gradients and both moments,
      and writes these; parameters and moments, and writes the parameters: 1 + 6 + 4 times P.
    - launch: nothing.

    The sums of a program or a tensor, which the launches hand on to each other, are left out.

    Args:
        kernel: its name.
        n_all: N.
        kept: K.
        batch: B.
        classes: C.
        params: P.
    """
    position = 4 if n_all < 1 << 31 else 8
    match kernel:
        case "threshold":
            return 4 * n_all
        case "partition":
            return (8 + position) * n_all
        case "choose":
            return (position + 12) * kept
        case "shuffle":
            return 8 * n_all
        case "choosing" | "sample":
            return (12 + position) * n_all + (position + 12) * kept
        case "update":
            return 32 * batch
        case "record":
            return 16 * batch
        case "cross_entropy":
            return 4 * batch * classes + 16 * batch
        case "lars":
            return 28 * params
        case "lamb":
            return 44 * params
        case "launch":
            return 0
    raise ValueError(f"kernel must be one of those above, got {kernel}")


def copies_of(moved: int) -> int:
    """R: as many as make the launch of a graph small, within a bound on their memory."""
    return max(1, min(MOST_COPIES, COPIED_BYTES // max(moved, 1)))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function as a whole, for this very size; fails where there is a break."""
    torch._dynamo.reset()  # sizes seen before would count against the limit on them
    return torch.compile(function, fullgraph=True, dynamic=False)


def each(get: Callable[[], Callable[..., Any]], sources: Sequence[Any], *rest: Any) -> Any:
    """A maker of the call on one of the sources and the rest of the arguments."""

    def make() -> Call:
        function = get()
        return lambda i: _outputs(function(sources[i], *rest))

    return make


def pair(function: Callable[..., Any], sources: Sequence[Any], *rest: Any) -> tuple[Any, Any]:
    """The makers of the calls of torch's operations, as they are and compiled."""
    plain = each(lambda: function, sources, *rest)
    return plain, each(lambda: compiled(function), sources, *rest)


def _outputs(result: Any) -> Outputs:
    return result if isinstance(result, tuple) else (result,)


def check_all(wanted: Sequence[tuple[str, Tensor, float]], outputs: Outputs) -> None:
    """Raise Mismatch unless each output agrees with its name, values and relative error."""
    for (name, want, relative), got in zip(wanted, outputs, strict=True):
        agree(name, got, want, relative)
