"""The files of a run's folder: their names, and what a line of each holds; needs no torch."""

import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from infobatch_fast.errors import UserError, reason

CONFIG = "config.json"
EPOCHS = "epochs.jsonl"
SUMMARY = "summary.json"
CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.pt"
BAD = "bad_files.json"
RESULTS = "results.jsonl"  # beside the folders of many runs: a line a run

RecordT = TypeVar("RecordT")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an epoch or a run took. None is "not measured"; what has a default older records lack.

    `seconds` is all of the wall time, `joules` all of the energy; the other seconds are parts of it
    that do not overlap.

    Attributes:
        images_per_second: images but those of start-up, over the seconds of training and pruning;
            None where it left no step to time.
        skipped_steps: steps that changed nothing, their gradients not being finite.
        train_seconds: of training, without pruning and start-up.
        pruning_seconds: of choosing, and of the update where it is timed apart from the step.
        startup_seconds: of compiling, capturing and tuning, which is no training; startup_images
            went through the steps that did it.
        expected_saving: share of all samples to be left out, by the policy's formula.
    """

    images_per_second: float | None
    skipped_steps: int
    train_seconds: float
    pruning_seconds: float | None
    evaluation_seconds: float
    checkpoint_seconds: float
    startup_seconds: float = 0.0
    startup_images: int = 0
    seconds: float | None = None
    expected_saving: float | None = None
    joules: float | None = None
    train_joules: float | None = None
    host_syncs: int | None = None
    phases: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class EpochLine(Measured):
    """A line of epochs.jsonl.

    Attributes:
        epoch: from 1.
        kept: samples trained on, K; prunable, those that the policy allowed to be left out, n.
        loss: mean of weight * loss over the steps taken; None where none was, or it is not finite.
        lr: of the last step.
        accuracy: share of the test set, or of what --validation holds out, in [0, 1]; None where
            it was not evaluated.
        ratio: share of the prunable samples to be left out, before rounding.
    """

    epoch: int
    kept: int
    prunable: int
    loss: float | None
    lr: float
    accuracy: float | None
    ratio: float | None = None
    score_histogram: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """By which sources figures were made, and on which device."""

    version: str
    commit: str | None
    source_hash: str
    python: str
    packages: dict[str, str | None]
    device: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord(Provenance):
    """config.json: what was asked for, of what data.

    `data` is published, files or synthetic, and genuine in older records; `data_hash` is of the
    training images and labels as they were trained on.
    """

    config: dict[str, Any]
    data: str
    data_hash: str | None = None
    samples: dict[str, int] = field(default_factory=dict)
    classes: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Summary(Measured):
    """summary.json: the results of a finished run; sums are over all of its sessions.

    Attributes:
        accuracy_best: of the best epoch, which was picked on the images that it is of.
        saved_share: samples not trained on over those of as many full epochs.
        epoch_seconds: median of training and pruning over the epochs without start-up; None where
            there is none.
        compiled: whether the network ran compiled; captured, its full steps as CUDA graphs;
            by_kernels, Triton kernels in the place of torch's operations; loader, the class.
        nvml: what the card said, of the epochs since `since_epoch`.
    """

    accuracy_last: float
    accuracy_best: float
    accuracy_best_epoch: int
    loss_last: float | None
    epochs: int
    samples_trained: int
    samples_saved: int
    saved_share: float
    peak_memory_bytes: int
    data: str
    epoch_seconds: float | None = None
    target_saving: float | None = None
    update_timed: bool = True
    joules_per_image: float | None = None
    joules_saved: float | None = None
    nvml: dict[str, Any] = field(default_factory=dict)
    compiled: bool | None = None
    captured: bool | None = None
    by_kernels: bool | None = None
    loader: str | None = None


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say in one line what the system did not let us do in the block."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"cannot {what}: {said or reason(error)}") from None


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write, so that a reader finds the old content or the new, whatever is killed when.

    A disk that is full, read-only or failing is a UserError, and the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a write that was killed
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a signal, too
        with suppress(OSError):  # a disk that is read-only by now
            temporary.unlink(missing_ok=True)
        failed: BaseException | None = error
        while failed is not None and not isinstance(failed, OSError):
            failed = failed.__context__  # torch's writer fails with what it makes of the disk's
        if isinstance(error, Exception) and isinstance(failed, OSError):
            raise UserError(f"cannot write {path}: {failed.strerror or failed}") from None
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file by `atomically`."""
    with atomically(path) as file:
        file.write(content)


def write_json(path: Path, record: Any) -> None:
    """Write a record as one JSON object, atomically."""
    write_atomically(path, (json.dumps(asdict(record), indent=2) + "\n").encode())


def write_epochs(path: Path, history: Iterable[EpochLine], mode: Literal["w", "a"]) -> None:
    """Write all epochs' lines anew, atomically, or add some.

    A kill may tear a line that is added; a resumed run writes all anew.
    """
    content = "".join(json.dumps(asdict(line)) + "\n" for line in history).encode()
    if mode == "w":
        return write_atomically(path, content)
    with doing(f"write {path}"), open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> bool:
    """Make a folder if it is not there; returns whether it was made."""
    with doing(f"make the folder {folder}"):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    return made


def read(kind: type[RecordT], path: Path) -> RecordT:
    """A record from its file."""
    with doing(f"read {path}"):
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} must be a regular file, got none")
        return parse(kind, read_object(path.read_text(), str(path)), str(path))


def read_object(text: str, where: str) -> dict[str, Any]:
    """One JSON object, of finite numbers; the message of another begins with `where`."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object: it holds a {type(value).__name__}")
    return value


def parse(kind: type[RecordT], value: Mapping[str, Any], where: str) -> RecordT:
    """A record from its JSON object; names that it does not know are left out.

    Raises:
        UserError: a value is missing or of another type; the message begins with `where`.
    """
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    names = {each.name for each in fields(kind)} & value.keys()
    for name in names:
        if not _fits(value[name], hints[name]):
            expected = hints[name] if get_args(hints[name]) else hints[name].__name__
            raise UserError(f"{where}: {name} must be {expected}, got {value[name]!r:.80}")
    try:
        return kind(**{name: value[name] for name in names})
    except (TypeError, ValueError) as error:  # of missing names and of wrong values
        raise UserError(f"{where}: {str(error).split('() ')[-1]}") from None


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) < 1e300  # JSON reads 1e999 as inf
    return isinstance(value, hint)
