"""Every form of the step trains as the eager one: compiled, captured, on both sizes of batches."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from steps_made import FakeCuda, assert_same, everything, make_batch, make_step, spoilt_batch
from torch._dynamo.utils import counters

from infobatch_fast.data.loader import make_loader
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train.distributed import Ranks
from infobatch_fast.train.graph import MOST, GraphStep
from infobatch_fast.train.loop import _batches
from infobatch_fast.train.step import DDP_WARM_UP

# Relative, of each loss. A rounding of the weights makes 1e-3 in bfloat16, on a CPU.
LIMITS = {"off": 1e-4, "bf16": 1e-2, "fp16": 1e-2}

BOTH = [
    ("cpu", False),
    pytest.param("cuda", False, marks=pytest.mark.gpu),
    pytest.param("cuda", True, marks=pytest.mark.gpu),
]

pytestmark = pytest.mark.usefixtures("like_for_like")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        FakeCuda(monkeypatch)
    torch.compiler.reset()
    counters.clear()
    return request.param


def assert_form(captured: GraphStep, device: str, compiled: bool) -> None:
    """It is the form that was meant, none that took its place with a line of text."""
    assert captured.captured
    assert len(captured._graphs) == MOST
    assert captured.step.by_kernels == (device == "cuda")
    assert captured.step.compiled == compiled
    assert counters["stats"]["unique_graphs"] == (2 if compiled else 0)  # a graph a size
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("device", "optimizer", "amp", "compiled"),
    [
        ("cpu", "lars", "off", False),
        pytest.param("cpu", "lars", "off", True, marks=pytest.mark.slow),
        pytest.param("cuda", "lars", "off", False, marks=pytest.mark.gpu),
        pytest.param("cuda", "lars", "bf16", False, marks=pytest.mark.gpu),
        pytest.param("cuda", "lars", "fp16", False, marks=pytest.mark.gpu),
        pytest.param("cuda", "lamb", "bf16", False, marks=pytest.mark.gpu),
        pytest.param("cuda", "lars", "off", True, marks=pytest.mark.gpu),
        pytest.param("cuda", "lars", "bf16", True, marks=pytest.mark.gpu),
    ],
    indirect=["device"],
)
def test_fifty_captured_steps_follow_the_eager_ones(
    device: str, optimizer: str, amp: str, compiled: bool
) -> None:
    eager = make_step(optimizer, device, amp=amp)
    step = make_step(optimizer, device, amp=amp, compile=compiled)
    captured = GraphStep(step)
    for seed in range(50):
        batch = make_batch(seed, 16 if seed % 3 else 5, device)
        for one in (eager, step):
            one.begin_epoch()
        captured.capture()
        eager(*batch, 0.01 * (1 + seed % 5), 0.9)
        captured(*batch, 0.01 * (1 + seed % 5), 0.9)
        expected = pytest.approx(eager.read_counts().loss, rel=LIMITS[amp], nan_ok=True)
        assert step.read_counts().loss == expected
    assert_form(captured, device, compiled)
    batch, spoilt = make_batch(50, device=device), spoilt_batch(51, device=device)
    with host_syncs(torch.device(device), "forbid"):
        captured(*batch, 0.01, 0.9)
    eager(*batch, 0.01, 0.9)
    assert step.infobatch is not None
    assert eager.infobatch is not None
    close = {"rtol": LIMITS[amp], "atol": LIMITS[amp], "equal_nan": True}
    torch.testing.assert_close(step.infobatch.scores, eager.infobatch.scores, **close)
    before = everything(step)
    captured(*spoilt, 0.01, 0.9)
    assert step.read_counts().skipped == 1
    assert_same(before, everything(step))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.parametrize(("device", "compiled"), BOTH, indirect=["device"])
def test_gradients_are_averaged_within_the_captured_step(
    device: str, compiled: bool, tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ranks = Ranks()  # one process, which goes the way of several
        ranks.world = 2
        ranks.group = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
        eager, step = (
            make_step(device=device),
            make_step(device=device, compile=compiled, ranks=ranks),
        )
        captured = GraphStep(step)
        for seed in range(DDP_WARM_UP + 10):
            captured.capture()
            for one in (eager, captured):
                one(*make_batch(seed, 16, device), 0.02, 0.9)
        assert captured.captured
        assert step.compiled == compiled
        counts = eager.read_counts().loss, step.read_counts().loss
        assert counts[1] == pytest.approx(counts[0], rel=LIMITS["off"])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("device", "compiled"), BOTH, indirect=["device"])
def test_captures_in_and_right_after_an_epoch_of_dali(device: str, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (58, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (58,), generator=generator)
    infobatch = InfoBatch(58, 6, delta=0.0, device=device)  # full epochs: 3 batches and 10 samples
    phases = Phases(torch.device(device), enabled=False)
    losses, seen = [], ([], [])
    for captures in (False, True):
        step = make_step("lars", device, compile=captures and compiled)
        advance = GraphStep(step) if captures else step
        loader, note = make_loader(
            "dali", images.to(device), labels.to(device), 16, mean=(0.5,) * 3, std=(0.25,) * 3
        )
        assert note is None
        for epoch in range(6):
            epochs = loader, infobatch.sample(epoch), advance, phases
            for batch_images, batch_labels, batch in _batches(*epochs, lambda _: nullcontext()):
                advance(batch_images, batch_labels, batch, 0.02, 0.9)
                seen[captures].append(batch.indices)
        losses.append(step.read_counts().loss)
    assert isinstance(advance, GraphStep)
    assert_form(advance, device, compiled)
    assert losses[1] == pytest.approx(losses[0], rel=LIMITS["off"])
    assert_same(*seen)
