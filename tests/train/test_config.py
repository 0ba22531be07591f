"""The command line: presets, overrides, and one line for every mistake."""

import contextlib
import io
import json
from typing import get_args, get_type_hints

import pytest

from infobatch_fast.errors import UserError
from infobatch_fast.policies import POLICIES
from infobatch_fast.train import config
from infobatch_fast.train.config import Config
from infobatch_fast.train.optim import OPTIMIZERS


def parse(words: str, cuda: bool = False) -> Config:
    return config.parse(words.split(), cuda=cuda)


def recorded(words: str = "") -> Config:
    return config.settle(parse(words), "cifar10", "cpu", 1)


PAPER = {
    **{"model": "r50", "epochs": 200, "batch_size": 200, "optimizer": "lars", "max_lr": 5.2},
    **{"weight_decay": 5e-4, "label_smoothing": 0.1, "amp": "bf16", "data_fraction": 1.0},
    **{"policy": "soft", "ratio": 0.5, "delta": 0.875, "rescale": True, "anneal": True},
    **{"score": "loss", "ratio_schedule": "constant", "target_saving": None},
}


def test_paper_is_the_reported_recipe() -> None:
    settings = parse("--preset paper").flat()
    assert {name: settings[name] for name in PAPER} == PAPER


@pytest.mark.parametrize(
    ("words", "cuda", "preset", "compiles", "captures"),
    [
        ("", True, "paper", True, True),
        ("", False, "quick", False, False),
        ("--device cpu", True, "quick", False, False),
        ("--device=cuda", False, "paper", True, True),
        ("--preset=quick", True, "quick", False, False),
        ("--no-graph", True, "paper", True, False),
        ("--no-compile", True, "paper", False, True),
        ("--preset paper --device cpu", True, "paper", False, False),
    ],
)
def test_the_preset_follows_the_device(words, cuda, preset, compiles, captures) -> None:
    settings = parse(words, cuda)
    assert (settings.preset, settings.compile, settings.graph) == (preset, compiles, captures)


def test_any_flag_overrides_its_preset() -> None:
    words = "--epochs 3 --max_lr 0.1 --no-rescale --no-anneal --policy random --compile --delta 0.5"
    settings, quick = parse(words), parse("")
    changed = {k: v for k, v in settings.flat().items() if quick.flat()[k] != v}
    assert changed == {
        **{"epochs": 3, "max_lr": 0.1, "compile": True},
        **{"policy": "random", "rescale": False, "anneal": False, "delta": 0.5},
    }
    assert not quick.whole_batches
    assert config.settle(settings, "cifar10", "cpu", 1).whole_batches  # as it compiles
    with pytest.raises(UserError, match=r"^graph must be off on a CPU, got --graph$"):
        recorded("--graph")


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    "line",
    [
        "--preset quick",
        "--preset paper --device cpu --compile --max-lr 0.1 --model timm:vit --no-rescale",
        "--preset imagenet --no-graph --dataset folder --eval-every 2 --log tensorboard --seed 5",
    ],
)
def test_settings_as_words_are_the_settings(line: str, cuda: bool) -> None:
    settings = parse(f"{line} --data-dir /tmp --out /tmp/x", cuda=cuda)
    words = ["--preset", settings.preset, *config.words(settings, cuda), *settings.pruning.flags]
    assert config.parse(words, cuda=cuda).recorded() == settings.recorded()
    assert len(words) < 20
    assert "--seed" not in config.words(settings, cuda, without={"seed"})


def test_names_are_those_of_what_they_stand_for() -> None:
    hints = get_type_hints(Config)
    assert get_args(hints["optimizer"]) == OPTIMIZERS
    for policy in POLICIES:
        assert parse(f"--policy {policy}").pruning.policy == policy
    assert parse(f"--policy {__name__}:soft_again").pruning.policy == f"{__name__}:soft_again"


