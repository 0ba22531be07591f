"""The trainer on a card: the forms that were asked for, no host sync in a step, and resuming."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from steps_made import ON, FakeCuda, make_step
from torch.optim.optimizer import register_optimizer_step_post_hook
from traced import trace_syncs

from infobatch_fast.data.loader import make_loader
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train import config, loop, main
from infobatch_fast.train.records import CHECKPOINT, EPOCHS, SUMMARY, WEIGHTS

SYNTHETIC = "--dataset synthetic --synthetic-samples"
TINY = f"--preset quick --model small --batch-size 50 --max-lr 0.2 --amp off {SYNTHETIC} 500"


def train(folder: Path, words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's summary and its epochs."""
    assert main([*words.split(), "--out", str(folder)]) == 0
    lines = (folder / EPOCHS).read_text().splitlines()
    return json.loads((folder / SUMMARY).read_text()), [json.loads(line) for line in lines]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_a_run_forbids_host_syncs_from_its_first_step_on_cuda(kind: str, tmp_path: Path) -> None:
    words = "--device cuda --preset paper --model r18 --no-compile --host-syncs forbid --epochs 3"
    train(tmp_path / "run", f"{words} {SYNTHETIC} 2000 --loader {kind}")


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("cpu", "dali"),
        pytest.param("cuda", "dali", marks=pytest.mark.gpu),
        pytest.param("cuda", "torch", marks=pytest.mark.gpu),
    ],
)
def test_one_sync_an_epoch_and_none_in_its_steps(device: str, kind: str) -> None:
    where, samples = torch.device(device), 90
    images = torch.randint(0, 256, (samples, 32, 32, 3), dtype=torch.uint8).to(where)
    labels = torch.randint(0, 10, (samples,)).to(where)
    infobatch = InfoBatch(samples, 8, device=device)
    step = make_step("lars", device, infobatch=infobatch, amp="bf16")
    loader, _ = make_loader(kind, images, labels, 16, mean=(0.5,) * 3, std=(0.25,) * 3)

    def steps(plan: Any) -> None:
        for images, labels, batch in step.phases.each("wait", loader.epoch(plan)):
            with step.phases("step"):
                step(images, labels, batch, 0.1, 0.9)

    for epoch in range(3):  # what only a first epoch does may wait
        steps(infobatch.sample(epoch, 16))
        step.read_counts()
    with host_syncs(where, "count") as drawing:
        plan = infobatch.sample(3, 16)
    assert drawing.places.total() >= 1
    with host_syncs(where, "forbid"):
        steps(plan)
    step.read_counts()
    assert trace_syncs(lambda: steps(plan)).total() == 0
    if device == "cuda":
        assert drawing.count == 1
        assert trace_syncs(lambda: infobatch.sample(4, 16)).total() == 1


@pytest.mark.usefixtures("like_for_like")  # so that both draw the same second epoch
@pytest.mark.parametrize("device", ON)
def test_a_stopped_run_goes_on_as_the_one_that_was_not(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eager, since no optimizer is called in a replay. The first epoch is full, the second pruned.
    words = f"{TINY} --device {device} --epochs 2 --delta 1.0"
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    train(undisturbed, words)
    done = 0

    def stop(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == 10 + 3:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    try:
        assert main([*words.split(), "--out", str(stopped)]) == 128 + signal.SIGTERM
    finally:
        hook.remove()
    assert torch.load(stopped / CHECKPOINT, weights_only=True)["number"] == 3
    assert main(["--resume", str(stopped)]) == 0
    runs = []
    for folder in (undisturbed, stopped):
        state = torch.load(folder / CHECKPOINT, weights_only=True)["step"]
        scores = state["infobatch"]["scores"].cpu()
        runs.append({**torch.load(folder / WEIGHTS, weights_only=True), "scores": scores})
    # On a card cuDNN may take another algorithm in the other run, and some add in any order.
    limit = 1e-3 if device == "cuda" else 0.0
    assert runs[0].keys() == runs[1].keys()
    for name, want in runs[0].items():
        off = (runs[1][name].double() - want.double()).abs().nan_to_num().max()
        assert off <= limit * want.double().abs().nan_to_num().max(), name


@pytest.mark.usefixtures("like_for_like")
@pytest.mark.parametrize("device", ON)
def test_a_captured_run_trains_as_the_eager_one_and_says_so(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        FakeCuda(monkeypatch)
        settle = config.settle  # which refuses it on a CPU
        monkeypatch.setattr(
            config, "settle", lambda run, name, _, ranks: settle(run, name, "cuda", ranks)
        )
        monkeypatch.setattr(loop, "obstacle", lambda step: None)
    words = f"{TINY} --device {device} --optimizer lars --epochs 3 --whole-batches"
    eager, _ = train(tmp_path / "eager", f"{words} --no-graph")
    captured, lines = train(tmp_path / "captured", f"{words} --graph")
    assert (eager["captured"], captured["captured"]) == (False, True)
    assert captured["samples_trained"] == eager["samples_trained"]
    assert captured["loss_last"] == pytest.approx(eager["loss_last"], rel=1e-2)
    assert [line["startup_seconds"] > 0 for line in lines] == [True, False, False]


@pytest.mark.gpu
def test_the_paper_preset_runs_as_it_says_and_start_up_is_apart(tmp_path: Path) -> None:
    words = f"--preset paper --model r18 --epochs 4 {SYNTHETIC} 4000"
    summary, lines = train(tmp_path / "run", words)
    forms = {name: summary[name] for name in ("compiled", "captured", "by_kernels", "loader")}
    assert forms == {"compiled": True, "captured": True, "by_kernels": True, "loader": "DaliLoader"}
    assert lines[0]["kept"] == 4000 > lines[1]["kept"]
    assert lines[1]["kept"] % 200 == 0
    # The first epoch compiles and captures, and those behind it do neither.
    assert [line["startup_seconds"] > 0 for line in lines] == [True, False, False, False]
    assert [line["startup_images"] for line in lines] == [600, 0, 0, 0]
    assert lines[0]["startup_seconds"] > summary["epoch_seconds"]
    assert summary["images_per_second"] > 0.5 * lines[-1]["images_per_second"]
