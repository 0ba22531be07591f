"""The runs of a plan: trained one after the other, each in its folder, with their states kept."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from reproduce_child import run_child
from reproduce_estimate import Pace, samples_of, seconds_left, words_of
from reproduce_plan import Planned, Setting, Training, command_words, resolve
from reproduce_records import State, find, saved_share, wait_for, write_results
from tqdm import tqdm

from infobatch_fast.errors import UserError
from infobatch_fast.report import text as tables
from infobatch_fast.report.groups import counted
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupted, Interrupts, Say

_SHOWN = ("epoch ", "WARNING", "resume ", "error: ")  # lines of the trainer's, by their beginning
_MISTAKE = 2


class Runs:
    """A plan, and how far it is.

    Args:
        setting: of all its runs.
        plan: from `make_plan`.
        out: the folder that holds theirs.
    """

    def __init__(self, setting: Setting, plan: Sequence[Planned], out: Path) -> None:
        self.setting, self.out = setting, out
        self.plan = list(plan)
        self.states: dict[str, State] = {}

    def look(self) -> None:
        """Read how far each run is, and what that tells of the epochs of others.

        Raises:
            UserError: a folder holds a run of other settings.
        """
        self._resolve()
        for planned in self.plan:
            self.states[planned.name] = find(self.out / planned.name, self.setting, planned)

    def left(self) -> list[Planned]:
        """The runs that are not done."""
        return [planned for planned in self.plan if self.states[planned.name].word != "done"]

    def commands(self) -> Iterator[str]:
        """The trainer's command of each run that is left and known."""
        for planned in self.left():
            if planned.epochs is not None:
                folder = self.out / planned.name
                begun = (folder / record.CONFIG).exists()
                words = command_words(self.setting, planned, folder, begun)
                yield shlex.join(["python", "-m", "infobatch_fast.train", *words])

    def folders(self) -> list[Path]:
        """Of all runs, in the plan's order."""
        return [self.out / planned.name for planned in self.plan]

    def train(self, command: Sequence[str], interrupts: Interrupts, say: Say) -> None:
        """Train what is left, one run after the other; a run that fails does not end the others.

        Args:
            command: the trainer's.
            interrupts: passed on to it.
            say: shows a line to the user.

        Raises:
            Interrupted: by a signal, after the trainer saved what it had.
            UserError: the first run is a mistake from its beginning: so are the others.
        """
        tried: set[str] = set()
        while ready := [p for p in self.left() if p.epochs is not None and p.name not in tried]:
            self._write()
            planned = ready[0]
            begun = (self.out / planned.name / record.CONFIG).exists()
            try:
                code = self._train_one(planned, command, interrupts, say)
            except Interrupted as stop:
                state = find(self.out / planned.name, self.setting, planned)
                self.states[planned.name] = state._replace(word="interrupted")
                self._write()
                done = f"{len(self.plan) - len(self.left())} of {counted(len(self.plan), 'run')}"
                raise Interrupted(
                    stop.number, f"stopped; {done} are done; the same command continues"
                ) from None
            state = self.states[planned.name]
            if code == _MISTAKE and not tried and not begun:
                self._write()
                raise UserError(state.reason)
            tried.add(planned.name)
            self._resolve()
        for planned in self.left():
            if planned.epochs is None:
                why = f"it follows {planned.after}, which is not done"
                self.states[planned.name] = State("planned", why)
        self._write()

    def left_lines(self) -> Iterator[str]:
        """A table of the runs that are not done, if there are any."""
        rows = [[p.name, *self.states[p.name][:2]] for p in self.left()]
        if rows:
            yield "\nNot done"
            yield from tables.markdown(
                ["run", "state", "reason"], [[a, b, c or ""] for a, b, c in rows], left=3
            )

    def _resolve(self) -> None:
        self.plan = resolve(self.setting, self.plan, lambda name: saved_share(self.out, name))
        for planned in self.plan:
            if planned.name not in self.states:
                self.states[planned.name] = find(self.out / planned.name, self.setting, planned)

    def _write(self) -> None:
        write_results(self.out / record.RESULTS, self.setting, self.plan, self.states)

    def _train_one(
        self, planned: Planned, command: Sequence[str], interrupts: Interrupts, say: Say
    ) -> int:
        """Train a run to its end, and return the trainer's exit code."""
        folder = self.out / planned.name
        prefix = f"[{self.plan.index(planned) + 1}/{len(self.plan)}]"
        wait_for(folder, say)
        before = find(folder, self.setting, planned)  # it may be done by now
        if before.word == "done":
            self.states[planned.name] = before
            return 0
        begun = (folder / record.CONFIG).exists()
        say(f"{prefix} {planned.name}{', continued' if begun else ''}")
        words = [*command, *command_words(self.setting, planned, folder, begun)]
        log = self.out / f"{planned.name}.log"
        with tqdm(
            disable=not sys.stdout.isatty(), file=sys.stdout, leave=False, bar_format="{desc}"
        ) as bar:

            def show(line: str) -> None:
                if line.startswith("epoch ") and not bar.disable:
                    bar.set_description_str(f"{prefix} {line}")
                elif line.startswith(_SHOWN):
                    say(f"{prefix} {line}")

            ended = run_child(words, interrupts, show, log)
        state = find(folder, self.setting, planned)
        if ended.code != 0:
            word = "interrupted" if ended.code in (130, 143) else "failed"
            state = state._replace(word=word, reason=ended.why)
            say(f"{prefix} {word}: {ended.why}; see {log}")
        elif state.word != "done":
            state = state._replace(word="failed", reason="it ended without a whole record")
        self.states[planned.name] = state
        return ended.code


