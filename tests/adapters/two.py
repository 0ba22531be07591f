"""Two processes, as a launcher starts them: the framework makes the group."""

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes


def child(rank: int, work: Callable[[], Any], port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    # Threads as torchrun has it; accelerate warns where it has to say so itself.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.save(work(), folder / f"rank{rank}")


def both(work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` gives on each rank, on the CPU."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded")
        context: Any = start_processes(
            child, (work, port, folder), 2, join=False, daemon=True, start_method="fork"
        )
    assert context.join(60) or context.join(60), "a rank hangs"  # each ends with one of them
    return [torch.load(folder / f"rank{rank}") for rank in (0, 1)]