def soft_again(view):
    return POLICIES["soft"].choose(view)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        *((f"--ratio {value}", f"ratio [0, 1) {value}") for value in ("1.5", "1.0", "-0.1", "nan")),
        ("--delta 1.1", "delta [0, 1] 1.1"),
        ("--policy sotf", "policy sotf soft"),
        ("--policy absent:function", "policy absent:function"),
        ("--score bsl", "score bsl bls"),
        ("--ratio-schedule pod", "ratio_schedule pod pods"),
        *((f"--target-saving {value}", f"target_saving (0, 1) {value}") for value in (1.0, 0.0)),
        ("--target-saving 0.3 --ratio 0.5", "target_saving ratio 0.3 0.5"),
        ("--target-saving 0.1 --policy none", "target_saving 0.1 policy none"),
        ("--target-saving 0.1 --delta 0", "target_saving 0.1 delta 0"),
        *((f"--data-fraction {value}", f"data_fraction (0, 1] {value}") for value in (0.0, 1.5)),
        ("--validation -1", "validation at least 0 -1"),
        ("--budget 0.6 --ratio 0.5", "budget ratio 0.6 0.5"),
        ("--target-saving 0.6 --budget 0.5", "budget target-saving 0.6 0.5"),
        ("--budget 0.6 --policy hard", "budget policy 0.6 hard"),
        ("--label-noise 1.0", "label_noise [0, 1) 1.0"),
        ("--model resnet18", "model resnet18 r18"),
        ("--optimizer lasr", "--optimizer lasr lars"),
        ("--dataset cifar-10", "dataset cifar-10 cifar10"),
        ("--preset papre", "preset papre paper"),
        ("--amp bf32", "--amp bf32 bf16"),
        ("--loader dail", "--loader dail dali"),
        ("--device gpu", "--device gpu cuda"),
        ("--epochs 0", "epochs 1 0"),
        ("--epochs 1.5", "--epochs 1.5"),
        ("--batch-size 0", "batch_size 1 0"),
        *((f"--max-lr {value}", f"max_lr {value}") for value in ("0.0", "inf")),
        ("--weight-decay -1", "weight_decay -1"),
        ("--label-smoothing 1", "label_smoothing [0, 1) 1"),
        ("--seed -1", "seed -1"),
        ("--synthetic-samples 1", "synthetic_samples synthetic_classes 10 1"),
        ("--synthetic-samples 9999999999999", "synthetic_samples 9999999999999"),
        ("--synthetic-classes 50001", "synthetic_classes 50001 50000"),
        ("--ratio abc", "--ratio abc"),
        ("--ratio", "--ratio"),
        ("--rato 0.5", "--rato 0.5 --ratio"),
        ("stray", "stray"),
    ],
)
def test_a_mistake_names_flag_and_value_in_one_line(words: str, names: str) -> None:
    with pytest.raises(UserError) as error:
        parse(words)
    message = str(error.value)
    assert all(name in message for name in names.split()), message
    assert "\n" not in message


@pytest.mark.parametrize("words", ["--ratio 2", "--rato 0.5", "--epochs 1.5"])
def test_a_mistake_reads_alike_where_frames_are_ascii(words: str) -> None:
    messages = []
    for encoding in ("utf-8", "ascii"):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        with contextlib.redirect_stdout(out), pytest.raises(UserError) as error:
            parse(words)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "--- " not in messages[0]


def test_help_has_every_flag(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    text = capsys.readouterr().out
    for name in Config().flat():
        assert f"--{name.replace('_', '-')}" in text
    assert "well-learned" in text or "prunable" in text


def test_a_record_names_no_places_and_reads_back() -> None:
    words = "--out /tmp/x --data-dir /tmp/y --score bls --target-saving 0.25 --data-fraction 0.1"
    settings = recorded(words)
    record = json.loads(json.dumps(settings.recorded()))
    assert "/tmp" not in json.dumps(record)
    again = config.from_record(record)
    assert again.recorded() == record
    # Older records lack what came later.
    new = ("score", "ratio_schedule", "target_saving", "data_fraction")
    older = {name: value for name, value in recorded().recorded().items() if name not in new}
    assert config.from_record(older).recorded() == recorded().recorded()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ratio", "a"), ("ratio", 7), ("epochs", True)),
        *(("model", 51), ("score", 3), ("target_saving", 2), ("data_fraction", None)),
    ],
)
def test_a_record_that_is_wrong_is_told_of(name: str, value) -> None:
    with pytest.raises(UserError, match=rf"config.*{name}"):
        config.from_record({**recorded().recorded(), name: value})


@pytest.mark.parametrize(
    ("action", "words", "names"),
    [
        ("resume", "--ratio 0.5 --checkpoint-every 5 --loader torch --eval-every 2", None),
        ("resume", "--ratio 0.3", "ratio 0.5 --resume --data-dir 0.3"),
        ("resume", "--score bls", "score loss bls"),
        ("resume", "--target-saving 0.3", "target_saving None 0.3"),
        ("resume", "--preset paper", "preset quick paper"),
        ("resume", "--device cuda", "device cpu cuda"),
        ("resume", "--compile", "compile False True"),
        ("resume", "--out y", "out --resume y"),
        ("evaluate", "--device cuda", None),
        ("evaluate", "--amp bf16", "amp off --evaluate bf16"),
    ],
)
def test_what_resuming_and_evaluating_may_change(action, words, names) -> None:
    arguments = [f"--{action}", "x", *words.split()]
    if names is None:
        assert config.of_run(arguments, recorded(), action) != recorded()
        return
    with pytest.raises(UserError) as error:
        config.of_run(arguments, recorded(), action)
    assert all(name in str(error.value) for name in names.split()), error.value
    synthetic = config.settle(recorded(), "synthetic", "cpu", 1)  # another device makes other data
    with pytest.raises(UserError, match=r"^device must stay cpu with --evaluate"):
        config.of_run("--evaluate x --device cuda".split(), synthetic, "evaluate")
