"""How far a run is: its epochs, what it spent on what, what became of its samples, checkpoints.

Dimensions: N samples, E epochs, M samples tracked, P samples pictured.
"""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.tree import BadFiles
from infobatch_fast.errors import UserError, reason
from infobatch_fast.plan import Plan
from infobatch_fast.telemetry.nvml import Nvml
from infobatch_fast.telemetry.phases import PHASES, PRUNING, peak_memory
from infobatch_fast.telemetry.syncs import HostSyncs, host_syncs
from infobatch_fast.train import folder, records
from infobatch_fast.train.cli import Interrupted, say
from infobatch_fast.train.config import RESUMABLE, Config
from infobatch_fast.train.records import EpochLine, Summary
from infobatch_fast.train.step import Counts, TrainStep

NONFINITE_LIMIT = 20  # such steps in a row end the run
CHECKPOINT_SECONDS = 60.0
TRACKED = 1024  # samples whose scores are kept for each epoch: 4 kB an epoch
PLAN = ("indices", "weights", "num_prunable", "ratio")  # what a checkpoint keeps of one
PICTURED = 48  # samples whose images are kept, half of them the least kept ones

# What `spending` counts, by the names in an epoch's line.
SPENT = [each.name for each in fields(EpochLine) if each.name.endswith(("seconds", "joules"))]


class Diverged(Exception):
    """Too many steps had gradients that are not finite."""


