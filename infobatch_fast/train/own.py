"""The user's own parts: a model or a data set that `module:function` names."""

from collections.abc import Collection
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
    except (Exception, SystemExit) as error:
        raise failed(argument, name, error) from error


def failed(argument: str, name: str, error: BaseException) -> UserError:
    """What the user's own code raised, as their mistake."""
    return UserError(f"{argument} {name} failed: {type(error).__name__}: {reason(error)}")


def own_model(name: str, num_classes: int, sides: Collection[tuple[int, int]]) -> nn.Module:
    """`timm:NAME` untrained, or what `module:function` makes of the number of classes.

    It is tried on two black images of each of these sides.
    """
    timm = name.startswith("timm:")
    model = _of_timm(name, num_classes) if timm else called("model", name, num_classes)
    for shape in ((2, 3, *each) for each in sides):
        try:
            with torch.no_grad():
                got = tuple(model.eval()(torch.zeros(shape)).shape)
            if not any(each.requires_grad for each in model.parameters()):
                got = "none that is trained"
        except Exception as error:
            got = f"{type(error).__name__}: {reason(error)}"
        if got != (wanted := (2, num_classes)):
            raise UserError(f"model {name} must make logits {wanted} of images {shape}, got {got}")
    return model.train()


def _of_timm(name: str, num_classes: int) -> nn.Module:
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
        classes = getattr(train, "classes", None)
        images, labels = _images_and_labels(name, train, workers)
        test_images, test_labels = _images_and_labels(name, test, workers)
        number = len(classes) if classes else int(labels.max()) + 1
        for each in torch.cat([labels, test_labels]).aminmax():
            if not 0 <= each < number:
                raise ValueError(f"a label {each} of {number} classes")
    except Exception as error:
        raise UserError(
            f"dataset {name} must give two data sets of (image, label) with targets, got "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    return Dataset(
        name,
        images,
        labels,
        test_images,
        test_labels,
        num_classes=number,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source="files",
        classes=classes and tuple(map(str, classes)),
    )


def _images_and_labels(name: str, dataset: Any, workers: int) -> tuple[Mapped, Tensor]:
    labels, number = torch.as_tensor(dataset.targets), len(dataset)
    if labels.shape != (number,) or labels.is_floating_point():
        raise ValueError(f"targets {labels.dtype} of shape {tuple(labels.shape)} for {number}")
    image, _ = dataset[0]
    image = torch.as_tensor(image)
    if image.dim() != 3 or len(image) != 3 or not image.is_floating_point():
        raise ValueError(f"an image {image.dtype} of shape {tuple(image.shape)}")
    _, height, width = image.shape
    mapped = Mapped(
        rows=torch.arange(number),
        sides=(height, width),
        workers=workers,
        dataset=dataset,
        name=name,
    )
    return mapped, labels.long()
