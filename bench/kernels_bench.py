"""How fast the kernels are, beside torch's own operations: `python bench/kernels_bench.py`.

Each kernel at each size, after each side was shown to do what it must (`sides/kernels.py`):
seconds, and GB/s as a share of a copy's rate in the same run. On a CPU the kernels are absent, and
what is timed is what stands in for them.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Self

import torch
from harness import Bench, Options, main, shown
from sides.kernels import (
    EPOCH,
    Case,
    cross_entropy_case,
    epoch_case,
    kernel_sides,
    lars_case,
    record_case,
)

from infobatch_fast.errors import UserError

TITLES = {
    "epoch": "Kernels of an epoch of N samples (% of a copy's rate, for the bytes that ours move)",
    "step": "Kernels of a training step (% of a copy's rate)",
}
LEAST, MOST = 1000, 2**31  # N: fewer samples are no shuffle that can be told from others
BATCHES = ((200, 10), (200, 100), (1024, 1000))  # B, C


@dataclass(frozen=True)
class KernelsBench(Options):
    """Time the Triton kernels against torch's operations: kernels_bench.jsonl and .png.

    Exit codes: 0 done; 2 a mistake in the input; 130 or 143 stopped by a signal, with what was
    measured kept.

    Attributes:
        sizes: data set sizes N; default 50000 1280000 1000000000 on CUDA, 50000 1000000 on a CPU.
        compiled: time torch.compile of torch's operations as well; some seconds more a row.
    """

    sizes: Annotated[tuple[int, ...], shown("N ...")] = ()
    compiled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            if not LEAST <= size <= MOST:
                raise UserError(f"sizes must be in [{LEAST}, 2**31], got {size}")

    def settle(self, cuda: bool) -> Self:
        """With the sizes."""
        default = (50_000, 1_280_000, 1_000_000_000) if cuda else (50_000, 1_000_000)
        sizes = self.sizes or (default[:1] if self.quick else default)
        return replace(self, sizes=tuple(sorted(set(sizes))))


def measure(bench: Bench, options: KernelsBench) -> None:
    """Every kernel at every size."""
    bench.measure_limits()
    device, seed = bench.device, options.seed

    def compare(part: str, case: dict[str, object], build: Callable[[], Case]) -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # cases of other sizes cannot use each other's memory
        sides = kernel_sides(build, device, options.compiled)
        bench.compare(part, case, sides, seconds=(1.0, 0.1), rounds=10, cold=True)

    for batch, classes in BATCHES:
        case = {"kernel": "cross_entropy", "batch_size": batch, "classes": classes}
        compare("step", case, partial(cross_entropy_case, batch, classes, device, seed))
    compare(
        "step", {"kernel": "record", "batch_size": 200}, partial(record_case, 200, device, seed)
    )
    model = "r50" if device.type == "cuda" else "small"
    compare("step", {"kernel": "lars", "model": model}, partial(lars_case, model, device, seed))
    for samples in options.sizes:
        for kernel in EPOCH:
            case = {"kernel": kernel, "samples": samples}
            compare("epoch", case, partial(epoch_case, kernel, samples, device, seed))


run = partial(main, KernelsBench, "kernels_bench", measure, TITLES)


if __name__ == "__main__":
    sys.exit(run())
