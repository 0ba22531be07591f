"""Records of runs and lines of benchmarks, made by formula, for the report's tests."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from infobatch_fast.report.lines import Line

SOURCE, OTHER_SOURCE = "5a" * 32, "c3" * 32
CPU = {"type": "cpu", "name": "Test CPU", "threads": 1}
GPU = {"type": "cuda", "name": "Test GPU", "memory_bytes": 2**37, "driver": "1.2"}

QUICK = {
    "preset": "quick",
    "ratio": 0.5,
    "delta": 0.875,
    "policy": "soft",
    "rescale": True,
    "anneal": True,
    "model": "small",
    "epochs": 4,
    "batch_size": 200,
    "optimizer": "sgd",
    "max_lr": 0.4,
    "weight_decay": 0.0005,
    "label_smoothing": 0.1,
    "amp": "off",
    "whole_batches": False,
    "compile": False,
    "dataset": "cifar10",
    "loader": "torch",
    "synthetic_samples": 50_000,
    "synthetic_classes": 10,
    "synthetic_easy": 0.5,
    "synthetic_hard": 0.1,
    "seed": 0,
    "device": "cpu",
    "eval_every": 1,
    "checkpoint_every": 0,
    "telemetry": True,
    "host_syncs": "off",
}
PAPER = {
    **QUICK,
    "preset": "paper",
    "model": "r50",
    "epochs": 200,
    "optimizer": "lars",
    "max_lr": 5.2,
    "amp": "bf16",
    "whole_batches": True,
    "loader": "dali",
    "device": "cuda",
}


def write_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    accuracy: float = 0.8,
    epoch_seconds: float = 60.0,
    done: int | None = None,
    new: bool = True,
    about: dict[str, Any] | None = None,
    eval_every: int = 1,
) -> Path:
    """Write a run's folder.

    Each pruned epoch (not the first, nor the last eighth) keeps 1000 - 400 x ratio of 1000
    samples, and takes time in proportion, of which 1% is pruning; evaluation takes 1 s an epoch
    and checkpoints 0.5 s.

    Args:
        folder: made.
        config: changes to QUICK; without telemetry the record is as the trainer then writes it.
        accuracy: of the last epoch; the epochs before approach it.
        epoch_seconds: of a full epoch's training and pruning.
        done: epochs finished; fewer than all leave no summary.
        new: whether the record has what older ones lack.
        about: changes to config.json beside its config.
        eval_every: epochs between evaluations.
    """
    config = {**QUICK, **(config or {})}
    epochs, samples = config["epochs"], 1000
    last = epochs if done is None else done
    about = {
        "config": config,
        "data": "genuine",
        **({"samples": {"train": samples, "test": 200}} if new else {}),
        "version": "0.1.0",
        "commit": "ab" * 20,
        "source_hash": SOURCE,
        "python": "3.11.7",
        "packages": {"torch": "2.15.0"},
        "device": GPU if config["device"] == "cuda" else CPU,
        **(about or {}),
    }
    gpu = about["device"]["type"] == "cuda"
    full = config["policy"] == "none" or config["delta"] == 0
    lines = []
    for epoch in range(1, last + 1):
        pruned = not full and 1 < epoch <= math.ceil(epochs * config["delta"])
        kept = samples - (round(400 * config["ratio"]) if pruned else 0)
        seconds = epoch_seconds * kept / samples
        evaluated = epoch % eval_every == 0 or epoch == epochs
        line = {
            "epoch": epoch,
            "kept": kept,
            "prunable": 400 if pruned else 0,
            "loss": 2.0 / epoch,
            "lr": 0.1,
            "accuracy": round(accuracy - 0.5 * (1 - epoch / epochs) ** 2, 6) if evaluated else None,
            "images_per_second": kept / seconds,
            "skipped_steps": 0,
            "train_seconds": 0.99 * seconds,
            "pruning_seconds": 0.01 * seconds,
            "evaluation_seconds": 1.0,
            "checkpoint_seconds": 0.5,
        }
        if new:
            line |= {
                "seconds": seconds + 1.6,
                "phases": {
                    "choose": 0.004 * seconds,
                    "wait": 0.1 * seconds,
                    "step": 0.89 * seconds,
                    "update": 0.006 * seconds,
                    "evaluation": 1.0,
                    "checkpoint": 0.5,
                    "other": 0.1,
                },
                "host_syncs": 1 if gpu else None,
                "train_joules": 500 * seconds if gpu else None,
                "joules": 500 * seconds + 400.0 if gpu else None,
                "score_histogram": _histogram(epoch, epochs, samples),
            }
        if not config["telemetry"]:
            unknown = ("pruning_seconds", "phases", "train_joules", "joules", "score_histogram")
            line |= {"train_seconds": seconds, **dict.fromkeys(unknown)}
        lines.append(line)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "epochs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if last == epochs:
        (folder / "summary.json").write_text(json.dumps(_summary(lines, samples, new, gpu)))
    return folder


def write_samples(
    folder: Path, classes: list[str] | None = None, *, missing: float = 0.001
) -> Path:
    """Add to a finished run what newer ones tell of its samples.

    A pruned epoch that leaves out m samples leaves out the first m // 2 each time, and the rest by
    turns from those up to 400. Class c are the samples from 100 c on; the score of sample i
    after epoch e is (i + 1) (e + 1) / 1000, but that of sample 0, which has none. The tracked ones
    are each hundredth; the image of sample i is of the one value i % 256.

    Args:
        folder: a run's.
        classes: names for config.json.
        missing: share of all samples by which a pruned epoch saves less than was expected.
    """
    path = folder / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "classes": classes}))
    config = about["config"]
    lines = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    samples = 1000
    kept = np.zeros(samples, np.int32)
    for line in lines:
        out = samples - line["kept"]
        each, some = out // 2, out - out // 2
        turns = [each + (line["epoch"] * some + i) % (400 - each) for i in range(some)]
        kept += 1
        kept[[*range(each), *turns]] -= 1
        line["ratio"] = config["ratio"] if line["prunable"] else 0.0
        line["expected_saving"] = out / samples + (missing if out else 0.0)
    (folder / "epochs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "summary.json"
    saving = sum(line["expected_saving"] for line in lines) / len(lines)
    new = {"expected_saving": saving, "target_saving": config.get("target_saving")}
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))
    numbers = np.arange(samples)
    epochs = np.arange(1, len(lines) + 1)[:, None]
    history = ((numbers + 1) * epochs / 1000).astype(np.float32)
    history[:, 0] = np.nan
    most = np.argsort(-kept, kind="stable")[:24]
    pictured = np.concatenate([np.argsort(kept, kind="stable")[:24], most])
    tracked = np.arange(0, samples, 100)
    arrays = {
        "kept": kept,
        "scores": history[-1],
        "labels": (numbers // 100).astype(np.int32),
        "tracked": tracked,
        "score_history": history[:, tracked],
        "pictured": pictured,
        "pictures": np.tile((pictured % 256).astype(np.uint8)[:, None, None, None], (32, 32, 3)),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def write_lines(
    path: Path, rows: list[dict[str, Any]], *, quick: bool = False, device: Any = None
) -> Path:
    """Write a benchmark's file; a row's keys replace those of a plain line."""
    plain = {
        "benchmark": "overhead",
        "part": "choose",
        "case": {},
        "unit": "s",
        "median": 0.002,
        "p20": 0.0015,
        "p80": 0.0025,
        "count": 100,
        "more": {},
        "absent": None,
        "complete": True,
        "quick": quick,
        "options": {"seed": 0, "sizes": [50000, 1000000]},
        "started": "2026-01-02T03:04:05+00:00",
        "version": "0.1.0",
        "commit": "ab" * 20 + "-dirty",
        "source_hash": SOURCE,
        "python": "3.11.7",
        "packages": {"torch": "2.15.0"},
        "device": device or CPU,
    }
    assert tuple(plain) == tuple(field.name for field in fields(Line))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**plain, **row}) + "\n" for row in rows))
    return path


def _histogram(epoch: int, epochs: int, samples: int) -> dict[str, Any]:
    bins = 16
    center = bins * (0.7 - 0.4 * epoch / epochs)
    weights = [math.exp(-(((bin - center) / 2) ** 2)) for bin in range(bins + 2)]
    counts = [int(samples * weight / sum(weights)) for weight in weights]
    return {"low": 0.01, "high": 100.0, "counts": counts, "unseen": samples - sum(counts)}


def _summary(lines: list[dict[str, Any]], samples: int, new: bool, gpu: bool) -> dict[str, Any]:
    evaluated = [line for line in lines if line["accuracy"] is not None]
    best = max(evaluated, key=lambda line: line["accuracy"])
    trained = sum(line["kept"] for line in lines)
    full = samples * len(lines)

    def total(name: str) -> Any:
        values = [line[name] for line in lines]
        return None if None in values else sum(values)

    telemetry = lines[0]["pruning_seconds"] is not None
    why = "the device is no GPU" if telemetry else "telemetry is off"
    gpu = gpu and telemetry

    summary = {
        "accuracy_last": evaluated[-1]["accuracy"],
        "accuracy_best": best["accuracy"],
        "accuracy_best_epoch": best["epoch"],
        "loss_last": lines[-1]["loss"],
        "epochs": len(lines),
        "samples_trained": trained,
        "samples_saved": full - trained,
        "saved_share": 1 - trained / full,
        "train_seconds": total("train_seconds"),
        "pruning_seconds": total("pruning_seconds"),
        "evaluation_seconds": total("evaluation_seconds"),
        "checkpoint_seconds": total("checkpoint_seconds"),
        "images_per_second": trained / (total("train_seconds") + (total("pruning_seconds") or 0.0)),
        "skipped_steps": 0,
        "peak_memory_bytes": 2**30,
        "data": "genuine",
    }
    if not new:
        return summary
    joules = total("joules") if gpu else None
    return summary | {
        "seconds": total("seconds"),
        "phases": {n: sum(line["phases"][n] for line in lines) for n in lines[0]["phases"]}
        if telemetry
        else None,
        "host_syncs": total("host_syncs"),
        "train_joules": total("train_joules") if gpu else None,
        "joules": joules,
        "joules_per_image": joules / trained if joules else None,
        "joules_saved": total("train_joules") / trained * (full - trained) if gpu else None,
        "nvml": {
            "samples": 10 if gpu else 0,
            "missed": {},
            "absent": {} if gpu else {"all": why},
        },
    }
