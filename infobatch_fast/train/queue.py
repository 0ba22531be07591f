"""Runs of the trainer, one after the other: a folder each, by which another call finds it again.

`<out>/<run>.log` has what the trainer said, `<out>/results.jsonl` a line a run.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infobatch_fast.errors import UserError
from infobatch_fast.pruning import FULL, Pruning
from infobatch_fast.train import records
from infobatch_fast.train.cli import Interrupted, say

TRAIN = (sys.executable, "-m", "infobatch_fast.train")
REPORT = (sys.executable, "-m", "infobatch_fast.report")
# Runs a command that gets SIGTERM when its parent dies (PR_SET_PDEATHSIG), so that it saves.
_CODE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
LAUNCH = (sys.executable, "-S", "-c", _CODE) if sys.platform == "linux" else ()
SOFT_SHARE = 0.8  # of the samples below the mean loss, for the estimate: 0.77 to 0.86 as reported


@dataclass(frozen=True)
class Planned:
    """One run, and how far it is.

    Attributes:
        name: of its folder.
        epochs: E; None until the run is done whose samples it is to see.
        passes: over all of the data, of as many samples as it sees, about.
        words: the trainer's, without places.
        about: its config.json; None where it has not begun.
        done: epochs.
        summary: None while it is not done.
        tables: that it belongs to.
    """

    name: str
    pruning: Pruning
    seed: int
    epochs: int | None
    passes: float
    words: list[str]
    about: dict[str, Any] | None
    done: int
    summary: records.Summary | None
    tables: list[str] = field(default_factory=list)


class Failed(Exception):
    """Runs failed, the others are done."""


class Plan:
    """The runs in their order, each once.

    Args:
        out: folder of their folders.
        parts: of their names, before the epochs.
        extra: the trainer's words that set these runs apart from others; they stand in the names.
        words: all of the trainer's words for a pruning, a seed and epochs.
    """

    def __init__(
        self,
        out: Path,
        parts: Sequence[str],
        extra: Sequence[str],
        words: Callable[[Pruning, int, int], list[str]],
    ) -> None:
        self.runs: dict[str, Planned] = {}
        self._out, self._parts, self._words = out, parts, words
        self._extra = re.findall(r"[\w.]+", " ".join(extra))

    def add_shorter(self, pruned: Planned, table: str = "") -> Planned:
        """Plan full data for as many epochs as see the samples that the pruned run saw."""
        of = pruned.summary
        epochs = None if of is None else max(1, round(of.epochs * (1 - of.saved_share)))
        return self.add(FULL, pruned.seed, epochs, table, pruned.passes)

    def add(
        self, pruning: Pruning, seed: int, epochs: int | None, table: str = "", passes: float = 0
    ) -> Planned:
        """Plan a run; where its epochs are not known yet, of about so many passes."""
        passes = passes_of(pruning, epochs) if epochs else passes
        name = "-".join([*self._parts, f"e{epochs or 'X'}", *self._extra, pruning.slug, f"s{seed}"])
        if name not in self.runs:
            words = self._words(pruning, seed, epochs) if epochs else []
            found = look(self._out / name)
            self.runs[name] = Planned(name, pruning, seed, epochs, passes, words, *found)
        if table not in self.runs[name].tables:
            self.runs[name].tables.append(table)
        return self.runs[name]


def look(folder: Path) -> tuple[dict[str, Any] | None, int, records.Summary | None]:
    """What a run's folder holds: config.json, how many epochs, and the summary."""
    about, lines, summary = (
        folder / name for name in (records.CONFIG, records.EPOCHS, records.SUMMARY)
    )
    return (
        records.read_object(about.read_text(), str(about)) if about.exists() else None,
        lines.read_bytes().count(b"\n") if lines.exists() else 0,
        records.read(records.Summary, summary) if summary.exists() else None,
    )


def passes_of(pruning: Pruning, epochs: int) -> float:
    """Of a run over all of the data, about."""
    if pruning.full_data:
        return epochs
    share = SOFT_SHARE if pruning.policy == "soft" else 1.0
    return epochs * (1 - (pruning.target_saving or pruning.ratio * pruning.method.delta * share))


def estimate(plan: Sequence[Planned], timed: Callable[[], float | None] = lambda: None) -> str:
    """What is left, in passes over the data, and in time.

    Args:
        timed: seconds of a pass, where no run is done yet that tells; None is not known.
    """
    left = [p for p in plan if p.summary is None]
    if not left:
        return f"nothing to train: all {len(plan)} runs are done"
    passes = sum(p.passes * (1 - p.done / (p.epochs or 1)) for p in left)
    done = [p.summary for p in plan if p.summary]
    if done:
        trained = sum(s.epochs * (1 - s.saved_share) for s in done)
        pace = sum(s.seconds or s.train_seconds for s in done) / trained
    elif not (pace := timed()):
        return f"{passes:.0f} passes over the data; their time is known once a run is done"
    hours, minutes = divmod(round(pace * passes / 60), 60)
    return f"{hours} h {minutes} min: {passes:.0f} passes over the data, {pace:.3g} s each"


