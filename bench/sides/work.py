"""What a training step has to do for an image, counted and not timed: FLOP, and bytes moved.

The network runs forward and backward once on fake tensors, which have shapes and dtypes but no
storage, while modes of torch's dispatcher see every operation, those of autograd included. The loss
is in it; scoring and the optimizer are not.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from infobatch_fast.train.step import AUTOCAST

# They move nothing: what they give is a view of their input, or holds no values yet.
_NOTHING = ("_unsafe_view", "as_strided_", "empty", "empty_like", "empty_strided", "new_empty")
_NOTHING += ("new_empty_strided",)
_FILLS = ("copy_", "fill_", "zero_")  # what they write to is not read


class Work(NamedTuple):
    """Of an image, forward and backward.

    Attributes:
        flop: of convolutions and matrix products, two a multiply-add, by torch's own counter.
        bytes: read and written by an eager step; see `traffic`.
    """

    flop: float
    bytes: float


def work_an_image(
    network: nn.Module, batch_size: int, shape: tuple[int, ...] = (3, 32, 32), *, amp: str = "off"
) -> Work:
    """Count a step of a batch, and divide by it: the weights are read once for all its images.

    Args:
        network: in training mode, from images (B, *shape) to logits; it is not changed.
        batch_size: B.
        shape: of an image.
        amp: off, bf16 or fp16.
    """
    fake, flops, moved = FakeTensorMode(), FlopCounterMode(display=False), _Bytes()
    state = {
        name: fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        for name, tensor in network.state_dict(keep_vars=True).items()
    }
    with fake:
        images = torch.empty(batch_size, *shape)
        labels = torch.empty(batch_size, dtype=torch.int64)
        # A fake CPU, whatever is measured: the counts are the same on every machine.
        autocast = torch.autocast("cpu", AUTOCAST.get(amp), enabled=amp != "off")
        with moved, flops:
            with autocast:
                logits = torch.func.functional_call(network, state, (images,))
            F.cross_entropy(logits.float(), labels).backward()
    return Work(flops.get_total_flops() / batch_size, moved.total / batch_size)


class _Bytes(TorchDispatchMode):
    """Adds up the traffic of the operations within."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += traffic(func, args, kwargs or {}, result)
        return result


def traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operation reads and writes in memory: its tensors, each from end to end.

    Batch norm reads the batch twice, for its sums and to apply them. The backward pass of a
    convolution reads its gradient twice where it is two products, of the input's gradient and of
    the weight's. No cache is taken to hold what the operation before has written.
    """
    name = func._schema.name.removeprefix("aten::")
    if func.namespace != "aten" or func.is_view or name in _NOTHING:
        return 0
    makes = name in _FILLS or name.startswith("new_") or name.endswith("_like")
    read = [args[1:] if makes else args, kwargs]
    if "batch_norm" in name:
        read.append(args[: 2 if name.endswith("_backward") else 1])
    elif name == "convolution_backward" and all(args[-1][:2]):
        read.append(args[:1])
    tensors = [leaf for leaf in tree_leaves([read, result]) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
