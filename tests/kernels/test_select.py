"""Triton or torch: the kernels must prove themselves, and what runs on them does as torch does."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infobatch_fast import InfoBatch, infobatch
from infobatch_fast.kernels import reference, select, twin
from infobatch_fast.kernels.select import Kernels
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train import optim, step
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import TrainStep

CPU = torch.device("cpu")


def cross_entropy_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    label_smoothing: float,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    attached = logits.detach().requires_grad_()
    with torch.enable_grad():
        losses = F.cross_entropy(
            attached.float(), labels, reduction="none", label_smoothing=label_smoothing
        )
        loss = reference.rescaled_mean(losses, weights)
        (gradient,) = torch.autograd.grad(loss if scale is None else loss * scale, attached)
    return loss.detach(), losses.detach(), gradient


TWINS = Kernels(
    reference.threshold,
    twin.partition,
    twin.choose,
    twin.shuffle,
    reference.record,
    cross_entropy_gradient,
    optim._ForeachLars,
    max_classes=16,
)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs as if the device had kernels, which are their twins in torch."""
    for module in (infobatch, step, optim):
        monkeypatch.setattr(module, "triton_kernels", lambda device: TWINS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, which interprets
def test_torch_and_the_interpreted_kernels_prove_themselves() -> None:
    select.prove(TWINS, CPU)
    select.prove(select.load(), CPU)


def wrong(name: str) -> Callable[..., Any]:
    """The twin with a small mistake in what it gives."""
    right = getattr(TWINS, name)

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        if name == "record":
            args[0][5] += 1
        if isinstance(result, tuple):
            return (result[0].flip(0) if result[0].dim() else result[0] * 1.01, *result[1:])
        if isinstance(result, Tensor):
            return result * 1.01 if result.is_floating_point() else result.flip(0)
        return result

    class MistakenLars(optim._ForeachLars):
        def update(self, *args: Any, **kwargs: Any) -> None:
            super().update(*args, **{**kwargs, "clip": 0.41})

    return MistakenLars if name == "lars" else mistaken


def always(scores: Tensor, indices: Tensor, losses: Tensor, found_inf: Tensor) -> None:
    """Records a skipped step."""
    reference.record(scores, indices, losses)


@pytest.mark.parametrize(
    ("name", "mistaken"),
    [*((name, wrong(name)) for name in Kernels._fields[:-1]), ("record", always)],
)
def test_a_kernel_that_differs_is_found(name: str, mistaken: Any) -> None:
    with pytest.raises(RuntimeError, match=rf"^the kernel {name} differs from torch's operations$"):
        select.prove(TWINS._replace(**{name: mistaken}), CPU)


@pytest.mark.parametrize("failure", ["load", "prove", None])
def test_a_device_is_proven_once(monkeypatch: pytest.MonkeyPatch, failure: str | None) -> None:
    proofs: list[torch.device] = []

    def fail(*arguments: Any) -> None:
        raise RuntimeError("ptxas died\n  of old age")

    monkeypatch.setattr(select, "load", lambda: TWINS)
    monkeypatch.setattr(select, "prove", lambda kernels, device: proofs.append(device))
    monkeypatch.setattr(select, "_PROVEN", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert select.triton_kernels(CPU) is None
    if failure is None:
        assert [select.triton_kernels(devices[i]) for i in (0, 0, 1)] == [TWINS] * 3
        assert proofs == devices
        return
    monkeypatch.setattr(select, failure, fail)
    says = "^torch's operations stand in for the Triton kernels: ptxas died of old age$"
    with pytest.warns(UserWarning, match=says):
        assert select.triton_kernels(devices[0]) is None
    assert select.triton_kernels(devices[0]) is None  # and a second warning would be an error


@pytest.mark.parametrize("policy", ["soft", "random"])
def test_an_epoch_drawn_by_kernels(twins: None, policy: str) -> None:
    def pruner(**options: Any) -> InfoBatch:
        made = InfoBatch(1000, 8, 0.3, device="cpu", policy=policy, **options)
        made.scores.uniform_(generator=torch.Generator().manual_seed(0))
        made.scores[::9] = torch.nan
        return made

    ours = pruner(seed=3)
    assert torch.equal(ours.sample(7).indices.sort().values, torch.arange(1000))
    prunable = reference.well_learned(ours.scores) if policy == "soft" else ours.scores.isfinite()
    n = int(prunable.sum())
    with host_syncs(CPU, "count") as watch:
        plan = ours.sample(1)
    # The twin of `partition` is two nonzero(); of the plan itself, one read.
    assert watch.places["_local_scalar_dense"] == 1
    k = round(0.7 * n)
    assert (len(plan), plan.num_prunable) == (1000 - n + k, n)
    chosen = prunable[plan.indices]
    assert int(chosen.sum()) == k
    assert plan.indices.unique().numel() == len(plan)
    assert torch.equal(plan.weights, torch.where(chosen, n / k, 1.0))
    assert torch.equal(plan.indices, ours.sample(1).indices)
    assert not torch.equal(plan.indices, ours.sample(2).indices)
    assert not torch.equal(plan.indices, pruner(seed=4).sample(1).indices)
    assert len(ours.sample(1, 32)) % 32 == 0
    assert pruner(rescale=False).sample(1).weights.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("amp", "plain", "most"),
    # 9: fewer classes than there are, so torch's loss
    [("off", False, 16), ("bf16", True, 16), ("fp16", False, 16), ("off", True, 9)],
)
def test_a_step_by_kernels_is_the_step(
    monkeypatch: pytest.MonkeyPatch, amp: str, plain: bool, most: int
) -> None:
    def train() -> tuple[TrainStep, InfoBatch]:
        model = make_model("small", 10, seed=1)
        pruner = InfoBatch(64, 4, device="cpu")
        taken = TrainStep(
            model,
            make_optimizer("lars", model, lr=0.1, weight_decay=5e-4),
            None if plain else pruner,
            amp=amp,
            label_smoothing=0.1,
            compile=False,
            phases=Phases(CPU),
        )
        generator = torch.Generator().manual_seed(0)
        plan = pruner.sample(0)
        for batch in itertools.islice(plan.batches(4), 3):
            batch = batch._replace(weights=1 + torch.rand(4, generator=generator))
            images = torch.randn(4, 3, 32, 32, generator=generator)
            taken(images, torch.randint(0, 10, (4,), generator=generator), batch, 0.05, 0.9)
        return taken, pruner

    torch_step, torch_scores = train()
    # The plan is drawn as before: only the step is compared.
    twins = TWINS._replace(max_classes=most)
    monkeypatch.setattr(step, "triton_kernels", lambda device: twins)
    kernel_step, kernel_scores = train()
    for one, other in zip(
        torch_step.model.parameters(), kernel_step.model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch_scores.scores, kernel_scores.scores, equal_nan=True)
    assert kernel_step.read_counts() == pytest.approx(torch_step.read_counts(), rel=1e-6)
    assert torch_scores.scores.isfinite().sum() == (0 if plain else 12)


@pytest.mark.gpu
def test_the_kernels_prove_themselves_on_cuda() -> None:
    assert select.triton_kernels(torch.device("cuda", 0)) is not None
