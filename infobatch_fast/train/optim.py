"""LARS and LAMB in a few launches and no host sync; every optimizer by its name.

LARS is You et al. 2017 (arXiv:1708.03888), LAMB is You et al. 2020 (arXiv:1904.00962). M is the
length of the flat buffers, T the number of parameter tensors.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.train.layerwise import (
    BLOCK,
    Foreach,
    Fused,
    LayerWise,
    fraction,
    not_negative,
    require,
)

OPTIMIZERS = ("sgd", "adam", "lars", "lamb")


class LARS(LayerWise):
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
        fused: bool | None = None,
    ):
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, {**numbers, "max_trust": max_trust, "clip": clip}, fused)

    def _check(self, group: dict[str, Any]) -> None:
        names = ("lr", "weight_decay", "eta", "max_trust", "clip")
        not_negative(**{name: group[name] for name in names})
        fraction(momentum=group["momentum"])

    def _update(self, bucket: Foreach, group: dict[str, Any], found: Tensor | None) -> None:
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
        blocks = flat.view(-1, BLOCK)
        torch.mul(buffer.view(-1, BLOCK), bucket.spread(step), out=blocks)
        torch._foreach_sub_(bucket.params, bucket.views)

    def _begin(self, bucket: Fused, mark: Tensor | None) -> None:
        bucket.kernels.norms(
            bucket.blocks, bucket.pointers, grad_scale=bucket.scale, found_inf=mark
        )

    def _launch(self, bucket: Fused, group: dict[str, Any], found: Tensor | None) -> None:
        bucket.kernels.lars(
            bucket.blocks,
            bucket.pointers,
            bucket.state["momentum_buffer"],
            bucket.scalar(group["lr"]),
            bucket.scalar(group["momentum"]),
            **{name: group[name] for name in ("weight_decay", "eta", "max_trust", "clip")},
            grad_scale=bucket.scale,
            found_inf=found,
        )


class LAMB(LayerWise):
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
        fused: bool | None = None,
    ):
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "max_trust": max_trust}, fused)

    def _check(self, group: dict[str, Any]) -> None:
        not_negative(**{name: group[name] for name in ("lr", "weight_decay", "max_trust")})
        require("> 0", lambda v: v > 0, eps=group["eps"])
        fraction(**{f"betas[{i}]": beta for i, beta in enumerate(group["betas"])})

    def _update(self, bucket: Foreach, group: dict[str, Any], found: Tensor | None) -> None:
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
        blocks = torch.sqrt(square, out=flat).view(-1, BLOCK)
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

    def _begin(self, bucket: Fused, mark: Tensor | None) -> None:
        if mark is not None:
            bucket.kernels.find_nonfinite(
                bucket.blocks, bucket.pointers, mark, grad_scale=bucket.scale
            )

    def _launch(self, bucket: Fused, group: dict[str, Any], found: Tensor | None) -> None:
        bucket.kernels.lamb(
            bucket.blocks,
            bucket.pointers,
            bucket.state["exp_avg"],
            bucket.state["exp_avg_sq"],
            bucket.state["step"],
            bucket.scalar(group["lr"]),
            bucket.scalar(group["betas"][0]),
            beta2=group["betas"][1],
            **{name: group[name] for name in ("eps", "weight_decay", "max_trust")},
            grad_scale=bucket.scale,
            found_inf=found,
        )


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
    not_negative(lr=lr, weight_decay=weight_decay)
    fraction(momentum=momentum)
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
