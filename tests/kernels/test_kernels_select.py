"""Triton or torch: the kernels must prove themselves, and what runs on them does as torch does."""

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infobatch_fast import InfoBatch, infobatch
from infobatch_fast.kernels import prune_torch, reference, select
from infobatch_fast.kernels.select import Kernels
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train import step
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import TrainStep

CPU = torch.device("cpu")


def update(losses: Tensor, weights: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
    reference.record(scores, indices, losses)
    return reference.rescaled_mean(losses, weights)


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
    prune_torch.partition,
    prune_torch.choose,
    prune_torch.shuffle,
    update,
    reference.record,
    cross_entropy_gradient,
    max_classes=16,
)


@pytest.fixture
def twins(monkeypatch) -> None:
    """Everything runs as if the device had kernels, which are their twins in torch."""
    for module in (infobatch, step):
        monkeypatch.setattr(module, "triton_kernels", lambda device: TWINS)


def test_torch_proves_itself() -> None:
    select.prove(TWINS, CPU)


def wrong(name: str) -> Any:
    """The twin with a small mistake in what it gives."""
    right = getattr(TWINS, name)

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        if name in ("update", "record") and args[3 if name == "update" else 0].is_contiguous():
            scores = args[3 if name == "update" else 0]
            result = right(*args, **kwargs)
            scores[5] += 1
            return result
        result = right(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0].flip(0) if result[0].dim() else result[0] * 1.01, *result[1:])
        return result * 1.01 if result.is_floating_point() else result.flip(0)

    return mistaken


@pytest.mark.parametrize("name", Kernels._fields[:-1])
def test_a_kernel_that_differs_is_found(name: str) -> None:
    says = "cross_entropy" if name == "cross_entropy_gradient" else name
    with pytest.raises(RuntimeError, match=rf"^the kernel {says} differs from torch's operations$"):
        select.prove(TWINS._replace(**{name: wrong(name)}), CPU)


def test_a_skipped_step_that_is_recorded_is_found() -> None:
    def always(scores: Tensor, indices: Tensor, losses: Tensor, found_inf: Tensor) -> None:
        reference.record(scores, indices, losses)

    with pytest.raises(RuntimeError, match=r"^the kernel record differs"):
        select.prove(TWINS._replace(record=always), CPU)


def test_a_cpu_gets_torch() -> None:
    assert select.triton_kernels(CPU) is None


