"""How far a run is: its finished epochs, the seconds it spent on what, and its checkpoints."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from infobatch_fast.errors import UserError, reason
from infobatch_fast.plan import Plan
from infobatch_fast.telemetry.phases import PHASES, PRUNING, Nvml, peak_memory
from infobatch_fast.train import checkpoint, config
from infobatch_fast.train.config import Config
from infobatch_fast.train.samples import SampleRecord
from infobatch_fast.train.step import Counts, TrainStep

NONFINITE_LIMIT = 20  # such steps in a row end the run
CHECKPOINT_SECONDS = 60.0

# "seconds" is all of an epoch's wall time; the others are parts of it, apart from each other: what
# pruning took is not in the training time.
SECONDS = (
    "seconds",
    "train_seconds",
    "pruning_seconds",
    "evaluation_seconds",
    "checkpoint_seconds",
)
JOULES = ("joules", "train_joules")  # of the epoch, and of its training and pruning alone
_SUMMED = ("kept", "skipped_steps", *SECONDS, *JOULES, "host_syncs")
_SUMMARISED = {"accuracy", "loss", "phases", "expected_saving", *_SUMMED}  # of each epoch's line


class Diverged(Exception):
    """Too many steps in a row had gradients that are not finite."""


class Progress:
    """The state of a run outside the training step.

    Args:
        step: the training step of an InfoBatch, whose state the checkpoints hold.
        path: the checkpoint's file.
        settings: saved beside it, and compared when it is loaded.
        meter: of the device's energy.
    """

    def __init__(self, step: TrainStep, path: Path, settings: Config, meter: Nvml) -> None:
        assert step.infobatch is not None
        self.step, self.path, self.settings, self.meter = step, path, settings, meter
        self.infobatch = step.infobatch
        self.samples = SampleRecord(self.infobatch.num_samples, self.infobatch.scores.device)
        self.epoch = 0  # epochs finished
        self.since_epoch = 1  # the first that this session trained in
        self.history: list[dict[str, Any]] = []
        self._clear()
        self._saved_at = -math.inf
        self._now: tuple[float, float | None] = 0.0, None  # when what was spent was last added up
        self._training: tuple[float, float | None] | None = None

    def _clear(self) -> None:
        # Since the last epoch was closed; None is "not measured".
        self.spent: dict[str, float | None] = dict.fromkeys((*SECONDS, *JOULES), 0.0)
        self.phases: dict[str, float] | None = dict.fromkeys(PHASES, 0.0)

    def begin(self) -> None:
        """Count time and energy from now on."""
        self._now = time.perf_counter(), self.meter.joules()
        self.step.phases.read()

    def start_clock(self) -> None:
        """Count time and energy from now on as training."""
        self._training = time.perf_counter(), self.meter.joules()

    def stop_clock(self) -> None:
        """End that; what the phases took of it for pruning is counted as pruning instead."""
        assert self._training is not None
        seconds, joules = _between(self._training, (time.perf_counter(), self.meter.joules()))
        phases = self._add_phases()
        pruning = sum(phases.get(name, 0.0) for name in PRUNING) if phases else None
        self._add(
            pruning_seconds=pruning, train_seconds=seconds - (pruning or 0.0), train_joules=joules
        )
        self._training = None

    @contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Add what the block takes to one of `SECONDS`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(**{name: time.perf_counter() - start})

    def close_epoch(
        self,
        plan: Plan,
        counts: Counts,
        *,
        lr: float,
        accuracy: float | None,
        host_syncs: int | None,
        histogram: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Add the epoch to the history, and begin to count what the next one spends.

        Args:
            plan: the epoch's.
            counts: of its steps.
            lr: of its last step.
            accuracy: on the test set, if it was evaluated.
            host_syncs: if they were counted.
            histogram: of the scores at its end, if telemetry is on.
        """
        self.samples.close_epoch(plan, self.infobatch.scores)
        self._add_up()
        seconds = (self.spent["train_seconds"] or 0.0) + (self.spent["pruning_seconds"] or 0.0)
        self.epoch += 1
        line = {
            "epoch": self.epoch,
            "kept": len(plan),
            "prunable": plan.num_prunable,
            "ratio": plan.ratio,
            "expected_saving": plan.expected_saving,
            "loss": counts.loss if math.isfinite(counts.loss) else None,
            "lr": lr,
            "accuracy": accuracy,
            "images_per_second": len(plan) / seconds,
            "skipped_steps": counts.skipped,
            **self.spent,
            "host_syncs": host_syncs,
            "phases": self.phases,
            "score_histogram": histogram,
        }
        self.history.append(line)
        self._clear()
        return line

    def _add_up(self) -> None:
        """Bring `spent` and `phases` up to now."""
        before, self._now = self._now, (time.perf_counter(), self.meter.joules())
        seconds, joules = _between(before, self._now)
        self._add(seconds=seconds, joules=joules)
        self._add_phases()

    def _add(self, **amounts: float | None) -> None:
        for name, amount in amounts.items():
            before = self.spent[name]
            self.spent[name] = None if before is None or amount is None else before + amount

    def _add_phases(self) -> dict[str, float]:
        phases = self.step.phases.read()
        if not self.step.phases.enabled:
            self.phases = None  # of a part of the epoch they are not known
        if self.phases is not None:
            for name, seconds in phases.items():
                self.phases[name] += seconds
        return phases

    def check_finite(self, longest: int) -> None:
        """Raise Diverged if `longest` steps in a row that changed nothing are too many."""
        if longest < NONFINITE_LIMIT:
            return
        last = "no checkpoint was written yet"
        if self.path.exists():
            last = f"the last good checkpoint is {self.path}"
        raise Diverged(
            f"{longest} steps in a row had non-finite gradients in epoch {self.epoch + 1} "
            f"(the limit is {NONFINITE_LIMIT}): lower --max-lr (now {self.settings.max_lr}); {last}"
        )

    def due(self) -> bool:
        """Whether the last checkpoint is a minute old, or there is none of this session."""
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS

    def save(self, plan: Plan | None = None, number: int = 0) -> None:
        """Save a checkpoint: of a finished epoch, or of an epoch's plan after `number` steps.

        Raises:
            Diverged: instead of saving a state that goes nowhere.
            UserError: the disk is full; the older checkpoint is still there.
        """
        training = self._training is not None
        if training:
            self.stop_clock()
        self._add_up()
        with self.step.phases("checkpoint"), self.spending("checkpoint_seconds"):
            state = self.step.state_dict()
            # The host waits: it copies all of it anyway.
            self.check_finite(int(state["counts"][-1]))
            drawn = None
            if plan is not None:
                drawn = {
                    "num_prunable": plan.num_prunable,
                    "ratio": plan.ratio,
                    "indices": plan.indices,
                    "weights": plan.weights,
                }
            checkpoint.save(
                self.path,
                {
                    "config": self.settings.recorded(),
                    "step": state,
                    "epoch": self.epoch,
                    "plan": drawn,
                    "number": number,
                    "history": self.history,
                    "samples": self.samples.state_dict(),
                    "spent": self.spent,
                    "phases": self.phases,
                    "random": torch.get_rng_state(),
                    "kernels": self.step.by_kernels,
                },
            )
        self._saved_at = time.monotonic()
        if training:
            self.start_clock()

    def restore(self, saved: dict[str, Any]) -> tuple[Plan | None, int]:
        """Take over a checkpoint; returns the plan of the epoch under way and its steps done.

        Raises:
            UserError: it is of another configuration or shape.
        """
        names = config.differences(self.settings, saved.get("config"))
        if names:
            raise UserError(
                f"checkpoint {self.path} must be of this run's configuration, "
                f"got another {', '.join(names)}"
            )
        try:
            self.step.load_state_dict(saved["step"])
            torch.set_rng_state(saved["random"])
            self.epoch, self.history = int(saved["epoch"]), list(saved["history"])
            self.since_epoch = self.epoch + 1
            self.samples.load_state_dict(saved["samples"])
            if len(self.samples.history) != self.epoch:
                raise ValueError(f"{self.epoch} epochs, scores of {len(self.samples.history)}")
            spent = {name: saved["spent"][name] for name in self.spent}
            self.spent = {n: None if v is None else float(v) for n, v in spent.items()}
            phases = saved["phases"]
            self.phases = None if phases is None else {n: float(phases[n]) for n in PHASES}
            if len(self.history) != self.epoch or self.epoch > self.settings.epochs:
                raise ValueError(f"{self.epoch} epochs but a history of {len(self.history)}")
            for number, line in enumerate(self.history, 1):
                if line["epoch"] != number or not line.keys() >= _SUMMARISED:
                    raise ValueError(f"a history with {line} for epoch {number}")
            if saved["plan"] is None:
                return None, 0
            plan, number = self._plan(**saved["plan"]), int(saved["number"])
            if not 0 <= number <= -(-len(plan) // self.settings.batch_size):
                raise ValueError(f"{number} steps of an epoch of {len(plan)} samples")
            return plan, number
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {self.path} does not fit this run: "
                f"{type(error).__name__}: {reason(error)}"
            ) from None

    def _plan(
        self, num_prunable: int, ratio: float, indices: torch.Tensor, weights: torch.Tensor
    ) -> Plan:
        scores = self.infobatch.scores
        samples = scores.numel()
        if indices.dtype != torch.int64 or indices.dim() != 1 or indices.shape != weights.shape:
            raise ValueError(f"a plan of shapes {tuple(indices.shape)} and {tuple(weights.shape)}")
        if not (0 < indices.numel() <= samples and 0 <= indices.min() <= indices.max() < samples):
            raise ValueError(f"a plan of other samples than 0 to {samples - 1}")
        indices, weights = indices.to(scores.device), weights.to(scores.device)
        return Plan(self.epoch, samples, num_prunable, indices, weights, ratio)

    def summary(self, samples: int, source: str) -> dict[str, Any]:
        """The results of a finished run on `samples` training samples."""
        self._add_up()
        history = self.history
        full = samples * len(history)
        evaluated = [line for line in history if line["accuracy"] is not None]
        best = max(evaluated, key=lambda line: line["accuracy"])
        # What came after the last epoch, a checkpoint say, is in no epoch's line.
        rest = {**dict.fromkeys(_SUMMED, 0), **self.spent}
        total = {n: _sum([*(line[n] for line in history), rest[n]]) for n in _SUMMED}
        phases = [*(line["phases"] for line in history), self.phases]
        trained, joules = total["kept"], total["train_joules"]
        an_image = None if joules is None else joules / trained
        return {
            "accuracy_last": evaluated[-1]["accuracy"],
            "accuracy_best": best["accuracy"],
            "accuracy_best_epoch": best["epoch"],
            "loss_last": history[-1]["loss"],
            "epochs": len(history),
            "samples_trained": trained,
            "samples_saved": full - trained,
            "saved_share": (full - trained) / full,
            "expected_saving": sum(line["expected_saving"] for line in history) / len(history),
            "target_saving": self.settings.target_saving,
            **{name: total[name] for name in SECONDS},
            "phases": _sum_phases(phases),
            "images_per_second": trained
            / (total["train_seconds"] + (total["pruning_seconds"] or 0.0)),
            "skipped_steps": total["skipped_steps"],
            # Else it is, in whole or in part, in the time of the step.
            "update_timed": not (self.step.by_kernels or self.settings.graph),
            "host_syncs": total["host_syncs"],
            **{name: total[name] for name in JOULES},
            "joules_per_image": an_image,
            # An estimate: had the samples saved cost what those trained on did.
            "joules_saved": None if an_image is None else an_image * (full - trained),
            # NVML sees one session: of a resumed run, the epochs from here on.
            "nvml": {"since_epoch": self.since_epoch, **self.meter.read()},
            "peak_memory_bytes": peak_memory(self.step.found_inf.device),
            "data": source,
        }


def _between(
    then: tuple[float, float | None], now: tuple[float, float | None]
) -> tuple[float, float | None]:
    """Seconds and joules from one reading to another; None joules where one is not known."""
    joules = None if then[1] is None or now[1] is None else now[1] - then[1]
    return now[0] - then[0], joules


def _sum(values: list[Any]) -> Any:
    return None if None in values else sum(values)


def _sum_phases(parts: list[dict[str, float] | None]) -> dict[str, float] | None:
    measured = [part for part in parts if part is not None]
    if len(measured) < len(parts):
        return None
    return {name: sum(part[name] for part in measured) for name in PHASES}
