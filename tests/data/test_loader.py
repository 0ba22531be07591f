import gc
import sys
import weakref
from itertools import islice, product
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision

from infobatch_fast.data import loader as loader_module
from infobatch_fast.data.augment import augmentation
from infobatch_fast.data.loader import TorchLoader, make_loader
from infobatch_fast.errors import UserError
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Plan
from infobatch_fast.telemetry.syncs import host_syncs

try:
    from infobatch_fast.data.dali import DaliLoader
except ImportError:
    DaliLoader: Any = None

needs_dali = pytest.mark.skipif(DaliLoader is None, reason="DALI is not installed")
either = pytest.mark.parametrize("kind", [TorchLoader, pytest.param(DaliLoader, marks=needs_dali)])
PIXELS: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # output = pixel value
CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def random_images(n, height=32, width=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


def random_plan(num_samples, k, epoch=0, seed=0, device="cpu"):
    """Unequal weights, each a function of its sample alone, so that a mispairing shows."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    indices = torch.randperm(num_samples, generator=generator)[:k].to(device)
    return Plan(epoch, num_samples, 0, indices, weight_of(indices))


def weight_of(ids):
    return 1 + ids.float() / 8  # exact on every device


def label_of(ids):
    return ids * 31 % 101


def numbered_images(n, side=8):
    """Images of one colour, which spells their number: no crop or flip changes them."""
    ids = torch.arange(n)
    colours = torch.stack([ids % 256, ids // 256, ids * 13 % 256], 1).to(torch.uint8)
    return colours[:, None, None, :].expand(n, side, side, 3).contiguous(), label_of(ids)


def numbers_in(images):
    """(B,) int64: the number that every pixel of every image spells; -1 where they differ."""
    values = images.round().long().permute(0, 2, 3, 1).flatten(1, 2)
    colour = values[:, 0]
    ids = colour[:, 0] + 256 * colour[:, 1]
    same = (values == colour[:, None]).all(2).all(1) & (ids * 13 % 256 == colour[:, 2])
    return torch.where(same, ids, -1)


def numbered(kind, n=500, batch_size=16):
    return kind(*numbered_images(n), batch_size, **PIXELS)


def assert_batches(batches, plan, batch_size=16, start_batch=0, count=None):
    """The batches are the plan's, from start_batch on: images, labels, indices and weights."""
    batches = list(batches)
    starts = list(range(0, len(plan), batch_size))[start_batch:][:count]
    assert len(batches) == len(starts)
    for start, (images, labels, batch) in zip(starts, batches, strict=True):
        expected = plan.indices[start : start + batch_size]
        assert torch.equal(numbers_in(images), expected)
        assert torch.equal(labels, label_of(expected))
        assert torch.equal(batch.indices, expected)
        assert torch.equal(batch.weights, weight_of(expected))


def all_images(batches):
    return torch.cat([images for images, _, _ in batches])


def transformed(image, pad, y, x, flip):
    """The same augmentation by torchvision: (H, W, C) -> (C, H, W) uint8."""
    height, width, _ = image.shape
    chw = image.permute(2, 0, 1)
    if pad:
        chw = vision.pad(chw, [pad], padding_mode="reflect")
    chw = vision.crop(chw, int(y), int(x), height, width)
    return vision.hflip(chw) if flip else chw


# Pixels


@either
def test_every_crop_and_flip_is_torchvisions(kind, monkeypatch):
    table = list(product(range(9), range(9), (False, True)))
    columns = [torch.tensor(values) for values in zip(*table, strict=True)]
    monkeypatch.setattr(
        loader_module,
        "augmentation",
        lambda seed, epoch, positions, pad: [values[positions] for values in columns],
    )
    images, plan = random_images(162), random_plan(162, 162)
    out = all_images(kind(images, torch.arange(162), 50, **PIXELS).epoch(plan))
    expected = [transformed(images[i], 4, *c) for i, c in zip(plan.indices, table, strict=True)]
    torch.testing.assert_close(out, torch.stack(expected).float(), rtol=0, atol=1e-4)


@either
@pytest.mark.parametrize(
    ("height", "width", "pad"), [(32, 32, 4), (12, 20, 3), (20, 12, 4), (9, 7, 6), (1, 1, 0)]
)
def test_random_crops_are_torchvisions(kind, height, width, pad, monkeypatch):
    if kind is DaliLoader:
        monkeypatch.setattr("infobatch_fast.data.dali.SERIAL", 17)  # crops of two batches at a time
    images = random_images(40, width, height).permute(0, 2, 1, 3)  # not contiguous
    plan = random_plan(40, 33, epoch=2)
    loader = kind(images, torch.arange(40), 8, **PIXELS, pad=pad, seed=9)
    crops = zip(*augmentation(9, 2, torch.arange(33), pad), strict=True)
    expected = [transformed(images[i], pad, *c) for i, c in zip(plan.indices, crops, strict=True)]
    for start in (0, 2):
        batches = list(loader.epoch(plan, start))
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _, _ in batches)
        assert torch.equal(all_images(batches).round(), torch.stack(expected[8 * start :]).float())


