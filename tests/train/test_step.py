"""The training step: what it computes, and that a step that is not finite changes nothing."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from infobatch_fast import Batch, InfoBatch
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import OPTIMIZERS, make_optimizer
from infobatch_fast.train.step import TrainStep


def make_step(optimizer: str = "sgd", amp: str = "off", device: str = "cpu", **kwargs) -> TrainStep:
    model = make_model("small", 10, seed=1)
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    return TrainStep(
        model,
        make_optimizer(optimizer, model, lr=0.1, weight_decay=5e-4),
        **{
            "infobatch": InfoBatch(64, 4, device=device),
            "amp": amp,
            "label_smoothing": 0.1,
            "compile": False,
            "phases": Phases(torch.device(device)),
            **kwargs,
        },
    )


def make_batch(seed: int = 0, size: int = 16, device: str = "cpu") -> tuple[Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,), generator=generator)
    indices = torch.randperm(64, generator=generator)[:size]
    weights = torch.where(torch.arange(size) % 2 == 0, 2.0, 1.0)
    batch = Batch(indices.to(device), weights.to(device))
    return images.to(device), labels.to(device), batch


def everything(step: TrainStep) -> list[Tensor]:
    assert step.infobatch is not None
    tensors = [*step.model.state_dict().values(), step.infobatch.scores]
    for state in step.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(before: list[Tensor], after: list[Tensor]) -> None:
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))


def test_step_against_plain_torch() -> None:
    step = make_step()
    assert step.infobatch is not None
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
        loss = (losses * batch.weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(step.infobatch.scores[batch.indices], losses.detach())
        total += loss.item() * 16
        weight += batch.weights.sum().item()
    for mine, theirs in zip(
        step.model.state_dict().values(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    counts = step.read_counts()
    assert counts.loss == pytest.approx(total / weight, rel=1e-5)
    assert (counts.skipped, counts.longest) == (0, 0)
    step.begin_epoch()
    assert step.read_counts().loss != step.read_counts().loss  # NaN: no step was taken


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing(optimizer: str, first: bool, value: float) -> None:
    step, clean = make_step(optimizer), make_step(optimizer)
    if not first:
        step(*make_batch(0), 0.01, 0.9)
        clean(*make_batch(0), 0.01, 0.9)
    before = everything(step)
    images, labels, batch = make_batch(1)
    images[3, 1, 4, 4] = value
    step(images, labels, batch, 0.01, 0.9)
    after = everything(step)
    common = len(step.model.state_dict()) + 1
    assert_same(before[:common], after[:common])
    if not first:
        assert_same(before, after)
    assert step.read_counts().skipped == 1
    # What follows is what would have followed without it, bit for bit.
    for seed in (2, 3):
        step(*make_batch(seed), 0.02, 0.9)
        clean(*make_batch(seed), 0.02, 0.9)
    assert_same(everything(clean), everything(step))


def test_rows_of_skipped_steps_are_counted() -> None:
    step = make_step()
    bad = make_batch(0)
    bad[0][0, 0, 0, 0] = float("nan")
    for kind in "bbgbbbg":
        step(*(bad if kind == "b" else make_batch(1)), 0.01, 0.9)
    counts = step.read_counts()
    assert (counts.skipped, counts.longest) == (5, 3)
    step.begin_epoch()
    step(*bad, 0.01, 0.9)
    assert step.read_counts()[1:] == (1, 3)


def test_without_infobatch_it_is_plain_training() -> None:
    step = make_step(infobatch=None)
    model = copy.deepcopy(step.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    total = 0.0
    for seed in range(3):
        images, labels, batch = make_batch(seed)  # its weights are not taken
        step(images, labels, batch, 0.1, 0.9)
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / 3
    for mine, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert step.read_counts().loss == pytest.approx(total, rel=1e-5)
    state = step.state_dict()
    assert state["infobatch"] is None
    step.load_state_dict(state)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_host_read_in_the_step(amp: str, optimizer: str) -> None:
    step = make_step(optimizer, amp)
    step(*make_batch(0), 0.01, 0.9)
    with host_syncs(torch.device("cpu"), "count") as reads:
        step(*make_batch(1), 0.01, 0.9)
    assert reads.count == 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_learns_like_float32(amp: str) -> None:
    losses = {}
    for mode in ("off", amp):
        step = make_step("sgd", mode)
        for _ in range(12):
            step(*make_batch(0, 32), 0.05, 0.9)
        losses[mode] = step.read_counts().loss
        assert step.read_counts().skipped == 0
    assert losses[amp] == pytest.approx(losses["off"], rel=0.05)


def test_float16_scale_falls_and_recovers() -> None:
    step = make_step("sgd", "fp16")
    step.scale.fill_(2.0**40)
    before = everything(step)
    step(*make_batch(0), 0.01, 0.9)
    assert step.scale.item() == 2.0**39
    assert_same(before[:-1], everything(step)[: len(before) - 1])
    while step.scale.item() > 2.0**14:
        step(*make_batch(0), 0.01, 0.9)
        if step.growth.item() == 1:
            break
    step.growth.fill_(1999)
    scale = step.scale.item()
    step(*make_batch(1), 0.01, 0.9)
    assert step.scale.item() == 2 * scale


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_state_continues_bit_for_bit(optimizer: str, amp: str, tmp_path) -> None:
    step = make_step(optimizer, amp)
    bad = make_batch(7)
    bad[0][0, 0, 0, 0] = float("nan")
    for batch in (make_batch(0), bad, make_batch(1)):
        step(*batch, 0.01, 0.9)
    torch.save(step.state_dict(), tmp_path / "state")
    other = make_step(optimizer, amp)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.growth.item() == step.growth.item() == (amp == "fp16")
    for batch in (bad, make_batch(2), make_batch(3)):  # a skip first: back to what was loaded
        step(*batch, 0.02, 0.88)
        other(*batch, 0.02, 0.88)
    assert_same(everything(step), everything(other))
    assert step.read_counts() == other.read_counts()
    if amp == "fp16":
        assert other.scale.item() == step.scale.item() == 2.0**14


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch 2.11's own compiler
@pytest.mark.parametrize(("amp", "limit"), [("off", 1e-3), ("bf16", 0.02)])
def test_fifty_compiled_steps_follow_the_eager_ones(amp: str, limit: float) -> None:
    # Compiled, what is pointwise is fused: bfloat16 is rounded less often, sums may be in another
    # order.
    plain, compiled = make_step("lars", amp=amp), make_step("lars", amp=amp, compile=True)
    for seed in range(50):
        for step in (plain, compiled):
            step.begin_epoch()
            step(*make_batch(seed), 1.0, 0.9)
        assert compiled.read_counts().loss == pytest.approx(plain.read_counts().loss, rel=limit)
    assert list(compiled.state_dict()["model"]) == list(plain.state_dict()["model"])


@pytest.mark.parametrize("options", [False, True, {"max_autotune": True}])
def test_what_is_start_up_on_a_cpu(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compile(model: nn.Module, dynamic: bool, options: Any):
        asked.append(options)
        return lambda images: model(images)

    monkeypatch.setattr(torch, "compile", compile)
    step = make_step(compile=options)
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


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_compiler_that_fails_is_told_and_nothing_is_lost(
    where: str, amp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = fail_in(monkeypatch, where, TorchDynamoException("no compiler\n was found"))
    said: list[str] = []
    plain, compiled = make_step(amp=amp), make_step(amp=amp, compile=True, say=said.append)
    for seed in range(3):
        plain(*make_batch(seed), 0.05, 0.9)
        compiled(*make_batch(seed), 0.05, 0.9)
        assert_same(everything(plain), everything(compiled))
    assert plain.read_counts() == compiled.read_counts()
    assert said == ["WARNING: the network is not compiled: no compiler was found"]
    assert called == [where]
    assert not compiled.compiled
    with pytest.raises(RuntimeError, match=r"^no compiler"):
        make_step(amp=amp, compile=True)(*make_batch(0), 0.05, 0.9)


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
    step = make_step(compile=True, say=said.append)
    with pytest.raises(raised, match=r"^no memory$") as info:
        step(*make_batch(0), 0.05, 0.9)
    assert type(info.value) is raised
    assert said == []
    assert step.forward is not step.model


def test_an_eager_step_that_fails_is_no_compilers_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    step = make_step(say=said.append)

    def fail(images: Tensor) -> Tensor:
        raise TorchDynamoException("of the network's own")

    monkeypatch.setattr(step.model, "forward", fail)
    with pytest.raises(TorchDynamoException, match="own"):
        step(*make_batch(0), 0.05, 0.9)
    assert said == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch 2.11's own compiler
def test_a_backward_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    lower = GraphLowering.run

    def run(self: GraphLowering, *arguments: Any) -> Any:
        if self.is_backward:
            raise RuntimeError("no code for it")
        return lower(self, *arguments)

    monkeypatch.setattr(GraphLowering, "run", run)
    # Another test may have had the same network compiled.
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    torch.compiler.reset()
    said: list[str] = []
    plain, compiled = make_step(), make_step(compile=True, say=said.append)
    for seed in range(2):
        plain(*make_batch(seed), 0.05, 0.9)
        compiled(*make_batch(seed), 0.05, 0.9)
    assert said == ["WARNING: the network is not compiled: RuntimeError: no code for it"]
    assert_same(everything(plain), everything(compiled))


def test_a_model_without_buffers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    step = TrainStep(
        model,
        make_optimizer("lars", model, lr=0.1, weight_decay=0.0),
        InfoBatch(64, 4, device="cpu"),
        amp="off",
        label_smoothing=0.0,
        compile=False,
        phases=Phases(torch.device("cpu")),
    )
    step(*make_batch(0), 0.1, 0.9)
    assert step.read_counts().skipped == 0


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_no_sync_in_the_step_on_cuda(optimizer: str, amp: str) -> None:
    step = make_step(optimizer, amp, "cuda")
    data = make_batch(0, device="cuda")
    for _ in range(3):
        step(*data, 0.01, 0.9)
    with host_syncs(torch.device("cuda"), "forbid"):
        for _ in range(3):
            step(*data, 0.01, 0.9)
    assert step.read_counts().loss < 100


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_non_finite_step_changes_nothing_on_cuda(optimizer: str) -> None:
    step = make_step(optimizer, "bf16", "cuda")
    step(*make_batch(0, device="cuda"), 0.01, 0.9)
    before = everything(step)
    images, labels, batch = make_batch(1, device="cuda")
    images[3, 1, 4, 4] = float("nan")
    step(images, labels, batch, 0.01, 0.9)
    assert_same(before, everything(step))
    assert step.read_counts().skipped == 1
