"""What a run's arrays tell of its samples, read with care and reduced to what a report shows.

Dimensions: N samples, E epochs, M samples tracked, P samples pictured.
"""

import warnings
from pathlib import Path

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from infobatch_fast.errors import UserError, reason
from infobatch_fast.report.records import NOTHING, Inside, Run, Sample

PICTURES = 12  # of the least kept, and of the most often kept
TRACKED = 8
_TYPES = {
    "kept": np.int32,
    "scores": np.float32,
    "labels": np.int32,
    "tracked": np.int64,
    "score_history": np.float32,
    "pictured": np.int64,
    "pictures": np.uint8,
}


def read_inside(folder: Path, run: Run) -> tuple[Inside, list[tuple[str, str]]]:
    """Read what there is of a run's arrays.

    Args:
        folder: the run's.
        run: its record.

    Returns:
        What they tell, and the name of each file that cannot be used, with the reason.
    """
    arrays: dict[str, np.ndarray] = {}
    bad: list[tuple[str, str]] = []
    if run.samples is None or run.damaged:
        return NOTHING, bad
    for name, dtype in _TYPES.items():
        path = folder / f"{name}.npy"
        if not path.exists():
            continue
        try:
            array = _array(path, dtype)
            _check(name, array, arrays, run)
        except UserError as error:
            bad.append((path.name, str(error)))
        else:
            arrays[name] = array
    if not arrays.keys() >= {"kept", "labels"}:
        return NOTHING, bad
    kept, labels = arrays["kept"], arrays["labels"]
    scores = arrays.get("scores", np.full(run.samples, np.nan, dtype=np.float32))
    epochs = run.config["epochs"]

    def sample(number: int, data: np.ndarray) -> Sample:
        of = int(labels[number]), int(kept[number]), float(scores[number])
        return Sample(number, *of, np.array(data))  # a copy: the file need not stay open

    inside = NOTHING
    if kept.min() < epochs:
        counts, sums = np.bincount(labels), np.bincount(labels, weights=epochs - kept)
        shares = {int(c): float(sums[c] / (counts[c] * epochs)) for c in np.flatnonzero(counts)}
        inside = inside._replace(classes=shares)
    if kept.min() < epochs and arrays.keys() >= {"pictured", "pictures"}:
        numbers, images = arrays["pictured"].tolist(), arrays["pictures"]
        found = [sample(n, image) for n, image in zip(numbers, images, strict=True)]
        half = len(found) // 2
        least, most = found[:half][:PICTURES], found[half:][:PICTURES]
        inside = inside._replace(least=tuple(least), most=tuple(most))
    if arrays.keys() >= {"tracked", "score_history"}:
        numbers, history = arrays["tracked"], arrays["score_history"]
        ranked = np.lexsort((numbers, kept[numbers]))
        # From the least kept to the most often kept, in even steps.
        places = np.linspace(0, len(ranked) - 1, min(TRACKED, len(ranked))).round().astype(int)
        chosen = ranked[places]
        tracked = [sample(int(numbers[i]), history[:, i]) for i in chosen]
        inside = inside._replace(tracked=tuple(tracked))
    return inside, bad


def _array(path: Path, dtype: type) -> np.ndarray:
    """An array of the file, which is neither unpickled nor believed to be as large as it says."""
    if not path.is_file():
        raise UserError("it must be a regular file")
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
                raise UserError("it is no .npy file")
        with warnings.catch_warnings(action="error"):
            # Mapped, the size that its header claims is checked against the file's.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror or reason(error)}") from None
    except Exception as error:  # a broken header is tokenized, and fails in many ways
        raise UserError(f"it holds no array: {reason(error)}") from None
    if array.dtype != dtype:
        raise UserError(f"it must hold {np.dtype(dtype).name}, got {array.dtype.name}")
    return array


def _check(name: str, array: np.ndarray, others: dict[str, np.ndarray], run: Run) -> None:
    """Raise UserError unless the array fits the run and the arrays before it."""
    samples, epochs = run.samples or 0, run.config["epochs"]
    tracked, pictured = others.get("tracked"), others.get("pictured")
    shapes = {
        "kept": (samples,),
        "scores": (samples,),
        "labels": (samples,),
        "score_history": (epochs, *(tracked.shape if tracked is not None else array.shape[1:2])),
        "pictures": (*(pictured.shape if pictured is not None else array.shape[:1]), 32, 32, 3),
    }
    shape = shapes.get(name, array.shape[:1])
    if array.shape != shape:
        raise UserError(f"its shape must be {shape}, got {array.shape}")
    bounds = {
        "kept": (0, epochs),
        "labels": (0, len(run.about.get("classes") or []) - 1),
        "tracked": (0, samples - 1),
        "pictured": (0, samples - 1),
    }
    if name not in bounds or not array.size:
        return
    low, high = bounds[name]
    if name == "labels" and high < 0:
        high = samples - 1  # the classes have no names: there are no more than samples
    least, most = int(array.min()), int(array.max())
    if least < low or most > high:
        raise UserError(f"it must hold numbers in [{low}, {high}], got {least} to {most}")
    if name == "kept" and run.complete and int(array.sum(dtype=np.int64)) != run.trained:
        raise UserError(
            f"it must add up to the {run.trained} samples of epochs.jsonl, "
            f"got {int(array.sum(dtype=np.int64))}"
        )
