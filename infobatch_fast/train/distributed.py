"""Several processes that train one run together, as torchrun starts them.

Gradients are DDP's, and scores `infobatch_fast.ranks`'s. Here is the rest: each one's part of an
epoch, what all decide together, who writes and tells the user, and what happens where one is lost.
A single process goes the same way and sends nothing.

Dimensions: W ranks, K samples of an epoch, B batch of one rank.
"""

import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from infobatch_fast.errors import UserError
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Plan
from infobatch_fast.ranks import Share, Unlike
from infobatch_fast.train.cli import Interrupted, Interrupts, complain, is_out_of_memory

BEAT = 1.0  # s between two signs of life
LIMIT = 50.0  # s without one: a killed process is noticed at once, a machine without power then
START = 300.0  # s for all to come: machines import and restart in their own time
GRACE = 2.0  # s for the main thread, where its own error is what ends this rank
PATIENCE = 10.0  # s for the thread, where the main one fails at what a rank that is gone had to do
LOOK = 4  # steps between two looks at whether a rank is to stop
GOING_ON, PARTED, LOST = range(3)  # what the first rank answers to signs of life

T = TypeVar("T")


@dataclass(frozen=True)
class Part(Plan):
    """One rank's samples of a plan, from position start on, of the K up to stop."""

    share: Share = field(default_factory=Share)
    start: int = 0
    stop: int = 0

    def positions(self, device: torch.device | str) -> Tensor:
        """(len,) int64: the places in the plan, so that any W crops and flips a sample alike."""
        return self.share.take(torch.arange(self.start, self.stop, device=device))


