"""What a run tells its user, as lines of text."""

from pathlib import Path
from typing import Any

from infobatch_fast.budget import scheduled_ratio
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Plan
from infobatch_fast.policies import find_schedule
from infobatch_fast.train.cli import say
from infobatch_fast.train.config import Config
from infobatch_fast.train.records import EpochLine, Summary

PRUNABLE = {
    "soft": "well-learned",
    "repb": "samples that sat out or are below the mean of their batch",
}
# Of `spend` at 0.75, 0.625 and 0.5, as docs/policies.md has it.
WORTH = (
    "worth      0.75 to 1.39 points over full data for fewer epochs, where it was measured: a "
    "small network, 16 epochs of CIFAR-10 (in 40 epochs 0.61, undecided); --compare measures it "
    "for yours"
)
REACHED = 0.001  # of all samples: whole samples and batches need not meet a target exactly


def preset_line(settings: Config, chosen: bool) -> str:
    """Which preset is taken, why, and how to have the other."""
    why = "the reported recipe; --preset quick has a short demonstration"
    if settings.preset == "quick":
        why = "a demonstration, as no CUDA device is used; --preset paper has the reported recipe"
    return f"preset     {settings.preset}, {'as asked for' if chosen else why}"


def budget_line(asked: Config, settings: Config) -> str:
    """How a budget is spent, and what that was measured to be worth."""
    of, epochs = settings.pruning, settings.epochs
    line = f"budget     {asked.budget:g} of the samples of {asked.epochs} full epochs: "
    line += f"{epochs} epoch{'s' * (epochs > 1)}"
    if of.target_saving is None:
        return f"{line} of full data"
    return f"{line}, {of.target_saving:.1%} of the samples left out by {of.policy}\n{WORTH}"


def judges(settings: Config) -> str:
    """The images that accuracies are of: the test set's, or what --validation holds out."""
    return "held-out" if settings.validation else "test"


def header(
    settings: Config,
    data: Dataset,
    device: dict[str, Any],
    parameters: int,
    infobatch: InfoBatch,
    loader: str,
) -> list[str]:
    """Device, data, model, recipe, and what pruning can save at most."""
    where = f"torch threads: {device.get('threads')}"
    if device["type"] == "cuda":
        where = f"{device['memory_bytes'] / 2**30:.0f} GiB, CUDA {device['cuda']}"
    if device.get("processes"):
        where += f", {device['processes']} processes, each with its own"
    kind = data.name if data.name == data.source else f"{data.name} ({data.source})"
    precision = {"off": "float32"}.get(settings.amp, f"{settings.amp} autocast")
    target = settings.pruning.target_saving is not None
    return [
        f"device     {device['name']}, {where}",
        f"data       {kind}: {data.labels.numel():,} training and {data.test_labels.numel():,} "
        f"{judges(settings)} images, {data.num_classes} classes, fed "
        f"by {loader}"
        + f", {100 * settings.label_noise:g}% of the labels wrong"
        * bool(settings.label_noise),
        f"model      {settings.model}, {parameters:,} parameters, channels_last, {precision}"
        + (", compiled" if settings.compile else "")
        + (", steps as CUDA graphs" if settings.graph else ""),
        f"recipe     {settings.epochs} epoch{'s' * (settings.epochs > 1)}, batch "
        f"{settings.batch_size}, {settings.optimizer}, one-cycle to lr {settings.max_lr:g}, weight "
        f"decay {settings.weight_decay:g}, label smoothing {settings.label_smoothing:g}, "
        + f"mixup {settings.mixup:g}, " * (settings.mixup > 0)
        + f"mean of weights {settings.ema:g}, " * (settings.ema > 0)
        + f"seed {settings.seed}",
        pruning_line(settings),
        *([target_line(infobatch)] if target else []),
    ]


def pruning_line(settings: Config) -> str:
    """The pruning and the most it can save: the first epoch is full, as it has no scores yet."""
    of = settings.pruning
    if of.full_data:
        return "pruning    none: every epoch trains on all samples"
    pruning, epochs = max(0, of.first_full_epoch(settings.epochs) - 1), settings.epochs
    told = {
        "no rescaling": not of.rescale,
        "no annealing": not of.anneal,
        f"{of.ratio_schedule} schedule": of.ratio_schedule != "constant",
        f"{of.score} scores": of.score != "loss",
    }
    line = f"pruning    {', '.join([of.policy, *(name for name, on in told.items() if on)])}: "
    if of.target_saving is not None:
        line += f"to save {of.target_saving:.1%} of all samples"
    else:
        schedule, first_full = find_schedule(of.ratio_schedule), of.first_full_epoch(epochs)
        ratios = [scheduled_ratio(of.ratio, schedule, e, first_full) for e in range(1, first_full)]
        line += f"r = {of.ratio:g} of the {PRUNABLE.get(of.policy, 'samples seen')} left out in "
        line += f"{pruning} of {epochs} epochs, at most {sum(ratios) / epochs:.1%} of all samples"
    if full := epochs - of.first_full_epoch(epochs):
        line += f"; the last {f'{full} train' if full > 1 else 'trains'} on all"
    if of.target_saving is None and pruning == 0:
        line += "\nWARNING: no epoch prunes: the first has no scores yet; take more --epochs"
    return line


def target_line(infobatch: InfoBatch) -> str:
    """What --target-saving asks of each epoch, and whether that can be."""
    target, most = infobatch.pruning.target_saving, infobatch.most_saving
    assert target is not None
    pruning = max(0, infobatch.first_full_epoch - 1)  # the first epoch has no scores yet
    if target > most:
        return (
            f"WARNING: target_saving {target:g} cannot be reached: {pruning} of the "
            f"{infobatch.num_epochs} epochs can leave out samples, and so the run can save "
            f"{most:.1%} at most"
        )
    part = target * infobatch.num_epochs / pruning
    mean = ", in the mean" * (infobatch.pruning.ratio_schedule != "constant")
    line = f"target     {part:.1%} of the samples out of each epoch that prunes{mean}"
    if of := PRUNABLE.get(infobatch.pruning.policy):
        line += f", possible while {part / infobatch.most_ratio:.1%} are {of}"
    return line


