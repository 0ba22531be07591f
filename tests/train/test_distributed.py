"""Several processes of the trainer, as torchrun starts them: forked, on gloo."""

import faulthandler
import gc
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import fails, lines_of, summary_of
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from infobatch_fast import InfoBatch
from infobatch_fast.data.loader import make_loader
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.errors import UserError
from infobatch_fast.plan import Plan
from infobatch_fast.ranks import Share
from infobatch_fast.train import __main__ as command
from infobatch_fast.train import distributed, loop, main
from infobatch_fast.train import folder as record
from infobatch_fast.train.distributed import Part
from infobatch_fast.train.ledger import Ledger

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
# 103 samples in batches of 16: the 7 that remain are 4 and 3 on two ranks, 2, 2, 2 and 1 on four.
TINY = (
    "--device cpu --dataset synthetic --synthetic-samples 103 --batch-size 16 --epochs 3 --delta 1 "
    "--max-lr 0.05 --loader torch --model test_distributed:linear --whole-batches"
).split()
STEP = loop.TrainStep.__call__
Step: Any = loop.TrainStep  # of forked processes, which each may patch
In: Any = command
Hook = Callable[[int], Any]


def linear(classes: int) -> nn.Module:
    """No batch norm: any number of ranks then computes the same, to rounding."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))


def nothing(rank: int) -> None:
    pass


class Torn:
    """Processes that run the trainer, what they said, and how they ended."""

    def __init__(self, codes: list[int | None], folder: Path) -> None:
        self.codes = codes
        read = [folder / f"rank{rank}" for rank in range(len(codes))]
        self.out, self.err = ([Path(f"{p}.{end}").read_text() for p in read] for end in ("o", "e"))

    @property
    def said(self) -> list[str]:
        """The lines of all ranks on stderr, but for what gloo and the store write."""
        ours = ("error:", "stopped", "Traceback")
        return [line for text in self.err for line in text.splitlines() if line.startswith(ours)]


def worker(rank: int, folder: Path, words: list[str], hook: Hook) -> None:
    """One process: its output into files, and its end the trainer's."""
    gc.freeze()  # what the parent left, pipelines with threads too, is not this one's to release
    for number, end in ((1, "o"), (2, "e")):
        os.dup2(
            os.open(f"{folder}/rank{rank}.{end}", os.O_CREAT | os.O_APPEND | os.O_WRONLY), number
        )
    import sys

    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(n, "wb"), write_through=True) for n in (1, 2)
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    faulthandler.dump_traceback_later(30)  # of what hangs, before `start` kills it
    try:
        after = hook(rank)
        code = main(words)
        if after is not None:
            torch.save(after, folder / f"rank{rank}.pt")
    except BaseException:
        traceback.print_exc()
        code = 70
    if code or "TORCHELASTIC_RUN_ID" not in os.environ:  # whose agent wants an orderly end
        os._exit(code)


def child(rank: int, world: int, port: int, folder: Path, words: list[str], hook: Hook) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True")
    worker(rank, folder, words, hook)


