"""What a run tells its user, as lines of text."""

from pathlib import Path
from typing import Any

from infobatch_fast.data.cifar import Dataset
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Plan
from infobatch_fast.pruning import Pruning
from infobatch_fast.train.config import Config


def preset_line(settings: Config, chosen: bool) -> str:
    """Which preset is taken, why, and how to have the other."""
    if chosen:
        return f"preset     {settings.preset}, as asked for"
    if settings.preset == "quick":
        return (
            "preset     quick, a demonstration, as there is no CUDA device to use; "
            "--preset paper has the reported recipe"
        )
    return "preset     paper, the reported recipe; --preset quick has a short demonstration"


def header(
    settings: Config, data: Dataset, device: dict[str, Any], parameters: int, loader: str
) -> list[str]:
    """Device, data, model, recipe, and what pruning can save at most."""
    where = (
        f"{device['name']}, torch threads: {device['threads']}"
        if "threads" in device
        else (f"{device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, CUDA {device['cuda']}")
    )
    samples, tests = data.labels.numel(), data.test_labels.numel()
    kind = data.name if data.name == data.source else f"{data.name} ({data.source})"
    epochs = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"
    precision = {"off": "float32"}.get(settings.amp, f"{settings.amp} autocast")
    return [
        f"device     {where}",
        f"data       {kind}: {samples:,} training and {tests:,} test images, "
        f"{data.num_classes} classes, fed by {loader}",
        f"model      {settings.model}, {parameters:,} parameters, channels_last, {precision}"
        + (", compiled" if settings.compile else "")
        + (", steps as CUDA graphs" if settings.graph else ""),
        f"recipe     {epochs}, batch {settings.batch_size}, {settings.optimizer}, "
        f"one-cycle to lr {settings.max_lr:g}, weight decay {settings.weight_decay:g}, "
        f"label smoothing {settings.label_smoothing:g}, seed {settings.seed}",
        pruning_line(settings),
    ]


PRUNABLE = {"soft": "well-learned", "repb": "samples below the mean of their batch"}
REACHED = 0.001  # of all samples: whole samples and batches need not meet a target exactly


def pruning_line(settings: Config) -> str:
    """The pruning and its upper bound, delta * ratio * share."""
    delta = settings.delta if settings.anneal or settings.delta == 0 else 1.0
    most = delta * settings.ratio
    aimed = settings.target_saving is not None
    if (delta if aimed else most) == 0 or settings.policy == "none":
        return "pruning    none: every epoch trains on all samples"
    ablations = [
        name
        for name, on in (("no rescaling", settings.rescale), ("no annealing", settings.anneal))
        if not on
    ]
    if settings.ratio_schedule != "constant":
        ablations.append(f"{settings.ratio_schedule} schedule")
    if settings.score != "loss":
        ablations.append(f"{settings.score} scores")
    line = f"pruning    {', '.join([settings.policy, *ablations])}: "
    if aimed:
        line += f"to save {settings.target_saving:.1%} of all samples"
    else:
        line += f"saves at most delta x ratio x share = {delta:g} x {settings.ratio:g} x share = "
        line += f"{most:.1%} x share of the {PRUNABLE.get(settings.policy, 'samples seen')}"
    full = settings.epochs - Pruning(delta=delta).first_full_epoch(settings.epochs)
    if full == 1:
        return line + "; the last epoch trains on all"
    return line + (f"; the last {full} epochs train on all" if full else "")


def target_lines(infobatch: InfoBatch) -> list[str]:
    """What --target-saving asks of each epoch, and whether that can be."""
    target, most = infobatch.pruning.target_saving, infobatch.most_saving
    assert target is not None
    pruning = infobatch.first_full_epoch - 1
    if target > most:
        why = "there is but one epoch that may prune, the first, which has no scores yet"
        if pruning > 0:
            weighted = f", {infobatch.most_ratio:.0%} of them at most" * (infobatch.most_ratio < 1)
            why = (
                f"{pruning} of the {infobatch.num_epochs} epochs can leave out samples{weighted}, "
                f"and so the run can save {most:.1%} at most"
            )
        return [f"WARNING: target_saving {target:g} cannot be reached: {why}"]
    part = target * infobatch.num_epochs / pruning
    line = f"target     {part:.1%} of the samples out of each epoch that prunes, "
    if infobatch.pruning.policy in PRUNABLE:
        needed = part / infobatch.most_ratio
        return [f"{line}possible while {needed:.1%} are {PRUNABLE[infobatch.pruning.policy]}"]
    return [f"{line}which {infobatch.pruning.policy} can do"]


