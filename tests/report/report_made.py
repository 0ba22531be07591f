"""Folders of runs and files of benchmarks, made by formula, for the tests of what reads them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from infobatch_fast.pruning import Pruning
from infobatch_fast.report.lines import Line
from infobatch_fast.train.records import CONFIG, EPOCHS, SUMMARY, EpochLine, RunRecord, Summary

SAMPLES = 1000
CPU = {"type": "cpu", "name": "Test CPU", "threads": 1}
GPU = {"type": "cuda", "name": "Test GPU", "memory_bytes": 2**37}
SOURCE = {
    "version": "0.1.0",
    "commit": "ab" * 20,
    "source_hash": "5a" * 32,
    "python": "3.11.7",
    "packages": {"torch": "2.15.0"},
}
SETTINGS = {
    **{"preset": "quick", "model": "small", "epochs": 4, "batch_size": 200, "optimizer": "sgd"},
    **{"max_lr": 0.4, "weight_decay": 0.0005, "label_smoothing": 0.1, "amp": "off"},
    **{"whole_batches": False, "compile": False, "graph": False, "dataset": "cifar10"},
    **{"loader": "torch", "data_fraction": 1.0, "synthetic_samples": 50_000, "seed": 0},
    **{"synthetic_classes": 10, "device": "cpu", "mixup": 0.0, "ema": 0.0, "log": "off"},
    **{"train_size": 176, "test_size": 224, "workers": 0, "cache": "auto", "max_bad_files": 0},
    **{"validation": 0, "label_noise": 0.0, "sync_batch_norm": False},
    **{"eval_every": 1, "checkpoint_every": 0, "telemetry": True, "host_syncs": "off"},
}


def write_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    accuracy: float = 0.8,
    epoch_seconds: float = 60.0,
    done: int | None = None,
    **about: Any,
) -> Path:
    """Write a run's folder, and return it.

    A pruned epoch keeps 1000 - 400 ratio of 1000 samples, in that share of a full epoch's time, 1%
    of which is pruning. Each epoch spends 2 s on start-up, evaluation and the rest.

    Args:
        folder: made.
        config: changes to SETTINGS and to the default `Pruning`.
        accuracy: of the last epoch.
        epoch_seconds: of a full epoch's training and pruning.
        done: epochs finished; fewer than all leave no summary.
        about: changes to the rest of config.json.
    """
    settings = {**SETTINGS, **Pruning().settings(), **(config or {})}
    pruning, epochs = Pruning.of(settings), settings["epochs"]
    last = epochs if pruning.method.delta == 1 else -(-epochs * 7 // 8)  # that may prune
    full_from = 0 if pruning.full_data else last
    device = GPU if settings["device"] == "cuda" else CPU
    record = RunRecord(
        config=settings,
        **{"data": "published", "device": device, "samples": {"train": SAMPLES}, **SOURCE, **about},
    )
    lines = []
    for epoch in range(1, (epochs if done is None else done) + 1):
        pruned = 1 < epoch <= full_from
        kept = SAMPLES - round(400 * pruning.ratio) * pruned
        seconds = epoch_seconds * kept / SAMPLES
        lines.append(
            EpochLine(
                epoch=epoch,
                kept=kept,
                prunable=400 * pruned,
                loss=2.0 / epoch,
                lr=0.1,
                accuracy=accuracy - 0.1 * (1 - epoch / epochs),
                images_per_second=kept / seconds,
                skipped_steps=0,
                train_seconds=0.99 * seconds,
                pruning_seconds=0.01 * seconds,
                evaluation_seconds=1.0,
                checkpoint_seconds=0.0,
                startup_seconds=0.5,
                seconds=seconds + 2.0,
                joules=500.0 if device is GPU else None,
                phases={"choose": 0.01 * seconds, "step": 0.99 * seconds, "evaluation": 1.0},
                score_histogram={"low": 0.1, "high": 10.0, "counts": [0, 600, 400, 0], "unseen": 0},
            )
        )
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(asdict(record)))
    (folder / EPOCHS).write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
    if len(lines) == epochs:
        trained = sum(line.kept for line in lines)
        summary = Summary(
            accuracy_last=accuracy,
            accuracy_best=accuracy,
            accuracy_best_epoch=epochs,
            loss_last=2.0 / epochs,
            epochs=epochs,
            samples_trained=trained,
            samples_saved=SAMPLES * epochs - trained,
            saved_share=1 - trained / SAMPLES / epochs,
            images_per_second=SAMPLES / epoch_seconds,
            skipped_steps=0,
            train_seconds=sum(line.train_seconds for line in lines),
            pruning_seconds=sum(line.pruning_seconds or 0.0 for line in lines),
            evaluation_seconds=float(epochs),
            checkpoint_seconds=0.0,
            peak_memory_bytes=2**20,
            data=record.data,
            joules=500.0 * epochs if device is GPU else None,
        )
        (folder / SUMMARY).write_text(json.dumps(asdict(summary)))
    return folder


FULL = {"delta": 0.0}


def write_arrays(folder: Path, epochs: int = 4) -> Path:
    """Add what a run tells of its samples: the first 100 were left out of one epoch, and so on."""
    kept = np.full(SAMPLES, epochs, np.int32)
    kept[:100] -= 1
    arrays = {
        "kept": kept,
        "scores": np.linspace(0.1, 2, SAMPLES, dtype=np.float32),
        "labels": (np.arange(SAMPLES) % 4).astype(np.int32),
        "pictured": np.arange(24),
        "pictures": np.zeros((24, 32, 32, 3), np.uint8),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def line(**changes: Any) -> dict[str, Any]:
    """A benchmark's line."""
    of = Line(
        benchmark="overhead",
        part="choose",
        case={"samples": 50_000, "side": "device"},
        unit="s",
        median=0.00084,
        p20=0.0008,
        p80=0.0009,
        count=320,
        more={"updates_seconds": 0.0497, "pruned_epoch_percent": 0.84},
        absent=None,
        complete=True,
        quick=False,
        options={"load_average": 0.1, "cores": 2},
        started="2026-01-02T03:04:05+00:00",
        device=CPU,
        **SOURCE,
    )
    return {**asdict(of), **changes}
