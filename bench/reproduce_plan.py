"""What `reproduce.py` trains: each table's runs, once each, with their names and commands."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infobatch_fast.errors import UserError
from infobatch_fast.policies import POLICIES
from infobatch_fast.pruning import Pruning
from infobatch_fast.train import config
from infobatch_fast.train.config import Config

DELTA = Config.delta  # the default is that of the reported runs
TABLES = ("accuracy", "cost", "ablation", "policies")
SAVING = 0.25  # what all policies leave out, where a run of so many epochs can
MAIN_RATIO = 0.5
LEAST_EPOCHS = 2
# Share of the samples below the mean loss, for the estimate alone: 0.77 to 0.86 in the reported
# runs.
_SOFT_PRUNABLE = 0.8
# Flags of the trainer that are the plan's own; no further word may hold them.
_OWN = (
    *("preset", "dataset", "seed", "epochs", "device", "data-dir", "data-fraction"),
    *("policy", "ratio", "delta", "score", "ratio-schedule", "target-saving"),
    *("rescale", "no-rescale", "anneal", "no-anneal", "out", "resume", "evaluate"),
)


@dataclass(frozen=True)
class Training:
    """What the epochs of a run leave out.

    Attributes:
        policy: soft (InfoBatch), random, ...; not used where delta is 0.
        ratio: r; not used with a target.
        rescale: whether the kept samples are weighted.
        anneal: whether the last epochs are full.
        score: loss or bls.
        ratio_schedule: constant or pods.
        target_saving: share of all samples to leave out; None is by the ratio.
        delta: share of the epochs that prune; 0 is full data.
    """

    policy: str = "soft"
    ratio: float = MAIN_RATIO
    rescale: bool = True
    anneal: bool = True
    score: str = "loss"
    ratio_schedule: str = "constant"
    target_saving: float | None = None
    delta: float = DELTA

    @property
    def words(self) -> list[str]:
        """The trainer's flags."""
        if self.delta == 0:
            return ["--delta", "0.0"]
        words = ["--policy", self.policy]
        if self.target_saving is None:
            words += ["--ratio", str(self.ratio)]
        else:
            words += ["--target-saving", str(self.target_saving)]
        if self.score != "loss":
            words += ["--score", self.score]
        if self.ratio_schedule != "constant":
            words += ["--ratio-schedule", self.ratio_schedule]
        return words + ["--no-rescale"] * (not self.rescale) + ["--no-anneal"] * (not self.anneal)

    @property
    def slug(self) -> str:
        """Its part of a run's name."""
        if self.delta == 0:
            return "full"
        target = self.target_saving
        parts = [
            self.policy,
            f"r{self.ratio:g}" if target is None else f"save{target:g}",
            *([self.score] if self.score != "loss" else []),
            *([self.ratio_schedule] if self.ratio_schedule != "constant" else []),
            *["norescale"] * (not self.rescale),
            *["noanneal"] * (not self.anneal),
        ]
        return "-".join(parts)

    def saving(self, epochs: int) -> float:
        """The share of all samples that so many epochs leave out, about."""
        if self.delta == 0:
            return 0.0
        if self.target_saving is not None:
            return self.target_saving
        share = _SOFT_PRUNABLE if self.policy == "soft" else 1.0
        return most_saving(epochs, self.delta if self.anneal else 1.0) * self.ratio * share


FULL = Training(delta=0.0)


