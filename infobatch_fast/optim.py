"""LARS and LAMB in a few launches and no host sync, and the schedule of the learning rate.

LARS is You et al. 2017 (arXiv:1708.03888), LAMB is You et al. 2020 (arXiv:1904.00962). M is the
length of the flat buffers, T the number of parameter tensors.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from infobatch_fast.errors import UserError, unknown_name

OPTIMIZERS = ("sgd", "adam", "lars", "lamb")

# Elements in a block of a flat buffer. One coefficient a block keeps the index that spreads the
# trust ratios at 1/64 of the parameters' size, and each tensor aligned for vector loads.
_BLOCK = 64


class _Bucket:
    """Parameters of one device and dtype, each laid into whole blocks of flat buffers (M,).

    The views of a buffer have the parameters' own strides, without which the multi-tensor kernels
    fall back to one launch a tensor. The padding between them stays finite and is never read.
    """

    def __init__(self, params: list[Tensor], slots: Iterable[str], state: dict[Tensor, Any]):
        self.key = _layout(params)
        self.params = params
        device, dtype = params[0].device, params[0].dtype
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = [-(-p.numel() // _BLOCK) for p in params]
        self._starts = [_BLOCK * n for n in itertools.accumulate(blocks, initial=0)]
        self._strides = [torch.empty_like(p, device="meta").stride() for p in params]
        owner = torch.repeat_interleave(torch.arange(len(params)), torch.tensor(blocks))
        self._owner = owner.to(device, torch.int32)
        self.flat = torch.zeros(self._starts[-1], dtype=dtype, device=device)
        self.views = self._views(self.flat)
        self.state: dict[str, Tensor] = {}
        for name in slots:
            if name == "step":
                whole = torch.zeros(len(params), dtype=torch.float32, device=device)
                parts = [whole[i] for i in range(len(params))]
            else:
                whole = torch.zeros_like(self.flat)
                parts = self._views(whole)
            for p, part in zip(params, parts, strict=True):
                if name in state[p]:
                    part.copy_(state[p][name])
                state[p][name] = part
            self.state[name] = whole

    def _views(self, flat: Tensor) -> list[Tensor]:
        where = zip(self.params, self._strides, self._starts, strict=False)
        return [flat.as_strided(p.shape, stride, start) for p, stride, start in where]

    def gradients(self, scale: Tensor | None) -> None:
        """Copies the gradients into `flat`, divided by `scale` (1,) if there is one."""
        grads = []
        for p, view in zip(self.params, self.views, strict=True):
            grad = p.grad
            assert grad is not None
            if grad.stride() != view.stride() and _same_order(grad, view):
                # The two differ by the stride of a dimension of size 1, which has no meaning, yet
                # would send all T copies down the slow path: 1x1 convolutions in channels_last.
                grad = grad.as_strided(view.shape, view.stride())
            grads.append(grad)
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
    return [(id(p), p.device, p.dtype, p.stride()) for p in params]


def _same_order(a: Tensor, b: Tensor) -> bool:
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)


class _LayerWise(torch.optim.Optimizer):
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
        self._buckets: dict[tuple[int, torch.device, torch.dtype], _Bucket] = {}
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
        for p, slot in [(p, slot) for p in loaded for slot in self._slots if slot in loaded[p]]:
            want = torch.Size() if slot == "step" else p.shape
            if loaded[p][slot].shape != want:
                got = tuple(loaded[p][slot].shape)
                raise ValueError(f"{slot} must have shape {tuple(want)}, got {got}")
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

    def _lay_out(self, index: int, params: list[Tensor]) -> list[_Bucket]:
        alike: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"gradients must be dense, got {p.grad.layout}")
            if p.numel():
                alike[index, p.device, p.dtype].append(p)
        for name, members in alike.items():
            if name not in self._buckets or self._buckets[name].key != _layout(members):
                self._buckets[name] = _Bucket(members, self._slots, self.state)
        return [self._buckets[name] for name in alike]

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, bucket: _Bucket, group: dict[str, Any], found: Tensor | None) -> None:
        raise NotImplementedError


def _in_place(mine: Any, loaded: Any) -> Any:
    """`loaded` in the form of `mine`: written into its tensor, or a number (a sync, on load)."""
    if isinstance(mine, tuple):
        return tuple(_in_place(a, b) for a, b in zip(mine, loaded, strict=True))
    if isinstance(mine, Tensor):
        return mine.copy_(torch.as_tensor(loaded))
    return loaded.item() if isinstance(loaded, Tensor) else loaded


def _require(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    # A tensor's value is not looked at: that would wait for the device.
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name} must be a number or a 0-dim tensor, got {value.dim()}-dim")
    elif not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value}")


def _not_negative(**values: Any) -> None:
    for name, value in values.items():
        _require(name, value, ">= 0", lambda v: v >= 0)


class LARS(_LayerWise):
    """Layer-wise adaptive rate scaling, arXiv:1708.03888 algorithm 1, as the InfoBatch runs had it.

    For each tensor w with gradient g, all of them, biases and norms too:
    trust = eta |w| / (|g| + weight_decay |w|), 1 where a norm is 0, at most `max_trust`;
    buffer = momentum * buffer + clamp(g + weight_decay w, -clip, clip); w -= lr * trust * buffer.
    """

    _slots = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.9,
        weight_decay: float = 5e-4,
        eta: float = 0.001,
        max_trust: float = 50.0,
        clip: float = 10.0,
    ):
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, {**numbers, "max_trust": max_trust, "clip": clip})

    def _check(self, group: dict[str, Any]) -> None:
        names = ("lr", "weight_decay", "eta", "max_trust", "clip")
        _not_negative(**{name: group[name] for name in names})
        _require("momentum", group["momentum"], "in [0, 1)", lambda v: 0 <= v < 1)

    def _update(self, bucket: _Bucket, group: dict[str, Any], found: Tensor | None) -> None:
        flat, buffer = bucket.flat, bucket.state["momentum_buffer"]
        decay = group["weight_decay"]
        weight, gradient = bucket.norms(bucket.params), bucket.norms(bucket.views)
        trust = group["eta"] * weight / (gradient + decay * weight)
        trust.masked_fill_((weight == 0) | (gradient == 0), 1.0).clamp_(0.0, group["max_trust"])
        step = bucket.scalar(group["lr"]) * trust
        momentum = bucket.scalar(group["momentum"])
        torch._foreach_add_(bucket.views, bucket.params, alpha=decay)
        flat.clamp_(-group["clip"], group["clip"])
        if found is not None:
            # Filled, not multiplied: NaN * 0 is NaN. And -0.0, which added changes no bit.
            flat.masked_fill_(found, -0.0)
            momentum = momentum.masked_fill(found, 1.0)
            step = step.masked_fill(found, 0.0)
        torch.addcmul(flat, buffer, momentum, out=buffer)
        blocks = flat.view(-1, _BLOCK)
        torch.mul(buffer.view(-1, _BLOCK), bucket.spread(step), out=blocks)
        torch._foreach_sub_(bucket.params, bucket.views)


class LAMB(_LayerWise):
    """Layer-wise adaptive moments, arXiv:1904.00962 algorithm 2, with bias correction.

    For each tensor w: u = Adam's direction + weight_decay w; trust = |w| / |u|, 1 where a norm
    is 0, at most `max_trust`; w -= lr * trust * u. `betas[0]` may be a tensor, `betas[1]` not.
    """

    _slots = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        betas: tuple[float | Tensor, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 5e-4,
        max_trust: float = 10.0,
    ):
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "max_trust": max_trust})

    def _check(self, group: dict[str, Any]) -> None:
        _not_negative(**{name: group[name] for name in ("lr", "weight_decay", "max_trust")})
        _require("eps", group["eps"], "> 0", lambda v: v > 0)
        for i, beta in enumerate(group["betas"]):
            _require(f"betas[{i}]", beta, "in [0, 1)", lambda v: 0 <= v < 1)

    def _update(self, bucket: _Bucket, group: dict[str, Any], found: Tensor | None) -> None:
        flat, count = bucket.flat, bucket.state["step"]
        mean, square = bucket.state["exp_avg"], bucket.state["exp_avg_sq"]
        beta1, beta2 = bucket.scalar(group["betas"][0]), bucket.scalar(group["betas"][1])
        blend, shrink = 1 - beta1, beta2
        if found is None:
            count.add_(1.0)
        else:
            flat.masked_fill_(found, 0.0)
            count.add_(~found)
            blend, shrink = blend.masked_fill(found, 0.0), shrink.masked_fill(found, 1.0)
        mean.lerp_(flat, blend.to(flat.dtype))
        square.mul_(shrink).addcmul_(flat, flat, value=1 - group["betas"][1])

        # In float64, since 1 - 0.999 loses four digits of seven. At least one step is counted: a
        # skipped first step would give 0 / 0.
        steps = count.clamp(min=1.0).double()
        first, second = (1 - beta.double() ** steps for beta in (beta1, beta2))
        scale = (first / second.sqrt()).to(bucket.accumulate)
        offset = (group["eps"] * first).to(bucket.accumulate)
        blocks = torch.sqrt(square, out=flat).view(-1, _BLOCK)
        torch.addcmul(bucket.spread(offset), blocks, bucket.spread(scale), out=blocks)
        torch.div(mean, flat, out=flat)
        torch._foreach_add_(bucket.views, bucket.params, alpha=group["weight_decay"])
        weight, update = bucket.norms(bucket.params), bucket.norms(bucket.views)
        trust = (weight / update).masked_fill_((weight == 0) | (update == 0), 1.0)
        step = bucket.scalar(group["lr"]) * trust.clamp_(0.0, group["max_trust"])
        if found is not None:
            step = step.masked_fill(found, 0.0)
        blocks.mul_(bucket.spread(step))
        torch._foreach_sub_(bucket.params, bucket.views)


def one_cycle(
    progress: float,
    *,
    max_lr: float,
    pct_start: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
    momentum_range: tuple[float, float] = (0.85, 0.95),
) -> tuple[float, float]:
    """Learning rate and momentum of the one-cycle policy (Smith 2018, arXiv:1803.09820).

    Two cosines. The rate goes from max_lr / div up to max_lr at `pct_start` of the training, then
    down to max_lr / div / final_div; the momentum from the top of its range to the bottom and back.

    Args:
        progress: Part of the training done, (epoch + step / steps in this epoch) / epochs.
        max_lr: The highest learning rate.
        pct_start: Where it is reached.
        div: How far below it the training starts.
        final_div: How far below its start the training ends.
        momentum_range: The lowest and the highest momentum.

    Raises:
        ValueError: If progress is outside [0, 1] or pct_start outside (0, 1).
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    if not 0 < pct_start < 1:
        raise ValueError(f"pct_start must be in (0, 1), got {pct_start}")
    low, high = momentum_range
    start = max_lr / div
    if progress < pct_start:
        part = progress / pct_start
        return _cosine(start, max_lr, part), _cosine(high, low, part)
    part = (progress - pct_start) / (1 - pct_start)
    return _cosine(max_lr, start / final_div, part), _cosine(low, high, part)


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """An optimizer of `OPTIMIZERS` for all of the model's parameters; each honours `found_inf`.

    Move the model to its device, dtype and memory format first. LARS and LAMB hold learning rate
    and momentum as tensors, so a CUDA graph may capture them; SGD and Adam hold numbers.

    Args:
        name: "sgd" (plain momentum, no Nesterov), "adam", "lars" or "lamb".
        model: The model.
        lr: The learning rate.
        weight_decay: Added to the gradient, by LAMB to the direction.
        momentum: The momentum; beta1 of Adam and LAMB.

    Raises:
        UserError: If the name is unknown.
        ValueError: If a number is out of range.
    """
    if name not in OPTIMIZERS:
        raise UserError(unknown_name("optimizer", name, OPTIMIZERS))
    _not_negative(lr=lr, weight_decay=weight_decay)
    _require("momentum", momentum, "in [0, 1)", lambda v: 0 <= v < 1)
    params = list(model.parameters())
    if name == "sgd":
        options = {"momentum": momentum, "weight_decay": weight_decay, "fused": True}
        sgd = torch.optim.SGD(params, lr=lr, **options)
        # torch's first fused step allocates the buffer uninitialised and, if skipped, leaves it so:
        # the next step would add garbage. From zeros the first step is the same.
        for p in params:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
        return sgd
    if name == "adam":
        betas = (momentum, 0.999)
        adam = torch.optim.Adam(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        adam.register_step_pre_hook(_scalar_found_inf)
        return adam
    device = params[0].device
    rate, inertia = (torch.full((), v, dtype=torch.float32, device=device) for v in (lr, momentum))
    if name == "lars":
        return LARS(params, rate, momentum=inertia, weight_decay=weight_decay)
    return LAMB(params, rate, betas=(inertia, 0.999), weight_decay=weight_decay)


def _scalar_found_inf(optimizer: Any, args: Any, kwargs: Any) -> None:
    # torch's Adam takes `found_inf` off its 0-dim step counts, which fails for shape (1,).
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        optimizer.found_inf = found_inf.reshape(())


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Sets learning rate and momentum (beta1) of every group: a fill where it holds a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = _filled(group["lr"], lr)
        if "momentum" in group:
            group["momentum"] = _filled(group["momentum"], momentum)
        else:
            beta1, *rest = group["betas"]
            group["betas"] = (_filled(beta1, momentum), *rest)


def _filled(held: Any, value: float) -> Any:
    return held.fill_(value) if isinstance(held, Tensor) else value


def nonfinite(grads: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Unscales gradients in place and marks whether one is not finite, all on the device.

    Args:
        grads: The gradients, dense.
        found_inf: () or (1,) float32: set to 1 if any element is NaN or inf, else to 0.
        inv_scale: () or (1,) float32, multiplied into the gradients.
    """
    found_inf.zero_()
    # One kernel takes one dtype.
    alike: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        alike[grad.dtype].append(grad)
    for members in alike.values():
        torch._amp_foreach_non_finite_check_and_unscale_(members, found_inf, inv_scale)
