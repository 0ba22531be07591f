"""The examples run as they stand, on the data that is here."""

import difflib
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from infobatch_fast.train.schedule import one_cycle

EXAMPLES = Path(__file__).parents[1] / "examples"
PAIRS = ("timm_loop", "torchvision_loop")
TINY = ["--epochs", "4", "--limit", "160", "--batch-size", "16", "--workers", "0"]
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="not in a checkout")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of each of the optimizer's steps."""
    if not os.environ.get("INFOBATCH_DATA"):
        pytest.importorskip("sklearn")
        monkeypatch.delenv("INFOBATCH_DATA", raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)
    taken: list[float] = []
    step = torch.optim.SGD.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    return taken


@pytest.mark.parametrize("name", PAIRS)
def test_pruning_changes_at_most_15_lines(name: str) -> None:
    plain, pruned = (
        (EXAMPLES / f"{name}{end}.py").read_text().splitlines() for end in ("", "_pruned")
    )
    changed = [line for line in difflib.unified_diff(plain, pruned, n=0) if line[1:].strip()]
    changed = [line[0] for line in changed if not line.startswith(("+++", "---"))]
    assert 0 < changed.count("+") <= 15
    assert changed.count("-") <= 15


@pytest.mark.parametrize("name", PAIRS)
def test_pruned_loops_take_fewer_steps_on_the_same_schedule(name: str, steps: list[float]) -> None:
    importlib.import_module(name).main(TINY)
    plain = steps.copy()
    steps.clear()
    importlib.import_module(f"{name}_pruned").main(TINY)
    assert len(plain) == 4 * 10
    assert 2 * 10 + 2 * 5 <= len(steps) < len(plain)  # the first and the last epoch are full
    assert steps[-1] == pytest.approx(plain[-1], rel=1e-6, abs=1e-3)
    assert max(steps) == pytest.approx(max(plain), rel=0.05)


def test_the_reference_loop_resumes_with_its_scores(
    steps: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = importlib.import_module("torchvision_loop_pruned")
    flags = [*TINY, "--output-dir", str(tmp_path)]
    loop.main(flags)
    whole = steps.copy()
    steps.clear()
    train, epochs = loop.train_one_epoch, []

    def interrupted(*parts: Any) -> float:
        epochs.append(parts[5])
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train(*parts)

    monkeypatch.setattr(loop, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.main(flags)
    loop.main([*flags, "--resume", str(tmp_path / "checkpoint.pth")])
    assert epochs == [0, 1, 2, 2, 3]
    # Flips are not of a seed that the checkpoint has, so that the third epoch differs a little.
    assert len(steps) == pytest.approx(len(whole), abs=2)
    assert len(steps) < 4 * 10


def test_the_quick_recipe_follows_the_trainers_rates(steps: list[float]) -> None:
    assert 0 <= importlib.import_module("cifar_loop").main(TINY) <= 1
    assert 2 * 10 + 2 * 5 <= len(steps) < 4 * 10
    trainers = [one_cycle(step / 40, max_lr=0.4)[0] for step in range(40)]
    # torch's one-cycle has its peak a step earlier.
    assert steps[:10] == pytest.approx(trainers[:10], abs=0.04)
    assert steps[-10:] == pytest.approx(trainers[-10:], abs=0.04)


@pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and of its own dependencies
def test_lightning(steps: list[float], tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    example = importlib.import_module("lightning_cifar")
    metrics = example.main([*TINY, "--out", str(tmp_path)])
    assert {"loss", "accuracy"} <= metrics.keys()
    assert 2 * 10 + 2 * 5 <= len(steps) < 4 * 10
    assert steps[-1] < 0.02
    (last,) = tmp_path.glob("last.ckpt")
    trained = len(steps)
    example.main([*TINY, "--out", str(tmp_path), "--resume", str(last)])
    assert len(steps) == trained  # the run was complete


def test_accelerate(steps: list[float], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    example = importlib.import_module("accelerate_cifar")
    flags = [*TINY, "--out", str(tmp_path)]
    assert 0 <= example.main(flags) <= 1
    assert 2 * 10 + 2 * 5 <= len(steps) < 4 * 10
    assert steps[-1] < 0.02
    trained = len(steps)
    example.main([*flags, "--resume", str(tmp_path)])
    assert len(steps) == trained  # the run was complete


@pytest.mark.parametrize("task", ["images", "texts", "language"])
def test_hugging_face(task: str, steps: list[float], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    example = importlib.import_module("huggingface_trainer")
    flags = [task, *TINY, "--out", str(tmp_path), "--accumulate", "2"]
    metrics = example.main(flags)
    assert metrics["eval_loss"] > 0
    assert ("eval_accuracy" in metrics) == (task != "language")
    assert 2 * 5 + 2 * 2 <= metrics["steps"] < 4 * 5
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    again = example.main([*flags, "--resume", str(checkpoint)])
    assert again["steps"] == metrics["steps"]  # the run was complete
