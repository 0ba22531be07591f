"""Checkpoints that are whole or not there: atomic save, verified load."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from infobatch_fast.errors import UserError
from infobatch_fast.train.records import write_atomically

VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint: a state of tensors and plain values, which `load` takes back.

    Raises:
        UserError: it could not be written; an older checkpoint is still there.
    """
    save_tensors(path, {"version": VERSION, **state})


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Save a dictionary that `torch.load(weights_only=True)` admits.

    Raises:
        UserError: it could not be written; an older file is still there.
    """
    # Through memory: an error of the disk inside torch's writer is no OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU; executes nothing of it.

    Args:
        path: the checkpoint's file.

    Raises:
        UserError: it is missing, unreadable, cut short, no checkpoint, or of another version.
    """
    state = load_tensors(path)
    version = state.get("version")
    if version != VERSION:
        raise UserError(f"checkpoint {path} must be of version {VERSION}, got {version}")
    return state


def load_tensors(path: Path) -> dict[str, Any]:
    """Load a dictionary of tensors and plain values onto the CPU; executes nothing of it.

    Args:
        path: a file that torch.save wrote.

    Raises:
        UserError: it is missing, unreadable, cut short, or holds something else.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device never end
        raise UserError(f"checkpoint {path} must be a regular file, got something else")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # of files that torch.save did not write
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind for a damaged or hostile file
        raise UserError(
            f"checkpoint {path} cannot be loaded ({type(error).__name__}): "
            "it is cut short, damaged, or no checkpoint"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} must hold a dictionary, got {type(state).__name__}")
    return state
