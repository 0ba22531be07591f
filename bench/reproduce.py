"""The reported tables, trained anew with one command: `python bench/reproduce.py`.

accuracy and cost hold full data and InfoBatch by r; ablation its parts one by one, and hard, at
r = 0.5; policies every policy, soft with score bls and soft with r by pods, each leaving out a
quarter of the samples of all epochs (half of what is possible, where a quarter is not). Each table
also has training shorter: full data for as many epochs as see the samples that InfoBatch saw with
the same seed (at r = 0.5; in policies, with a quarter left out). budget holds policies and
training shorter side by side, each on 0.75, 0.625 and 0.5 of the samples of full data.

Each run is one command of the trainer, in a folder named by its settings, by which another call
finds it. `<out>/<run>.log` has what the trainer said, `<out>/results.jsonl` a line a run.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    # What is trained is the checkout that this file lies in, not an installed copy.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fcntl
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import tyro

from infobatch_fast.errors import UserError, reason
from infobatch_fast.pruning import FULL, Pruning
from infobatch_fast.report.text import markdown
from infobatch_fast.train import records
from infobatch_fast.train.cli import Interrupted, Say, command, parse

TRAIN = (sys.executable, "-m", "infobatch_fast.train")
REPORT = (sys.executable, "-m", "infobatch_fast.report")
# Runs a command that gets SIGTERM when its parent dies (PR_SET_PDEATHSIG), so that it saves.
_CODE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
LAUNCH = (sys.executable, "-S", "-c", _CODE) if sys.platform == "linux" else ()

TABLES = ("accuracy", "cost", "ablation", "policies", "budget")
BUDGETS = (0.75, 0.625, 0.5)
EPOCHS = {"paper": 200, "quick": 10}  # of the presets
SAVING = 0.25  # what all policies leave out, where a run of so many epochs can
ABLATION = [
    Pruning(policy, rescale=rescale, anneal=anneal)
    for policy, rescale, anneal in (
        *(("random", False, False), ("soft", False, False), ("soft", True, False)),
        *(("soft", False, True), ("soft", True, True), ("hard", True, True)),
    )
]
SOFT_SHARE = 0.8  # of the samples below the mean loss, for the estimate: 0.77 to 0.86 as reported
TIMED = 0.02  # share of the data of the two epochs that an estimate is from


@dataclass(frozen=True)
class Options:
    """Train the runs of the reported tables, and report them; a second call goes on.

    Words after -- go to the trainer, such as -- --batch-size 128. Exit codes: 0 all is done; 1 a
    run failed, the others are done; 2 a mistake in the input, or no room; 130 or 143 stopped by a
    signal.

    Attributes:
        table: the runs of which table.
        seeds: each run is trained with each.
        ratios: r of the runs of accuracy and cost.
        dataset: of all runs.
        scale: share of the epochs and of the data, in (0, 1], for a small machine: then these
            are not the reported experiments.
        preset: auto is paper where there is a CUDA device, quick where there is none.
        epochs: of each run, before scaling; default the preset's.
        data_dir: folder of CIFAR; default $INFOBATCH_DATA, else a user cache.
        out: folder of the runs, their results and their report.
        dry_run: show the plan and what it takes, by finished runs or by two short epochs.
        extra: words for the trainer.
    """

    table: Literal["accuracy", "cost", "ablation", "policies", "budget", "all"] = "all"
    seeds: tuple[int, ...] = (0,)
    ratios: tuple[float, ...] = (0.3, 0.5, 0.7)
    dataset: Literal["cifar10", "cifar100", "synthetic"] = "cifar10"
    scale: float = 1.0
    preset: Literal["auto", "paper", "quick"] = "auto"
    epochs: int | None = None
    data_dir: Path | None = None
    out: Path = Path("runs/reproduce")
    dry_run: bool = False
    extra: tyro.conf.Suppress[tuple[str, ...]] = ()

    def words(self, pruning: Pruning, seed: int, epochs: int, fraction: float) -> list[str]:
        """The trainer's words for a run on a share of the data, without places."""
        return [
            *("--preset", self.preset, "--dataset", self.dataset, "--seed", str(seed)),
            *("--epochs", str(epochs), *pruning.flags),
            *(["--data-fraction", f"{fraction:g}"] if fraction < 1 else []),
            *self.extra,
        ]

    def command(self, how: Sequence[str]) -> list[str]:
        """The trainer's command, with the place of the data."""
        place = [] if self.data_dir is None else ["--data-dir", str(self.data_dir)]
        return [*TRAIN, *how, *place]


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
    epochs: int | None
    passes: float
    words: list[str]
    about: dict[str, Any] | None
    done: int
    summary: records.Summary | None
    tables: list[str] = field(default_factory=list)


