"""The part "loader" of `agreement.py`: the same pass from DALI and from torch, here and there.

Dimensions: N samples, K of them in the pass, B batch.
"""

import math
from dataclasses import dataclass, replace

import torch
from agreement_figures import Bench, ulps
from loader_sides import PAD, TOLERANCE, first
from overhead_sides import draw_scores
from torch import Tensor

from infobatch_fast.data.cifar import Dataset
from infobatch_fast.data.loader import Epoch, make_loader
from infobatch_fast.errors import UserError
from infobatch_fast.infobatch import Batch, InfoBatch, Plan

CPU = torch.device("cpu")
UNIT = 1e-7  # of the differences of normalised values, relative to the larger of 1 and the value
ROUNDED = 1  # steps of float16 that normalised values may lie apart


def measure_loaders(bench: Bench, data: Dataset, batch_size: int) -> None:
    """Rows of the first loader that works here against every other one.

    Args:
        bench: whose rows they are.
        data: on the CPU.
        batch_size: B.
    """
    plan = pruned_plan(len(data.labels), batch_size, bench.seed, bench.device)
    epochs: dict[str, Epoch[Batch]] = {}
    for device in (bench.device, CPU) if bench.cuda else (CPU,):
        for kind in ("dali", "torch"):
            side = f"{kind} {device.type}"
            try:
                epochs[side] = _epoch(kind, data, plan, batch_size, bench.seed, device)
            except UserError as error:
                bench.add_absent("loader", {"what": "all", "side": side}, str(error))
    if not bench.cuda:
        bench.add_absent(
            "loader", {"what": "all", "side": "dali cuda"}, "the device is the CPU, as its twin's"
        )
    ours, *others = epochs
    found = _compare(epochs, Scale.of(data, bench.device), bench.device)
    for other in others:
        rows, pair = found[other], {"side": ours, "against": other}
        more = {"samples": len(plan), "last_batch_images": len(plan) % batch_size}
        for what, equal in (
            ("crops and flips", rows.images),
            ("labels", rows.labels),
            ("indices and weights", rows.batch),
        ):
            share = equal / len(plan)
            bench.add(
                "loader", {"what": what, **pair}, share, "equal", 1.0, at_least=True, more=more
            )
        case = {"what": "normalised float32", **pair}
        bench.add("loader", case, rows.off / UNIT, "1e-7", round(TOLERANCE / UNIT), more=more)
        case = {"what": "cast to float16", **pair}
        bench.add("loader", case, rows.ulps, "ULP", ROUNDED, more=more)


def pruned_plan(samples: int, batch_size: int, seed: int, device: torch.device) -> Plan:
    """A pruned epoch whose last batch is partial, of scores as they lie in a training."""
    infobatch = InfoBatch(samples, 1, 0.5, 1.0, seed, device)
    infobatch.scores.copy_(torch.from_numpy(draw_scores(samples, seed)))
    plan = infobatch.sample(0)
    return plan if len(plan) % batch_size else first(plan, len(plan) - 1)


def _epoch(
    kind: str, data: Dataset, plan: Plan, batch_size: int, seed: int, device: torch.device
) -> Epoch[Batch]:
    here = data.to(device)
    how = {"mean": data.mean, "std": data.std, "seed": seed, "pad": PAD}
    loader, _ = make_loader(kind, here.images, here.labels, batch_size, **how)
    there = {"indices": plan.indices.to(device), "weights": plan.weights.to(device)}
    return loader.epoch(replace(plan, **there))


@dataclass
class _Found:
    """Of a pair: images, labels and batches' samples that are equal, and the largest distances."""

    images: int = 0
    labels: int = 0
    batch: int = 0
    off: float = 0.0
    ulps: float = 0.0


@dataclass(frozen=True)
class Scale:
    """The way back from normalised values to the 256 levels of a pixel."""

    mean: Tensor  # (3, 1, 1)
    std: Tensor

    @classmethod
    def of(cls, data: Dataset, device: torch.device) -> "Scale":
        """That of a data set."""
        return cls(*(torch.tensor(v, device=device).view(3, 1, 1) for v in (data.mean, data.std)))

    def levels(self, images: Tensor) -> Tensor:
        """Whole numbers, from 0 to 255 where the images are right."""
        return ((images * self.std + self.mean) * 255).round()


def _compare(
    epochs: dict[str, Epoch[Batch]], scale: Scale, device: torch.device
) -> dict[str, _Found]:
    """The first epoch against each other one, batch by batch."""
    ours, *others = epochs
    found = {name: _Found() for name in others}
    for batches in zip(*epochs.values(), strict=True):  # one that ends early raises
        images, labels, batch = batches[0]
        levels = scale.levels(images)
        for name, other in zip(others, batches[1:], strict=True):
            theirs, their_labels, their_batch = other[0].to(device), other[1], other[2]
            if theirs.shape != images.shape:
                shapes = tuple(images.shape), tuple(theirs.shape)
                raise ValueError(f"images of {ours} and {name} have the shapes {shapes}")
            row = found[name]
            row.images += int((levels == scale.levels(theirs)).flatten(1).all(1).sum())
            row.labels += int((labels == their_labels.to(device)).sum())
            same = batch.indices == their_batch.indices.to(device)
            same &= batch.weights == their_batch.weights.to(device)
            row.batch += int(same.sum())
            off = ((images - theirs).abs() / theirs.abs().clamp(min=1)).max().item()
            row.off = off if math.isnan(off) else max(row.off, off)  # NaN stays
            row.ulps = max(row.ulps, ulps(images.half(), theirs.half()))
    return found
