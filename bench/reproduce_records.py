"""How far the runs of a plan are, from their records, and each one's line of results."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from reproduce_plan import Planned, Setting, expected_config, settings_words

from infobatch_fast.errors import UserError
from infobatch_fast.report.read import read
from infobatch_fast.report.records import Run
from infobatch_fast.train import config
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Say
from infobatch_fast.train.records import write_atomically


class State(NamedTuple):
    """Of a run.

    Attributes:
        word: planned, interrupted, failed or done.
        reason: why it is not done, where there is something to say.
        run: its record; None where there is none.
    """

    word: str
    reason: str | None = None
    run: Run | None = None


def find(folder: Path, setting: Setting, planned: Planned) -> State:
    """How far a run is.

    Args:
        folder: of the run.
        setting: the plan's.
        planned: the run.

    Raises:
        UserError: the folder holds a run of other settings, or a record that cannot be read.
    """
    if planned.epochs is None or not (folder / record.CONFIG).exists():
        return State("planned")
    recorded = record.read_json(folder / record.CONFIG).get("config")
    expected = expected_config(setting, planned)
    names = config.differences(expected, recorded)
    if names:
        mine, theirs = expected.recorded(), recorded if isinstance(recorded, dict) else {}
        told = ", ".join(f"{n} {theirs.get(n)} instead of {mine.get(n)}" for n in names)
        raise UserError(
            f"{folder} must be a run of the planned settings: name another --out, or move it away; "
            f"it has {told}"
        )
    inputs = read([folder])
    run = inputs.runs[0] if inputs.runs else None
    if run is not None and run.complete:
        return State("done", None, run)
    if run is None or (folder / record.SUMMARY).exists():
        raise UserError(
            f"{folder} must have a whole record: move it away to train it again; "
            f"{inputs.bad[0][1] if inputs.bad else 'epochs are missing'}"
        )
    return State("interrupted", f"{len(run.epochs)} of {planned.epochs} epochs are done", run)


def saved_share(out: Path, name: str) -> float | None:
    """The share of its samples that a finished run left out; None while it is not finished."""
    if not (out / name / record.SUMMARY).exists():
        return None
    inputs = read([out / name])
    runs = [run for run in inputs.runs if run.complete]
    return runs[0].figure("saved_share") if runs else None


def finished(out: Path) -> list[Run]:
    """All finished runs of a folder, planned or not."""
    folders: list[Path] = []
    with suppress(OSError):
        folders = sorted(p for p in out.iterdir() if (p / record.SUMMARY).is_file())
    return [run for run in read(folders).runs if run.complete]


def wait_for(folder: Path, say: Say) -> None:
    """Wait for whoever trains in a run's folder: what a killed call left saves and ends."""
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # there is none, or the trainer will say what is wrong
        return
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting    for another process that trains in {folder}")
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
    finally:
        os.close(number)


def write_results(
    path: Path, setting: Setting, plan: Iterable[Planned], states: Mapping[str, State]
) -> None:
    """Write a line a run.

    Raises:
        UserError: the disk is full or read-only.
    """
    lines = [result(setting, planned, states[planned.name]) for planned in plan]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def result(setting: Setting, planned: Planned, state: State) -> dict[str, Any]:
    """One run's line; what its record does not tell is null."""
    training, run = planned.training, state.run
    full = training.delta == 0
    about = run.about if run is not None else {}
    trained = run is not None and bool(run.epochs)
    known = planned.epochs is not None
    return {
        "name": planned.name,
        "tables": list(planned.tables),
        "method": {
            "policy": "none" if full else training.policy,
            "ratio": None if full or training.target_saving is not None else training.ratio,
            "delta": training.delta,
            "rescale": training.rescale and not full,
            "anneal": training.anneal and not full,
            "score": training.score,
            "ratio_schedule": training.ratio_schedule,
            "target_saving": training.target_saving,
        },
        "seed": planned.seed,
        "epochs": planned.epochs,
        "after": planned.after,
        "scale": setting.scale,
        "data_fraction": setting.scale,
        "dataset": setting.dataset,
        "data": about.get("data"),
        "model": setting.defaults.model,
        "state": state.word,
        "reason": state.reason,
        "accuracy_last": run.figure("accuracy_last") if run else None,
        "accuracy_best": run.figure("accuracy_best") if run else None,
        "minutes": run.minutes if run is not None and trained else None,
        "pruning_seconds": run.pruning_seconds if run is not None and trained else None,
        "seconds": run.figure("seconds") if run else None,
        "device_hours": run.device_hours if run is not None and trained else None,
        "saved_share": run.saved_share if run else None,
        "samples_trained": run.trained if run else None,
        "command": (
            ["python", "-m", "infobatch_fast.train", *settings_words(setting, planned)]
            if known
            else None
        ),
        **{name: about.get(name) for name in ("commit", "source_hash", "device", "packages")},
    }