def plan_lines(runs: Runs, pace: Pace | None) -> Iterator[str]:
    """The plan as a table, and what is left of it as an estimate.

    Args:
        runs: of the plan.
        pace: None where nothing is left, or where it could not be measured.
    """
    rows, total, samples = [], 0.0, 0
    source = record.source_hash()
    for number, planned in enumerate(runs.plan, 1):
        state = runs.states[planned.name]
        left = state.word != "done"
        # Training shorter sees as many samples as the run it depends on.
        training = Training() if planned.epochs is None else planned.training
        saved = training.saving(planned.epochs or runs.setting.epochs)
        done = 0.0
        if state.run is not None and planned.epochs:
            done = len(state.run.epochs) / planned.epochs
        seconds = 0.0
        if pace is not None and left:
            seconds = seconds_left(runs.setting, planned, pace.seconds, saved, done)
        count = samples_of(runs.setting, planned, saved)
        total, samples = total + seconds, samples + left * round(count * (1 - done))
        word = state.word if planned.epochs else f"after {planned.after}"
        if state.run is not None and state.run.about["source_hash"] != source:
            word += ", OTHER SOURCE"
        rows.append(
            [
                *(str(number), planned.name, ", ".join(planned.tables), word),
                "X" if planned.epochs is None else str(planned.epochs),
                f"{count:,}",
                words_of(seconds) if seconds else "",
            ]
        )
    headers = ["#", "run", "tables", "state", "epochs", "samples, about", "left, about"]
    yield from tables.markdown(headers, rows, left=4)
    if any(planned.epochs is None for planned in runs.plan):
        yield (
            "X          is planned when the run it comes after is done: full data for as many "
            "whole epochs as saw its samples; where that is another run of the plan, it is that"
        )
    left = runs.left()
    if not left:
        yield f"estimate   nothing to train: all {counted(len(runs.plan), 'run')} are done"
    elif pace is None:
        yield f"estimate   none: a few steps of {runs.setting.defaults.model} could not be timed"
    else:
        yield (
            f"estimate   {words_of(total)} for {counted(len(left), 'run')}, {samples:,} samples at "
            f"{tables.seconds(pace.seconds)} each: from {pace.source}"
        )
