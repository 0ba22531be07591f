"""The loaders of other packages for `throughput.py`, and the list of all the sides.

A package that is not installed is a row that says how to install it. Each adapter was written from
the package's public interface, and says the version that it was tried with.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from loader_sides import (
    PAD,
    Batches,
    Item,
    PilImages,
    Setting,
    Side,
    TensorImages,
    augment_v2,
    data_loader,
    ours,
)
from torch import Tensor
from torchvision import transforms

from infobatch_fast.data.cifar import Dataset


def airbench(setting: Setting) -> Side:
    """The loader of cifar10-airbench: it augments all images of the epoch at once, in float16.

    Tried with airbench 0.1.8 on a CPU.
    """
    from airbench import CifarLoader  # pyright: ignore[reportMissingImports]

    data, folder = setting.data, setting.folder / "airbench"
    if not folder.exists():
        folder.mkdir()
        classes = [str(number) for number in range(data.num_classes)]
        stored = {"images": data.images, "labels": data.labels, "classes": classes}
        torch.save(stored, folder / "train.pt")
    where = {} if setting.device.type == "cuda" else {"gpu": "cpu"}

    def loader(**options: Any) -> Callable[[], Batches]:
        made = CifarLoader(
            str(folder), batch_size=setting.batch_size, drop_last=False, **options, **where
        )
        indices = setting.plan.indices
        made.images = made.images[indices].contiguous(memory_format=torch.channels_last)
        made.labels = made.labels[indices]
        made.normalize = transforms.Normalize(data.mean, data.std)
        return lambda: ((images.float(), labels) for images, labels in made)

    return Side(
        loader(aug={"flip": True, "translate": PAD}, shuffle=True),
        setting.plan,
        plain=loader(shuffle=False),
        tolerance=5e-3,  # float16
        note="own random crops, flips and order; float16, cast to float32",
        compared="every batch of a pass without augmentation",
    )


def ffcv(setting: Setting) -> Side:
    """FFCV over its own file of raw pixels, in the plan's order.

    Written for ffcv 1.0; not tried.
    """
    from ffcv import fields  # pyright: ignore[reportMissingImports]
    from ffcv import transforms as ops  # pyright: ignore[reportMissingImports]
    from ffcv.fields.decoders import (  # pyright: ignore[reportMissingImports]
        IntDecoder,
        SimpleRGBImageDecoder,
    )
    from ffcv.loader import Loader, OrderOption  # pyright: ignore[reportMissingImports]
    from ffcv.writer import DatasetWriter  # pyright: ignore[reportMissingImports]

    data, path = setting.data, setting.folder / "images.beton"
    if not path.exists():
        columns = {"image": fields.RGBImageField(), "label": fields.IntField()}
        writer = DatasetWriter(str(path), columns, num_workers=setting.workers)
        rows = list(zip(data.images.numpy(), data.labels.tolist(), strict=True))
        writer.from_indexed_dataset(rows)
    mean, std = ([255 * value for value in values] for values in (data.mean, data.std))

    def loader(*augmentations: Any) -> Callable[[], Batches]:
        image = [SimpleRGBImageDecoder(), *augmentations, ops.ToTensor()]
        image += [ops.ToDevice(setting.device), ops.ToTorchImage(), ops.Convert(torch.float32)]
        image += [transforms.Normalize(mean, std)]
        label = [IntDecoder(), ops.ToTensor(), ops.ToDevice(setting.device), ops.Squeeze(1)]
        made = Loader(
            str(path),
            batch_size=setting.batch_size,
            num_workers=setting.workers,
            order=OrderOption.SEQUENTIAL,
            indices=setting.plan.indices.cpu().numpy(),
            drop_last=False,
            pipelines={"image": image, "label": label},
        )
        return lambda: made

    fill = tuple(round(value) for value in mean)
    return Side(
        loader(ops.RandomHorizontalFlip(), ops.RandomTranslate(padding=PAD, fill=fill)),
        setting.plan,
        plain=loader(),
        note="own random flips and crops, padded with the mean colour, not by reflection",
        compared="every batch of a pass without augmentation",
    )


class StreamedImages:
    """A map-style dataset of mosaicml-streaming's local shards, transformed by torchvision v2."""

    def __init__(self, shards: Any, data: Dataset) -> None:
        self.shards, self.data = shards, data

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        sample = self.shards[item[0]]
        pixels = torch.from_numpy(np.array(sample["image"])).permute(2, 0, 1)
        return augment_v2(pixels, item, self.data), sample["label"]


def streaming(setting: Setting) -> Side:
    """mosaicml-streaming's LocalDataset, which is indexed at random, in a DataLoader.

    Tried with mosaicml-streaming 0.13.0 on a CPU.
    """
    from streaming import LocalDataset, MDSWriter  # pyright: ignore[reportMissingImports]

    data, folder = setting.data, setting.folder / "streaming"
    if not folder.exists():
        size = ",".join(str(length) for length in data.images.shape[1:])
        columns = {"image": f"ndarray:uint8:{size}", "label": "int"}
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for image, label in zip(data.images.numpy(), data.labels.tolist(), strict=True):
                writer.write({"image": image, "label": label})
    dataset = StreamedImages(LocalDataset(str(folder)), data)
    return data_loader(setting, dataset, setting.workers, "raw pixels in local MDS shards")


@dataclass(frozen=True)
class Peer:
    """A loader of a package that need not be there.

    Attributes:
        package: that is imported.
        install: how to have it.
        make: its side.
    """

    package: str
    install: str
    make: Callable[[Setting], Side]

    def missing(self) -> str | None:
        """How to install it, where it is not."""
        if importlib.util.find_spec(self.package) is None:
            return f"not installed: {self.install}"
        return None


PEERS = {
    "airbench": Peer("airbench", "pip install airbench", airbench),
    "FFCV": Peer("ffcv", "pip install ffcv (needs OpenCV, libturbojpeg and a compiler)", ffcv),
    "Streaming, DataLoader": Peer("streaming", "pip install mosaicml-streaming", streaming),
}


def make_sides(workers: int) -> dict[str, Callable[[Setting], Side]]:
    """What makes each side, by its name; those with processes first, which DALI's threads follow.

    Args:
        workers: processes of the sides that have any.
    """
    many = f"{workers} worker" + ("s" if workers > 1 else "")
    made: dict[str, Callable[[Setting], Side]] = {}
    for name, dataset in (("torchvision v2", TensorImages), ("PIL", PilImages)):
        for label, count in (("0 workers", 0), (many, workers)):
            made[f"{name}, DataLoader, {label}"] = lambda setting, dataset=dataset, count=count: (
                data_loader(setting, dataset(setting.data), count)
            )
    for name, peer in PEERS.items():
        if peer.missing() is None:
            made[name] = peer.make
    made["ours, torch"] = lambda setting: ours(setting, "torch")
    made["ours, DALI"] = lambda setting: ours(setting, "dali")
    return made
