"""One run's settings: a frozen dataclass, its presets, and the command line made from it."""

import argparse
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from infobatch_fast.budget import spend
from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.pruning import Pruning
from infobatch_fast.train import cli, records

MODELS = ("r18", "r34", "r50", "r101", "small")
DATASETS = ("cifar10", "cifar100", "synthetic", "folder")
# Never written to a run's record: they name places on this machine, or an action. Of a budget the
# record has the epochs and the pruning that it is spent by.
UNRECORDED = ("budget", "data_dir", "out", "resume", "evaluate", "compare", "seeds")
# What --resume may change: none of it alters which samples are trained on, or how. A device does:
# its generators draw other plans from the same seed.
RESUMABLE = (
    *("data_dir", "loader", "workers", "cache", "max_bad_files", "checkpoint_every"),
    *("eval_every", "telemetry", "host_syncs", "log"),
)
EVALUABLE = ("data_dir", "device", "validation", "test_size", "workers", "max_bad_files")

_FOLDER = tyro.conf.arg(metavar="PATH", help_behavior_hint="")
_DATASET = tyro.conf.arg(metavar=f"{{{','.join(DATASETS)},module:function}}", help_behavior_hint="")
_MODEL = tyro.conf.arg(metavar=f"{{{','.join(MODELS)},timm:NAME,module:function}}")