def serve(pipe: Any) -> None:
    """The store that torchrun has, its agent being a process of its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    signal.pause()


def start(world: int, folder: Path, *words: object, hook: Hook = nothing) -> Torn:
    """The trainer in so many processes, to their end."""
    folder.mkdir(exist_ok=True)
    context: Any = multiprocessing.get_context("fork")
    # In a process of its own: ranks forked beside its thread now and then hang, holding its locks.
    ours, its = context.Pipe()
    store = context.Process(target=serve, args=(its,), daemon=True)
    store.start()
    port, given = ours.recv(), [*map(str, words)]
    every = [
        context.Process(target=child, args=(rank, world, port, folder, given, hook))
        for rank in range(world)
    ]
    for each in every:
        each.start()
    for each in every:
        each.join(40)
    hanging = [rank for rank, each in enumerate(every) if each.is_alive()]
    for each in (*every, store):
        each.kill()
    torn = Torn([each.exitcode for each in every], folder)
    assert not hanging, (hanging, torn.err)
    return torn


def whole(world: int, folder: Path, *words: object, hook: Hook = nothing) -> Torn:
    torn = start(world, folder, *words, hook=hook)
    assert torn.codes == [0] * world, torn.err
    return torn


def weights_of(run: Path) -> list[Tensor]:
    return [*torch.load(run / "model.pt", weights_only=True).values()]


def assert_equal(one: Iterable[Tensor], other: Iterable[Tensor], exact: bool = True) -> None:
    rtol, atol = (0.0, 0.0) if exact else (1e-3, 1e-5)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def spy(rank: int) -> list[Any]:
    """All batches of this process, as they come to the step."""
    batches: list[Any] = []

    def call(self: Any, images: Tensor, labels: Tensor, batch: Any, *rates: float) -> None:
        assert images.is_contiguous(memory_format=torch.channels_last)
        batches.append((images.clone(), labels, *batch))
        STEP(self, images, labels, batch, *rates)

    Step.__call__ = call
    return batches


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with its batches."""
    folder = tmp_path_factory.mktemp("alone")
    whole(1, folder, *TINY, "--out", folder / "run", hook=spy)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    whole(2, folder, *TINY, "--out", folder / "run", hook=spy)
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_on_what_one_trains_on(alone: Path, two: Path, tmp_path, world: int) -> None:
    folder = two if world == 2 else tmp_path
    if world == 4:
        whole(4, folder, *TINY, "--out", folder / "run", hook=spy)
    expected, *every = (
        torch.load(name / f"rank{rank}.pt")
        for name, ranks in ((alone, 1), (folder, world))
        for rank in range(ranks)
    )
    for step, of_one in enumerate(expected):
        parts = [batches[step] for batches in every]
        images, labels, indices, weights = (torch.cat(each) for each in zip(*parts, strict=True))
        assert_equal((images, labels, indices), of_one[:3])  # crops and flips, too
        # Of an odd batch each rank's mean counts as its samples do.
        sizes = torch.tensor([len(part[0]) for part in parts])
        factor = (sizes * world / sizes.sum()).repeat_interleave(sizes)
        assert_equal([weights], [of_one[3] * factor])
    assert {len(batches) for batches in every} == {len(expected)}
    assert_equal(weights_of(folder / "run"), weights_of(alone / "run"), exact=False)
    for mine, other in zip(lines_of(folder / "run"), lines_of(alone / "run"), strict=True):
        for name in ("kept", "prunable", "accuracy", "skipped_steps"):
            assert mine[name] == other[name]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert mine["phases"]["merge"] > other["phases"]["merge"]  # which merges nothing
        assert mine["pruning_seconds"] > mine["phases"]["merge"]
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["device"]["processes"] == world
    said = [(folder / f"rank{rank}.o").read_text() for rank in range(world)]
    assert f"{world} processes" in said[0]
    assert said[1:] == [""] * (world - 1)


def test_a_step_is_skipped_by_all(tmp_path) -> None:
    """By the network with batch norm, in bfloat16: all ranks then have the same weights, too."""
    words = [*TINY, "--model", "small", "--amp", "bf16", "--epochs", 2, "--out", tmp_path / "run"]

    def hook(rank: int) -> dict[str, Tensor]:
        state, calls, finish = {}, [], Ledger.finish

        def call(self: Any, images: Tensor, *rest: Any) -> None:
            calls.append(0)
            if rank == 1 and len(calls) == 3:
                images[0] = torch.nan
            STEP(self, images, *rest)

        def finished(self: Ledger, *args: Any, **kwargs: Any) -> Any:
            state.update(self.step.model.state_dict(), scores=self.infobatch.scores)
            return finish(self, *args, **kwargs)

        Step.__call__, Ledger.finish = call, finished
        return state

    whole(2, tmp_path, *words, hook=hook)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_equal(first.values(), second.values())
    assert all(value.isfinite().all() for value in first.values())
    assert [line["skipped_steps"] for line in lines_of(tmp_path / "run")] == [1, 0]
    assert_equal([first["fc.weight"]], [weights_of(tmp_path / "run")[-2]])


def strike(rank: int, at: int, number: int) -> Hook:
    """A signal to one rank as it begins a step."""

    def hook(own: int) -> None:
        calls: list[int] = []
        distributed.LOOK = 1

        def call(self: Any, *args: Any) -> None:
            calls.append(0)
            if (own, len(calls)) == (rank, at):
                os.kill(os.getpid(), number)
            STEP(self, *args)

        Step.__call__ = call

    return hook


@pytest.mark.parametrize(
    ("rank", "number", "worlds"), [(1, signal.SIGTERM, (2, 1)), (0, signal.SIGINT, (4,))]
)
def test_a_signal_to_one_stops_all_and_any_number_goes_on(
    two: Path, tmp_path, rank: int, number: int, worlds: tuple[int, ...]
) -> None:
    run = tmp_path / "run"
    torn = start(2, tmp_path, *TINY, "--out", run, hook=strike(rank, 9, number))
    assert torn.codes == [128 + number] * 2
    assert torn.said == [f"stopped; continue with --resume {run}"]
    state = record.load(run / "checkpoint.pt")
    assert state["epoch"] == 1
    assert 0 < state["number"] < math.ceil(len(state["plan"]["indices"]) / 16)
    for world in worlds:
        again = tmp_path / f"again{world}"
        shutil.copytree(run, again)
        whole(world, tmp_path / str(world), "--resume", again)
        assert_equal(weights_of(again), weights_of(two / "run"), exact=world == 2)
        assert summary_of(again)["samples_trained"] == summary_of(two / "run")["samples_trained"]


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (4, 2)])
def test_a_rank_that_is_killed_is_named_and_the_others_end(tmp_path, world: int, rank: int) -> None:
    hook = strike(rank, 9, signal.SIGKILL)
    torn = start(world, tmp_path, *TINY, "--out", tmp_path / "run", hook=hook)
    assert torn.codes == [-signal.SIGKILL if own == rank else 1 for own in range(world)]
    assert torn.said == [f"error: rank {rank} ended, or gave no sign of life for 50 s: all stop"]