@either
def test_images_that_are_not_augmented_and_their_normalisation(kind):
    images, plan = random_images(30, 10, 12), random_plan(30, 30)
    before = images.clone()
    out = all_images(kind(images, torch.arange(30), 8, **CIFAR, augment=False).epoch(plan))
    pixels = images[plan.indices].permute(0, 3, 1, 2).float() / 255
    expected = vision.normalize(pixels, list(CIFAR["mean"]), list(CIFAR["std"]))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert out.dtype == torch.float32
    assert torch.equal(images, before)


@either
def test_more_than_two_gigabytes_of_images(kind):
    n = 720_000
    images = torch.from_numpy(np.zeros((n, 32, 32, 3), np.uint8))  # pages that nothing has touched
    assert images.numel() > 2**31
    images[-3:] = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1, 1)
    plan = Plan(0, n, 0, torch.tensor([n - 1, 0, n - 2, n - 3]), torch.ones(4))
    ((out, labels, _),) = kind(images, torch.arange(n), 4, **PIXELS, pad=0).epoch(plan)
    assert torch.equal(out.round().mean((1, 2, 3)), torch.tensor([3.0, 0.0, 2.0, 1.0]))
    assert torch.equal(labels, plan.indices)


# Which sample is which, through every way to run and to leave an epoch


