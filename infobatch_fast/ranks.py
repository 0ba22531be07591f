"""Several processes: the share that each takes of a plan, scores merged, plans compared.

Dimensions: N samples, K kept, B batch of one rank, W ranks. Global batch g is W consecutive
micro-batches of B samples, of which rank r takes the r-th.
"""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from infobatch_fast.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK = 1 << 24  # samples at once: 1e9 would need as much memory again for each step of the way
NOT_MINE = -(1 << 31)  # the least int32, in float32 the bits of -0.0


class Unlike(RuntimeError):
    """The ranks have drawn other plans than each other."""


class Share(NamedTuple):
    """What one of several ranks takes of a plan.

    What remains after the whole global batches is split evenly into consecutive parts. Fewer
    samples than ranks are left out of the epoch: no rank may have a batch less than another.
    """

    rank: int = 0
    world: int = 1
    batch_size: int = 1

    def own(self, count: int) -> int:
        """How many of count consecutive samples are this rank's."""
        if self.world == 1:
            return count
        rest = count % (self.world * self.batch_size)
        whole = (count - rest) // self.world
        if rest < self.world:
            return whole
        return whole + (rest + self.world - 1 - self.rank) // self.world

    def reached(self, count: int, own: int) -> int:
        """How many of count all ranks have had, once this one has had `own` of its own."""
        return count if own == self.own(count) else own * self.world

    def of(self, plan: Plan, start: int = 0) -> Plan:
        """This rank's samples of a plan from position start on."""
        indices, weights = (self.take(values[start:]) for values in (plan.indices, plan.weights))
        return replace(plan, indices=indices, weights=weights)

    def take(self, values: Tensor) -> Tensor:
        """This rank's of consecutive samples' values."""
        if self.world == 1:
            return values
        rest = len(values) % (self.world * self.batch_size)
        whole, rest = values.tensor_split([len(values) - rest])
        own = whole.view(-1, self.world, self.batch_size)[:, self.rank].flatten()
        if len(rest) < self.world:
            return own
        return torch.cat([own, rest.tensor_split(self.world)[self.rank]])


def place(group: "ProcessGroup | None") -> tuple[int, int]:
    """The rank of this process, and how many there are.

    Raises:
        RuntimeError: there are several, and they have not met.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise RuntimeError(
            "torch.distributed.init_process_group must come before the first epoch is drawn where "
            f"WORLD_SIZE is not 1, got {world}"
        )
    return 0, 1


def merge(scores: Tensor, mine: Tensor, group: "ProcessGroup | None") -> None:
    """Copy, in place, each score from the rank that recorded it to all others. Collective.

    Of a sample that several recorded, all get the score that is largest by its bits.

    Args:
        scores: (N,) float32.
        mine: (N,) bool, the samples that this rank recorded.
    """
    for part, own in zip(scores.split(CHUNK), mine.split(CHUNK), strict=True):
        # Adding 0.0 makes 0.0 of -0.0, and leaves all other bits alone.
        bits = part.add(0.0).view(torch.int32).masked_fill_(~own, NOT_MINE)
        merged = _reduced(bits, dist.ReduceOp.MAX, group)
        part.copy_(torch.where(merged == NOT_MINE, part, merged.view(torch.float32)))


def compare(plan: Plan, batch_size: int, group: "ProcessGroup | None") -> None:
    """Whether all ranks have the same plan and batch size. Collective; one host sync.

    Raises:
        Unlike: they have not; the message names epoch and ranks.
    """
    first, *others = gathered(fingerprint(plan) + batch_size, group)
    if unlike := [number for number, other in enumerate(others, 1) if other != first]:
        raise Unlike(
            f"plan of epoch {plan.epoch} must be the same on all ranks, by seed, settings, scores "
            f"and batch size; got another than rank 0's on rank {', '.join(map(str, unlike))}"
        )


def fingerprint(plan: Plan) -> Tensor:
    """() int64, 64 bits of a plan's epoch, samples, order and weights."""
    total = torch.tensor(plan.epoch, device=plan.indices.device)
    for start in range(0, len(plan), CHUNK):
        indices, weights = plan.batch(start, start + CHUNK)
        value = torch.arange(start, start + len(indices), device=indices.device)
        # Odd constants, products modulo 2**64: as SplitMix64, which signed shifts do no harm.
        for key in (indices, weights.view(torch.int32)):
            value = (value * -0x61C8864680B583EB).add_(key)
            value = (value ^ value >> 30).mul_(-0x40A7B892E31B1A47)
            value ^= value >> 27
        total += value.sum()
    return total


def gathered(value: Tensor, group: "ProcessGroup | None") -> list[int]:
    """A number of each rank, () int64, on all of them. Collective."""
    rank, world = place(group)
    values = torch.zeros(world, dtype=torch.int64, device=value.device)
    values[rank] = value
    return summed(values, group).tolist()


def summed(values: Tensor, group: "ProcessGroup | None") -> Tensor:
    """The sum over all ranks. Collective."""
    return _reduced(values, dist.ReduceOp.SUM, group)


def _reduced(values: Tensor, operation: Any, group: "ProcessGroup | None") -> Tensor:
    """All ranks' values as one, on the values' device."""
    nccl = dist.get_backend(group) == "nccl"  # which knows no tensor of the CPU
    meeting = values.cuda() if nccl else values
    dist.all_reduce(meeting, operation, group)
    return meeting.to(values.device)
