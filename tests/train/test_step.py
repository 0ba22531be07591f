"""The training step: what it computes, and that a step that is not finite changes nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps_made import (
    ON,
    assert_same,
    everything,
    make_batch,
    make_step,
    spoilt_batch,
)
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train.optim import OPTIMIZERS
from infobatch_fast.train.step import TrainStep

FEW = 4  # samples of a batch


@pytest.mark.parametrize("plain", [False, True])
def test_step_against_plain_torch(plain: bool) -> None:
    options: dict[str, Any] = {"infobatch": None} if plain else {}
    step = make_step("sgd", **options)
    model = copy.deepcopy(step.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    total = weight = 0.0
    for seed in range(4):
        images, labels, batch = make_batch(seed)
        lr, momentum = 0.1 * (seed + 1), 0.95 - 0.02 * seed
        step(images, labels, batch, lr, momentum)
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        losses = F.cross_entropy(model(images), labels, reduction="none", label_smoothing=0.1)
        weights = torch.ones(16) if plain else batch.weights
        loss = (losses * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step.infobatch is not None:
            torch.testing.assert_close(step.infobatch.scores[batch.indices], losses.detach())
        total += loss.item() * 16
        weight += weights.sum().item()
    mine, theirs = dict(step.model.state_dict()), dict(model.state_dict())
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert step.read_counts() == (pytest.approx(total / weight, rel=1e-5), 0, 0)
    step.begin_epoch()
    assert step.read_counts() == (pytest.approx(float("nan"), nan_ok=True), 0, 0)
    step.load_state_dict(step.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("device", ON)
def test_a_non_finite_step_changes_nothing(
    device: str, value: float, first: bool, optimizer: str
) -> None:
    step, clean = (make_step(optimizer, device) for _ in range(2))
    if not first:
        for one in (step, clean):
            one(*make_batch(0, device=device), 0.01, 0.9)
    before = everything(step)
    step(*spoilt_batch(1, value, device), 0.01, 0.9)
    after = everything(step)
    # A first step may allocate what the optimizer holds.
    common = len(step.model.state_dict()) + 1 if first else len(before)
    assert_same(before[:common], after[:common])
    assert step.read_counts().skipped == 1
    if device == "cpu":  # what follows is what would have followed without it, bit for bit
        for seed in (2, 3):
            step(*make_batch(seed), 0.02, 0.9)
            clean(*make_batch(seed), 0.02, 0.9)
        assert_same(everything(clean), everything(step))


def test_rows_of_skipped_steps_are_counted() -> None:
    step = make_step("sgd")
    for kind in "bbgbbbg":
        step(*(spoilt_batch(0) if kind == "b" else make_batch(1)), 0.01, 0.9)
    assert step.read_counts()[1:] == (5, 3)
    step.begin_epoch()
    step(*spoilt_batch(0), 0.01, 0.9)
    assert step.read_counts()[1:] == (1, 3)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("device", ON)
def test_no_host_sync_in_the_step(device: str, optimizer: str, amp: str) -> None:
    step, batch = make_step(optimizer, device, amp=amp), make_batch(0, FEW, device)
    for _ in range(3 if device == "cuda" else 1):
        step(*batch, 0.01, 0.9)
    with host_syncs(torch.device(device), "forbid"):
        step(*batch, 0.01, 0.9)
    assert step.read_counts().loss < 100


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_learns_like_float32(amp: str) -> None:
    losses = {}
    for mode in ("off", amp):
        step = make_step("sgd", amp=mode, dense=amp == "fp16")
        for _ in range(8):
            step(*make_batch(0, 8), 0.05, 0.9)
        losses[mode] = step.read_counts().loss
        assert step.read_counts().skipped == 0
    assert losses[amp] == pytest.approx(losses["off"], rel=0.05)


def test_float16_scale_falls_and_recovers() -> None:
    step = make_step("sgd", amp="fp16")
    step.scale.fill_(2.0**40)
    before = everything(step)
    step(*make_batch(0), 0.01, 0.9)
    assert step.scale.item() == 2.0**39
    assert_same(before, everything(step))
    step.scale.fill_(2.0**12)
    step.growth.fill_(1999)
    step(*make_batch(1), 0.01, 0.9)
    assert step.scale.item() == 2.0**13


def held_by(step: TrainStep) -> list[Tensor]:
    (group,), state = step.optimizer.param_groups, step.optimizer.state
    rates = [group[name] for name in ("lr", "momentum") if name in group]
    return rates + [tensor for slots in state.values() for tensor in slots.values()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_state_continues_bit_for_bit(optimizer: str, amp: str, tmp_path: Path) -> None:
    step, other = (make_step(optimizer, amp=amp) for _ in range(2))
    spoilt = spoilt_batch(7, size=FEW)
    for batch in (make_batch(0, FEW), spoilt, make_batch(1, FEW)):
        step(*batch, 0.01, 0.9)
    torch.save(step.state_dict(), tmp_path / "state")
    held = held_by(other)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    if optimizer in ("lars", "lamb"):  # a captured graph holds them
        assert [id(tensor) for tensor in held_by(other)] == [id(tensor) for tensor in held]
    assert other.growth.item() == step.growth.item() == (amp == "fp16")
    # A skip first: back to what was loaded.
    for batch in (spoilt, make_batch(2, FEW), make_batch(3, FEW)):
        step(*batch, 0.02, 0.88)
        other(*batch, 0.02, 0.88)
    assert_same(everything(step), everything(other))
    assert step.read_counts() == other.read_counts()
    assert other.scale.item() == step.scale.item() == (2.0**14 if amp == "fp16" else 1)


# The compiler


@pytest.mark.parametrize("options", [False, True, {"max_autotune": True}])
def test_what_is_start_up_on_a_cpu(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compile(model: nn.Module, dynamic: bool, options: Any):
        asked.append(options)
        return lambda images: model(images)

    monkeypatch.setattr(torch, "compile", compile)
    step = make_step("sgd", compile=options)
    assert step.compiled == bool(options)
    assert asked == ([options if isinstance(options, dict) else None] if options else [])
    for size in (16, 5):
        shape = torch.Size((size, 3, 32, 32))
        for first in (True, False, False):
            assert step.is_new(shape) == (step.compiled and first)
            step(*make_batch(0, size), 0.01, 0.9)


class _Through(torch.autograd.Function):
    """The same values, whose backward raises, as where a backward cannot be compiled."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ctx.error