def train(
    make_plan: Callable[[], Sequence[Planned]], out: Path, place: Sequence[str]
) -> dict[str, str]:
    """Train what is left, one run after the other; returns why runs failed, by their names.

    Args:
        make_plan: anew before each run, as what is done tells the epochs of others.
        out: folder of the runs, made if it is not there.
        place: the trainer's words for where the data lie.

    Raises:
        Interrupted: by a signal, after the trainer saved what it had.
        UserError: the first run is a mistake from its beginning: so are the others.
    """
    records.make_folder(out)
    failed: dict[str, str] = {}
    while True:
        plan = make_plan()
        write_results(out, plan, failed)
        left = [p for p in plan if p.summary is None]
        ready = [p for p in left if p.epochs and p.name not in failed]
        if not ready:
            return failed
        planned, done = ready[0], len(plan) - len(left)
        folder, log = out / planned.name, out / f"{planned.name}.log"
        prefix = f"[{plan.index(planned) + 1}/{len(plan)}]"
        how = [*planned.words, "--out", str(folder)]
        if planned.about is not None:
            how = ["--resume", str(folder)]

        def show(line: str, prefix: str = prefix) -> None:
            if line.startswith(("epoch ", "WARNING")):
                say(f"{prefix} {line}")

        say(f"{prefix} {planned.name}{'' if planned.about is None else ', continued'}")
        _wait_for(folder)
        try:
            code, why = run_child([*TRAIN, *how, *place], log, show)
        except Interrupted as stop:
            write_results(out, make_plan(), failed)
            message = f"stopped; {done} of {len(plan)} runs are done; the same command continues"
            raise Interrupted(stop.number, message) from None
        if code == 2 and planned.about is None and not done and not failed:
            raise UserError(why)
        if not (folder / records.SUMMARY).exists():
            failed[planned.name] = why
            say(f"{prefix} failed: {why}; see {log}")


def report(plan: Sequence[Planned], failed: Mapping[str, str], words: Sequence[str]) -> None:
    """Report, by the report's words, and tell what is not done.

    Raises:
        Failed: a run is not done, or the report failed.
    """
    code = 0
    if any(planned.about for planned in plan):
        code, _ = run_child([*REPORT, *words], Path(os.devnull), say)
    left = [planned.name for planned in plan if planned.summary is None]
    for name in left:
        say(f"not done   {name}: {failed.get(name, 'it follows a run that is not done')}")
    if left:
        raise Failed(f"{len(left)} of {len(plan)} runs are not done; the same command tries again")
    if code:
        raise Failed("the report could not be made")


def run_child(words: Sequence[str], log: Path, show: Callable[[str], None]) -> tuple[int, str]:
    """Run a command to its end; returns its exit code, and the last error or line that it said.

    All that it says, on stderr too, is added to the log, and shown line by line. A signal is
    passed on to it, and raised as Interrupted when it has ended.
    """
    said: deque[str] = deque(["it said nothing"], maxlen=50)
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    stopped: Interrupted | None = None
    with (
        open(log, "ab") as file,
        subprocess.Popen(
            [*LAUNCH, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            process_group=0,  # a Ctrl-C of the terminal would reach it twice otherwise
        ) as process,
    ):
        assert process.stdout is not None
        while process.returncode is None:
            try:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    said.append(line.decode(errors="replace").rstrip())
                    show(said[-1])
                process.wait()
            except Interrupted as stop:
                stopped = stop
                process.send_signal(stop.number)
            except BaseException:
                process.terminate()
                raise
    if stopped is not None:
        raise stopped
    if process.returncode < 0:
        return process.returncode, f"killed by {signal.Signals(-process.returncode).name}"
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return process.returncode, (errors or [line for line in said if line])[-1]


def write_results(out: Path, plan: Sequence[Planned], failed: Mapping[str, str]) -> None:
    """Write results.jsonl: a line a run, of its config.json, with its summary.json in it."""
    lines: list[str] = []
    for planned in plan:
        state = "done" if planned.summary else "interrupted" if planned.about else "planned"
        line = {
            "name": planned.name,
            "tables": planned.tables,
            "label": planned.pruning.label,
            "state": "failed" if planned.name in failed else state,
            "reason": failed.get(planned.name),
            "command": ["python", *TRAIN[1:], *planned.words],
            "summary": asdict(planned.summary) if planned.summary else None,
            **(planned.about or {}),
        }
        lines.append(json.dumps(line) + "\n")
    records.write_atomically(out / records.RESULTS, "".join(lines).encode())


def _wait_for(folder: Path) -> None:
    """Until nobody trains in it: what a killed call left may still be saving."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        fcntl.flock(number, fcntl.LOCK_EX)
        os.close(number)
