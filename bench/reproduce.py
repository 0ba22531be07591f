"""The reported tables, trained anew with one command: `python bench/reproduce.py`.

accuracy and cost hold full data and InfoBatch by r; ablation its parts one by one, and hard, at
r = 0.5; policies every policy, soft with score bls and soft with r by pods, each leaving out a
quarter of the samples of all epochs (half of what is possible, where a quarter is not). Each table
also has training shorter: full data for as many epochs as see the samples that InfoBatch saw with
the same seed (at r = 0.5; in policies, with a quarter left out). budget holds policies and
training shorter side by side, each on 0.75, 0.625 and 0.5 of the samples of full data.

Each run is one command of the trainer, in a folder named by its settings, by which another call
finds it (infobatch_fast/train/queue.py).
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    # What is trained is the checkout that this file lies in, not an installed copy.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import tyro

from infobatch_fast.errors import UserError, reason
from infobatch_fast.pruning import FULL, Pruning
from infobatch_fast.report.text import markdown
from infobatch_fast.train import queue
from infobatch_fast.train.cli import command, complain, parse, say

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

    @property
    def place(self) -> list[str]:
        """The trainer's words for where the data lie."""
        return [] if self.data_dir is None else ["--data-dir", str(self.data_dir)]


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
    own |= {"--delta", "--target-saving", "--budget", "--compare"}
    for word in extra:
        if (flag := word.split("=")[0].replace("_", "-")).startswith("--") and flag in own:
            raise UserError(f"the words after -- must leave {flag} to the plan, got {word}")
    out = options.out.expanduser()
    return replace(options, preset=preset, epochs=epochs, out=out, extra=tuple(extra))


def make_plan(options: Options) -> list[queue.Planned]:
    """The runs of the tables, seed by seed, each once; training shorter as far as it is known."""
    scale, whole = options.scale, options.epochs or 0
    parts = [options.dataset, options.preset, *([f"scale{scale:g}"] if scale < 1 else [])]
    plan = queue.Plan(options.out, parts, options.extra, partial(options.words, fraction=scale))
    for seed in options.seeds:
        for table in TABLES if options.table == "all" else [options.table]:
            if table == "budget":
                for pruning, epochs in budget_runs(whole):
                    plan.add(pruning, seed, epochs, table)
                continue
            prunings, main = prunings_of(table, whole, options.ratios)
            for pruning in prunings:
                plan.add(pruning, seed, whole, table)
            plan.add_shorter(plan.add(main, seed, whole, table), table)
    return list(plan.runs.values())


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
            if saving := spending.pruning.get("target_saving"):  # else it is full data
                for policy in ("hard", "ucb"):
                    yield Pruning(policy, target_saving=saving), spending.epochs


def plan_lines(plan: Sequence[queue.Planned]) -> Iterator[str]:
    """The plan as a table."""
    rows = []
    for number, p in enumerate(plan, 1):
        state = "yes" if p.summary else f"{p.done} epochs" if p.about else "no"
        rows.append([str(number), p.name, ", ".join(p.tables), state, str(p.epochs or "X")])
    yield from markdown(["#", "run", "tables", "done", "epochs"], rows, left=4)
    if not all(p.epochs for p in plan):
        yield "X          as many as see the samples of its table's pruned run, once that is done"


def timed_pace(options: Options) -> float | None:
    """Seconds of a pass over the data, from two epochs on a little of it; None if that fails."""
    fraction = min(TIMED, options.scale)
    say(f"timing     two epochs of {fraction:g} of the data, as no run is done yet")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        how = [*options.words(FULL, 0, 2, fraction), "--out", str(folder), *options.place]
        _, why = queue.run_child([*queue.TRAIN, *how], Path(place, "log"), lambda line: None)
        _, _, summary = queue.look(folder)
    if summary is None:
        say(f"timing     failed: {why}")
        return None
    seconds = summary.epoch_seconds or summary.train_seconds / 2
    return seconds * options.scale / fraction + summary.evaluation_seconds / 2


def run(arguments: Sequence[str]) -> None:
    """Plan, train what is left, and report."""
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
                how = [*planned.words, "--out", str(options.out / planned.name), *options.place]
                say(shlex.join(["python", *queue.TRAIN[1:], *how]))
        say(f"estimate   {queue.estimate(plan, lambda: timed_pace(options))}")
        return
    say(f"estimate   {queue.estimate(plan)}")
    failed = queue.train(lambda: make_plan(options), options.out, options.place)
    words = [str(options.out), "--out", str(options.out / "report")]
    queue.report(make_plan(options), failed, words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        hint = "pass a lower --batch-size to the trainer, after --"
        return command(lambda _: run(words), hint)
    except queue.Failed as error:
        return complain(f"error: {error}", 1)
    except OSError as error:
        return complain(f"error: {reason(error)}", 2)


if __name__ == "__main__":
    sys.exit(main())