class Ledger:
    """The state of a run outside the training step, and its folder, `path`."""

    def __init__(self, settings: Config, step: TrainStep, path: Path, meter: Nvml) -> None:
        assert step.infobatch is not None
        self.settings, self.step, self.path, self.meter = settings, step, path, meter
        self.infobatch, self.ranks = step.infobatch, step.ranks
        self.device = self.infobatch.scores.device
        self.samples = SampleRecord(self.infobatch.num_samples, self.device)
        self.epoch = 0  # epochs finished
        self.since_epoch = 1  # the first that this session trained in
        self.history: list[EpochLine] = []
        self._clear()
        self._saved_at, self._told = -math.inf, 0
        self._account: str | None = None
        self._then: tuple[float, float | None] = 0.0, None

    def _clear(self) -> None:
        # Since the last epoch was closed; None is "not measured".
        self.spent: dict[str, Any] = dict.fromkeys(SPENT, 0.0)
        self.spent["startup_images"] = 0
        self.phases: dict[str, float] | None = dict.fromkeys(PHASES, 0.0)
        self.syncs = None if self.settings.host_syncs == "off" else 0

    def begin(self) -> None:
        """Count time and energy from now on."""
        self._then = time.perf_counter(), self._joules()
        self.step.phases.read()

    @contextmanager
    def spending(self, account: str) -> Iterator[None]:
        """Count the block as train, startup, evaluation or checkpoint, but for such within it.

        The latter three are phases, too; training consists of several.
        """
        outer = self._account
        self._lap(account)
        try:
            with nullcontext() if account == "train" else self.step.phases(account):
                yield
        finally:
            self._lap(outer)

    @contextmanager
    def starting(self, watch: HostSyncs, images: int) -> Iterator[None]:
        """Count the block as start-up that so many images went through, host syncs uncounted."""
        with watch.allowed(), self.spending("startup"):
            yield
        self.spent["startup_images"] += images * self.ranks.world

    @contextmanager
    def watching(self, *, choosing: bool = False) -> Iterator[HostSyncs]:
        """Count the block's host syncs, or forbid them; choosing may have one."""
        how = self.settings.host_syncs
        with host_syncs(self.device, "count" if choosing and how != "off" else how) as watch:
            yield watch
        self.syncs = _sum([self.syncs, watch.count])

    def _joules(self) -> float | None:
        """Those of one card among several would be taken for all."""
        return self.meter.joules() if self.ranks.world == 1 else None

    def _lap(self, account: str | None) -> None:
        """Count what passed since the last lap where it belongs; what follows is `account`'s."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a few times an epoch: what is queued is this account's
        then, self._then = self._then, (time.perf_counter(), self._joules())
        seconds, joules = self._then[0] - then[0], _sum([self._then[1], then[1] and -then[1]])
        phases = self.step.phases.read()
        passed: dict[str, float | None] = {"seconds": seconds, "joules": joules}
        if self._account == "train":  # what the phases took of it for pruning is no training
            pruning = sum(phases.get(name, 0.0) for name in PRUNING) if phases else None
            passed |= {"train_seconds": seconds - (pruning or 0.0), "pruning_seconds": pruning}
            passed["train_joules"] = joules
        elif self._account is not None:
            passed[f"{self._account}_seconds"] = seconds
        if self._account == "startup":
            phases = {"startup": sum(phases.values())}
        for name, amount in passed.items():
            self.spent[name] = _sum([self.spent[name], amount])
        if not self.step.phases.enabled:
            self.phases = None  # of a part of the epoch they are not known
        if self.phases is not None:
            for name, seconds in phases.items():
                self.phases[name] += seconds
        self._account = account

    def close_epoch(self, plan: Plan, counts: Counts, **measured: Any) -> EpochLine:
        """Record the epoch, with what else was measured, and begin to count the next one's."""
        self.samples.close_epoch(plan, self.infobatch.scores)
        self._lap(None)
        self.epoch += 1
        line = EpochLine(
            epoch=self.epoch,
            kept=len(plan),
            prunable=plan.num_prunable,
            ratio=plan.ratio,
            expected_saving=plan.expected_saving,
            loss=counts.loss,
            images_per_second=_speed(len(plan), self.spent),
            skipped_steps=counts.skipped,
            phases=self.phases,
            host_syncs=self.syncs,
            **self.spent,
            **measured,
        )
        self._clear()
        self.history.append(line)
        if self.ranks.first:
            records.write_epochs(self.path / records.EPOCHS, [line], "a")
        return line

    def check(self, counts: Counts, steps: int | None = None) -> None:
        """Raise Diverged if too many steps changed nothing, of `steps` where an epoch is over."""
        if counts.longest >= NONFINITE_LIMIT:
            what = f"{counts.longest} steps in a row had non-finite gradients"
        elif steps is not None and 2 * counts.skipped > steps:
            what = f"{counts.skipped} of {steps} steps had non-finite gradients"
        elif steps is not None and not math.isfinite(counts.loss):
            what = f"the loss was {counts.loss}"
        else:
            return
        raise Diverged(
            f"{what} in epoch {self.epoch + 1}: lower --max-lr (now {self.settings.max_lr:g}) or "
            f"--weight-decay (now {self.settings.weight_decay:g})"
        )

    def due(self) -> bool:
        """Whether the last checkpoint is a minute old, or there is none of this session."""
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS

    def save(self, plan: Plan | None = None, number: int = 0) -> None:
        """Save a checkpoint: of a finished epoch, or of an epoch's plan after `number` steps.

        It raises Diverged instead of saving a state that goes nowhere. Collective.
        """
        with self.spending("checkpoint"):
            self.check(self.step.read_counts())
            with self.step.phases("merge"):
                self.infobatch.merge()
            state = {
                "version": folder.CHECKPOINT_VERSION,
                "config": self.settings.recorded(),
                "step": self.step.state_dict(),
                "epoch": self.epoch,
                "plan": None if plan is None else {name: getattr(plan, name) for name in PLAN},
                "number": number,
                "history": [asdict(line) for line in self.history],
                "samples": self.samples.state_dict(),
                "spent": self.spent,
                "phases": self.phases,
                "random": torch.get_rng_state(),
                "kernels": self.step.by_kernels,
            }
            if self.ranks.first:
                folder.save(self.path / records.CHECKPOINT, state)
        self._saved_at = time.monotonic()

    def stop(self, signal: int) -> None:
        """Where there is a signal, part from the other ranks, and raise Interrupted. Collective."""
        if signal:
            self.ranks.leave()
            place = self.settings.data_dir
            data_dir = f" --data-dir {place}" if place else ""
            raise Interrupted(signal, f"stopped; continue with --resume {self.path}{data_dir}")

    def tell_bad(self, bad: BadFiles | None) -> None:
        """Write down what files any rank has left out, and tell the user where there are more."""
        if bad is None:
            return
        for found in self.ranks.of_all(bad.why):
            bad.add(found)
        if self.ranks.first and len(bad.why) > self._told:
            self._told = len(bad.why)
            say(f"WARNING: left out are files, {bad}")
            records.write_json(self.path / records.BAD, bad)

    def restore(self, saved: dict[str, Any]) -> tuple[Plan | None, int]:
        """Take over a checkpoint; returns the plan of the epoch under way and its steps done."""
        path = self.path / records.CHECKPOINT
        try:
            for name, value in self.settings.recorded().items():  # of which older runs have fewer
                if name not in RESUMABLE and saved["config"].get(name, value) != value:
                    raise UserError(
                        f"checkpoint {path} must be of this run's configuration, got another {name}"
                    )
            self.step.load_state_dict(saved["step"])
            if self.ranks.first:  # the others' draws are their own
                torch.set_rng_state(saved["random"])
            self.epoch, self.since_epoch = saved["epoch"], saved["epoch"] + 1
            self.history = [
                records.parse(EpochLine, line, f"checkpoint {path}") for line in saved["history"]
            ]
            self.samples.load_state_dict(saved["samples"])
            self.spent.update(saved["spent"])
            self.phases = saved["phases"] and {**dict.fromkeys(PHASES, 0.0), **saved["phases"]}
            plan = None
            if saved["plan"] is not None:
                tensors = {name: saved["plan"][name].to(self.device) for name in PLAN[:2]}
                drawn = {**saved["plan"], **tensors}
                plan = Plan(epoch=self.epoch, num_samples=self.infobatch.num_samples, **drawn)
                self.syncs = None  # those of the part that is done are not known
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {path} does not fit this run: {type(error).__name__}: {reason(error)}"
            ) from None
        if self.ranks.first:  # a kill may have left epochs that the checkpoint does not have
            records.write_epochs(self.path / records.EPOCHS, self.history, "w")
        return plan, saved["number"]

    def finish(self, data: Dataset, **forms: Any) -> Summary:
        """Write what a finished run leaves: arrays of the samples, weights and summary."""
        if self.ranks.first:
            self.samples.write(self.path, data, self.infobatch.scores)
            state = self.step.result.state_dict()
            weights = {name: value.cpu().contiguous() for name, value in state.items()}
            folder.save(self.path / records.WEIGHTS, weights)
        summary = self._summary(data, forms)
        if self.ranks.first:
            records.write_json(self.path / records.SUMMARY, summary)
        return summary

    def _summary(self, data: Dataset, forms: dict[str, Any]) -> Summary:
        self._lap(None)
        history = self.history
        evaluated = [(line.accuracy, -line.epoch) for line in history if line.accuracy is not None]
        best, epoch = max(evaluated)  # the earliest of those
        # What came after the last epoch, a checkpoint say, is in no epoch's line.
        spent = {n: _sum([*(getattr(x, n) for x in history), self.spent[n]]) for n in self.spent}
        phases = [*(line.phases for line in history), self.phases]
        trained, full = sum(line.kept for line in history), data.labels.numel() * len(history)
        # What an epoch takes is known from those that compiled, captured and tuned nothing.
        settled = [_training(asdict(line)) for line in history if not line.startup_seconds]
        timed, joules = trained - spent["startup_images"], spent["train_joules"]
        an_image = joules / timed if timed and joules is not None else None
        return Summary(
            accuracy_last=evaluated[-1][0],
            accuracy_best=best,
            accuracy_best_epoch=-epoch,
            loss_last=history[-1].loss,
            epochs=len(history),
            samples_trained=trained,
            samples_saved=full - trained,
            saved_share=(full - trained) / full,
            expected_saving=sum(line.expected_saving or 0.0 for line in history) / len(history),
            target_saving=self.settings.pruning.target_saving,
            **spent,
            epoch_seconds=statistics.median(settled) if settled else None,
            phases=None
            if None in phases
            else {n: sum(p.get(n, 0.0) for p in phases if p) for n in PHASES},
            images_per_second=_speed(trained, spent),
            skipped_steps=sum(line.skipped_steps for line in history),
            # Else it is, in whole or in part, in the time of the step.
            update_timed=not (self.step.by_kernels or forms["captured"]),
            host_syncs=_sum([line.host_syncs for line in history]),
            joules_per_image=an_image,
            # An estimate: had the samples saved cost what those trained on did.
            joules_saved=None if an_image is None else an_image * (full - trained),
            # NVML sees one session: of a resumed run, the epochs from here on.
            nvml={"since_epoch": self.since_epoch, **self.meter.read()},
            peak_memory_bytes=peak_memory(self.device),
            data=data.source,
            by_kernels=self.step.by_kernels,
            **forms,
        )