@pytest.mark.parametrize("failure", ["load", "prove"])
def test_what_does_not_work_is_told_once(monkeypatch, failure: str) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("ptxas died\n  of old age")

    monkeypatch.setattr(select, "load", lambda: TWINS)
    monkeypatch.setattr(select, failure, fail)
    monkeypatch.setattr(select, "_PROVEN", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    device = torch.device("cuda", 0)
    says = "^torch's operations stand in for the Triton kernels: ptxas died of old age$"
    with pytest.warns(UserWarning, match=says):
        assert select.triton_kernels(device) is None
    assert select.triton_kernels(device) is None  # and a second warning would be an error


def test_a_device_is_proven_once(monkeypatch) -> None:
    proofs: list[torch.device] = []
    monkeypatch.setattr(select, "load", lambda: TWINS)
    monkeypatch.setattr(select, "prove", lambda kernels, device: proofs.append(device))
    monkeypatch.setattr(select, "_PROVEN", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    for _ in range(2):
        assert select.triton_kernels(torch.device("cuda", 0)) is TWINS
    select.triton_kernels(torch.device("cuda", 1))
    assert proofs == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize("policy", ["soft", "random"])
def test_an_epoch_drawn_by_kernels(twins, policy: str) -> None:
    pruner = InfoBatch(1000, 8, 0.3, device="cpu", policy=policy, seed=3)
    assert torch.equal(pruner.sample(0).indices.sort().values, torch.arange(1000))
    assert not torch.equal(pruner.sample(0).indices, pruner.sample(7).indices)
    pruner.scores.uniform_(generator=torch.Generator().manual_seed(0))
    pruner.scores[::9] = torch.nan
    well = reference.well_learned(pruner.scores)
    prunable = well if policy == "soft" else pruner.scores.isfinite()
    n = int(prunable.sum())
    with host_syncs(CPU, "count") as watch:
        plan = pruner.sample(1)
    # The twin of `partition` is two nonzero(); of the plan itself, one read.
    assert watch.places["_local_scalar_dense"] == 1
    k = round(0.7 * n)
    assert (len(plan), plan.num_prunable) == (1000 - n + k, n)
    chosen = prunable[plan.indices]
    assert int(chosen.sum()) == k
    assert plan.indices.unique().numel() == len(plan)
    assert torch.equal(plan.weights, torch.where(chosen, n / k, 1.0))
    assert plan.weights.sum().item() == pytest.approx(1000, abs=1e-2)
    again, other = pruner.sample(1), pruner.sample(2)
    assert torch.equal(plan.indices, again.indices)
    assert not torch.equal(plan.indices, other.indices)
    assert len(pruner.sample(1, 32)) % 32 == 0
    seeded = InfoBatch(1000, 8, 0.3, device="cpu", policy=policy, seed=4)
    seeded.scores.copy_(pruner.scores)
    assert not torch.equal(seeded.sample(1).indices, plan.indices)
    plain = InfoBatch(1000, 8, 0.3, device="cpu", policy=policy, rescale=False)
    plain.scores.copy_(pruner.scores)
    assert plain.sample(1).weights.unique().tolist() == [1.0]


def test_update_by_kernels(twins) -> None:
    pruner = InfoBatch(10, 4, device="cpu")
    batch = pruner.sample(0).batch(0, 4)
    losses = torch.tensor([1.0, 2.0, torch.inf, 4.0]).requires_grad_()
    pruner.update(losses, batch).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.25] * 4
    assert pruner.scores[batch.indices].nan_to_num(-1.0).tolist() == [1, 2, -1, 4]
    half = torch.rand(4, 2, dtype=torch.float16)
    assert pruner.update(half, batch).item() == pytest.approx(half.float().mean().item())


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_step_by_kernels_is_the_step(monkeypatch, amp: str, plain: bool) -> None:
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
        for begin in (0, 16, 32):
            batch = plan.batch(begin, begin + 16)
            batch = batch._replace(weights=1 + torch.rand(16, generator=generator))
            images = torch.randn(16, 3, 32, 32, generator=generator)
            taken(images, torch.randint(0, 10, (16,), generator=generator), batch, 0.05, 0.9)
        return taken, pruner

    torch_step, torch_scores = train()
    # The plan is drawn as before: only the step is compared.
    monkeypatch.setattr(step, "triton_kernels", lambda device: TWINS)
    kernel_step, kernel_scores = train()
    for one, other in zip(
        torch_step.model.parameters(), kernel_step.model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch_scores.scores, kernel_scores.scores, equal_nan=True)
    assert kernel_step.read_counts() == pytest.approx(torch_step.read_counts(), rel=1e-6)
    assert torch_scores.scores.isfinite().sum() == (0 if plain else 48)


def test_more_classes_than_the_kernel_holds(monkeypatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("too many classes")

    few = TWINS._replace(max_classes=9, cross_entropy_gradient=refuse)
    monkeypatch.setattr(step, "triton_kernels", lambda device: few)
    model = make_model("small", 10, seed=1)
    pruner = InfoBatch(16, 4, device="cpu")
    optimizer = make_optimizer("lars", model, lr=0.1, weight_decay=5e-4)
    options: dict[str, Any] = {"amp": "off", "label_smoothing": 0.1, "compile": False}
    taken = TrainStep(model, optimizer, pruner, phases=Phases(CPU), **options)
    labels = torch.randint(0, 10, (16,))
    taken(torch.randn(16, 3, 32, 32), labels, pruner.sample(0).batch(0, 16), 0.1, 0.9)
    assert pruner.scores.isfinite().all()


@pytest.mark.slow
def test_the_kernels_prove_themselves_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch; from infobatch_fast.kernels import select\n"
        "select.prove(select.load(), torch.device('cpu')); print('proven')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (ran.returncode, ran.stdout) == (0, "proven\n"), ran.stderr


@pytest.mark.gpu
def test_the_kernels_prove_themselves_on_cuda() -> None:
    assert select.triton_kernels(torch.device("cuda", 0)) is not None
