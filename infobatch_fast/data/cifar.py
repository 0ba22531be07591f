"""Where the data is: CIFAR-10/100 on disk as a `Dataset`, the download for an empty folder.

The parts: `dataset` is the form that data has, `cifar_files` and `cifar_pickle` read what was
published, `download` fetches it, `synthetic` makes images of its own.
"""

import os
from pathlib import Path

import numpy as np
import torch

from infobatch_fast.data.cifar_files import KINDS, Form, Kind, read_archive, read_folder
from infobatch_fast.data.class_names import CLASSES
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.download import download_archive
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.errors import UserError, reason, unknown_name

__all__ = ["DataMissing", "Dataset", "default_data_dir", "load_cifar", "make_synthetic"]


class DataMissing(UserError):
    """No data in the folder, and no download could put it there."""


def default_data_dir() -> Path:
    """`INFOBATCH_DATA` where set, else `infobatch_fast` in the user's cache folder.

    Raises:
        UserError: neither is set and the user has no home folder.
    """
    if chosen := os.environ.get("INFOBATCH_DATA"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "infobatch_fast"
    except RuntimeError:
        raise UserError("INFOBATCH_DATA must be set where the user has no home folder") from None


def load_cifar(name: str, data_dir: Path | str, *, download: bool = True) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 (its fine labels) into CPU tensors.

    The forms looked for, the first found being read: the binary folder, the Python folder, the
    binary archive, the Python archive, and `data_dir` being itself one of the two folders. A form
    that is there but broken is an error: no other form and no download stands in for it.

    Args:
        name: `cifar10` or `cifar100`.
        data_dir: The folder that holds, or is to hold, one of the forms.
        download: Fetch the Python archive into `data_dir` where no form is there.

    Raises:
        UserError: an unknown name, or a file that is missing, unreadable or not as published.
        DataMissing: no form is there and it was not, or could not be, downloaded.
    """
    if name not in KINDS:
        raise UserError(unknown_name("dataset", name, KINDS))
    kind = KINDS[name]
    folder = Path(os.path.abspath(os.path.expanduser(data_dir)))
    failure = "downloading is off"
    found = _find(kind, folder)
    if found is None and download:
        try:
            download_archive(name, folder)
        except Exception as error:
            failure = f"the download failed ({reason(error)})"
        found = _find(kind, folder)
    if found is None:
        names = ", ".join([f.folder for f in kind.forms] + [f.archive for f in kind.forms])
        raise DataMissing(
            f"data_dir {folder} must hold one of {names}, got none and {failure}: put one there, "
            "set INFOBATCH_DATA or --data-dir to the folder that has it, or use --dataset synthetic"
        )
    form, path = found
    read = read_archive if path.name == form.archive else read_folder
    *train, (test_images, test_labels) = read(kind, form, path)
    return Dataset(
        name=name,
        images=torch.from_numpy(np.concatenate([images for images, _ in train])),
        labels=torch.from_numpy(np.concatenate([labels for _, labels in train])),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        num_classes=kind.num_classes,
        mean=kind.mean,
        std=kind.std,
        source="genuine",
        classes=CLASSES[name],
    )


def _find(kind: Kind, folder: Path) -> tuple[Form, Path] | None:
    """The first form in `folder`, and the path of its folder or archive."""
    if _exists(folder) and not folder.is_dir():
        raise UserError(f"data_dir must be a folder, got {folder}")
    for form in kind.forms:
        if _exists(folder / form.folder):
            return form, folder / form.folder
    for form in kind.forms:
        if _exists(folder / form.archive):
            return form, folder / form.archive
    for form in kind.forms:
        whole = all((folder / name).is_file() for name in form.files)
        if whole or (folder.name == form.folder and _exists(folder)):
            return form, folder
    return None


def _exists(path: Path) -> bool:
    # Not Path.exists: a dangling link and a folder closed to us are broken data, not missing data.
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable, got {reason(error)}") from error
    return True
