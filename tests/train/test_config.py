"""The command line: presets, overrides, and one line for every mistake."""

import json

import pytest

from infobatch_fast.errors import UserError
from infobatch_fast.policies import POLICIES
from infobatch_fast.train import config
from infobatch_fast.train.config import Config


def test_paper_is_the_reported_recipe() -> None:
    settings = config.parse(["--preset", "paper"], cuda=False)
    assert (settings.model, settings.epochs, settings.batch_size) == ("r50", 200, 200)
    assert (settings.optimizer, settings.max_lr, settings.weight_decay) == ("lars", 5.2, 5e-4)
    assert (settings.label_smoothing, settings.amp, settings.policy) == (0.1, "bf16", "soft")
    assert (settings.ratio, settings.delta, settings.rescale, settings.anneal) == (
        0.5,
        0.875,
        True,
        True,
    )


def test_the_preset_follows_the_device() -> None:
    assert config.parse([], cuda=True).preset == "paper"
    assert config.parse([], cuda=False).preset == "quick"
    assert config.parse(["--device", "cpu"], cuda=True).preset == "quick"
    assert config.parse(["--device=cuda"], cuda=False).preset == "paper"
    assert config.parse(["--preset=quick"], cuda=True).preset == "quick"


def test_defaults_are_plain_infobatch() -> None:
    for arguments in ([], ["--preset", "paper"]):
        settings = config.parse(arguments, cuda=False)
        assert (settings.policy, settings.score, settings.ratio_schedule) == (
            "soft",
            "loss",
            "constant",
        )
        assert settings.target_saving is None
        assert settings.data_fraction == 1


def test_pruning_flags() -> None:
    for policy in POLICIES:
        assert config.parse(["--policy", policy], cuda=False).policy == policy
    words = "--score bls --ratio-schedule pods --target-saving 0.25 --data-fraction 0.1"
    settings = config.settle(config.parse(words.split(), cuda=False), "cifar10", "cpu")
    assert (settings.score, settings.ratio_schedule) == ("bls", "pods")
    assert (settings.target_saving, settings.data_fraction) == (0.25, 0.1)
    recorded = json.loads(json.dumps(settings.recorded()))
    assert config.from_record(recorded) == settings
    again = config.of_run("--resume x --target-saving 0.25".split(), settings, "resume")
    assert again.target_saving == 0.25
    for flag, value in (
        ("score", "loss"),
        ("ratio_schedule", "constant"),
        ("target_saving", 0.3),
        ("data_fraction", 0.2),
        ("policy", "hard"),
    ):
        with pytest.raises(UserError, match=rf"^{flag} must stay \S+ on --resume .*, got {value}$"):
            config.of_run(
                ["--resume", "x", "--" + flag.replace("_", "-"), str(value)], settings, "resume"
            )
        assert config.differences(settings, {**recorded, flag: value}) == [flag]


