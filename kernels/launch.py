"""How a kernel is launched, and what it can take."""

from typing import Any

import torch
import triton
from torch import Tensor


@triton.jit
def _no_kernel():
    pass


# Triton interprets where TRITON_INTERPRET=1 was set before it was imported.
INTERPRETED = not isinstance(_no_kernel, triton.JITFunction)


def launch(
    kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Launch a kernel on the device of its first argument: Triton would take the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=True)


def check(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise TypeError or ValueError unless a kernel can take the tensor, which is contiguous.

    Args:
        name: in the message.
        tensor: the argument.
        dtype: one or several.
        shape: None is (N,), any N; () takes a tensor of one element, too.
        device: None is any that kernels run on.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    fits = tensor.dim() == 1 if shape is None else tensor.shape == shape
    if not fits and not (shape == () and tensor.numel() == 1):
        want = "(N,)" if shape is None else shape
        raise ValueError(f"{name} must have shape {want}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(f"{name} must be on a CUDA device, got {tensor.device}")