@dataclass(frozen=True)
class Config:
    """Train an image classifier on fewer samples, by InfoBatch (dynamic data pruning).

    The default of every flag is its preset's: paper (the reported recipe) where there is a CUDA
    device, quick (minutes on a CPU) where there is none; imagenet is for a folder of photographs.
    Exit codes: 0 done; 1 diverged, or a run of --compare failed, or a forbidden host sync; 2 a
    mistake in the input, or no room on disk or GPU; 129, 130 or 143 stopped by a signal. The
    flag --version prints the version.

    Attributes:
        preset: the recipe to start from, see above; any other flag overrides what it sets.
        pruning: which samples the epochs leave out, and with what weights.
        model: r18 to r101 are torchvision's ResNets, with a CIFAR stem for images below 64 pixels;
            small is for CPUs; timm:NAME is timm's; module:function makes a network of your own
            from the number of classes.
        epochs: passes over the (pruned) data.
        budget: share, in (0, 1), of the samples of --epochs full epochs to train on. How many
            epochs that is, and what each leaves out (by policy hard), follow from it.
        batch_size: samples per step, of all processes together.
        optimizer: lars and lamb adapt the learning rate of each layer.
        max_lr: peak of the one-cycle learning rate.
        weight_decay: L2 coefficient.
        label_smoothing: in [0, 1).
        mixup: blend images and losses with those of another sample, in shares drawn from
            Beta(mixup, mixup); 0: off. A sample's score is the loss of its own label, in an
            image of which it is the larger part.
        ema: decay of an exponential mean of the weights, which is then what is evaluated and kept
            in model.pt; 0: off.
        amp: autocast; fp16 with loss scaling.
        whole_batches: in pruned epochs keep the number of samples, nearest to the exact one, that
            leaves no partial batch: a GPU tunes and compiles its kernels anew for each size of a
            partial batch. Several processes imply it.
        sync_batch_norm: on GPUs, batch norm over the batches of all processes.
        compile: torch.compile the network; implies --whole-batches. Default of paper on CUDA.
        graph: replay each full step as one CUDA graph; implies --whole-batches. Default of paper on
            CUDA. An optimizer that it cannot hold, sgd or adam, trains without, and says so.
        dataset: synthetic is made on the device from the seed; folder is --data-dir with one
            folder of images per class in its train/ and val/; module:function makes data sets of
            your own from --data-dir; default cifar10.
        data_dir: folder of CIFAR (bin, py or .tar.gz); default $INFOBATCH_DATA, else a user cache.
        train_size: side, in pixels, of the training images of --dataset folder.
        test_size: side, in pixels, of the test images of --dataset folder.
        workers: threads or processes that read and decode image files; 0: one per core.
        cache: hold the files' bytes in memory; auto: if they take at most a quarter of it.
        max_bad_files: how many files may be left out because they are no images or cannot be
            decoded.
        loader: auto is DALI where it can be imported.
        data_fraction: share, in (0, 1], of the training images to take, the same ones for every
            seed.
        validation: number of training images to hold out, the same ones for every seed, and to
            evaluate on instead of the test set, so that nothing is picked on the test set.
        label_noise: share of the training labels to make wrong, by the seed, in [0, 1).
        synthetic_samples: training samples of --dataset synthetic; a fifth as many for testing.
        synthetic_classes: classes of --dataset synthetic.
        seed: seed of the initialisation, the plans and the augmentation.
        device: auto is CUDA where there is one.
        eval_every: epochs between evaluations on the test set; the last epoch is always evaluated.
        telemetry: record the phases of an epoch, energy and score histograms; without it, only
            the epochs' seconds.
        host_syncs: count the host syncs of each epoch (the CPU waits for the GPU), or forbid those
            within an epoch and stop at the first. On a CPU it takes the reads that would be one on
            a GPU, and is slower. Those of start-up, which compiles and tunes, are not counted.
        log: also write the epochs' figures for tensorboard, in the run's folder, or to wandb, as it
            is set up.
        checkpoint_every: steps between checkpoints; 0: at epoch ends, at most once a minute.
        out: the run's folder, new or empty; default runs/<name>.
        resume: run folder to continue; only --data-dir, --loader, --workers, --cache
            and --max-bad-files, --checkpoint-every, --eval-every, --telemetry, --host-syncs
            and --log may change.
        evaluate: checkpoint, weights or run folder: print its test accuracy and train nothing.
        compare: train this run, full data, and full data for fewer epochs on as many samples, with
            several seeds, and tell what pruning was worth; --out is the folder of all these runs,
            default runs/compare. After a kill the same command continues, and trains no run twice.
        seeds: number of seeds of --compare, counted from --seed.
    """

    preset: Literal["paper", "quick", "imagenet"] = "paper"
    pruning: Annotated[Pruning, tyro.conf.OmitArgPrefixes] = field(default_factory=Pruning)
    model: Annotated[str, _MODEL] = "r50"
    epochs: int = 200
    budget: float | None = None
    batch_size: int = 200
    optimizer: Literal["sgd", "adam", "lars", "lamb"] = "lars"
    max_lr: float = 5.2
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    mixup: float = 0.0
    ema: float = 0.0
    amp: Literal["bf16", "fp16", "off"] = "bf16"
    whole_batches: bool = True
    sync_batch_norm: bool = False
    compile: bool = False
    graph: bool = False
    dataset: Annotated[str | None, _DATASET] = None
    data_dir: Annotated[Path | None, _FOLDER] = None
    train_size: int = 176
    test_size: int = 224
    workers: int = 0
    cache: Literal["auto", "on", "off"] = "auto"
    max_bad_files: int = 0
    loader: Literal["auto", "dali", "torch"] = "auto"
    data_fraction: float = 1.0
    validation: int = 0
    label_noise: float = 0.0
    synthetic_samples: int = 50_000
    synthetic_classes: int = 10
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    eval_every: int = 1
    checkpoint_every: int = 0
    telemetry: bool = True
    host_syncs: Literal["off", "count", "forbid"] = "off"
    log: Literal["off", "tensorboard", "wandb"] = "off"
    out: Annotated[Path | None, _FOLDER] = None
    resume: Annotated[Path | None, _FOLDER] = None
    evaluate: Annotated[Path | None, _FOLDER] = None
    compare: bool = False
    seeds: int = 3  # two tell no more than the sign

    def __post_init__(self) -> None:
        for name, value, known in (
            ("model", self.model, [*MODELS, "timm:NAME"]),
            ("dataset", self.dataset or DATASETS[0], DATASETS),
        ):
            if value not in known and ":" not in value:
                raise UserError(unknown_name(name, value, [*known, "module:function"]))
        for rule, fits, names in (
            ("at least 1", lambda v: v >= 1, "epochs batch_size train_size test_size"),
            ("at least 1", lambda v: v >= 1, "eval_every seeds"),
            ("at least 2", lambda v: v >= 2, "synthetic_classes"),
            ("at least 0", lambda v: v >= 0, "checkpoint_every validation workers max_bad_files"),
            ("in [0, 2**63)", lambda v: 0 <= v < 2**63, "seed"),
            ("positive and finite", lambda v: 0 < v < math.inf, "max_lr"),
            ("at least 0 and finite", lambda v: 0 <= v < math.inf, "weight_decay mixup"),
            ("in [0, 1)", lambda v: 0 <= v < 1, "label_smoothing ema label_noise"),
            ("in (0, 1]", lambda v: 0 < v <= 1, "data_fraction"),
            (
                f"at least synthetic_classes, {self.synthetic_classes}, and at most 2**40",
                lambda v: self.synthetic_classes <= v <= 2**40,
                "synthetic_samples",
            ),
        ):
            for name in names.split():
                if not fits(value := getattr(self, name)):
                    raise UserError(f"{name} must be {rule}, got {value}")
        try:
            InfoBatch(1, self.epochs, device="cpu", **self.pruning.settings())
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None
        target = self.pruning.target_saving
        if target is not None and self.pruning.full_data:
            prunes = "policy" if self.pruning.policy == "none" else "delta"
            raise UserError(
                f"target_saving needs epochs that prune, got {target} with {prunes} "
                f"{getattr(self.pruning, prunes)}"
            )

    def flat(self) -> dict[str, Any]:
        """The settings by the names of their flags."""
        return {name: getattr(self, name) for name in _NAMES} | self.pruning.settings()

    def recorded(self) -> dict[str, Any]:
        """The settings without places and actions, as JSON types."""
        return {name: value for name, value in self.flat().items() if name not in UNRECORDED}