def strained(plan: Plan, infobatch: InfoBatch) -> str | None:
    """That an epoch cannot leave out its part of the target; None if it can."""
    capped = plan.num_prunable == 0 or plan.ratio >= infobatch.most_ratio - 1e-9
    if infobatch.asked < 0.5 or not capped:
        return None
    return (
        f"WARNING: target_saving {infobatch.pruning.target_saving:g} asks epoch {plan.epoch + 1} "
        f"to leave out {infobatch.asked:,.0f} samples; of its {plan.num_prunable:,} prunable ones "
        f"it can leave out {plan.num_samples - len(plan):,}"
    )


def epoch_line(line: EpochLine, settings: Config, samples: int) -> str:
    """One epoch: kept of N samples, loss, learning rate, accuracy, images/s, seconds."""
    width, total = len(str(settings.epochs)), f"{samples:,}"
    loss, of, pruning = line.loss or 0.0, settings.pruning, line.pruning_seconds
    speed = "-" if line.images_per_second is None else f"{line.images_per_second:,.0f}"
    parts = {
        f"epoch {line.epoch:{width}}/{settings.epochs}": True,
        f"kept {line.kept:{len(total)},}/{total}": True,
        f"loss {loss:{'.4f' if loss < 1e6 else '.2e'}}": True,
        f"lr {line.lr:.2e}": True,
        "accuracy " + ("     -" if line.accuracy is None else f"{line.accuracy:6.2%}"): True,
        f"{speed:>7} images/s": True,
        f"{line.train_seconds + (pruning or 0.0):.2f} s": True,
        f"pruning {pruning or 0.0:.4f} s": pruning is not None,
        f"start-up {line.startup_seconds:.1f} s": line.startup_seconds,
        f"r {line.ratio:.3f}": of.target_saving or of.ratio_schedule != "constant",
        f"host syncs {line.host_syncs}": line.host_syncs is not None,
        f"SKIPPED {line.skipped_steps} non-finite steps": line.skipped_steps,
    }
    return "  ".join(part for part, shown in parts.items() if shown)


def tell(summary: Summary, settings: Config, folder: Path) -> None:
    """Say the results of a finished run."""
    full = summary.samples_trained + summary.samples_saved
    target, phases = summary.target_saving, summary.phases or {}
    reached = target is not None and summary.saved_share >= target - REACHED
    total = max(sum(phases.values()), 1e-9)
    shares = (f"{name} {took:.2f} s ({took / total:.1%})" for name, took in phases.items())
    lines = {
        "accuracy": f"{summary.accuracy_last:.2%} after the last epoch; best "
        f"{summary.accuracy_best:.2%} (epoch {summary.accuracy_best_epoch}, picked on the "
        f"{judges(settings)} images)",
        "time": _time(summary),
        "phases": ", ".join(shares),
        "samples": f"trained on {summary.samples_trained:,} of {full:,}; saved "
        f"{summary.samples_saved:,} ({summary.saved_share:.1%})",
        "target": target
        and f"{target:.1%} of the samples to save: {'reached' if reached else 'NOT REACHED'}, "
        f"{summary.saved_share:.1%}",
        "energy": _energy(summary),
        "host syncs": summary.host_syncs is not None
        and f"{summary.host_syncs:,} within {summary.epochs} epochs",
        "memory": f"{summary.peak_memory_bytes / 2**30:.2f} GiB at the peak",
        "form": f"network {'' if summary.compiled else 'not '}compiled, steps "
        f"{'' if summary.captured else 'not '}captured, operations by "
        f"{'Triton' if summary.by_kernels else 'torch'}, fed by {summary.loader}",
        "run": f"{folder}: config.json, epochs.jsonl, summary.json, checkpoint.pt, model.pt, "
        "arrays of the samples (.npy)",
    }
    for name, text in lines.items():
        if text:
            say(f"{name:10} {text}")
    if summary.data == "synthetic":
        say("WARNING: this was SYNTHETIC data; the accuracy says nothing of CIFAR-10")


def _time(summary: Summary) -> str:
    training, pruning = summary.train_seconds, summary.pruning_seconds
    parts = [f"training {training:.1f} s"]
    if pruning is not None:
        share = pruning / max(pruning + training, 1e-9)
        part = "" if summary.update_timed else "; the update is in the step"
        parts.append(f"pruning {pruning:.3f} s ({share:.2%} of both{part})")
    parts.append(f"start-up {summary.startup_seconds:.1f} s")
    parts.append(f"evaluation {summary.evaluation_seconds:.1f} s")
    parts.append(f"checkpoints {summary.checkpoint_seconds:.1f} s")
    each = "" if summary.epoch_seconds is None else f"; an epoch {summary.epoch_seconds:.2f} s"
    return f"{summary.seconds or 0.0:.1f} s: {', '.join(parts)}{each}"


def _energy(summary: Summary) -> str:
    if summary.joules is None:
        absent = summary.nvml["absent"]
        why = absent.get("all") or absent.get("joules") or "not at every reading of the run"
        return f"not measured: {why}"
    line = f"{summary.joules:,.0f} J"
    if (each := summary.joules_per_image) is not None:
        line += f": {each:.4f} J an image trained on, and by that about "
        line += f"{summary.joules_saved:,.0f} J saved"
    return line
