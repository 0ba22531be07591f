"""What several processes cost: `python bench/scaling.py --device cpu`, with gloo on this machine.

Measured: epochs of the trainer, and merging alone. Computed, and labelled so: merging with more
ranks and samples, from the bytes that a ring sends, and from what was measured here of a byte, of a
hop and of what each rank does by itself.
"""

import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness import Bench, Options, main, spread

from infobatch_fast import ranks
from infobatch_fast.errors import UserError
from infobatch_fast.report.lines import read_lines
from infobatch_fast.train.records import EPOCHS, EpochLine

TITLES = {
    "epoch": "An epoch of the trainer, and merging in it",
    "merge": "Merging the scores of N samples",
    "computed": "COMPUTED, not measured: merging, from bytes and what was measured here",
}
RANKS, MORE = (1, 2, 4), (8, 64, 1024)
SIZES, LARGER = (50_000, 1_280_000, 10_000_000), (1_280_000, 100_000_000, 1_000_000_000)
TRAINER = "--device cpu --dataset synthetic --batch-size 200 --preset quick --whole-batches"
TRAINER += " --loader torch --eval-every 100 --delta 1"


@dataclass(frozen=True)
class Scaling(Options):
    """Measure epochs and merging with 1, 2 and 4 processes: scaling.jsonl and scaling.png.

    It takes some two minutes. Exit codes: 0 done; 2 a mistake in the input; 130 or 143 stopped by a
    signal, with what was measured kept.
    """


def measure(bench: Bench, options: Scaling) -> None:
    """Epochs, merging, and what follows for more ranks."""
    if bench.device.type != "cpu":
        raise UserError(f"device must be cpu: the processes meet by gloo, got {bench.device.type}")
    for world in RANKS:
        lines = train(world, 2000 if options.quick else 10_000, 3 if options.quick else 6)[1:]
        took = [line.train_seconds + (line.pruning_seconds or 0.0) for line in lines]
        merging = median(line.phases["merge"] for line in lines if line.phases)
        bench.add("epoch", {"ranks": world}, "s", spread(took), {"merge_seconds": merging})
    sizes = SIZES[:2] if options.quick else SIZES
    whole, bare, hop = {}, {}, {}
    for world in RANKS:
        for size, (merged, reduced) in together(world, (1, *sizes)).items():
            if size == 1:
                hop[world] = median(reduced)
                continue
            bench.add(
                "merge",
                {"ranks": world, "samples": size},
                "s",
                spread(merged),
                {"all_reduce_seconds": median(reduced), "sent_bytes": sent(world, size)},
            )
            bare[world], whole[world] = median(reduced), median(merged)
    own = whole[1] / sizes[-1]  # s a sample: what a rank does by itself
    of_byte = bare[4] / sent(4, sizes[-1])
    of_hop = hop[4] / hops(4)
    for world in MORE:
        for size in LARGER:
            chunks = -(-size // ranks.CHUNK)
            parts = {
                "bytes_seconds": sent(world, size) * of_byte,
                "hops_seconds": chunks * hops(world) * of_hop,
                "own_seconds": size * own,
            }
            case = {"ranks": world, "samples": size}
            more = {**parts, "sent_bytes": sent(world, size)}
            bench.add("computed", case, "s", {"median": sum(parts.values())}, more)


def sent(world: int, size: int) -> float:
    """Bytes that each rank of a ring sends: float32, once around to add and once to tell."""
    return 2 * (world - 1) / world * 4 * size


def hops(world: int) -> int:
    """Messages that follow one another in a ring."""
    return 2 * (world - 1)


def train(world: int, samples: int, epochs: int) -> list[EpochLine]:
    """The epochs of a run of the trainer in so many processes of one thread."""
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node", str(world), "-m", "infobatch_fast.train", *TRAINER.split()]
        words += ["--synthetic-samples", str(samples), "--epochs", str(epochs)]
        done = subprocess.run(
            [*words, "--out", f"{folder}/run"],
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"the trainer failed with {world} processes: {done.stderr[-300:]}")
        return read_lines(Path(folder, "run", EPOCHS), EpochLine)[0]


def together(world: int, sizes: Sequence[int]) -> dict[int, tuple[list[float], list[float]]]:
    """By N, seconds of merging and of its all-reduce alone, in a group of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, folder, sizes), nprocs=world)
        return torch.load(f"{folder}/took", weights_only=True)


def _rank(rank: int, world: int, folder: str, sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", f"file://{folder}/store", limit, world, rank)
    took: dict[int, Any] = {}
    for size in sizes:
        scores, mine = torch.rand(size), torch.arange(size) % world == rank
        bits = torch.zeros(min(size, ranks.CHUNK), dtype=torch.int32)
        calls = (lambda: ranks.merge(scores, mine, None)), (lambda: dist.all_reduce(bits))  # noqa: B023
        took[size] = [], []
        for _ in range(12):
            for call, seconds in zip(calls, took[size], strict=True):
                dist.barrier()
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        took[size] = tuple(seconds[2:] for seconds in took[size])
    if rank == 0:
        torch.save(took, f"{folder}/took")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(Scaling, "scaling", measure, TITLES))