def _training(spent: dict[str, Any]) -> float:
    """Seconds of training and pruning."""
    return spent["train_seconds"] + (spent["pruning_seconds"] or 0.0)


def _speed(images: int, spent: dict[str, Any]) -> float | None:
    """Images a second, without start-up; None where nothing else was."""
    timed = images - spent["startup_images"]
    return timed / _training(spent) if timed else None


def _sum(values: list[Any]) -> Any:
    return None if None in values else sum(values)


class SampleRecord:
    """How often each sample was kept, and the scores of evenly spaced samples on the host."""

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self.kept = torch.zeros(num_samples, dtype=torch.int32, device=device)
        tracked = min(num_samples, TRACKED)
        self.tracked = torch.arange(tracked, device=device) * num_samples // tracked
        self.history: list[Tensor] = []  # (M,) float32 an epoch

    def close_epoch(self, plan: Plan, scores: Tensor) -> None:
        """Count an epoch's samples, and copy the tracked ones' scores; the host waits for that."""
        self.kept[plan.indices] += 1  # no sample is twice in a plan
        self.history.append(scores[self.tracked].cpu())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"kept": self.kept, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.kept.copy_(state["kept"])
        self.history = list(state["history"])

    def write(self, path: Path, data: Dataset, scores: Tensor) -> None:
        """Write the run's arrays into its folder, each a .npy file.

        kept (N,) int32, epochs that trained on the sample; scores (N,) float32, the last, NaN where
        not seen; labels (N,) int32; tracked (M,) int64, samples; score_history (E, M) float32,
        theirs after each epoch; pictured (P,) int64, the samples kept least, ascending, and then
        those kept most, descending; pictures (P, H, W, 3) uint8, their images.
        """
        kept = self.kept.cpu().numpy()
        half = min(PICTURED, kept.size) // 2
        ranked = np.argsort(kept, kind="stable")
        pictured = np.concatenate([ranked[:half], ranked[::-1][:half]])  # none twice
        arrays = {
            "kept": kept,
            "scores": scores.cpu().numpy(),
            "labels": data.labels.cpu().numpy().astype(np.int32),
            "tracked": self.tracked.cpu().numpy(),
            "score_history": torch.stack(self.history).numpy(),
            "pictured": pictured,
            "pictures": data.pictures(torch.from_numpy(pictured)).numpy(),
        }
        for name, array in arrays.items():
            with records.atomically(path / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
