"""What the records that a report is made of must hold, and the one line that says what is wrong."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from infobatch_fast.errors import UserError

SECONDS = ("train_seconds", "pruning_seconds", "evaluation_seconds", "checkpoint_seconds")


class Rule(NamedTuple):
    """What a value must be, in words and as a test of any JSON value."""

    says: str
    holds: Callable[[Any], bool]


def _number(says: str, low: float, high: float = 1e18, *, whole: bool = False) -> Rule:
    kinds = int if whole else (int, float)

    def holds(value: Any) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high

    return Rule(says, holds)


def _or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.says} or null", lambda value: value is None or rule.holds(value))


def _name(value: Any) -> bool:
    # It stands in headings and in plots.
    return isinstance(value, str) and value.replace("-", "_").isidentifier() and value.isascii()


def _is_seconds_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _name(name) and AMOUNT.holds(seconds) for name, seconds in value.items()
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_histogram(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() >= {"low", "high", "counts", "unseen"}:
        return False
    counts = value["counts"]
    return (
        all(POSITIVE.holds(value[name]) for name in ("low", "high"))
        and value["low"] < value["high"]
        and isinstance(counts, list)
        and len(counts) >= 3
        and all(COUNT.holds(count) for count in (*counts, value["unseen"]))
    )


AMOUNT = _number("a number of at least 0", 0)
POSITIVE = _number("a number above 0", 1e-18)
SHARE = _number("a number in [0, 1]", 0, 1)
COUNT = _number("a whole number of at least 0", 0, whole=True)
ORDINAL = _number("a whole number of at least 1", 1, whole=True)
NUMBER = _number("a number", -1.7e308, 1.7e308)
TEXT = Rule("a text", lambda value: isinstance(value, str))
NAME = Rule("a name", _name)
HASH = Rule("a hash", lambda value: isinstance(value, str) and value.isascii() and value.isalnum())
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
PHASES = _or_null(Rule("seconds by phase", _is_seconds_by_name))
HISTOGRAM = _or_null(Rule("a histogram", _is_histogram))
NVML = _or_null(
    Rule(
        "an object that may hold reasons under absent",
        lambda value: (
            isinstance(value, dict)
            and isinstance(value.get("absent", {}), dict)
            and all(isinstance(why, str) for why in value.get("absent", {}).values())
        ),
    )
)

# Those whose name ends in NEW are missing in older records.
ABOUT = {"config": OBJECT, "data": NAME, "source_hash": HASH, "device": OBJECT}
SAMPLES = {"train": ORDINAL}
ABOUT_NEW = {
    "commit": _or_null(TEXT),
    "classes": _or_null(Rule("a list of texts", _is_texts)),
    **dict.fromkeys(("samples", "packages"), OBJECT),
}
CONFIG = {
    **dict.fromkeys(("model", "dataset", "optimizer", "policy"), NAME),
    **dict.fromkeys(("epochs", "batch_size"), ORDINAL),
    **dict.fromkeys(("ratio", "delta"), SHARE),
    **dict.fromkeys(("rescale", "anneal"), FLAG),
    "max_lr": AMOUNT,
    "seed": _number("a whole number of at least 0", 0, 2**63, whole=True),
}
CONFIG_NEW = {
    **dict.fromkeys(("score", "ratio_schedule"), NAME),
    "target_saving": _or_null(SHARE),
    "data_fraction": _number("a number in (0, 1]", 1e-18, 1),
}
DEVICE = {"type": NAME, "name": TEXT}
# Without telemetry what pruning took is not known; it is in the training's seconds.
_SECONDS = {**dict.fromkeys(SECONDS, AMOUNT), "pruning_seconds": _or_null(AMOUNT)}
EPOCH = {
    **dict.fromkeys(("epoch", "kept"), ORDINAL),
    **dict.fromkeys(("prunable", "skipped_steps"), COUNT),
    "loss": _or_null(NUMBER),
    "lr": NUMBER,
    "accuracy": _or_null(SHARE),
    "images_per_second": AMOUNT,
    **_SECONDS,
}
_NEW = {
    "seconds": _or_null(AMOUNT),
    "phases": PHASES,
    "host_syncs": _or_null(COUNT),
    "train_joules": _or_null(AMOUNT),
    "joules": _or_null(AMOUNT),
}
SUMMARY = {
    **dict.fromkeys(("accuracy_last", "accuracy_best"), SHARE),
    **dict.fromkeys(("accuracy_best_epoch", "epochs", "samples_trained"), ORDINAL),
    "samples_saved": COUNT,
    "images_per_second": AMOUNT,
    **_SECONDS,
}
EPOCH_NEW = {
    **_NEW,
    "score_histogram": HISTOGRAM,
    **dict.fromkeys(("ratio", "expected_saving"), _or_null(SHARE)),
}
SUMMARY_NEW = {
    **_NEW,
    "joules_saved": _or_null(NUMBER),
    "nvml": NVML,
    **dict.fromkeys(("expected_saving", "target_saving"), _or_null(SHARE)),
}
LINE = {
    **dict.fromkeys(("benchmark", "part", "started", "version", "python"), TEXT),
    "source_hash": HASH,
    **dict.fromkeys(("case", "more", "options", "packages", "device"), OBJECT),
    **dict.fromkeys(("unit", "absent", "commit"), _or_null(TEXT)),
    **dict.fromkeys(("median", "p20", "p80"), _or_null(NUMBER)),
    "count": _or_null(COUNT),
    **dict.fromkeys(("complete", "quick"), FLAG),
}


def check(
    values: Mapping[str, Any],
    rules: Mapping[str, Rule],
    where: str,
    optional: Mapping[str, Rule] | None = None,
) -> None:
    """Raise UserError unless the values keep the rules.

    Args:
        values: of a JSON object.
        rules: by the name of the value, which must be there.
        where: begins the message.
        optional: of values that may be missing.
    """
    for name in rules:
        if name not in values:
            raise UserError(f"{where}: {name} is missing")
    for name, rule in {**rules, **(optional or {})}.items():
        if name in values and not rule.holds(values[name]):
            raise UserError(f"{where}: {name} must be {rule.says}, got {_short(values[name])}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
