"""The user's own parts: a model or a data set that `module:function` names."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.workers import Mapped
from infobatch_fast.errors import UserError, reason
from infobatch_fast.policies import imported


def called(argument: str, name: str, *arguments: Any) -> Any:
    """What the user's function gives; whatever goes wrong in it is a UserError."""
    try:
        function = imported(argument, name)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        return function(*arguments)
    except Exception as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{argument} {name} failed: {what}") from error


def own_model(name: str, num_classes: int) -> nn.Module:
    """`timm:NAME` untrained, or what `module:function` makes of the number of classes."""
    if not name.startswith("timm:"):
        return called("model", name, num_classes)
    try:
        import timm
    except ImportError:
        raise UserError(f"model {name} needs timm: pip install timm") from None
    try:
        return timm.create_model(name.removeprefix("timm:"), num_classes=num_classes)
    except RuntimeError as error:
        raise UserError(f"model {name} must be one of timm's, got: {reason(error)}") from None


def own_dataset(name: str, data_dir: Path, workers: int) -> Dataset:
    """What `module:function` makes of --data-dir: map-style data sets to train and to test on.

    Each gives an image (3, H, W) float, normalised, and a label by number, and has all labels as
    `targets`, as torchvision's have; `classes`, if there, are their names.
    """
    splits = called("dataset", name, data_dir)
    try:
        train, test = splits
        images, labels = _images_and_labels(train, workers)
        test_images, test_labels = _images_and_labels(test, workers)
    except Exception as error:
        raise UserError(
            f"dataset {name} must give two data sets of (image, label) with targets, got "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    classes = getattr(train, "classes", None)
    return Dataset(
        name,
        images,
        labels,
        test_images,
        test_labels,
        num_classes=len(classes) if classes else int(labels.max()) + 1,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source="files",
        classes=classes and tuple(map(str, classes)),
    )


def _images_and_labels(dataset: Any, workers: int) -> tuple[Mapped, Tensor]:
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64)
    image, _ = dataset[0]
    if image.dim() != 3 or len(image) != 3 or not image.is_floating_point():
        raise ValueError(f"an image {image.dtype} of shape {tuple(image.shape)}")
    rows = torch.arange(len(dataset))
    mapped = Mapped(rows=rows, side=image.shape[-1], workers=workers, dataset=dataset)
    return mapped, labels
