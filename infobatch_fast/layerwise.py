"""What LARS and LAMB share: flat buffers over many tensors, and steps that may be skipped.

M is the length of the flat buffers, T the number of parameter tensors.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

# Elements in a block of a flat buffer. One coefficient a block keeps the index that spreads the
# trust ratios at 1/64 of the parameters' size, and each tensor aligned for vector loads.
BLOCK = 64


class Bucket:
    """Parameters of one device and dtype, each laid into whole blocks of flat buffers (M,).

    The views of a buffer have the parameters' own strides, without which the multi-tensor kernels
    fall back to one launch a tensor. The padding between them stays finite and is never read.
    """

    def __init__(self, params: list[Tensor], slots: Iterable[str], state: dict[Tensor, Any]):
        self.key = _layout(params)
        self.params = params
        device, dtype = params[0].device, params[0].dtype
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = [-(-p.numel() // BLOCK) for p in params]
        owner = torch.repeat_interleave(torch.arange(len(params)), torch.tensor(blocks))
        self._owner = owner.to(device, torch.int32)
        self.flat = torch.zeros(BLOCK * sum(blocks), dtype=dtype, device=device)
        starts = [BLOCK * n for n in itertools.accumulate(blocks, initial=0)][:-1]
        strides = [torch.empty_like(p, device="meta").stride() for p in params]
        shapes = [p.shape for p in params]
        places = list(zip(shapes, strides, starts, strict=True))
        self.views = [self.flat.as_strided(*place) for place in places]
        self.state: dict[str, Tensor] = {}
        for name in slots:
            if name == "step":
                whole = torch.zeros(len(params), dtype=torch.float32, device=device)
                parts = whole.unbind()
            else:
                whole = torch.zeros_like(self.flat)
                parts = [whole.as_strided(*place) for place in places]
            for p, part in zip(params, parts, strict=True):
                if name in state[p]:
                    part.copy_(state[p][name])
                state[p][name] = part
            self.state[name] = whole

    def gradients(self, scale: Tensor | None) -> None:
        """Copies the gradients into `flat`, divided by `scale` (1,) if there is one."""
        grads = [p.grad for p in self.params if p.grad is not None]
        assert len(grads) == len(self.views)
        torch._foreach_copy_(self.views, grads)
        if scale is not None:
            self.flat.div_(scale)

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """The Euclidean norm of each tensor, (T,) float32 (float64 for float64)."""
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=self.accumulate))

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number or 0-dim tensor as a tensor (1,) on the device; a fill where it is a number.

        One dimension, since a 0-dim tensor would be rounded to a 16-bit parameter's dtype.
        """
        if isinstance(value, Tensor):
            return value.to(self.flat.device, self.accumulate).reshape(1)
        return torch.full((1,), value, dtype=self.accumulate, device=self.flat.device)

    def spread(self, coefficients: Tensor) -> Tensor:
        """A coefficient for each tensor (T,) as one for each block (M/64, 1)."""
        return coefficients.index_select(0, self._owner).unsqueeze(1)


def _layout(params: list[Tensor]) -> list[Any]:
    return [(id(p), p.stride()) for p in params]


