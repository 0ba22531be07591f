"""The files of a folder of images: what is known of each without decoding it, kept between runs.

Dimensions: N files.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from infobatch_fast.errors import UserError, reason

# As torchvision's ImageFolder takes them: other files are not looked at.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # that both decoders know
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 4096  # bytes in which the end's marker must be: some writers let more follow it
THREADS, PART = 16, 256  # that wait for a disk or a network; files that one looks into at a time


@dataclass
class BadFiles:
    """Files that are no images, or cannot be decoded, by their names; more than `most` end it."""

    most: int = 0
    why: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        named = ", ".join(f"{path} ({why})" for path, why in list(self.why.items())[:3])
        more = f" and {len(self.why) - 3} more" if len(self.why) > 3 else ""
        return f"{len(self.why)} that cannot be read as images: {named}{more}"

    def add(self, found: dict[str, str]) -> None:
        """Take these in as well; UserError where they are too many."""
        self.why |= found
        if len(self.why) > self.most:
            raise UserError(f"max_bad_files must not be passed, got {self.most} and {self}")


class Tree(NamedTuple):
    """The images under a folder, a folder a class, in the order of torchvision's ImageFolder."""

    folder: Path
    classes: tuple[str, ...]
    names: np.ndarray  # (N,) bytes, relative to the folder
    labels: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int64, bytes
    sides: np.ndarray  # (N, 2) int64, height and width as shown: with the EXIF orientation


def read_tree(folder: Path, bad: BadFiles, say: Callable[[str], None]) -> Tree:
    """Index a folder: look into each file that is not as it was when it was last found sound.

    Files are checked by their signature, size and end, and those that fail are left out.

    Raises:
        UserError: the folder cannot be read or holds no image, or too many files are bad.
    """
    try:
        classes = sorted(each.name for each in os.scandir(folder) if each.is_dir())
    except OSError as error:
        raise UserError(
            f"{folder} must be a folder that can be read, got {error.strerror}"
        ) from None
    kept = _cache(folder)
    saved = _load(kept)
    known = dict(saved)
    with ThreadPoolExecutor(THREADS) as threads:
        walked = list(threads.map(partial(_walk, folder), classes))
        keys = [key for each in walked for key in each]
        new = [key for key in keys if key not in known]
        if new:
            say(f"index      looking into {len(new):,} of {len(keys):,} files of {folder}")
        parts = [new[start : start + PART] for start in range(0, len(new), PART)]
        for part, found in zip(parts, threads.map(partial(_check, folder), parts), strict=True):
            known.update(zip(part, found, strict=True))
    # Not the bad ones: a disk or a decoder may fail today alone.
    sound = {key: known[key] for key in keys if not known[key][2]}
    if sound != saved:
        _save(kept, sound)
    bad.add({f"{folder.name}/{os.fsdecode(k[0])}": known[k][2] for k in keys if k not in sound})
    good = [
        (label, key, sound[key])
        for label, each in enumerate(walked)
        for key in each
        if key in sound
    ]
    if not good:
        raise UserError(f"{folder} must hold a folder of images for each class, got no image")
    labels, found, sides = zip(*good, strict=True)
    names, sizes, _ = zip(*found, strict=True)
    return Tree(
        folder,
        tuple(classes),
        np.array(names),
        np.array(labels, np.int64),
        np.array(sizes, np.int64),
        np.array([each[:2] for each in sides], np.int64),
    )


Key = tuple[bytes, int, int]  # name, size, time of the last change in ns
Found = tuple[int, int, str]  # height, width, what is wrong


def _walk(folder: Path, name: str) -> list[Key]:
    """The images of a class."""
    keys = []
    for place, _, names in sorted(os.walk(folder / name, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                path, size, time = os.path.join(place, name), -1, 0
                with suppress(OSError):  # of a link to nowhere, which is then found to be bad
                    stat = os.stat(path)
                    size, time = stat.st_size, stat.st_mtime_ns
                keys.append((os.fsencode(os.path.relpath(path, folder)), size, time))
    return keys


def _check(folder: Path, keys: list[Key]) -> list[Found]:
    return [_check_file(folder / os.fsdecode(name)) for name, _, _ in keys]


def _check_file(path: Path) -> Found:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return 0, 0, "empty"
            file.seek(0)
            image = Image.open(file)  # reads the head alone
            if image.format not in FORMATS:
                return 0, 0, f"{image.format}, not one of {', '.join(FORMATS)}"
            width, height = image.size
            exif = Image.Image.getexif(image)  # a PNG's own would decode it all
            lies = exif.get(ExifTags.Base.Orientation, 1) >= 5
            if lies and image.format != "TIFF":  # whose size is as it is shown
                width, height = height, width
            file.seek(max(0, size - TAIL))
            if ENDS.get(image.format, b"") not in file.read():
                return 0, 0, "truncated"
    except Image.UnidentifiedImageError:
        return 0, 0, "no image"
    except Exception as error:  # whatever Pillow makes of a damaged head
        return 0, 0, why_of(error)
    return height, width, ""


def why_of(error: Exception) -> str:
    """What went wrong with a file, without its name."""
    return getattr(error, "strerror", None) or reason(error)


def _cache(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=16).hexdigest()
    return cache / "infobatch_fast" / "folders" / f"{name}.npz"


def _load(path: Path) -> dict[Key, Found]:
    """What was found last time; nothing where that cannot be read."""
    with suppress(Exception), open(path, "rb") as file, np.load(file) as saved:
        rows = zip(bytes(saved["names"]).split(b"\0"), saved["sound"].tolist(), strict=True)
        return {(name, size, time): (h, w, "") for name, (size, time, h, w) in rows}
    return {}


def _save(path: Path, known: dict[Key, Found]) -> None:
    """Whole or not at all; not at all where the user's cache takes no files."""
    content = io.BytesIO()
    np.savez(
        content,
        names=np.frombuffer(b"\0".join(name for name, _, _ in known), np.uint8),
        sound=np.array([(*k[1:], *v[:2]) for k, v in known.items()], np.int64).reshape(-1, 4),
    )
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content.getvalue())
        os.replace(file.name, path)