_NAMES = [each.name for each in fields(Config) if each.name != "pruning"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},  # and on CUDA compiled and captured
    "quick": {
        "model": "small",
        "epochs": 10,
        "optimizer": "sgd",
        "max_lr": 0.4,
        "amp": "off",
        "whole_batches": False,
    },
    "imagenet": {
        "dataset": "folder",
        "epochs": 90,
        "batch_size": 1024,
        "max_lr": 6.4,
        "weight_decay": 5e-5,
    },
}


def from_record(record: Mapping[str, Any]) -> Config:
    """The settings that `Config.recorded` gave, of this version or an older one."""
    where = "the record's config"
    pruning = records.parse(Pruning, record, where)
    return records.parse(Config, {**record, "pruning": pruning}, where)


def parse(arguments: Sequence[str], *, cuda: bool) -> Config:
    """The command line's settings; a preset that is not named follows the device.

    Args:
        cuda: whether there is a CUDA device.
    """
    cuda = _on_cuda(peek(arguments, "device") or "auto", cuda)
    preset = peek(arguments, "preset") or ("paper" if cuda else "quick")
    if preset not in PRESETS:
        raise UserError(unknown_name("preset", preset, PRESETS))
    return _command_line(arguments, _of_preset(preset, cuda))


def _on_cuda(device: str, cuda: bool) -> bool:
    return device == "cuda" or (device == "auto" and cuda)


def _of_preset(preset: str, cuda: bool) -> Config:
    fast = cuda and preset != "quick"
    return Config(preset=preset, compile=fast, graph=fast, **PRESETS[preset])  # pyright: ignore


def of_run(arguments: Sequence[str], recorded: Config, action: str) -> Config:
    """The settings of a recorded run, changed by the command line as resume or evaluate allows."""
    given = _command_line(arguments, recorded)
    may = RESUMABLE if action == "resume" else EVALUABLE
    if recorded.dataset == "synthetic":
        may = tuple(name for name in may if name != "device")  # another device makes other data
    before, after = recorded.flat(), given.flat()
    for name in before:
        if before[name] != after[name] and name not in (*may, action):
            kept = "not be given" if name in UNRECORDED else f"stay {before[name]}"
            allowed = ", ".join("--" + each.replace("_", "-") for each in may)
            raise UserError(
                f"{name} must {kept} with --{action} (only {allowed} may change), got {after[name]}"
            )
    return given


def peek(arguments: Sequence[str], name: str) -> str | None:
    """The value of one flag, before the rest of the command line is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?", dest="value")
    return parser.parse_known_args(list(arguments))[0].value


def words(config: Config, cuda: bool, without: Collection[str] = ()) -> list[str]:
    """The flags that differ from the preset's, but for the pruning's, `without` and UNRECORDED."""
    default, said = _of_preset(config.preset, _on_cuda(config.device, cuda)), list[str]()
    for name in _NAMES:
        value, flag = getattr(config, name), name.replace("_", "-")
        if name in (*UNRECORDED, *without) or value == getattr(default, name):
            continue
        if isinstance(value, bool):
            said.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            said += [f"--{flag}", str(value)]
    return said


def settle(config: Config, dataset: str, device: str, processes: int) -> Config:
    """The settings with the data set and the device that were found, as they are recorded."""
    if config.graph and device != "cuda":
        raise UserError("graph must be off on a CPU, got --graph")
    if config.sync_batch_norm and device != "cuda":
        raise UserError("sync_batch_norm must be off on a CPU, got --sync-batch-norm")
    whole = config.whole_batches or config.compile or config.graph or processes > 1
    loader = "torch" if ":" in dataset else config.loader
    if config.loader == "dali" != loader:
        raise UserError("loader must be torch where a data set is one's own, got dali")
    return replace(config, dataset=dataset, device=device, whole_batches=whole, loader=loader)


def spent(config: Config) -> Config:
    """The settings with epochs and pruning of their budget, if they have one."""
    if config.budget is None:
        return config
    try:
        epochs, pruning = spend(config.budget, config.epochs, config.pruning.delta)
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(config, epochs=epochs, pruning=replace(config.pruning, **pruning))


# Only one of them says how much is left out.
_EXCLUSIVE = ("budget", "target-saving", "ratio"), ("budget", "policy")


def _command_line(arguments: Sequence[str], default: Config) -> Config:
    for names in _EXCLUSIVE:
        given = {name: peek(arguments, name) for name in names}
        first, *others = [name for name, value in given.items() if value is not None] or [""]
        if others:
            name, value = others[0].replace("_", "-"), given[others[0]]
            raise UserError(
                f"{first.replace('-', '_')} must be given without {name}, "
                f"got {given[first]} and {value}"
            )
    parsed = cli.parse(Config, arguments, "python -m infobatch_fast.train", default)
    folder = ("--dataset folder", parsed.dataset == "folder")
    for name, (where, there) in {
        "seeds": ("--compare", parsed.compare),
        "train_size": folder,
        "test_size": folder,
    }.items():
        value = peek(arguments, name.replace("_", "-"))
        if value is not None and not there:
            raise UserError(f"{name} must be given with {where} alone, got {value}")
    return parsed