def test_records_of_before_there_were_policies() -> None:
    new = ("score", "ratio_schedule", "target_saving", "data_fraction")
    settings = config.settle(config.parse(["--ratio", "0.3"], cuda=False), "cifar10", "cpu")
    older = {name: value for name, value in settings.recorded().items() if name not in new}
    assert len(older) == len(settings.recorded()) - 4
    assert config.from_record(older).recorded() == settings.recorded()
    for name, value, message in (
        ("target_saving", "a", "target_saving must be float in the record, got 'a'"),
        ("target_saving", 2, r"target_saving must be in \(0, 1\), got 2"),
        ("data_fraction", None, "data_fraction must be float in the record, got None"),
        ("score", 3, "score must be str in the record, got 3"),
        ("ratio_schedule", "x", "ratio_schedule must be one of constant, pods, got x"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            config.from_record({**older, name: value})


def test_a_gpu_compiles_and_captures_by_default() -> None:
    def fused(*words: str, cuda: bool) -> tuple[bool, bool]:
        settings = config.parse(words, cuda=cuda)
        return settings.compile, settings.graph

    assert fused(cuda=True) == (True, True)
    assert fused("--no-graph", cuda=True) == (True, False)
    assert fused("--no-compile", cuda=True) == (False, True)
    assert fused("--preset", "quick", cuda=True) == (False, False)
    assert fused("--preset", "paper", cuda=False) == (False, False)
    assert fused("--preset", "paper", "--device", "cpu", cuda=True) == (False, False)


def test_a_graph_settles_for_whole_batches_and_a_gpu() -> None:
    settings = config.parse(["--preset", "quick", "--graph"], cuda=True)
    assert config.settle(settings, "cifar10", "cuda").whole_batches
    assert not config.settle(config.parse([], cuda=False), "cifar10", "cuda").whole_batches
    with pytest.raises(UserError, match=r"^graph must be off on a CPU, got --graph$"):
        config.settle(settings, "cifar10", "cpu")


def test_any_flag_overrides_its_preset() -> None:
    quick = config.parse([], cuda=False)
    other = config.parse(["--epochs", "3", "--max-lr", "0.1"], cuda=False)
    assert (other.epochs, other.max_lr, other.model) == (3, 0.1, quick.model)
    full = [
        "--model",
        "r50",
        "--optimizer",
        "lars",
        "--max-lr",
        "5.2",
        "--delta",
        "0.0",
        "--seed",
        "0",
    ]
    assert config.parse(full, cuda=False).delta == 0
    pruned = [
        "--model",
        "r50",
        "--optimizer",
        "lars",
        "--max_lr",
        "5.2",
        "--delta",
        "0.875",
        "--ratio",
        "0.5",
    ]
    assert config.parse(pruned, cuda=False).max_lr == 5.2
    off = config.parse(
        ["--no-rescale", "--no-anneal", "--policy", "random", "--compile"], cuda=False
    )
    assert (off.rescale, off.anneal, off.policy, off.compile) == (False, False, "random", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratio 1.5", r"ratio must be in \[0, 1\), got 1.5"),
        ("--ratio 1", r"ratio must be in \[0, 1\), got 1.0"),
        ("--ratio -0.1", r"ratio must be in \[0, 1\), got -0.1"),
        ("--ratio nan", r"ratio must be in \[0, 1\), got nan"),
        ("--delta 1.1", r"delta must be in \[0, 1\], got 1.1"),
        ("--model r51", r"model must be one of .*, got r51 \(did you mean r50\?\)"),
        ("--model resnet18", r"model must be one of .* \(did you mean r18\?\)"),
        ("--optimizer lasr", r"optimizer must be .*, got lasr \(did you mean lars\?\)"),
        ("--policy sotf", r"policy must be .*, got sotf \(did you mean soft\?\)"),
        ("--policy repbb", r"policy must be .*, got repbb \(did you mean repb\?\)"),
        ("--score bsl", r"score must be one of loss, bls, got bsl \(did you mean bls\?\)"),
        ("--ratio-schedule pod", r"ratio_schedule must be .*, got pod \(did you mean pods\?\)"),
        ("--target-saving 1", r"target_saving must be in \(0, 1\), got 1.0"),
        ("--target-saving 0", r"target_saving must be in \(0, 1\), got 0.0"),
        ("--target-saving nan", r"target_saving must be in \(0, 1\), got nan"),
        ("--data-fraction 0", r"data_fraction must be in \(0, 1\], got 0.0"),
        ("--data-fraction 1.5", r"data_fraction must be in \(0, 1\], got 1.5"),
        ("--data-fraction nan", r"data_fraction must be in \(0, 1\], got nan"),
        ("--dataset cifar-10", r"dataset must be .*, got cifar-10 \(did you mean cifar10\?\)"),
        ("--preset papre", r"preset must be one of paper, quick, got papre \(did you mean paper"),
        ("--amp bf32", r"amp must be one of bf16, fp16, off, got bf32 \(did you mean bf16\?\)"),
        ("--loader dail", r"loader must be .*, got dail \(did you mean dali\?\)"),
        ("--device gpu", r"device must be one of auto, cuda, cpu, got gpu \(did you mean cuda\?\)"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--max-lr 0", "max_lr must be positive and finite, got 0.0"),
        ("--max-lr inf", "max_lr must be positive and finite, got inf"),
        ("--weight-decay -1", "weight_decay must be at least 0 and finite, got -1.0"),
        ("--label-smoothing 1", r"label_smoothing must be in \[0, 1\), got 1.0"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--synthetic-easy 2", r"synthetic_easy must be in \[0, 1\], got 2.0"),
        ("--synthetic-easy 0.7 --synthetic-hard 0.7", r"synthetic_easy \+ synthetic_hard must be"),
        ("--ratio abc", "Error parsing --ratio: could not convert string to float: 'abc'"),
        ("--epochs 1.5", "Error parsing --epochs: invalid literal for int"),
        ("--ratio", "Missing value for argument '--ratio'"),
        ("--rato 0.5", "Unrecognized options: --rato, 0.5 Perhaps you meant: --ratio FLOAT$"),
        ("stray", "Unrecognized options: stray"),
        ("--synthetic-samples 9999999999999", "synthetic_samples must be at most 1099511627776"),
        ("--synthetic-classes 50001", "synthetic_classes must be at most 50000, got 50001"),
    ],
)
def test_mistakes(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        config.parse(arguments.split(), cuda=False)
    assert "\n" not in str(error.value)


def test_help_reads_well(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        config.parse(["--help"], cuda=False)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text
    assert "None" not in text
    assert "well-learned" in text


def test_record_round_trip_names_no_places() -> None:
    settings = config.parse(
        ["--out", "/tmp/x", "--data-dir", "/tmp/y", "--ratio", "0.3"], cuda=False
    )
    settings = config.settle(settings, "cifar10", "cpu")
    recorded = json.loads(json.dumps(settings.recorded()))
    assert "/tmp" not in json.dumps(recorded)
    again = config.from_record(recorded)
    assert again.recorded() == recorded
    assert config.differences(again, recorded) == []
    assert config.differences(again, {**recorded, "ratio": 0.4, "loader": "dali"}) == ["ratio"]
    for broken, message in (
        (None, "config must be an object, got None"),
        ({"ratio": "a"}, "ratio must be float in the record, got 'a'"),
        ({"nonsense": 1}, "unknown setting, got nonsense"),
        ({"out": "x"}, "unknown setting, got out"),
        ({"ratio": 7}, r"ratio must be in \[0, 1\), got 7"),
    ):
        with pytest.raises(UserError, match=message):
            config.from_record(broken)


def test_what_resuming_and_evaluating_may_change() -> None:
    recorded = config.settle(config.parse([], cuda=False), "cifar10", "cpu")
    same = "--resume x --ratio 0.5 --checkpoint-every 5 --loader torch --eval-every 2".split()
    given = config.of_run(same, recorded, "resume")
    assert (given.checkpoint_every, given.loader, given.eval_every) == (5, "torch", 2)
    for flags, message in (
        ("--ratio 0.3", r"^ratio must stay 0.5 on --resume \(only --data-dir, --loader, "),
        ("--preset paper", "^preset must stay quick on --resume"),
        ("--device cuda", "^device must stay cpu on --resume"),
        ("--compile", "^compile must stay False on --resume"),
        ("--out y", "^out must stay None on --resume"),
    ):
        with pytest.raises(UserError, match=message):
            config.of_run(["--resume", "x", *flags.split()], recorded, "resume")
    assert (
        config.of_run("--evaluate x --device cuda".split(), recorded, "evaluate").device == "cuda"
    )
    with pytest.raises(UserError, match=r"^amp must stay off on --evaluate"):
        config.of_run("--evaluate x --amp bf16".split(), recorded, "evaluate")
    synthetic = config.settle(recorded, "synthetic", "cpu")
    with pytest.raises(UserError, match=r"^device must stay cpu on --evaluate"):
        config.of_run("--evaluate x --device cuda".split(), synthetic, "evaluate")


def test_settings_that_came_later_are_those_of_older_records() -> None:
    settings = Config(dataset="cifar10")
    record = settings.recorded()
    for name in ("score", "ratio_schedule", "target_saving", "data_fraction"):
        del record[name]
    assert config.differences(settings, record) == []
    changed = Config(dataset="cifar10", score="bls", data_fraction=0.5)
    assert config.differences(changed, record) == ["data_fraction", "score"]
    assert config.differences(settings, {**record, "alien": 1}) == ["alien"]
