"""Stands for the trainer: leaves a run's records in a moment, and fails as $FAULTS says."""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from infobatch_fast.pruning import Pruning
from infobatch_fast.train import records

N = 1000


def main(words: list[str]) -> int:
    def value(flag: str, default: str = "") -> str:
        return words[words.index(flag) + 1] if flag in words else default

    resumed = "--resume" in words
    folder = Path(value("--resume" if resumed else "--out"))
    faults = json.loads(os.environ["FAULTS"]).items()
    fault = next((fault for part, fault in faults if part in folder.name), "")
    if fault.startswith("exit "):
        print("some words\nerror: it broke")
        return int(fault.removeprefix("exit "))

    def stop(number: int, frame: object) -> None:
        time.sleep(0.3)  # of saving
        (folder / records.CHECKPOINT).touch()
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if not resumed:
        ratio, delta = float(value("--ratio", "0.5")), float(value("--delta", "0.875"))
        config: dict[str, Any] = Pruning(ratio=ratio, delta=delta).settings()
        config |= {"epochs": int(value("--epochs")), "seed": int(value("--seed"))}
        folder.mkdir()
        (folder / records.CONFIG).write_text(json.dumps({"config": config, "resumed": False}))
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # held to the end, as a run's is
    about = json.loads((folder / records.CONFIG).read_text()) | {"resumed": resumed}
    (folder / records.CONFIG).write_text(json.dumps(about))
    pruning, epochs = Pruning.of(about["config"]), about["config"]["epochs"]
    left_out = range(1, pruning.first_full_epoch(epochs))
    lines = folder / records.EPOCHS
    for epoch in range(lines.read_text().count("\n") if lines.exists() else 0, epochs):
        # Said first: who waits for the line kills the reader, and a pipe closes before the signal.
        print(f"epoch {epoch + 1}/{epochs}", flush=True)
        with open(lines, "a") as file:
            file.write(f'{{"epoch": {epoch + 1}}}\n')
        if fault == "kill" and epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang" and epoch == 2:
            time.sleep(0.05)
    if fault != "no summary":
        trained = N * epochs - len(left_out) * int(pruning.ratio * 800)
        values: dict[str, Any] = dict.fromkeys(records.Summary.__dataclass_fields__, 0)
        values |= {"accuracy_last": 0.5, "epochs": epochs, "samples_trained": trained}
        values |= {"saved_share": 1 - trained / (N * epochs), "train_seconds": trained / 100}
        values |= {"data": "same", "loader": "same", "nvml": {}, "target_saving": None}
        values |= dict.fromkeys(("update_timed", "compiled", "captured", "by_kernels"), True)
        (folder / records.SUMMARY).write_text(json.dumps(values | {"phases": None}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
