"""One run's settings: a frozen dataclass, its presets, and the command line made from it."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.policies import POLICIES, SCORES
from infobatch_fast.pruning import RATIO_SCHEDULES, Pruning
from infobatch_fast.train import cli as command
from infobatch_fast.train.models import MODELS
from infobatch_fast.train.optim import OPTIMIZERS

DATASETS = ("cifar10", "cifar100", "synthetic")
AMP = ("bf16", "fp16", "off")
LOADERS = ("auto", "dali", "torch")
DEVICES = ("auto", "cuda", "cpu")
HOST_SYNCS = ("off", "count", "forbid")

# Never written to a run's record: they name places on this machine, or an action.
UNRECORDED = ("data_dir", "out", "resume", "evaluate")
# What --resume may change: none of it alters which samples are trained on, or how. A device does:
# its generators draw other plans from the same seed.
RESUMABLE = ("data_dir", "loader", "checkpoint_every", "eval_every", "telemetry", "host_syncs")
EVALUABLE = ("data_dir", "device")

_FOLDER = tyro.conf.arg(metavar="PATH", help_behavior_hint="")

_NUMBER = tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")


def _one_of(*names: str, hint: str | None = None) -> Any:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}", help_behavior_hint=hint)


@dataclass(frozen=True)
class Config:
    """Train a CIFAR ResNet with InfoBatch: lossless speed-up by dynamic data pruning.

    The default of every flag is its preset's: paper (the reported recipe) where there is a CUDA
    device, quick (under two minutes on a CPU) where there is none. Exit codes: 0 done; 1 diverged;
    2 a mistake in the input, or no room on disk or GPU; 130 or 143 stopped by a signal.

    Attributes:
        preset: any other flag overrides what it sets.
        ratio: share of the well-learned samples that an epoch leaves out, in [0, 1).
        delta: share of the epochs that prune, in [0, 1]; the rest train on all data. 0: full data.
        policy: which samples are left out: soft is InfoBatch, random is any seen before, hard those
            of lowest loss; orderdp, repb, ucb and seta are later methods; none leaves out none.
        rescale: weight the kept well-learned samples so that the expected gradient is unchanged;
            hard, orderdp, ucb and seta have no weights.
        anneal: train on all data in the last (1 - delta) of the epochs.
        score: of a sample: loss is its last, bls the running mean of its batches' losses.
        ratio_schedule: pods alternates between epochs of more data and of less, ratio on average.
        target_saving: share of the samples of the whole run to leave out, in (0, 1): each epoch's
            ratio is solved from its scores, and --ratio not used. Where samples are weighted it
            goes to 0.9 at most; a target out of reach is told, and how far the run came.
        model: r18 to r101 are torchvision's ResNets with a CIFAR stem; small is for CPUs.
        epochs: passes over the (pruned) data.
        batch_size: samples a step.
        optimizer: lars and lamb adapt the learning rate of each layer.
        max_lr: peak of the one-cycle learning rate.
        weight_decay: L2 coefficient.
        label_smoothing: in [0, 1).
        amp: autocast; fp16 with loss scaling.
        whole_batches: in pruned epochs keep the count nearest to the exact one that leaves no
            partial batch; a GPU tunes and compiles its kernels anew for each size of one.
        compile: torch.compile the network; implies --whole-batches. Default of paper on CUDA.
        graph: replay each full step as one CUDA graph; implies --whole-batches. Default of paper on
            CUDA. An optimizer that it cannot hold, sgd or adam, trains without, and says so.
        dataset: synthetic is made on the device from the seed; default cifar10.
        data_dir: folder of CIFAR (bin, py or .tar.gz); default $INFOBATCH_DATA, else a user cache.
        loader: auto is DALI where it can be imported.
        data_fraction: share of the training and test images to take, the same ones for every
            seed, in (0, 1].
        synthetic_samples: training samples of --dataset synthetic; a fifth as many for testing.
        synthetic_classes: classes of --dataset synthetic.
        synthetic_easy: share of easy samples, in [0, 1].
        synthetic_hard: share of hard samples, in [0, 1].
        seed: of the initialisation, the plans and the augmentation.
        device: auto is CUDA where there is one.
        eval_every: epochs between evaluations on the test set; the last epoch is always evaluated.
        telemetry: phases of an epoch, energy and score histograms in the run's records; with
            --no-telemetry the epochs' seconds alone.
        host_syncs: count the host syncs of each epoch, or forbid those within it and stop at the
            first; on a CPU the reads that would be one on a GPU, and slower.
        checkpoint_every: steps between checkpoints; 0: at epoch ends, at most once a minute.
        out: the run's folder, new or empty; default runs/<name>.
        resume: run folder to continue; only --data-dir, --loader, --checkpoint-every,
            --eval-every, --telemetry and --host-syncs may change.
        evaluate: checkpoint, weights or run folder: print its test accuracy and train nothing.
    """

    preset: Annotated[str, _one_of("paper", "quick")] = "paper"
    ratio: float = 0.5
    delta: float = 0.875
    policy: Annotated[str, _one_of(*POLICIES)] = "soft"
    rescale: bool = True
    anneal: bool = True
    score: Annotated[str, _one_of(*SCORES)] = "loss"
    ratio_schedule: Annotated[str, _one_of(*RATIO_SCHEDULES)] = "constant"
    target_saving: Annotated[float | None, _NUMBER] = None
    model: Annotated[str, _one_of(*MODELS)] = "r50"
    epochs: int = 200
    batch_size: int = 200
    optimizer: Annotated[str, _one_of(*OPTIMIZERS)] = "lars"
    max_lr: float = 5.2
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    amp: Annotated[str, _one_of(*AMP)] = "bf16"
    whole_batches: bool = True
    compile: bool = False
    graph: bool = False
    dataset: Annotated[str | None, _one_of(*DATASETS, hint="")] = None
    data_dir: Annotated[Path | None, _FOLDER] = None
    loader: Annotated[str, _one_of(*LOADERS)] = "auto"
    data_fraction: float = 1.0
    synthetic_samples: int = 50_000
    synthetic_classes: int = 10
    synthetic_easy: float = 0.5
    synthetic_hard: float = 0.1
    seed: int = 0
    device: Annotated[str, _one_of(*DEVICES)] = "auto"
    eval_every: int = 1
    checkpoint_every: int = 0
    telemetry: bool = True
    host_syncs: Annotated[str, _one_of(*HOST_SYNCS)] = "off"
    out: Annotated[Path | None, _FOLDER] = None
    resume: Annotated[Path | None, _FOLDER] = None
    evaluate: Annotated[Path | None, _FOLDER] = None

    def __post_init__(self) -> None:
        for argument, value, known in (
            ("preset", self.preset, PRESETS),
            ("policy", self.policy, POLICIES),
            ("score", self.score, SCORES),
            ("ratio_schedule", self.ratio_schedule, RATIO_SCHEDULES),
            ("model", self.model, MODELS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("amp", self.amp, AMP),
            ("dataset", self.dataset or DATASETS[0], DATASETS),
            ("loader", self.loader, LOADERS),
            ("device", self.device, DEVICES),
            ("host_syncs", self.host_syncs, HOST_SYNCS),
        ):
            if value not in known:
                raise UserError(unknown_name(argument, value, known))
        try:
            Pruning.of(asdict(self))
        except ValueError as error:
            raise UserError(str(error)) from None
        least = {
            "epochs": 1,
            "batch_size": 1,
            "synthetic_samples": 1,
            "synthetic_classes": 2,
            "eval_every": 1,
            "checkpoint_every": 0,
            "seed": 0,
        }
        most = {"synthetic_samples": 2**40, "synthetic_classes": self.synthetic_samples}
        for argument, bound in least.items():
            value = getattr(self, argument)
            if value < bound:
                raise UserError(f"{argument} must be at least {bound}, got {value}")
        for argument, bound in most.items():
            if (value := getattr(self, argument)) > bound:
                raise UserError(f"{argument} must be at most {bound}, got {value}")
        if self.seed >= 2**63:
            raise UserError(f"seed must be below 2**63, got {self.seed}")
        if not 0 < self.max_lr < math.inf:
            raise UserError(f"max_lr must be positive and finite, got {self.max_lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.target_saving is not None and (self.policy == "none" or self.delta == 0):
            prunes = "policy" if self.policy == "none" else "delta"
            raise UserError(
                f"target_saving needs epochs that prune, got {self.target_saving} with {prunes} "
                f"{getattr(self, prunes)}"
            )
        if not 0 < self.data_fraction <= 1:
            raise UserError(f"data_fraction must be in (0, 1], got {self.data_fraction}")
        for argument in ("synthetic_easy", "synthetic_hard"):
            value = getattr(self, argument)
            if not 0 <= value <= 1:
                raise UserError(f"{argument} must be in [0, 1], got {value}")
        if self.synthetic_easy + self.synthetic_hard > 1:
            raise UserError(
                "synthetic_easy + synthetic_hard must be at most 1, "
                f"got {self.synthetic_easy} + {self.synthetic_hard}"
            )

    def recorded(self) -> dict[str, Any]:
        """The settings without places and actions, as JSON types."""
        return {name: value for name, value in asdict(self).items() if name not in UNRECORDED}


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {
        "model": "small",
        "epochs": 10,
        "optimizer": "sgd",
        "max_lr": 0.4,
        "amp": "off",
        "whole_batches": False,
    },
}

ON_CUDA: dict[str, dict[str, Any]] = {"paper": {"compile": True, "graph": True}, "quick": {}}


def from_record(record: Any) -> Config:
    """The settings that `Config.recorded` gave.

    Raises:
        UserError: a setting is unknown, of the wrong type, or out of range.
    """
    if not isinstance(record, dict):
        raise UserError(f"the record's config must be an object, got {record!r}")
    types: dict[str, Any] = {field.name: type(field.default) for field in fields(Config)}
    types |= {"dataset": str, "target_saving": float}  # of which None is the default
    for name, value in record.items():
        if name not in types or name in UNRECORDED:
            raise UserError(f"the record's config has an unknown setting, got {name}")
        expected = types[name]
        if name == "target_saving" and value is None:
            continue
        if not isinstance(value, (int, float) if expected is float else expected):
            raise UserError(f"{name} must be {expected.__name__} in the record, got {value!r}")
    return Config(**record)


def parse(arguments: Sequence[str], *, cuda: bool) -> Config:
    """The command line's settings; a preset that is not named follows the device.

    Args:
        arguments: the words after the program's name.
        cuda: whether there is a CUDA device.

    Raises:
        UserError: a value is out of range or unknown.
        SystemExit: with code 2 for a flag that does not parse, 0 after --help.
    """
    device = peek(arguments, "device") or "auto"
    cuda = device == "cuda" or (device == "auto" and cuda)
    preset = peek(arguments, "preset") or ("paper" if cuda else "quick")
    if preset not in PRESETS:
        raise UserError(unknown_name("preset", preset, PRESETS))
    defaults = {**PRESETS[preset], **(ON_CUDA[preset] if cuda else {})}
    return _command_line(arguments, Config(preset=preset, **defaults))


def of_run(arguments: Sequence[str], recorded: Config, action: str) -> Config:
    """The settings of a recorded run, changed by the command line as the action allows.

    Args:
        arguments: the words after the program's name.
        recorded: the run's settings.
        action: resume or evaluate.

    Raises:
        UserError: a flag differs from the record that may not.
    """
    given = _command_line(arguments, recorded)
    may = RESUMABLE if action == "resume" else EVALUABLE
    if recorded.dataset == "synthetic":
        may = tuple(name for name in may if name != "device")  # another device makes other data
    for field in fields(Config):
        before, after = getattr(recorded, field.name), getattr(given, field.name)
        if before != after and field.name not in (*may, "resume", "evaluate"):
            allowed = ", ".join("--" + name.replace("_", "-") for name in may)
            raise UserError(
                f"{field.name} must stay {before} on --{action} (only {allowed} may change), "
                f"got {after}"
            )
    return given


def peek(arguments: Sequence[str], name: str) -> str | None:
    """The value of one flag, before the rest of the command line is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", nargs="?")
    return getattr(parser.parse_known_args(list(arguments))[0], name)


def differences(config: Config, recorded: Any) -> list[str]:
    """Names of the settings that differ from a record and that resuming may not change."""
    if not isinstance(recorded, dict):
        return ["config"]
    mine = config.recorded()
    # A record of an older version lacks the settings that came later.
    theirs = {**{f.name: f.default for f in fields(Config) if f.name in mine}, **recorded}
    names = sorted({*mine, *theirs}.difference(RESUMABLE))
    return [name for name in names if mine.get(name) != theirs.get(name)]


def settle(config: Config, dataset: str, device: str) -> Config:
    """The settings with the data set and the device that were found, as they are recorded.

    Raises:
        UserError: a CUDA graph was asked for on a CPU.
    """
    if config.graph and device != "cuda":
        raise UserError("graph must be off on a CPU, got --graph")
    whole = config.whole_batches or config.compile or config.graph
    return replace(config, dataset=dataset, device=device, whole_batches=whole)


def _command_line(arguments: Sequence[str], default: Config) -> Config:
    return command.parse(Config, arguments, "python -m infobatch_fast.train", default)
