"""How far a run is: its finished epochs, the seconds it spent on what, and its checkpoints."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from infobatch_fast import checkpoint, config
from infobatch_fast.config import Config
from infobatch_fast.errors import UserError, reason
from infobatch_fast.infobatch import Plan
from infobatch_fast.step import Counts, TrainStep
from infobatch_fast.telemetry import peak_memory

NONFINITE_LIMIT = 20  # such steps in a row end the run
CHECKPOINT_SECONDS = 60.0

# Apart from each other: what pruning took is not in the training time.
SECONDS = ("train_seconds", "pruning_seconds", "evaluation_seconds", "checkpoint_seconds")

_SUMMARISED = {"accuracy", "kept", "loss", "skipped_steps", *SECONDS}  # of each epoch's line


class Diverged(Exception):
    """Too many steps in a row had gradients that are not finite."""


class Progress:
    """The state of a run outside the training step.

    Args:
        step: the training step, whose state the checkpoints hold.
        path: the checkpoint's file.
        settings: saved beside it, and compared when it is loaded.
    """

    def __init__(self, step: TrainStep, path: Path, settings: Config) -> None:
        self.step, self.path, self.settings = step, path, settings
        self.epoch = 0  # epochs finished
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = dict.fromkeys(
            SECONDS, 0.0
        )  # since the last epoch was closed
        self._saved_at = -math.inf
        self._began: float | None = None

    def start_clock(self) -> None:
        """Count the wall time from now on as training."""
        self._began = time.perf_counter()

    def stop_clock(self) -> None:
        """End that; what the phases took of it is counted as pruning instead."""
        assert self._began is not None
        phases = self.step.phases.read()
        pruning = sum(phases.get(name, 0.0) for name in ("choose", "update"))
        self.seconds["pruning_seconds"] += pruning
        self.seconds["train_seconds"] += time.perf_counter() - self._began - pruning
        self._began = None

    def close_epoch(
        self, plan: Plan, counts: Counts, lr: float, accuracy: float | None
    ) -> dict[str, Any]:
        """Add the epoch to the history, and begin to count the next one's seconds."""
        seconds = self.seconds["train_seconds"] + self.seconds["pruning_seconds"]
        self.epoch += 1
        line = {
            "epoch": self.epoch,
            "kept": len(plan),
            "prunable": plan.num_prunable,
            "loss": counts.loss if math.isfinite(counts.loss) else None,
            "lr": lr,
            "accuracy": accuracy,
            "images_per_second": len(plan) / seconds,
            "skipped_steps": counts.skipped,
            **self.seconds,
        }
        self.history.append(line)
        self.seconds = dict.fromkeys(SECONDS, 0.0)
        return line

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
        training = self._began is not None
        if training:
            self.stop_clock()
        start = time.perf_counter()
        state = self.step.state_dict()
        self.check_finite(int(state["counts"][-1]))  # the host waits: it copies all of it anyway
        drawn = None
        if plan is not None:
            drawn = {
                "num_prunable": plan.num_prunable,
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
                "seconds": self.seconds,
                "random": torch.get_rng_state(),
            },
        )
        self._saved_at = time.monotonic()
        self.seconds["checkpoint_seconds"] += time.perf_counter() - start
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
            self.seconds = {name: float(saved["seconds"][name]) for name in SECONDS}
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

    def _plan(self, num_prunable: int, indices: torch.Tensor, weights: torch.Tensor) -> Plan:
        assert self.step.infobatch is not None
        scores = self.step.infobatch.scores
        samples = scores.numel()
        if indices.dtype != torch.int64 or indices.dim() != 1 or indices.shape != weights.shape:
            raise ValueError(f"a plan of shapes {tuple(indices.shape)} and {tuple(weights.shape)}")
        if not (0 < indices.numel() <= samples and 0 <= indices.min() <= indices.max() < samples):
            raise ValueError(f"a plan of other samples than 0 to {samples - 1}")
        return Plan(
            self.epoch, samples, num_prunable, indices.to(scores.device), weights.to(scores.device)
        )

    def summary(self, samples: int, source: str) -> dict[str, Any]:
        """The results of a finished run on `samples` training samples."""
        history = self.history
        trained = sum(line["kept"] for line in history)
        full = samples * len(history)
        evaluated = [line for line in history if line["accuracy"] is not None]
        best = max(evaluated, key=lambda line: line["accuracy"])
        # A checkpoint after the last epoch is in no epoch's line.
        seconds = {n: sum(line[n] for line in history) + self.seconds[n] for n in SECONDS}
        return {
            "accuracy_last": evaluated[-1]["accuracy"],
            "accuracy_best": best["accuracy"],
            "accuracy_best_epoch": best["epoch"],
            "loss_last": history[-1]["loss"],
            "epochs": len(history),
            "samples_trained": trained,
            "samples_saved": full - trained,
            "saved_share": (full - trained) / full,
            **seconds,
            "images_per_second": trained / (seconds["train_seconds"] + seconds["pruning_seconds"]),
            "skipped_steps": sum(line["skipped_steps"] for line in history),
            "peak_memory_bytes": peak_memory(self.step.found_inf.device),
            "data": source,
        }