def settle(options: Options, extra: Sequence[str]) -> Options:
    """The options with preset, scaled epochs and the trainer's words."""
    if not 0 < options.scale <= 1:
        raise UserError(f"scale must be in (0, 1], got {options.scale}")
    preset = options.preset
    if preset == "auto":
        import torch  # seconds, which other calls do without

        preset = "paper" if torch.cuda.is_available() else "quick"
    whole = EPOCHS[preset] if options.epochs is None else options.epochs
    if (epochs := round(whole * options.scale)) < 3:
        raise UserError(
            "epochs times scale must be at least 3, as the first and the last prune nothing, "
            f"got {whole} x {options.scale:g}"
        )
    if not options.seeds:
        raise UserError("seeds must be one or more, got none")
    own = {*options.words(Pruning(), 0, epochs, 0.5), "--data-dir", "--out", "--resume"}
    for word in extra:
        if (flag := word.split("=")[0].replace("_", "-")).startswith("--") and flag in own:
            raise UserError(f"the words after -- must leave {flag} to the plan, got {word}")
    out = options.out.expanduser()
    return replace(options, preset=preset, epochs=epochs, out=out, extra=tuple(extra))


def make_plan(options: Options) -> list[Planned]:
    """The runs of the tables, seed by seed, each once; training shorter as far as it is known."""
    plan: dict[str, Planned] = {}
    scale, whole = options.scale, options.epochs or 0
    parts = [options.dataset, options.preset, *([f"scale{scale:g}"] if scale < 1 else [])]
    extra = re.findall(r"[\w.]+", " ".join(options.extra))

    def add(table: str, pruning: Pruning, seed: int, epochs: int | None, passes: float) -> Planned:
        name = "-".join([*parts, f"e{epochs or 'X'}", *extra, pruning.slug, f"s{seed}"])
        if name not in plan:
            words = options.words(pruning, seed, epochs, scale) if epochs else []
            plan[name] = Planned(name, pruning, epochs, passes, words, *_look(options.out / name))
        if table not in plan[name].tables:
            plan[name].tables.append(table)
        return plan[name]

    for seed in options.seeds:
        for table in TABLES if options.table == "all" else [options.table]:
            if table == "budget":
                for pruning, epochs in budget_runs(whole):
                    add(table, pruning, seed, epochs, _passes(pruning, epochs))
                continue
            prunings, main = prunings_of(table, whole, options.ratios)
            for pruning in prunings:
                add(table, pruning, seed, whole, _passes(pruning, whole))
            pruned = add(table, main, seed, whole, _passes(main, whole))
            shorter = pruned.summary and max(1, round(whole * (1 - pruned.summary.saved_share)))
            add(table, FULL, seed, shorter, shorter or pruned.passes)
    return list(plan.values())


def _look(folder: Path) -> tuple[dict[str, Any] | None, int, records.Summary | None]:
    """What a run's folder holds: config.json, how many epochs, and the summary."""

    def read(name: str) -> dict[str, Any] | None:
        path = folder / name
        return records.read_object(path.read_text(), str(path)) if path.exists() else None

    about, found, epochs = read(records.CONFIG), read(records.SUMMARY), folder / records.EPOCHS
    done = epochs.read_bytes().count(b"\n") if epochs.exists() else 0
    if found is None:
        return about, done, None
    return about, done, records.parse(records.Summary, found, str(folder / records.SUMMARY))