class Ranks:
    """The processes of a run; a `with` in which they are together.

    Signs of life are a thread's, once a second: a rank that is slow is not taken for one that is
    gone. Where one is, the others end with code 1, wherever they are.

    Attributes:
        rank: of W = `world`, those of this machine counted apart as local.
        group: of gradients and scores; None is torch's default, which all else goes through.
        restarts: of these processes by torchrun, so far.
        interrupts: the signals that this one has received.
    """

    def __init__(self) -> None:
        self.rank, self.world, self.local_rank, self.local_world = 0, 1, 0, 1
        self.group: Any = None
        self.interrupts = Interrupts()
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._leaving = threading.Event()
        self._steps, self._asked = 0, None

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        world = os.environ.get("WORLD_SIZE", "1")
        if world == "1":
            return self
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(
                    f"{name} must be set where WORLD_SIZE is {world}, got none: use torchrun"
                )
        self.rank, self.world, self.local_rank, self.local_world = (
            int(os.environ[name]) for name in names
        )
        if not self.first:
            sys.stdout = open(os.devnull, "w")
        with self._within(START):
            store = next(rendezvous("env://"))[0]
            self._store = dist.PrefixStore(f"try {self.restarts}", store)
            self._store = self._met(store)
        with self._within(LIMIT):
            dist.init_process_group(
                "gloo",
                timeout=timedelta(days=1),  # a slow rank is waited for, a lost one the thread sees
                world_size=self.world,
                rank=self.rank,
                store=self._store,
            )
            (self.restarts,) = self.most(self.restarts)
            watched = dist.new_group(backend="gloo", timeout=timedelta(seconds=LIMIT))
        self._thread = threading.Thread(target=self._watch, args=(watched,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        if self._thread is None:
            return
        try:
            if kind is None or kind is SystemExit:
                self.leave()
        except RuntimeError as failed:
            error = failed
        # It may be of what was sent to a rank that is gone, as torchrun's signal to the others is:
        # the thread says which.
        if isinstance(error, Interrupted) and self._thread:
            self._thread.join(GRACE)
        elif isinstance(error, RuntimeError) and not is_out_of_memory(error) and self._thread:
            self._thread.join(PATIENCE)

    def _met(self, store: Any) -> Any:
        """The part of a store that is of this start alone, once all ranks have come to it.

        torchrun's store outlives its workers, and each machine counts restarts of its own: a rank
        asks by a name that it makes up, and the first one answers. Within torch no signal would be
        heard meanwhile.
        """
        name = uuid.uuid4().hex
        if self.first:
            own = dist.PrefixStore(name, store)
            while own.add("here", 0) < self.world - 1:
                time.sleep(0.1)
                for key in (f"asks {rank}" for rank in range(1, self.world)):
                    if store.check([key]):  # perhaps of one that is gone: the next overwrites it
                        store.set(f"to {store.get(key).decode()}", name)
        else:
            store.set(f"asks {self.rank}", name)
            while not store.check([f"to {name}"]):
                time.sleep(0.1)
            own = dist.PrefixStore(store.get(f"to {name}").decode(), store)
        own.add("here", 1)
        while own.add("here", 0) < self.world:
            time.sleep(0.1)
        return own

    def leave(self) -> None:
        """Part in order, once all ranks have come to it. Collective."""
        if self._thread is not None:
            dist.barrier()
            self._leaving.set()
            self._thread.join()
            dist.barrier()  # the first one's process may hold the store
            dist.destroy_process_group()
            self._thread = None

    def end(self, code: int) -> int:
        """The exit code; where the ranks have not parted in order, exit with it."""
        if self._thread is not None:
            sys.stdout.flush()
            if self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                time.sleep(GRACE)  # the store is this process's, and the others may ask it
            os._exit(code)  # a thread waits within gloo, which an orderly exit would abort at
        return code

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """A block in which all ranks come together, or this one ends."""

        def end() -> None:
            if self.tells():
                did = f"the {self.world} ranks did not come together within {seconds:g} s"
                complain(f"error: {did}: all stop", 1)
            os._exit(1)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def tells(self) -> bool:
        """Whether this rank is to tell the user why all end: the first that asks."""
        told = []

        def ask() -> None:
            with suppress(RuntimeError):  # the process that held the store is gone
                told.append(self._store.add("told", 1) > 1)

        if self._store is not None:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(GRACE)  # a machine that has lost its power never answers
        return told != [True]

    def _watch(self, group: Any) -> None:
        gone, over = [], torch.zeros(1)
        while not gone and over.tolist() == [GOING_ON]:
            gone = self._beat(group, over)
        if over.tolist() == [PARTED]:
            return
        if gone and self.tells():
            named = f"rank {', '.join(map(str, gone))}"
            complain(f"error: {named} ended, or gave no sign of life for {LIMIT:g} s: all stop", 1)
        else:
            time.sleep(GRACE)
        os._exit(1)

    def _beat(self, group: Any, over: Tensor) -> list[int]:
        """Send the first rank a sign, which answers when it has all, into `over`; who is gone."""
        if not self.first:
            try:
                dist.send(over, 0, group)
                dist.recv(over, 0, group)
            except RuntimeError:
                return [0]
            return []
        leaving = self._leaving.wait(BEAT)
        limit, gone, signs = time.monotonic() + LIMIT, set(), {}
        for rank in range(1, self.world):
            with _gone(rank, gone):
                signs[rank] = dist.irecv(torch.zeros(1), rank, group)
        for rank, sign in signs.items():
            with _gone(rank, gone):
                sign.wait(timedelta(seconds=max(0.01, limit - time.monotonic())))
        over.fill_(LOST if gone else PARTED if leaving else GOING_ON)
        for rank in signs.keys() - gone:
            with _gone(rank, gone):
                dist.send(over, rank, group)
        return sorted(gone)

    # What all know or decide together. Every call is collective.

    def from_first(self, work: Callable[[], T]) -> T:
        """What the first rank's call gives, on all."""
        if self.world == 1:
            return work()
        given: list[Any] = [work() if self.first else None]
        dist.broadcast_object_list(given, 0)
        return given[0]

    def of_all(self, value: T) -> list[T]:
        """The value of every rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any, rule: str) -> None:
        """UserError where a rank has another value than the first one."""
        first, *others = self.of_all(value)
        if unlike := [str(rank) for rank, other in enumerate(others, 1) if other != first]:
            raise UserError(f"{rule} on all ranks, got others on rank {', '.join(unlike)}")

    def total(self, *values: float) -> list[float]:
        """The sum over all ranks of each."""
        if self.world == 1:
            return [*values]
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def most(self, *values: int) -> list[int]:
        """The largest over all ranks of each."""
        return [max(each) for each in zip(*self.of_all(values), strict=True)]

    def stopping(self) -> int:
        """A signal that a rank has received some steps ago, or 0; called in each step.

        Nobody waits for it: what is asked for in one step is looked at `LOOK` steps later.
        """
        if self.world == 1:
            return self.interrupts.received
        self._steps += 1
        if self._steps % LOOK:
            return 0
        seen = 0
        if self._asked is not None:
            work, value = self._asked
            work.wait()
            (seen,) = value.tolist()
        value = torch.tensor([self.interrupts.received])
        self._asked = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True), value
        return seen

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """A block for the first rank of each machine, and then for the others, who find files."""
        if self.local_rank:
            dist.barrier()
        yield
        if self.world > 1 and not self.local_rank:
            dist.barrier()

    # Devices, data and the network

    def form(self, device: torch.device) -> torch.device:
        """This rank's device of the kind, and the group of its kind."""
        if self.world == 1 or device.type != "cuda":
            return device
        if self.local_world > (count := torch.cuda.device_count()):
            raise UserError(
                f"nproc-per-node must be at most the {count} GPUs here, got {self.local_world}"
            )
        torch.cuda.set_device(self.local_rank)
        self.group = dist.new_group(backend="nccl")
        return torch.device("cuda", self.local_rank)

    def part(self, infobatch: InfoBatch, plan: Plan, start: int, batch_size: int) -> Part:
        """This rank's samples of a plan from position start on, once all have the same plan.

        Of a batch that W does not divide, weights make the ranks' mean that of the samples.

        Raises:
            UserError: the ranks' plans differ; the message names epoch and ranks.
        """
        share = infobatch.share(batch_size)
        try:
            infobatch.compare()
        except Unlike as error:
            raise UserError(str(error)) from None
        mine = share.of(plan, start)
        if own := share.own(rest := (len(plan) - start) % (share.world * batch_size)):
            mine.weights[-own:] *= own * share.world / rest
        return Part(**vars(mine), share=share, start=start, stop=len(plan))

    def parallel(self, model: nn.Module) -> nn.Module:
        """What runs the model and averages its gradients over the ranks."""
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(side), warnings.catch_warnings():  # else no graph may hold it
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            made = DistributedDataParallel(
                model,
                process_group=self.group,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        if side is not None:
            torch.cuda.current_stream(device).wait_stream(side)
        return made

    def spread(self, buffers: Iterable[Tensor]) -> None:
        """Give all ranks the first one's buffers, as each has seen other samples."""
        for buffer in buffers if self.world > 1 else ():
            dist.broadcast(buffer, 0, self.group)


@contextmanager
def _gone(rank: int, gone: set[int]) -> Iterator[None]:
    """A rank that a block could not reach is one of those that are gone."""
    try:
        yield
    except RuntimeError:
        gone.add(rank)
