"""`--compare`: a run beside full data and training shorter, over seeds, and what pruning was worth.

Training shorter is full data for fewer epochs, on as many samples: what pruning has to beat.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from infobatch_fast.errors import UserError, reason
from infobatch_fast.pruning import FULL, Pruning
from infobatch_fast.train import config
from infobatch_fast.train.cli import say
from infobatch_fast.train.config import Config
from infobatch_fast.train.queue import Plan, Planned, estimate, report, train

OUT = Path("runs/compare")


def compare(asked: Config, settings: Config) -> None:
    """Train what is left of the runs, and report; the same call goes on.

    Args:
        asked: the command line's settings, whose epochs full data has.
        settings: of the run, with epochs and pruning of its budget.

    Raises:
        UserError: the run prunes nothing, or a mistake in the first run.
        Failed: some run did not end.
    """
    of, out = settings.pruning, (settings.out or OUT).expanduser()
    if of.full_data or of.first_full_epoch(settings.epochs) < 2:  # the first has no scores
        got = of.label if of.full_data else f"epochs {settings.epochs}"
        raise UserError(f"compare must be of a run whose epochs leave out samples, got {got}")
    place = [] if settings.data_dir is None else ["--data-dir", str(settings.data_dir)]
    counted = f"{settings.seeds} seed" + "s" * (settings.seeds > 1)
    try:
        plan = _plan(asked, settings, out)
        say(
            f"compare    {of.label}; full data; full data for fewer epochs on as many samples; "
            f"{counted} each: {len(plan)} runs in {out}"
        )
        say(f"estimate   {estimate(plan)}")
        failed = train(lambda: _plan(asked, settings, out), out, place)
        plan = _plan(asked, settings, out)
        folders = [str(out / planned.name) for planned in plan if planned.about]
        report(plan, failed, [*folders, "--brief", "--out", str(out / "report")])
    except OSError as error:
        raise UserError(reason(error)) from None


def _plan(asked: Config, settings: Config, out: Path) -> Sequence[Planned]:
    cuda = torch.cuda.is_available()

    def words(pruning: Pruning, seed: int, epochs: int) -> list[str]:
        how = replace(settings, pruning=pruning, seed=seed, epochs=epochs)
        return ["--preset", how.preset, *config.words(how, cuda), *pruning.flags]

    # What stands in a name is what makes another experiment, apart from what always does.
    apart = {"dataset", "epochs", "seed", *config.RESUMABLE}
    extra = config.words(settings, cuda, without=apart)
    dataset = settings.dataset or config.DATASETS[0]
    if settings.data_dir and dataset not in ("cifar10", "cifar100", "synthetic"):
        extra.append(str(settings.data_dir.expanduser().resolve()))
    plan = Plan(out, [dataset.replace(":", "."), settings.preset], extra, words)
    for seed in range(settings.seed, settings.seed + settings.seeds):
        pruned = plan.add(settings.pruning, seed, settings.epochs)
        plan.add(FULL, seed, asked.epochs)
        plan.add_shorter(pruned)
    return list(plan.runs.values())