def fail_in(monkeypatch: pytest.MonkeyPatch, where: str, error: Exception) -> list[str]:
    """A torch.compile that fails so in one of the passes; returns what is called of it."""
    called: list[str] = []

    def compile(model: nn.Module, dynamic: bool, options: Any):
        def forward(images: Tensor) -> Tensor:
            called.append(where)
            logits = model(images)  # the buffers are no longer what they were
            if where == "forward":
                raise error
            # A part of the gradients is there when the backward fails.
            weight = next(p for p in reversed(list(model.parameters())) if p.dim() == 2)
            weight.grad = torch.ones_like(weight)
            return _Through.apply(logits, error)  # pyright: ignore[reportReturnType]

        return forward

    monkeypatch.setattr(torch, "compile", compile)
    return called


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_compiler_that_fails_is_told_and_nothing_is_lost(
    where: str, amp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = fail_in(monkeypatch, where, TorchDynamoException("no compiler\n was found"))
    said: list[str] = []
    plain, compiled = make_step(amp=amp), make_step(amp=amp, compile=True, say=said.append)
    for seed in range(3):
        plain(*make_batch(seed, FEW), 0.05, 0.9)
        compiled(*make_batch(seed, FEW), 0.05, 0.9)
        assert_same(everything(plain), everything(compiled))
    assert plain.read_counts() == compiled.read_counts()
    assert said == ["WARNING: the network is not compiled: no compiler was found"]
    assert called == [where]
    assert not compiled.compiled
    with pytest.raises(RuntimeError, match=r"^no compiler"):
        make_step(amp=amp, compile=True)(*make_batch(0, FEW), 0.05, 0.9)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
        (BackendCompilerFailed(None, torch.OutOfMemoryError("no memory"), None),
         torch.OutOfMemoryError),
        (BackendCompilerFailed(None, MemoryError("no memory"), None), MemoryError),
        (RuntimeError("no memory"), RuntimeError),
        (ValueError("no memory"), ValueError),
    ],
)  # fmt: skip
def test_what_is_no_failure_of_the_compiler_is_raised(
    where: str, error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, where, error)
    said: list[str] = []
    step = make_step("sgd", compile=True, say=said.append)
    with pytest.raises(raised, match=r"^no memory$") as info:
        step(*make_batch(0), 0.05, 0.9)
    assert type(info.value) is raised
    assert said == []
    assert step.compiled


def test_mixup_blends_images_and_losses_and_scores_own_labels() -> None:
    step = make_step("sgd", mixup=True)
    model = copy.deepcopy(step.model)
    images, labels, batch = make_batch(0)
    step.share.fill_(0.75)
    step(images, labels, batch, 0.1, 0.9)

    before = [15, *range(15)]  # of each, the sample before it in the batch
    logits = model(0.75 * images + 0.25 * images[before])
    own, other = (
        F.cross_entropy(logits, of, reduction="none", label_smoothing=0.1)
        for of in (labels, labels[before])
    )
    loss = ((0.75 * own + 0.25 * other) * batch.weights).mean()
    loss.backward()
    assert step.infobatch is not None
    torch.testing.assert_close(step.infobatch.scores[batch.indices], own.detach())
    assert step.read_counts().loss == pytest.approx(loss.item() * 16 / batch.weights.sum().item())
    for mine, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
        grad = theirs.grad + 5e-4 * theirs  # pyright: ignore
        torch.testing.assert_close(mine, theirs - 0.1 * grad, rtol=1e-4, atol=1e-6)


def test_the_mean_of_the_weights_follows_them() -> None:
    step = make_step("sgd", ema=0.9)
    mean = {name: value.clone() for name, value in step.model.state_dict().items()}
    for seed in range(3):
        step(*make_batch(seed), 0.1, 0.9)
        for name, value in step.model.state_dict().items():
            mean[name] = 0.9 * mean[name] + 0.1 * value
    got = step.result.state_dict()
    assert step.result is step.average
    for name, value in got.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, mean[name], rtol=1e-4, atol=1e-6)
    other = make_step("sgd", ema=0.9)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for of in (step, other):
        of(*make_batch(3), 0.1, 0.9)
    assert_same(list(step.result.state_dict().values()), list(other.result.state_dict().values()))
