"""LARS and LAMB without a host sync, and every optimizer by its name.

LARS is You et al. 2017 (arXiv:1708.03888), LAMB is You et al. 2020 (arXiv:1904.00962).
T is the number of parameter tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from infobatch_fast.kernels.select import triton_kernels

OPTIMIZERS = ("sgd", "adam", "lars", "lamb")
# Elements of a block of `_Flat`. One coefficient a block keeps the index that spreads the trust
# ratios at 1/64 of the parameters' size, and each tensor aligned for vector loads.
BLOCK = 64
BETA2, EPS, MAX_TRUST = 0.999, 1e-6, 10.0  # of LAMB


class _Layerwise(torch.optim.Optimizer):
    """What LARS and LAMB share; the parameters are dense float32, in one group.

    - State is allocated with the parameters, and `load_state_dict` writes into it, into learning
      rate and momentum, so a captured CUDA graph stays valid. These two are 0-dim tensors, which
      may change between replays; all else is fixed at capture.
    - Every parameter that requires a gradient has one in each step.
    - `found_inf`, an attribute set before `step`, a float32 tensor () or (1,) on the device: where
      it is not 0 the step leaves parameters and state as they were, whatever the gradients hold.
    """

    found_inf: Tensor | None = None
    _slots: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, lr: Tensor, momentum: Tensor, **rest: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, **rest})
        (self._group,) = self.param_groups
        self._params = [p for p in self._group["params"] if p.requires_grad and p.numel()]
        for p in self._params:
            for slot in self._slots:
                like = p.new_empty(()) if slot == "step" else p
                self.state[p][slot] = torch.zeros_like(like, requires_grad=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads into the tensors that are there."""
        (group,) = state_dict["param_groups"]
        for number, slots in state_dict["state"].items():
            for slot, value in slots.items():
                self.state[self._group["params"][number]][slot].copy_(value)
        for name in self._group.keys() - {"params"}:
            mine, value = self._group[name], group[name]
            self._group[name] = mine.copy_(value) if isinstance(mine, Tensor) else value

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step from the gradients."""
        self._step([p.grad for p in self._params])

    def _step(self, grads: list[Any]) -> None:
        raise NotImplementedError


class LARS(_Layerwise):
    """Layer-wise adaptive rate scaling, arXiv:1708.03888 algorithm 1, as the InfoBatch runs had it.

    For each tensor w with gradient g, all of them, biases and norms too:
    trust = eta |w| / (|g| + weight_decay |w|), 1 where a norm is 0, at most `max_trust`;
    momentum_buffer = momentum * momentum_buffer + clamp(g + weight_decay w, -clip, clip);
    w -= lr * trust * momentum_buffer.

    Two more attributes, set before `step`: `grad_scale`, () or (1,), by which the gradients are
    divided, though not in place; `finds_inf`, whether `step` itself sets `found_inf` to 1 where a
    gradient, once divided, is not finite, and else to 0: a pass over the gradients less. `fused` is
    False for torch's operations where there are Triton kernels, too.
    """

    finds_inf = False
    grad_scale: Tensor | None = None
    _slots = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: Tensor,
        *,
        momentum: Tensor,
        weight_decay: float = 5e-4,
        eta: float = 0.001,
        max_trust: float = 50.0,
        clip: float = 10.0,
        fused: bool = True,
    ):
        numbers = {"weight_decay": weight_decay, "eta": eta, "max_trust": max_trust, "clip": clip}
        super().__init__(params, lr, momentum, **numbers)
        kernels = triton_kernels(self._params[0].device) if fused else None
        momenta = [self.state[p]["momentum_buffer"] for p in self._params]
        form: Any = _ForeachLars if kernels is None else kernels.lars
        self._form = form(self._params, momenta)

    def _step(self, grads: list[Any]) -> None:
        mark = self.found_inf if self.finds_inf else None
        if mark is not None:
            mark.zero_()
        self._form.measure(grads, self.grad_scale, mark)
        names = ("lr", "momentum", "weight_decay", "eta", "max_trust", "clip")
        self._form.update(**{name: self._group[name] for name in names}, found=self.found_inf)


class LAMB(_Layerwise):
    """Layer-wise adaptive moments, arXiv:1904.00962 algorithm 2, with bias correction.

    For each tensor w: u = Adam's direction + weight_decay w; trust = |w| / |u|, 1 where a norm
    is 0, at most `MAX_TRUST`; w -= lr * trust * u. Adam's beta1 is `momentum`.
    """

    _slots = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, params: ParamsT, lr: Tensor, *, momentum: Tensor, weight_decay: float):
        super().__init__(params, lr, momentum, weight_decay=weight_decay)
        self._flat = _Flat(self._params)

    def _step(self, grads: list[Any]) -> None:
        flat, group = self._flat, self._group
        steps, means, squares = ([self.state[p][slot] for p in flat.params] for slot in self._slots)
        beta1, lr = group["momentum"], group["lr"]
        taken = torch.ones_like(lr)
        if self.found_inf is not None:
            taken = (self.found_inf.reshape(()) == 0).to(taken)
        keep1, keep2 = (torch.where(taken != 0, beta, 1.0) for beta in (beta1, BETA2))
        torch._foreach_copy_(flat.views, grads)
        flat.blocks.masked_fill_(taken == 0, 0.0)  # multiplied, NaN would stay
        torch._foreach_add_(steps, [taken] * len(steps))
        torch._foreach_mul_(squares, keep2)
        torch._foreach_addcmul_(squares, flat.views, flat.views, value=1 - BETA2)
        flat.blocks.mul_(1 - beta1)
        torch._foreach_mul_(means, keep1)
        torch._foreach_add_(means, flat.views)
        # In float64, since 1 - 0.999 loses four digits of seven. At least one step is counted: a
        # skipped first step would give 0 / 0.
        count = torch.stack(steps).clamp(min=1.0).double()
        first, second = 1 - beta1.double() ** count, 1 - BETA2**count
        torch._foreach_copy_(flat.views, squares)
        flat.blocks.sqrt_().mul_(flat.spread(first / second.sqrt()))
        flat.blocks.add_(flat.spread(EPS * first)).reciprocal_()
        torch._foreach_mul_(flat.views, means)
        torch._foreach_add_(flat.views, flat.params, alpha=group["weight_decay"])
        weight, update = _norms(flat.params), _norms(flat.views)
        trust = (weight / update).masked_fill_((weight == 0) | (update == 0), 1.0)
        rate = lr * trust.clamp_(max=MAX_TRUST)
        flat.blocks.mul_(flat.spread(rate.masked_fill_(taken == 0, 0.0)))
        torch._foreach_sub_(flat.params, flat.views)


class _Flat:
    """A flat buffer of whole blocks with a view for each of T parameters.

    What is alike for all elements, and what differs by tensor, is then one launch each. The views
    have the parameters' own strides, without which torch's multi-tensor operations fall back to one
    launch a tensor. The padding between them is never read.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        counts = [-(-p.numel() // BLOCK) for p in params]
        self.blocks = torch.zeros(sum(counts), BLOCK, device=params[0].device)
        owner = torch.repeat_interleave(torch.arange(len(params)), torch.tensor(counts))
        self._owner = owner.to(self.blocks.device)
        parts = self.blocks.view(-1).split([BLOCK * count for count in counts])
        strides = [torch.empty_like(p, device="meta").stride() for p in params]
        places = zip(parts, params, strides, strict=True)
        self.views = [part.as_strided(p.shape, stride) for part, p, stride in places]

    def spread(self, coefficients: Tensor) -> Tensor:
        """A coefficient for each tensor (T,) as one for each block, float32."""
        return coefficients.float().index_select(0, self._owner).unsqueeze(1)


class _ForeachLars(_Flat):
    """`kernels.lars.Lars` by torch's multi-tensor operations."""

    def __init__(self, params: list[Tensor], momenta: list[Tensor]) -> None:
        super().__init__(params)
        self.momenta = momenta

    def measure(
        self, grads: list[Tensor], scale: Tensor | None = None, found: Tensor | None = None
    ) -> None:
        torch._foreach_copy_(self.views, grads)
        if scale is not None:
            self.blocks.div_(scale)
        if found is not None:
            one = torch.ones((), device=found.device)
            torch._amp_foreach_non_finite_check_and_unscale_(self.views, found, one)

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
        weight, gradient = _norms(self.params), _norms(self.views)
        trust = eta * weight / (gradient + weight_decay * weight)
        trust.masked_fill_((weight == 0) | (gradient == 0), 1.0).clamp_(max=max_trust)
        rates = lr * trust
        torch._foreach_add_(self.views, self.params, alpha=weight_decay)
        self.blocks.clamp_(-clip, clip)
        if found is not None:
            skip = found.reshape(()) != 0
            # Filled: multiplied, NaN would stay. And -0.0, which added changes no bit.
            self.blocks.masked_fill_(skip, -0.0)
            momentum, rates = momentum.masked_fill(skip, 1.0), rates.masked_fill_(skip, 0.0)
        torch._foreach_mul_(self.momenta, momentum)
        torch._foreach_add_(self.momenta, self.views)
        torch._foreach_copy_(self.views, self.momenta)
        self.blocks.mul_(self.spread(rates))
        torch._foreach_sub_(self.params, self.views)


def _norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, (T,)."""
    return torch.stack(torch._foreach_norm(tensors))


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """One of `OPTIMIZERS` for all of the model's parameters; each honours `found_inf`.

    Move the model to its device, dtype and memory format first. LARS and LAMB hold learning rate
    and momentum as tensors, so a CUDA graph may capture them; SGD (without Nesterov) and Adam hold
    numbers. The momentum, beta1 of Adam and LAMB, is `set_schedule`'s; `fused` is for LARS.
    """
    params, momentum = list(model.parameters()), 0.9
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
        return torch.optim.Adam(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    rate, inertia = (
        torch.full((), v, device=params[0].device, dtype=torch.float32) for v in (lr, momentum)
    )
    if name == "lars":
        return LARS(params, rate, momentum=inertia, weight_decay=weight_decay, fused=fused)
    return LAMB(params, rate, momentum=inertia, weight_decay=weight_decay)