def prunings_of(
    table: str, epochs: int, ratios: Sequence[float]
) -> tuple[Sequence[Pruning], Pruning]:
    """A table's runs, and the one whose samples training shorter sees."""
    if table == "ablation":
        return ABLATION, Pruning()
    if table == "policies":
        from infobatch_fast.policies import POLICIES  # it imports torch

        most = (Pruning().first_full_epoch(epochs) - 1) / epochs  # the first and the last are full
        saving = SAVING if most > SAVING else round(most / 2, 4)
        names = [name for name in POLICIES if name != "none"]
        return [
            FULL,
            *(Pruning(name, rescale=name != "random", target_saving=saving) for name in names),
            Pruning(score="bls", target_saving=saving),
            Pruning(ratio_schedule="pods", target_saving=saving),
        ], Pruning(target_saving=saving)
    try:
        by_ratio = [FULL, *(Pruning(ratio=ratio) for ratio in ratios)]
    except ValueError as error:
        raise UserError(str(error)) from None
    return by_ratio, Pruning() if Pruning() in by_ratio else by_ratio[-1]


def budget_runs(epochs: int) -> Iterator[tuple[Pruning, int]]:
    """The table's runs and their epochs: what cannot be in so few is left out."""
    from infobatch_fast.budget import spend  # it imports torch

    yield FULL, epochs
    for budget in BUDGETS:
        yield FULL, max(1, round(budget * epochs))
        for policy in ("soft", "random", "hard", "ucb"):
            rescale = policy != "random"  # of all samples alike it would be a higher rate
            yield Pruning(policy, rescale=rescale, target_saving=1 - budget), epochs
        with suppress(ValueError):
            spending = spend(budget, epochs)
            for policy in ("hard", "ucb"):
                saving = spending.pruning["target_saving"]
                yield Pruning(policy, target_saving=saving), spending.epochs  # pyright: ignore


def _passes(pruning: Pruning, epochs: int) -> float:
    """Of a run over all of the data, about."""
    if pruning.full_data:
        return epochs
    share = SOFT_SHARE if pruning.policy == "soft" else 1.0
    return epochs * (1 - (pruning.target_saving or pruning.ratio * pruning.method.delta * share))


def run_child(words: Sequence[str], log: Path, show: Callable[[str], None]) -> tuple[int, str]:
    """Run a command to its end; returns its exit code, and the last error or line that it said.

    A signal is passed on to it, and raised as Interrupted when it has ended.

    Args:
        words: the command's.
        log: its output, stderr included, is added to this file.
        show: is given each line of it.
    """
    said: deque[str] = deque(["it said nothing"], maxlen=50)
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
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


def train(options: Options, say: Say) -> dict[str, str]:
    """Train what is left, one run after the other; returns why runs failed, by their names.

    Raises:
        Interrupted: by a signal, after the trainer saved what it had.
        UserError: the first run is a mistake from its beginning: so are the others.
    """
    failed: dict[str, str] = {}
    while True:
        plan = make_plan(options)
        write_results(options.out, plan, failed)
        left = [p for p in plan if p.summary is None]
        ready = [p for p in left if p.epochs and p.name not in failed]
        if not ready:
            return failed
        planned, done = ready[0], len(plan) - len(left)
        folder, log = options.out / planned.name, options.out / f"{planned.name}.log"
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
            code, why = run_child(options.command(how), log, show)
        except Interrupted as stop:
            write_results(options.out, make_plan(options), failed)
            message = f"stopped; {done} of {len(plan)} runs are done; the same command continues"
            raise Interrupted(stop.number, message) from None
        if code == 2 and planned.about is None and not done and not failed:
            raise UserError(why)
        if not (folder / records.SUMMARY).exists():
            failed[planned.name] = why
            say(f"{prefix} failed: {why}; see {log}")