def test_a_rank_that_is_killed_before_training_is_named(tmp_path) -> None:
    """Not the signal that torchrun then sends to the others."""

    def hook(rank: int) -> None:
        def struck(device: str) -> None:
            os.kill(os.getpid(), signal.SIGKILL if rank == 1 else signal.SIGTERM)

        In.find_device = struck

    torn = start(2, tmp_path, *TINY, "--out", tmp_path / "run", hook=hook)
    assert torn.codes == [1, -signal.SIGKILL]
    assert torn.said == ["error: rank 1 ended, or gave no sign of life for 50 s: all stop"]


def test_a_rank_that_is_killed_as_they_connect_ends_the_other(tmp_path) -> None:
    def hook(rank: int) -> None:
        distributed.LIMIT = 3.0
        if rank == 1:
            dist.init_process_group = lambda *args, **kwargs: os._exit(9)

    torn = start(2, tmp_path, *TINY, "--out", tmp_path / "run", hook=hook)
    assert torn.codes == [1, 9]
    assert torn.said == ["error: the 2 ranks did not come together within 3 s: all stop"]


@pytest.mark.parametrize("missing", [0, 1])
def test_ranks_do_not_wait_forever_for_one_that_never_starts(tmp_path, missing: int) -> None:
    def hook(rank: int) -> None:
        distributed.START = 3.0
        if rank == missing:
            os._exit(9)

    torn = start(3, tmp_path, *TINY, "--out", tmp_path / "run", hook=hook)
    assert torn.codes == [9 if rank == missing else 1 for rank in range(3)]
    assert torn.said == ["error: the 3 ranks did not come together within 3 s: all stop"]


def test_a_rank_that_is_slow_is_waited_for(tmp_path) -> None:
    """The first looks into a folder of millions of files, say; torch waits for half an hour."""

    def hook(rank: int) -> None:
        dist.distributed_c10d.default_pg_timeout = timedelta(seconds=0.5)
        load = In.load_data
        if rank == 0:
            In.load_data = lambda *args, **kwargs: time.sleep(2) or load(*args, **kwargs)

    whole(2, tmp_path, *TINY, "--epochs", 1, "--out", tmp_path / "run", hook=hook)


def gone() -> int:
    raise RuntimeError


@pytest.mark.parametrize(
    ("answer", "tells"),
    [
        (lambda: 1, True),
        (lambda: 2, False),
        (gone, True),
        (lambda: time.sleep(2) or 2, True),
    ],
)
def test_a_store_that_is_gone_or_silent_keeps_no_rank_from_telling(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[], int], tells: bool
) -> None:
    """Silent is that of a machine that has lost its power."""

    class Store:
        def add(self, key: str, amount: int) -> int:
            return answer()

    monkeypatch.setattr(distributed, "GRACE", 0.2)
    ranks = distributed.Ranks()
    ranks._store = Store()
    assert ranks.tells() is tells


def odd_data(rank: int) -> None:
    if rank == 1:

        def load(*args: Any, **kwargs: Any) -> None:
            raise UserError("data_dir must be there, got none on this machine")

        In.load_data = load


def other_data(rank: int) -> None:
    if rank == 1:
        In.make_synthetic = lambda *args, seed, device: make_synthetic(*args, seed=seed + 1)


def odd_score(rank: int) -> None:
    if rank == 1:
        merge = InfoBatch.merge

        def merged(self: InfoBatch) -> None:
            merge(self)
            self.scores[5] = 100.0

        InfoBatch.merge = merged


def full_disk(rank: int) -> None:
    def fsync(number: int) -> None:
        raise OSError(28, "No space left on device")

    os.fsync = fsync


def no_out(rank: int) -> None:
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"