@either
@pytest.mark.parametrize(
    ("n", "k", "batch_size"),
    [(1, 1, 1), (1, 1, 8), (9, 9, 1), (500, 500, 16), (500, 160, 16), (500, 0, 16), (500, 33, 16)],
)
def test_epochs_of_any_length_from_any_batch(kind, n, k, batch_size):
    loader = numbered(kind, n, batch_size)
    for epoch, kept in enumerate((k, min(n, 17), k)):
        plan = random_plan(n, kept, epoch)
        batches = -(-kept // batch_size)
        for start in sorted({0, 1, 7, batches} & set(range(batches + 1))):
            assert len(loader.epoch(plan, start)) == batches - start
            assert_batches(loader.epoch(plan, start), plan, batch_size, start)
    indices = torch.arange(n).repeat(2)  # samples may come twice
    plan = Plan(0, n, 0, indices, weight_of(indices))
    assert_batches(loader.epoch(plan), plan, batch_size)


def by_break(loader, plan, after):
    for i, _ in enumerate(loader.epoch(plan)):
        if i == after:
            break


def unread(loader, plan, after):
    assert len(loader.epoch(plan)) == 17
    iter(loader.epoch(plan))


def by_an_error_while_looking_ahead(loader, plan, after):
    wrong = plan.indices.clone()
    wrong[16 * (after + 1)] = 10**6
    with pytest.raises((IndexError, RuntimeError), match="index"):
        list(loader.epoch(Plan(plan.epoch, 500, 0, wrong, plan.weights)))


@either
@pytest.mark.parametrize("leave", [by_break, unread, by_an_error_while_looking_ahead])
def test_an_abandoned_epoch_leaves_nothing_behind(kind, leave):
    loader = numbered(kind)
    for epoch, (after, k) in enumerate([(0, 100), (2, 37), (15, 500)]):
        leave(loader, random_plan(500, 270, epoch), after)
        plan = random_plan(500, k, epoch, seed=1)
        assert_batches(loader.epoch(plan), plan)
        leave(loader, random_plan(500, 270, epoch), after)
    plan = random_plan(500, 270, 9)
    assert_batches(loader.epoch(plan, 5), plan, start_batch=5)


@either
@pytest.mark.parametrize("taken", [1, 3])
def test_an_older_iterator_refuses_or_goes_on_but_never_mixes(kind, taken):
    loader = numbered(kind)
    old, new = random_plan(500, 200, 0), random_plan(500, 150, 1)
    older = iter(loader.epoch(old))
    first = list(islice(older, taken))
    newer = iter(loader.epoch(new))
    second = list(islice(newer, 2))
    loader.epoch(random_plan(500, 300, 2))  # one that is only asked for disturbs none
    if kind is DaliLoader:
        with pytest.raises(RuntimeError, match="this iteration has ended"):
            next(older)
        assert list(older) == []
    else:
        first += older
    second += newer
    assert_batches(first, old, count=len(first))
    assert_batches(second, new)


@either
def test_batches_kept_are_not_overwritten(kind):
    loader = numbered(kind)
    plans = [random_plan(500, 200, epoch) for epoch in range(4)]
    kept = [list(loader.epoch(plan)) for plan in plans]
    del loader
    gc.collect()
    for batches, plan in zip(kept, plans, strict=True):
        assert_batches(batches, plan)


@either
def test_with_infobatch_and_no_value_read_back(kind):
    infobatch = InfoBatch(num_samples=500, num_epochs=4, delta=0.75, device="cpu")
    loader, lengths = numbered(kind), []
    for epoch in range(4):
        plan = infobatch.sample(epoch)
        lengths.append(len(plan))
        with host_syncs(torch.device("cpu"), "forbid"):
            batches = list(loader.epoch(plan))
        for images, _, batch in batches:
            infobatch.update(numbers_in(images).float(), batch)
        seen = torch.cat([numbers_in(images) for images, _, _ in batches])
        assert torch.equal(seen, plan.indices)
    assert lengths == [500, 375, 375, 500]
    assert torch.equal(infobatch.scores, torch.arange(500.0))


# What DALI gave out, and when it goes


@needs_dali
@pytest.mark.parametrize("taken", [1, 3, None], ids=["left", "left later", "finished"])
def test_no_output_is_released_between_two_epochs(taken, monkeypatch):
    """A CUDA graph captured between them would not survive it."""
    outputs: list[weakref.ref] = []

    def watched(output):
        array = np.array(output)
        outputs.append(weakref.ref(array))  # which lives as long as the tensor's memory
        return torch.from_numpy(array)

    monkeypatch.setattr(torch, "from_dlpack", watched)
    loader = numbered(DaliLoader)
    batches = islice(loader.epoch(random_plan(500, 100)), taken)
    while next(batches, None) is not None:
        pass
    del batches
    gc.collect()
    *earlier, last = outputs
    assert all(output() is None for output in earlier)
    assert last() is not None
    following = iter(loader.epoch(random_plan(500, 100)))
    assert last() is not None
    next(following)
    assert last() is None


@needs_dali
def test_a_dropped_loader_frees_its_pipeline_and_its_images():
    loader = numbered(DaliLoader)
    iterator = iter(loader.epoch(random_plan(500, 200)))
    next(iterator)
    gc.collect()
    gc.disable()
    try:
        held = [weakref.ref(x) for x in (loader, loader._padded, loader._pipeline)]
        del loader
        assert all(ref() is not None for ref in held)  # the iterator holds them
        del iterator
        assert [ref() for ref in held] == [None, None, None]
    finally:
        gc.enable()


# Errors, and the choice of a loader


@either
@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("batch_size", 0, "0"),
        ("batch_size", 2.0, "2.0"),
        ("pad", 6, "6"),
        ("mean", (125.3, 123.0, 113.9), r"\(125.3, "),
        ("std", (1, 0, 1), r"\(1, 0, 1\)"),
        ("images", np.zeros((4, 6, 8, 3), np.uint8), "ndarray"),
        ("images", torch.zeros(4, 3, 8, 8).byte(), r"torch.uint8 of shape \(4, 3, 8, 8\)"),
        ("labels", [1, 2, 3, 0], "list"),
        ("labels", torch.zeros(5).long(), r"torch.int64 of shape \(5,\)"),
        ("labels", torch.zeros(4).long().to("meta"), ".* on meta"),
    ],
)
def test_wrong_arguments(kind, name, value, got):
    arguments = {"images": torch.zeros(4, 6, 8, 3).byte(), "labels": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=rf"^{name} must .*, got {got}"):
        kind(**{**arguments, "batch_size": 2, **CIFAR, name: value})


@either
def test_a_plan_of_another_data_set(kind):
    with pytest.raises(ValueError, match=r"^plan must .* 500 samples, got 501$"):
        numbered(kind).epoch(random_plan(501, 100))