@dataclass(frozen=True)
class Setting:
    """What all runs of a call have in common.

    Attributes:
        dataset: cifar10, cifar100 or synthetic.
        preset: paper or quick.
        device: cuda or cpu.
        epochs: E of the runs that are no shorter training, scaled.
        scale: share of the epochs and of the data, in (0, 1].
        data_dir: the folder of the data; None is the trainer's default.
        extra: further words for the trainer.
        defaults: what the trainer makes of these, of the further words as well.
    """

    dataset: str
    preset: str
    device: str
    epochs: int
    scale: float
    data_dir: Path | None
    extra: tuple[str, ...]
    defaults: Config

    @property
    def samples(self) -> int:
        """N, of the share of the data that is used."""
        synthetic = self.dataset == "synthetic"
        whole = self.defaults.synthetic_samples if synthetic else 50_000
        return max(1, round(whole * self.scale))


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        name: of its folder; a function of the settings.
        tables: those that it belongs to.
        training: what its epochs leave out.
        seed: of all its randomness.
        epochs: E; None until the run it depends on is done.
        after: the name of that run: this one is full data for as many samples as that one saw.
    """

    name: str
    tables: tuple[str, ...]
    training: Training
    seed: int
    epochs: int | None
    after: str | None = None


def most_saving(epochs: int, delta: float = DELTA) -> float:
    """The most that a run can leave out: all epochs but the first and the annealing ones."""
    return max(0, Pruning(delta=delta).first_full_epoch(epochs) - 1) / epochs


def make_setting(
    dataset: str | None,
    preset: str,
    device: str,
    epochs: int | None,
    scale: float,
    data_dir: Path | None,
    extra: Sequence[str],
) -> Setting:
    """The setting of a call's options.

    Args:
        dataset: None is CIFAR-10.
        preset: paper or quick.
        device: cuda or cpu.
        epochs: before scaling; None is the preset's.
        scale: in (0, 1].
        data_dir: None is the trainer's default.
        extra: further words for the trainer.

    Raises:
        UserError: too few epochs, or a further word is the plan's to set, or not the trainer's.
    """
    for word in extra:
        flag = word.split("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and flag in _OWN:
            raise UserError(f"the words after -- must leave --{flag} to the plan, got {word}")
    dataset = dataset or "cifar10"
    defaults = config.parse(
        ["--preset", preset, "--device", device, "--dataset", dataset, *extra],
        cuda=device == "cuda",
    )
    scaled = max(1, round((epochs or defaults.epochs) * scale))
    if scaled < LEAST_EPOCHS:
        raise UserError(
            f"epochs times scale must be at least {LEAST_EPOCHS}, as the first prunes nothing, "
            f"got {epochs or defaults.epochs} x {scale:g}"
        )
    return Setting(dataset, preset, device, scaled, scale, data_dir, tuple(extra), defaults)


def make_plan(setting: Setting, tables: Iterable[str], seeds: Sequence[int]) -> list[Planned]:
    """The runs of the tables, seed by seed, each run once."""
    tables = set(tables)
    plan: list[Planned] = []
    for seed in seeds:
        main = name_of(setting, Training(), seed, setting.epochs)
        for training, of in _trainings(setting.epochs, tables):
            name = name_of(setting, training, seed, setting.epochs)
            plan.append(Planned(name, of, training, seed, setting.epochs))
            if name == main:
                short = name_of(setting, FULL, seed, None)
                plan.append(Planned(short, of, FULL, seed, None, main))
        if "policies" in tables:
            epochs = shorter(setting.epochs, target_saving(setting.epochs))
            name = name_of(setting, FULL, seed, epochs)
            plan.append(Planned(name, ("policies",), FULL, seed, epochs))
    return merged(plan)


def _trainings(epochs: int, tables: set[str]) -> list[tuple[Training, tuple[str, ...]]]:
    """Each training with the tables of those asked for that it belongs to."""
    by_ratio = [Training(ratio=ratio) for ratio in (0.3, MAIN_RATIO, 0.7)]
    of = {
        "accuracy": [FULL, *by_ratio],
        "cost": [FULL, *by_ratio],
        "ablation": [
            Training("random", rescale=False, anneal=False),
            Training(rescale=False, anneal=False),
            Training(anneal=False),
            Training(rescale=False),
            Training(),
            Training("hard", rescale=False),
        ],
    }
    if "policies" in tables:
        target = target_saving(epochs)
        of["policies"] = [
            FULL,
            *(
                Training(policy, rescale=policy != "random", target_saving=target)
                for policy in POLICIES
                if policy != "none"
            ),
            Training(score="bls", target_saving=target),
            Training(ratio_schedule="pods", target_saving=target),
        ]
    found: dict[Training, list[str]] = {}
    for table in TABLES:
        for training in of[table] if table in tables else []:
            found.setdefault(training, []).append(table)
    return [(training, tuple(names)) for training, names in found.items()]


def target_saving(epochs: int, delta: float = DELTA) -> float:
    """What all policies leave out: a quarter, or half of the most that the epochs allow.

    Args:
        epochs: E.
        delta: share of the epochs that prune.
    """
    most = most_saving(epochs, delta)
    assert most > 0, "too few epochs"
    return SAVING if most > SAVING else round(most / 2, 4)


def shorter(epochs: int, saved_share: float) -> int:
    """Epochs of full data that see as many samples as a run that left out a share; at least 1."""
    return max(1, round(epochs * (1 - saved_share)))


def resolve(
    setting: Setting, plan: Iterable[Planned], saved_share: Callable[[str], float | None]
) -> list[Planned]:
    """The plan with the epochs of the shorter trainings, as far as they are known.

    Args:
        setting: the plan's.
        plan: some epochs may be None.
        saved_share: of the run of a name; None while it is not done.
    """
    resolved = []
    for planned in plan:
        share = None
        if planned.epochs is None and planned.after is not None:
            share = saved_share(planned.after)
        if share is not None:
            epochs = shorter(setting.epochs, share)
            name = name_of(setting, planned.training, planned.seed, epochs)
            planned = replace(planned, name=name, epochs=epochs)
        resolved.append(planned)
    return merged(resolved)


def merged(plan: Iterable[Planned]) -> list[Planned]:
    """Runs of one name as one, which belongs to the tables of all of them."""
    found: dict[str, Planned] = {}
    for planned in plan:
        before = found.get(planned.name)
        tables = {*planned.tables, *(before.tables if before else ())}
        ordered = tuple(table for table in TABLES if table in tables)
        found[planned.name] = replace(before or planned, tables=ordered)
    return list(found.values())


def name_of(setting: Setting, training: Training, seed: int, epochs: int | None) -> str:
    """The name of a run's folder; X stands for epochs that are not known yet."""
    parts = [
        *(setting.dataset, setting.preset, setting.defaults.model),
        *([f"scale{setting.scale:g}"] if setting.scale < 1 else []),
        f"e{'X' if epochs is None else epochs}",
        *(training.slug, f"s{seed}"),
        *([_short_hash(setting.extra)] if setting.extra else []),
    ]
    return "-".join(parts)


def _short_hash(words: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def settings_words(setting: Setting, planned: Planned) -> list[str]:
    """The trainer's words for a run, without the places on this machine."""
    assert planned.epochs is not None
    return [
        *("--preset", setting.preset, "--dataset", setting.dataset),
        *("--seed", str(planned.seed), "--epochs", str(planned.epochs)),
        *planned.training.words,
        *(["--data-fraction", str(setting.scale)] if setting.scale < 1 else []),
        *("--device", setting.device),
        *setting.extra,
    ]


def expected_config(setting: Setting, planned: Planned) -> Config:
    """The settings that a run's record must have.

    Raises:
        UserError: the trainer does not take its words.
    """
    settings = config.parse(settings_words(setting, planned), cuda=setting.device == "cuda")
    return config.settle(settings, setting.dataset, setting.device)


def command_words(setting: Setting, planned: Planned, folder: Path, begun: bool) -> list[str]:
    """The trainer's words that begin a run in a folder, or continue it there."""
    places = ["--data-dir", str(setting.data_dir)] if setting.data_dir is not None else []
    if begun:
        return ["--resume", str(folder), *places]
    return [*settings_words(setting, planned), *places, "--out", str(folder)]