class LayerWise(torch.optim.Optimizer):
    """What LARS and LAMB share: flat buffers, skipped steps, state kept in place.

    - State is allocated with the parameters, and `load_state_dict` writes into it and into tensor
      hyperparameters, so a captured CUDA graph stays valid. A learning rate, momentum or beta1
      that is a 0-dim tensor may change between replays; all else is fixed at capture.
    - A parameter whose gradient is None is left out of the step. Keep that set stable: each change
      lays the buffers out anew, which is slow, and impossible in a captured graph.
    - `found_inf`, an attribute set before `step`, a float32 tensor () or (1,) on the device: where
      it is not 0 the step leaves parameters and state as they were, whatever the gradients hold.
      `grad_scale`, the same shape: the gradients are divided by it (torch.amp.GradScaler). The
      gradients themselves are not written to.
    - Norms and coefficients are float32 (float64 for float64); all that has a parameter's size is
      in its dtype, so LAMB's second moment is poor in 16 bits.

    Raises ValueError for a hyperparameter out of range (a tensor's value is not looked at) and for
    parameters that are not dense and floating point.
    """

    _step_supports_amp_scaling = True
    _slots: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any]):
        self._buckets: dict[tuple[int, torch.device, torch.dtype], Bucket] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does; ValueError for parameters or numbers that cannot work."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for p in group["params"]:
                if not p.is_floating_point() or p.layout != torch.strided:
                    rule = f"must be dense and floating point, got {p.dtype}, {p.layout}"
                    raise ValueError(f"parameters {rule}")
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        trained = [p for p in group["params"] if p.requires_grad]
        self._lay_out(len(self.param_groups) - 1, trained)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads into the tensors that are there; ValueError if a shape differs."""
        state, groups, buckets = self.state, self.param_groups, self._buckets
        super().load_state_dict(state_dict)
        loaded, loaded_groups = self.state, self.param_groups
        self.state, self.param_groups, self._buckets = state, groups, buckets
        for p, slots in loaded.items():
            for slot in self._slots:
                want = () if slot == "step" else tuple(p.shape)
                got = tuple(slots[slot].shape) if slot in slots else want
                if got != want:
                    raise ValueError(f"{slot} must have shape {want}, got {got}")
        for p in {**state, **loaded}:
            for slot in self._slots:
                value = loaded[p].get(slot)
                if slot in state[p]:
                    state[p][slot].zero_() if value is None else state[p][slot].copy_(value)
                elif value is not None:
                    state[p][slot] = value.clone()
        for group, other in zip(groups, loaded_groups, strict=True):
            for name in group.keys() - {"params"}:
                group[name] = _in_place(group[name], other.get(name, group[name]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients; returns what `closure` does, if one is given.

        Raises:
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for index, group in enumerate(self.param_groups):
            for bucket in self._lay_out(index, [p for p in group["params"] if p.grad is not None]):
                device = bucket.flat.device
                found = None if found_inf is None else found_inf.to(device).reshape(1) != 0
                bucket.gradients(None if scale is None else scale.to(device))
                self._update(bucket, group, found)
        return loss

    def _lay_out(self, index: int, params: list[Tensor]) -> list[Bucket]:
        alike: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"gradients must be dense, got {p.grad.layout}")
            if p.numel():
                alike[index, p.device, p.dtype].append(p)
        for name, members in alike.items():
            if name not in self._buckets or self._buckets[name].key != _layout(members):
                self._buckets[name] = Bucket(members, self._slots, self.state)
        return [self._buckets[name] for name in alike]

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, bucket: Bucket, group: dict[str, Any], found: Tensor | None) -> None:
        raise NotImplementedError


def _in_place(mine: Any, loaded: Any) -> Any:
    """`loaded` in the form of `mine`: written into its tensor, or a number (a sync, on load)."""
    if isinstance(mine, tuple):
        return tuple(_in_place(a, b) for a, b in zip(mine, loaded, strict=True))
    if isinstance(mine, Tensor):
        return mine.copy_(torch.as_tensor(loaded))
    return loaded.item() if isinstance(loaded, Tensor) else loaded


def require(rule: str, holds: Callable[[Any], bool], **values: Any) -> None:
    """Raise ValueError naming the value that breaks the rule."""
    for name, value in values.items():
        # A tensor's value is not looked at: that would wait for the device.
        if isinstance(value, Tensor):
            if value.dim():
                dims = value.dim()
                raise ValueError(f"{name} must be a number or a 0-dim tensor, got {dims}-dim")
        elif not holds(value):
            raise ValueError(f"{name} must be {rule}, got {value}")


not_negative = partial(require, ">= 0", lambda v: v >= 0)
fraction = partial(require, "in [0, 1)", lambda v: 0 <= v < 1)
