"""What LARS and LAMB share: flat buffers over many tensors, and steps that may be skipped.

Two ways to the same numbers: `Fused`, a few Triton launches in place, and `Foreach`, torch's
multi-tensor operations, which is the specification and runs on any device. M is the length of the
flat buffers, T the number of parameter tensors.
"""

import importlib.util
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from infobatch_fast.errors import reason

if TYPE_CHECKING:
    from infobatch_fast.kernels.layerwise import Pointers

# Elements in a block of a flat buffer. One coefficient a block keeps the index that spreads the
# trust ratios at 1/64 of the parameters' size, and each tensor aligned for vector loads.
BLOCK = 64


class Bucket:
    """Parameters of one device and dtype, their state laid into whole blocks of flat buffers (M,).

    The views of a buffer have the parameters' own strides, without which the multi-tensor kernels
    fall back to one launch a tensor. The padding between them stays finite and is never read.
    """

    def __init__(self, params: list[Tensor], slots: Iterable[str], state: dict[Tensor, Any]):
        self.params = params
        self.device, self.dtype = params[0].device, params[0].dtype
        self.accumulate = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.blocks_of = [-(-p.numel() // BLOCK) for p in params]
        self.starts = [BLOCK * n for n in itertools.accumulate(self.blocks_of, initial=0)][:-1]
        self.state: dict[str, Tensor] = {}
        for name in slots:
            if name == "step":
                whole = torch.zeros(len(params), dtype=torch.float32, device=self.device)
                parts = list(whole.unbind())
            else:
                whole, parts = self.buffer()
            for p, part in zip(params, parts, strict=True):
                if name in state[p]:
                    part.copy_(state[p][name])
                state[p][name] = part
            self.state[name] = whole

    def buffer(self) -> tuple[Tensor, list[Tensor]]:
        """A buffer of zeros (M,), and its views, one a parameter."""
        size = BLOCK * sum(self.blocks_of)
        whole = torch.zeros(size, dtype=self.dtype, device=self.device)
        strides = [torch.empty_like(p, device="meta").stride() for p in self.params]
        places = zip(self.params, strides, self.starts, strict=True)
        return whole, [whole.as_strided(p.shape, stride, start) for p, stride, start in places]

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number or 0-dim tensor as a tensor (1,) on the device; a fill where it is a number.

        One dimension, since a 0-dim tensor would be rounded to a 16-bit parameter's dtype.
        """
        if isinstance(value, Tensor):
            return value.to(self.device, self.accumulate).reshape(1)
        return torch.full((1,), value, dtype=self.accumulate, device=self.device)


class Foreach(Bucket):
    """A bucket for torch's multi-tensor operations, on a copy of the gradients, `flat`.

    `obstacle` says why the kernels do not take it.
    """

    def __init__(
        self,
        params: list[Tensor],
        slots: Iterable[str],
        state: dict[Tensor, Any],
        obstacle: str,
    ):
        super().__init__(params, slots, state)
        self.obstacle = obstacle
        owner = torch.repeat_interleave(torch.arange(len(params)), torch.tensor(self.blocks_of))
        self._owner = owner.to(self.device, torch.int32)
        self._one = torch.ones((), dtype=torch.float32, device=self.device)
        self.flat, self.views = self.buffer()

    def gradients(self, scale: Tensor | None) -> None:
        """Copies the gradients into `flat`, divided by `scale` (1,) if there is one."""
        torch._foreach_copy_(self.views, _gradients(self.params))
        if scale is not None:
            self.flat.div_(scale.to(self.device))

    def mark_nonfinite(self, found_inf: Tensor) -> None:
        """Sets `found_inf` to 1 if a gradient in `flat` is not finite."""
        torch._amp_foreach_non_finite_check_and_unscale_(self.views, found_inf, self._one)

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """The Euclidean norm of each tensor, (T,) float32 (float64 for float64)."""
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=self.accumulate))

    def spread(self, coefficients: Tensor) -> Tensor:
        """A coefficient for each tensor (T,) as one for each block (M/64, 1)."""
        return coefficients.index_select(0, self._owner).unsqueeze(1)


class Fused(Bucket):
    """A bucket for the Triton kernels, which read the gradients where they are."""

    pointers: "Pointers"
    scale: Tensor | None

    def __init__(self, params: list[Tensor], slots: Iterable[str], state: dict[Tensor, Any]):
        from infobatch_fast.kernels import layerwise as kernels  # needs Triton

        super().__init__(params, slots, state)
        self.kernels = kernels
        self.blocks = kernels.Blocks(params, self.starts)

    def gradients(self, scale: Tensor | None) -> None:
        """Finds where the gradients are, for this step, and what they are divided by."""
        self.pointers = self.blocks.point(self.params, _gradients(self.params))
        self.scale = None if scale is None else scale.to(self.device, torch.float32)


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
    - `finds_inf`, set to True: `step` itself sets `found_inf` to 1 where a gradient, once divided,
      is not finite, and else to 0: a pass over the gradients less.
    - Norms and coefficients are float32 (float64 for float64); all that has a parameter's size is
      in its dtype, so LAMB's second moment is poor in 16 bits.
    - `fused`: None takes the Triton kernels for float32 parameters on a GPU, and torch's operations
      where they cannot be had; `note` then says why. False never takes them. True takes them on any
      device (off the GPU, by Triton's interpreter), and raises what None notes. They are compiled
      when the optimizer is made.

    Raises ValueError for a hyperparameter out of range (a tensor's value is not looked at) and for
    parameters that are not dense and floating point.
    """

    finds_inf = False
    grad_scale: Tensor | None  # without a default: torch.amp.GradScaler looks whether it is there
    fused: bool | None = None
    _step_supports_amp_scaling = True
    _slots: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any], fused: bool | None):
        self.fused = fused
        # By group: the layout that they were made for, and the buckets.
        self._buckets: dict[int, tuple[list[Any], list[Foreach | Fused]]] = {}
        super().__init__(params, defaults)

    @property
    def note(self) -> str:
        """Why some parameters are updated by torch's operations; "" where none is."""
        buckets = [bucket for _, members in self._buckets.values() for bucket in members]
        return "; ".join(dict.fromkeys(b.obstacle for b in buckets if isinstance(b, Foreach)))

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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fused": self.fused}

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
            ValueError: If a gradient is sparse, or there is no `found_inf` to be set.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        work: list[tuple[Foreach | Fused, dict[str, Any]]] = []
        for index, group in enumerate(self.param_groups):
            trained = [p for p in group["params"] if p.grad is not None]
            work += [(bucket, group) for bucket in self._lay_out(index, trained)]
        mark = None
        if self.finds_inf:
            if found_inf is None:
                raise ValueError("found_inf must be a tensor where finds_inf is set, got None")
            mark = found_inf.zero_()
        for bucket, _ in work:
            bucket.gradients(scale)
            if isinstance(bucket, Fused):
                self._begin(bucket, mark)
            elif mark is not None:
                bucket.mark_nonfinite(mark)
        for bucket, group in work:
            found = None if found_inf is None else found_inf.to(bucket.device)
            if isinstance(bucket, Fused):
                self._launch(bucket, group, None if found is None else found.to(torch.float32))
                # As torch's own operations do: autograd then sees what was changed in place.
                torch.autograd.graph.increment_version([*bucket.params, *bucket.state.values()])
            else:
                self._update(bucket, group, None if found is None else found.reshape(1) != 0)
        return loss

    def _lay_out(self, index: int, params: list[Tensor]) -> list[Foreach | Fused]:
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"gradients must be dense, got {p.grad.layout}")
        params = [p for p in params if p.numel()]
        if not params:
            return []
        layout = [self.fused, *((id(p), p.device, p.dtype, p.shape, p.stride()) for p in params)]
        held, buckets = self._buckets.get(index, ([], []))
        if layout != held:
            alike: defaultdict[Any, list[Tensor]] = defaultdict(list)
            for p in params:
                alike[p.device, p.dtype, _obstacle(p, self.fused)].append(p)
            buckets = []
            for (device, _, obstacle), members in alike.items():
                obstacle = obstacle or self._rehearse(device, self.param_groups[index])
                if obstacle:
                    buckets.append(Foreach(members, self._slots, self.state, obstacle))
                else:
                    buckets.append(Fused(members, self._slots, self.state))
            self._buckets[index] = layout, buckets
        return buckets

    def _rehearse(self, device: torch.device, group: dict[str, Any]) -> str:
        """Steps a tensor by the kernels and by torch; returns what is wrong, "" if nothing is.

        Triton compiles and loads its kernels now, which a capture forbids.
        """
        found = torch.zeros(1, dtype=torch.float32, device=device)
        states: list[list[Tensor]] = []
        try:
            for kind in (Fused, partial(Foreach, obstacle="")):
                weight = torch.linspace(-1, 1, 5000, dtype=torch.float32, device=device)
                weight.grad = (weight * 1000).sin()
                bucket = kind([weight], self._slots, defaultdict(dict))
                bucket.gradients(None)
                if isinstance(bucket, Fused):
                    self._begin(bucket, found)
                    self._launch(bucket, group, found)
                else:
                    self._update(bucket, group, found != 0)
                states.append([weight, *bucket.state.values()])
            if not all(torch.allclose(a, b, 1e-4, 1e-6) for a, b in zip(*states, strict=True)):
                raise RuntimeError("they differ from torch's operations")
        except Exception as error:  # of many kinds: no C compiler, a driver too old, ...
            if self.fused:
                raise
            return f"the kernels cannot run: {reason(error)}"
        return ""

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, bucket: Foreach, group: dict[str, Any], found: Tensor | None) -> None:
        """Steps by torch's operations, unless `found` (1,) bool."""
        raise NotImplementedError

    def _begin(self, bucket: Fused, mark: Tensor | None) -> None:
        """Launches what comes before `_launch` of any bucket; sets `mark` for a non-finite."""
        raise NotImplementedError

    def _launch(self, bucket: Fused, group: dict[str, Any], found: Tensor | None) -> None:
        """Steps by the kernels, unless `found` () or (1,) float32."""
        raise NotImplementedError


def _gradients(params: list[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in params if p.grad is not None]
    assert len(grads) == len(params)
    return grads


def _obstacle(p: Tensor, fused: bool | None) -> str:
    """Why the kernels do not take a parameter; "" if they do."""
    if fused is False:
        return "fused is False"
    if not (p.is_cuda or fused):
        return f"parameters on {p.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if p.is_cuda and torch.cuda.get_device_capability(p.device) < (8, 0):
        return "a GPU of compute capability below 8.0"
    if p.dtype != torch.float32:
        return f"parameters of {p.dtype}"
    if type(p) not in (Tensor, torch.nn.Parameter):
        return f"parameters of class {type(p).__name__}"
    from infobatch_fast.kernels.layerwise import is_dense  # needs Triton

    return "" if is_dense(p.shape, p.stride()) else "parameters that are not dense"


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