def _wait_for(folder: Path) -> None:
    """Until nobody trains in it: what a killed call left may still be saving."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        fcntl.flock(number, fcntl.LOCK_EX)
        os.close(number)


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


def plan_lines(plan: Sequence[Planned]) -> Iterator[str]:
    """The plan as a table."""
    rows = []
    for number, p in enumerate(plan, 1):
        state = "yes" if p.summary else f"{p.done} epochs" if p.about else "no"
        rows.append([str(number), p.name, ", ".join(p.tables), state, str(p.epochs or "X")])
    yield from markdown(["#", "run", "tables", "done", "epochs"], rows, left=4)
    if not all(p.epochs for p in plan):
        yield "X          as many as see the samples of its table's pruned run, once that is done"


def estimate(plan: Sequence[Planned], options: Options, say: Say) -> str:
    """What is left, in passes over the data, and in time by what is done or a run of a moment."""
    left = [p for p in plan if p.summary is None]
    if not left:
        return f"nothing to train: all {len(plan)} runs are done"
    passes = sum(p.passes * (1 - p.done / (p.epochs or 1)) for p in left)
    done = [p.summary for p in plan if p.summary]
    if done:
        trained = sum(s.epochs * (1 - s.saved_share) for s in done)
        pace = sum(s.seconds or s.train_seconds for s in done) / trained
    elif not options.dry_run or not (pace := timed_pace(options, say)):
        return f"{passes:.0f} passes over the data; their time is known once a run is done"
    hours, minutes = divmod(round(pace * passes / 60), 60)
    return f"{hours} h {minutes} min: {passes:.0f} passes over the data, {pace:.3g} s each"


def timed_pace(options: Options, say: Say) -> float | None:
    """Seconds of a pass over the data, from two epochs on a little of it; None if that fails."""
    fraction = min(TIMED, options.scale)
    say(f"timing     two epochs of {fraction:g} of the data, as no run is done yet")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        words = [*options.words(FULL, 0, 2, fraction), "--out", str(folder)]
        _, why = run_child(options.command(words), Path(place, "log"), lambda line: None)
        _, _, summary = _look(folder)
    if summary is None:
        say(f"timing     failed: {why}")
        return None
    seconds = summary.epoch_seconds or summary.train_seconds / 2
    return seconds * options.scale / fraction + summary.evaluation_seconds / 2


def run(arguments: Sequence[str], say: Say) -> int:
    """Plan, train what is left, and report; returns the exit code."""
    words, extra = list(arguments), []
    if "--" in words:
        words, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    options = settle(parse(Options, words, "python bench/reproduce.py", Options()), extra)
    plan = make_plan(options)
    if options.scale < 1:
        say(f"scale      {options.scale:g} of epochs and data: NOT the reported experiments")
    for line in plan_lines(plan):
        say(line)
    if options.dry_run:
        for planned in plan:
            if planned.words and not planned.summary:
                how = [*planned.words, "--out", str(options.out / planned.name)]
                say(shlex.join(["python", *options.command(how)[1:]]))
    say(f"estimate   {estimate(plan, options, say)}")
    if options.dry_run:
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    failed = train(options, say)
    plan, code = make_plan(options), 0
    if any(planned.about for planned in plan):
        words = [*REPORT, str(options.out), "--out", str(options.out / "report")]
        code, _ = run_child(words, Path(os.devnull), say)
    left = [planned.name for planned in plan if planned.summary is None]
    for name in left:
        say(f"not done   {name}: {failed.get(name, 'it follows a run that is not done')}")
    return 1 if left or code else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    codes: list[int] = []

    def body(_: object, say: Say) -> None:
        try:
            codes.append(run(words, say))
        except OSError as error:
            raise UserError(reason(error)) from None

    return command(body, "pass a lower --batch-size to the trainer, after --") or codes[0]


if __name__ == "__main__":
    sys.exit(main())