def strained(plan: Plan, infobatch: InfoBatch) -> str | None:
    """That an epoch cannot leave out its part of the target; None if it can."""
    capped = plan.num_prunable == 0 or plan.ratio >= infobatch.most_ratio - 1e-9
    if infobatch.asked < 0.5 or not capped:
        return None
    why = "all but one"
    if infobatch.most_ratio < 1:
        why = f"at most {infobatch.most_ratio:.0%}, as those kept are weighted"
    last = plan.epoch == infobatch.first_full_epoch - 1
    target = infobatch.pruning.target_saving
    return (
        f"WARNING: target_saving {target:g} asks epoch {plan.epoch + 1} to "
        f"leave out {infobatch.asked:,.0f} samples; of its {plan.num_prunable:,} prunable ones it "
        f"leaves out {why}: {plan.num_samples - len(plan):,}; "
        f"{'so it is missed' if last else 'the rest falls to later epochs'}"
    )


def epoch_line(line: dict[str, Any], epochs: int, samples: int, *, ratio: bool = False) -> str:
    """One epoch: kept, loss, learning rate, accuracy, images/s, seconds, seconds of pruning.

    Args:
        line: the epoch's record.
        epochs: of the run.
        samples: N.
        ratio: show the epoch's, where it is not the same for all.
    """
    width = len(str(epochs))
    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
    if len(loss) > 12:
        loss = f"{line['loss']:.2e}"
    accuracy = "     -" if line["accuracy"] is None else f"{line['accuracy']:6.2%}"
    pruning = line["pruning_seconds"]
    text = (
        f"epoch {line['epoch']:{width}}/{epochs}  kept {line['kept']:{len(f'{samples:,}')},}/"
        f"{samples:,}  loss {loss}  lr {line['lr']:.2e}  accuracy {accuracy}  "
        f"{line['images_per_second']:7,.0f} images/s  "
        f"{line['train_seconds'] + (pruning or 0.0):.2f} s"
    )
    if pruning is not None:
        text += f"  pruning {pruning:.4f} s"
    if ratio:
        text += f"  r {line['ratio']:.3f}"
    if line["host_syncs"] is not None:
        text += f"  host syncs {line['host_syncs']}"
    if line["skipped_steps"]:
        text += f"  SKIPPED {line['skipped_steps']} non-finite steps"
    return text


def summary_lines(summary: dict[str, Any], folder: Path) -> list[str]:
    """The results of a finished run."""
    full = summary["samples_trained"] + summary["samples_saved"]
    lines = [
        f"accuracy   {summary['accuracy_last']:.2%} after the last epoch; best "
        f"{summary['accuracy_best']:.2%} (epoch {summary['accuracy_best_epoch']}, picked on the "
        "test set)",
        _time_line(summary),
        f"samples    trained on {summary['samples_trained']:,} of {full:,}; saved "
        f"{summary['samples_saved']:,} ({summary['saved_share']:.1%})",
        _energy_line(summary),
        f"memory     {summary['peak_memory_bytes'] / 2**30:.2f} GiB at the peak",
        f"run        {folder}: config.json, epochs.jsonl, summary.json, checkpoint.pt, model.pt, "
        "arrays of the samples (.npy)",
    ]
    if summary["target_saving"] is not None:
        reached = summary["saved_share"] >= summary["target_saving"] - REACHED
        lines.insert(
            3,
            f"target     {summary['target_saving']:.1%} of the samples to save: "
            f"{'reached' if reached else 'NOT REACHED'}, {summary['saved_share']:.1%}",
        )
    if summary["phases"] is not None:
        lines.insert(2, phases_line(summary["phases"]))
    if summary["host_syncs"] is not None:
        lines.insert(-2, f"host syncs {summary['host_syncs']:,} within {summary['epochs']} epochs")
    if summary["data"] != "genuine":
        lines.append("WARNING: this was SYNTHETIC data; the accuracy says nothing of CIFAR-10")
    return lines


def phases_line(phases: dict[str, float]) -> str:
    """What each phase took, and its share of them all."""
    total = max(sum(phases.values()), 1e-9)
    words = [f"{name} {took:.2f} s ({took / total:.1%})" for name, took in phases.items()]
    return f"phases     {', '.join(words)}"


def _time_line(summary: dict[str, Any]) -> str:
    training, pruning = summary["train_seconds"], summary["pruning_seconds"]
    line = f"time       {summary['seconds']:.1f} s: training {training:.1f} s, "
    if pruning is not None:
        share = pruning / max(pruning + training, 1e-9)
        part = "" if summary["update_timed"] else "; the update is in the step"
        line += f"pruning {pruning:.3f} s ({share:.2%} of both{part}), "
    return line + (
        f"evaluation {summary['evaluation_seconds']:.1f} s, "
        f"checkpoints {summary['checkpoint_seconds']:.1f} s"
    )


def _energy_line(summary: dict[str, Any]) -> str:
    if summary["joules"] is None:
        absent = summary["nvml"]["absent"]
        why = absent.get("all") or absent.get("joules") or "not at every reading of the run"
        return f"energy     not measured: {why}"
    line = f"energy     {summary['joules']:,.0f} J"
    if summary["joules_per_image"] is not None:
        line += (
            f": {summary['joules_per_image']:.4f} J an image trained on, and by that about "
            f"{summary['joules_saved']:,.0f} J saved"
        )
    return line