@needs_dali
@pytest.mark.parametrize("name", ["torch", "dali", "auto"])
def test_make_loader(name):
    loader, note = make_loader(name, *numbered_images(50), 16, **PIXELS)
    assert type(loader) is (TorchLoader if name == "torch" else DaliLoader)
    assert note is None


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(None, "halted"), (RuntimeError("CUDA error 35:\n  driver too old"), "35: driver too old")],
)
def test_make_loader_where_dali_does_not_work(broken, reason, monkeypatch):
    class Module:
        @staticmethod
        def DaliLoader(*args, **kwargs):
            raise broken

    monkeypatch.setitem(sys.modules, "infobatch_fast.data.dali", broken and Module)
    loader, note = make_loader("auto", *numbered_images(50), 16, **PIXELS)
    assert type(loader) is TorchLoader
    assert note is not None
    assert note.startswith("WARNING: loader auto is torch")
    with pytest.raises(UserError, match=r"^loader dali must .* pip install") as caught:
        make_loader("dali", *numbered_images(50), 16, **PIXELS)
    for line in (note, str(caught.value)):
        assert reason in line
        assert "\n" not in line


def test_make_loader_hides_no_wrong_argument():
    with pytest.raises(UserError, match=r"^loader must .*, got dail "):
        make_loader("dail", *numbered_images(4), 2, **CIFAR)
    with pytest.raises(ValueError, match=r"^batch_size must"):
        make_loader("auto", *numbered_images(4), 0, **CIFAR)


# On a GPU


@pytest.mark.gpu
@either
@pytest.mark.parametrize("augment", [True, False])
def test_cuda_yields_the_batches_of_the_cpu(kind, augment):
    images, labels = random_images(300), torch.arange(300) % 10
    options = {**CIFAR, "seed": 5, "augment": augment}
    on_cpu = TorchLoader(images, labels, 16, **options)
    on_cuda = kind(images.cuda(), labels.cuda(), 16, **options)
    for epoch, (k, start) in enumerate([(300, 0), (77, 2), (1, 0), (0, 0), (160, 10)]):
        expected = on_cpu.epoch(random_plan(300, k, epoch), start)
        batches = on_cuda.epoch(random_plan(300, k, epoch, device="cuda"), start)
        for mine, other in zip(batches, expected, strict=True):
            assert mine[0].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(mine[0].cpu(), other[0], rtol=0, atol=1e-6)
            for a, b in zip((mine[1], *mine[2]), (other[1], *other[2]), strict=True):
                assert torch.equal(a.cpu(), b)


@pytest.mark.gpu
@either
@pytest.mark.parametrize("own_stream", [False, True])
def test_cuda_slow_consumers_read_no_overwritten_batch(kind, own_stream):
    """The host runs ahead of a consumer that sleeps on the device, reads, and ruins its input."""
    n, batch_size = 4096, 64
    images, labels = numbered_images(n, 32)
    loader = kind(images.cuda(), labels.cuda(), batch_size, **PIXELS)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        seen, expected = [], []
        for epoch in range(5):
            plan = random_plan(n, n, epoch, device="cuda")
            count = 50 if epoch % 2 else 64  # every other epoch is left early
            for batch_images, batch_labels, batch in islice(loader.epoch(plan), count):
                torch.cuda._sleep(2_000_000)  # about 1 ms
                ids = numbers_in(batch_images)
                same = (label_of(ids) == batch_labels) & (weight_of(ids) == batch.weights)
                seen.append(torch.where(same & (ids == batch.indices), ids, -2))
                batch_images.fill_(-1)
            expected.append(random_plan(n, n, epoch).indices[: batch_size * count])
            del plan
            torch.full((n,), -1, device="cuda")  # takes memory that the plan may have given back
        result = torch.cat(seen).cpu()
    assert torch.equal(result, torch.cat(expected))


@pytest.mark.gpu
@either
def test_cuda_iterating_does_not_wait_for_the_device(kind):
    images, labels = numbered_images(500)
    loader = kind(images.cuda(), labels.cuda(), 16, **PIXELS)
    plan = random_plan(500, 200, device="cuda")
    list(loader.epoch(plan))  # what is allocated or compiled once may wait
    torch.cuda.synchronize()
    with host_syncs(torch.device("cuda"), "forbid"):
        iterator = iter(loader.epoch(plan, 1))
        # Work of half a second stands before the batches: the host must run ahead of it. torch's
        # debug mode does not see a wait inside DALI; an event that is not over does.
        torch.cuda._sleep(1_000_000_000)
        behind = torch.cuda.Event()
        behind.record()
        batches = [next(iterator)]
        assert not behind.query()
        batches += list(iterator)
    batches = [(x.cpu(), y.cpu(), type(b)(*(t.cpu() for t in b))) for x, y, b in batches]
    assert_batches(batches, random_plan(500, 200), start_batch=1)
