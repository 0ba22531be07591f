"""What the kernels' benchmark compares, by kernel and size.

The sides: "ours", the Triton kernels; "torch", the operations that stand in for them, as
`kernels/reference.py` and the optimizers with fused=False have them; "compiled", these by
torch.compile without a break, where that can be done; "loop", an optimizer that goes from tensor to
tensor, which does less than the others: it would take a step whose gradients are not finite.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from kernels_epoch import epoch_work
from kernels_step import cross_entropy_work, optimizer_work, record_work, update_work
from kernels_work import Call, Case, GetKernels, Work
from torch import Tensor


def make_cases(
    sizes: Sequence[int],
    batches: Sequence[tuple[int, int]],
    params: Callable[[], Sequence[Tensor]],
    kernels: GetKernels,
    device: torch.device,
    seed: int,
) -> list[Case]:
    """The cases of the benchmark, but for the launch floor.

    Args:
        sizes: N of those that an epoch takes.
        batches: B and C of those that a step takes.
        params: float32 tensors on the device, of the optimizers.
        kernels: gives the Triton kernels.
        device: of the buffers.
        seed: of the values.
    """
    cases = []
    three = ("ours", "torch", "compiled")
    for samples in sizes:
        for kernel in ("threshold", "partition", "choose", "shuffle", "choosing"):
            build = partial(epoch_work, kernel, samples, kernels, device, seed)
            cases.append(Case(kernel, {"samples": samples}, three, build))
        build = partial(epoch_work, "sample", samples, kernels, device, seed)
        cases.append(Case("sample", {"samples": samples}, three[:2], build, "wall"))
    for kernel, make in (("update", update_work), ("record", record_work)):
        for batch in dict.fromkeys(batch for batch, _ in batches):
            build = partial(make, batch, kernels, device, seed)
            cases.append(Case(kernel, {"batch_size": batch}, three, build))
    for batch, classes in batches:
        build = partial(cross_entropy_work, batch, classes, kernels, device, seed)
        size = {"batch_size": batch, "classes": classes}
        cases.append(Case("cross_entropy", size, three, build))
    for kernel in ("lars", "lamb"):
        build = partial(optimizer_work, kernel, params, seed)
        cases.append(Case(kernel, {}, (*three, "loop"), build))
    return cases


def launch_case(device: torch.device) -> Case:
    """The floor under every launch: an empty Triton kernel, and torch's filling of an element."""

    def build() -> Work:
        one = torch.zeros(1, device=device)

        def ours() -> Call:
            from kernels_empty import launch_empty  # needs Triton

            def call(i: int) -> tuple[Tensor, ...]:
                launch_empty(one)
                return ()

            return call

        return Work(
            {"ours": ours, "torch": lambda: lambda i: (one.zero_(),)}, lambda outputs: None, 0, 64
        )

    return Case("launch", {}, ("ours", "torch"), build)
