"""Stands for the trainer: leaves a run's records in a moment, and fails as $FAULTS says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from infobatch_fast.pruning import Pruning
from infobatch_fast.train import records

N = 1000
words = sys.argv[1:]
resumed = "--resume" in words
folder = Path(words[words.index("--resume" if resumed else "--out") + 1])
fault = next((f for part, f in json.loads(os.environ["FAULTS"]).items() if part in str(folder)), "")
if fault.startswith("exit "):
    print("some words\nerror: it broke")
    sys.exit(int(fault.removeprefix("exit ")))


def value(flag: str, default: str) -> str:
    return words[words.index(flag) + 1] if flag in words else default


def stop(number: int, frame: object) -> None:
    time.sleep(0.3)  # of saving
    (folder / records.CHECKPOINT).write_text("saved")
    sys.exit(128 + number)


for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, stop)
if resumed:
    about = json.loads((folder / records.CONFIG).read_text())
    (folder / "resumed").touch()
else:
    delta = float(value("--delta", "0.875"))
    pruning = Pruning(value("--policy", "soft"), float(value("--ratio", "0.5")), delta)
    config = {"epochs": int(value("--epochs", "")), "seed": int(value("--seed", ""))}
    config |= {"dataset": "synthetic", "model": "small", "data_fraction": 1.0}
    about = {"config": pruning.settings() | config, "data": "synthetic"}
    about |= {"source_hash": "same", "device": {"name": "here"}}
    folder.mkdir()
    (folder / records.CONFIG).write_text(json.dumps(about))
epochs, pruning = about["config"]["epochs"], Pruning.of(about["config"])
first = pruning.first_full_epoch(epochs)
kept = [N - int(1 <= e < first) * int(pruning.ratio * 800) for e in range(epochs)]
lines = folder / records.EPOCHS
for epoch in range(lines.read_text().count("\n") if lines.exists() else 0, epochs):
    with open(lines, "a") as file:
        file.write(json.dumps({"epoch": epoch + 1, "kept": kept[epoch]}) + "\n")
    print(f"epoch {epoch + 1}/{epochs}", flush=True)
    if fault == "kill" and epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    while fault == "hang" and epoch == 2:
        time.sleep(0.05)
if fault != "no summary":
    none = dict.fromkeys(("pruning_seconds", "loss_last", "images_per_second"))
    zero = dict.fromkeys(("skipped_steps", "checkpoint_seconds", "peak_memory_bytes"), 0)
    summary = {"accuracy_last": 0.5, "accuracy_best": 0.6, "accuracy_best_epoch": 1}
    summary |= {"epochs": epochs, "samples_trained": sum(kept), "train_seconds": sum(kept) / 100}
    summary |= {"samples_saved": N * epochs - sum(kept), "data": "synthetic"}
    summary |= {"saved_share": 1 - sum(kept) / (N * epochs), "evaluation_seconds": 0}
    (folder / records.SUMMARY).write_text(json.dumps(summary | none | zero))