MISTAKES: dict[str, tuple[str, Hook, str]] = {
    "flag": ("--batch-size 15 --out {}", nothing, "batch_size must be a multiple of the 2"),
    "value": ("--epochs 0 --out {}", nothing, "epochs must be at least 1"),
    "norm": ("--sync-batch-norm --out {}", nothing, "sync_batch_norm must be off on a CPU"),
    "one rank": ("--out {}", odd_data, "data_dir must be there"),
    "data": ("--out {}", other_data, "data_dir must hold the same data .* others on rank 1$"),
    "plans": ("--out {}", odd_score, "plan of epoch 1 must .* another than rank 0's on rank 1$"),
    "disk": ("--out {}", full_disk, "cannot write .* No space left"),
    "no out": ("", no_out, "out must be given where torchrun has --max-restarts, got none"),
    "no run": ("--resume {}", nothing, "resume must be a run's folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_once(tmp_path, name: str) -> None:
    words, hook, message = MISTAKES[name]
    words = words.format(tmp_path / "run").split()
    torn = start(2, tmp_path, *([] if "--resume" in words else TINY), *words, hook=hook)
    (line,) = torn.said
    assert re.match(f"error: {message}", line)
    assert 2 in torn.codes
    assert set(torn.codes) <= {1, 2}


def test_an_environment_that_names_no_place_to_meet(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK must be set where WORLD_SIZE is 2" in fails(capsys, *TINY)


@pytest.mark.parametrize("start", [0, 32])
@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_loaders_give_each_rank_its_part(kind: str, start: int) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    data = make_synthetic(103, 4, 4)
    order = torch.randperm(103, generator=torch.Generator().manual_seed(0))
    plan = Plan(2, 103, 0, order, torch.rand(103))

    def batches(world: int, rank: int, size: int) -> list[tuple[Tensor, ...]]:
        loader, _ = make_loader(
            kind, data.images, data.labels, size, mean=data.mean, std=data.std, seed=3
        )
        mine = Share(rank, world, size)
        part = Part(**vars(mine.of(plan, start)), share=mine, start=start, stop=len(plan))
        return [(x.clone(), y, *batch) for x, y, batch in loader.epoch(part)]

    alone = batches(1, 0, 16)
    for world in (2, 4):
        every = [batches(world, rank, 16 // world) for rank in range(world)]
        for step, expected in enumerate(alone):
            parts = zip(*(each[step] for each in every), strict=True)
            assert_equal((torch.cat(part) for part in parts), expected)


def test_torchrun_restarts_them_and_they_go_on(two: Path, tmp_path) -> None:
    """Killed at the start, in a step, and while a checkpoint is written, one rank or the other."""
    moments = [(1, 0), (1, 9), (0, 0)]

    def hook(rank: int) -> None:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if attempt == 3:
            return
        who, at = moments[attempt]
        if at:
            strike(who, at, signal.SIGKILL)(rank)
        elif rank == who == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 2 and rank == who:
            fsync = os.fsync

            def struck(number: int) -> None:
                if "checkpoint" in os.readlink(f"/proc/self/fd/{number}"):
                    os.kill(os.getpid(), signal.SIGKILL)
                fsync(number)

            os.fsync = struck

    def entry() -> None:
        worker(int(os.environ["RANK"]), tmp_path, words, hook)

    words = [*TINY, "--checkpoint-every", "2", "--out", str(tmp_path / "run")]
    config = LaunchConfig(1, 1, 2, max_restarts=3, start_method="fork", monitor_interval=0.05)
    config.rdzv_endpoint, config.rdzv_backend, config.run_id = "127.0.0.1:0", "c10d", "test"
    elastic_launch(config, entry)()
    assert_equal(weights_of(tmp_path / "run"), weights_of(two / "run"))


@pytest.mark.parametrize(("seed", "codes"), [(0, [0, 0]), (7, [2, 1])])
def test_a_restart_goes_on_with_its_own_run_alone(
    two: Path, tmp_path, seed: int, codes: list[int]
) -> None:
    def hook(rank: int) -> None:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"

    run = tmp_path / "run"
    shutil.copytree(two / "run", run)
    torn = start(2, tmp_path, *TINY, "--seed", seed, "--out", run, hook=hook)
    assert torn.codes == codes
    refused = "error: out must be a new or empty folder"
    assert [line.startswith(refused) for line in torn.said] == [True] * (seed != 0)


@pytest.mark.parametrize(
    "words", [["--max-lr", "0.1"], ["--checkpoint-every", "3"], ["--epochs", "4"]]
)
def test_ranks_of_other_arguments_are_named(tmp_path, words: list[str]) -> None:
    def hook(rank: int) -> None:
        run = In.run
        more = words if rank == 1 else []
        In.run = lambda given, *rest: run([*given, *more], *rest)

    torn = start(2, tmp_path, *TINY, "--out", tmp_path / "run", hook=hook)
    assert torn.said == ["error: arguments must be the same on all ranks, got others on rank 1"]
    assert not (tmp_path / "run").exists()
