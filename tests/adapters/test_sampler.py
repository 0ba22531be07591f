"""Attribution through a torch DataLoader: each loss is a function of its sample's number alone."""

import copy
import pickle
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from infobatch_fast import Batch, InfoBatch, ProgressLR
from infobatch_fast.adapters.sampler import Loader

N, B, EPOCHS = 103, 8, 6
Pair = namedtuple("Pair", "x y")


class Samples(Dataset):
    """N samples of a form: what each holds says which it is."""

    def __init__(self, form: str = "tuple", n: int = N) -> None:
        self.form, self.n = form, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        x, y = torch.full((2,), float(i)), i
        return {"tensor": x, "tuple": (x, y), "named": Pair(x, y), "dict": {"x": x, "y": y}}[
            self.form
        ]


class Stream(IterableDataset):
    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(range(N))


class Table(Samples):
    def __getitem__(self, i: int) -> Any:
        raise AssertionError("one at a time")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [Samples.__getitem__(self, i) for i in indices]


def numbers(data: Any) -> torch.Tensor:
    """Which samples a batch of the user's holds."""
    if isinstance(data, dict):
        return data["y"]
    return data[:, 0].long() if isinstance(data, torch.Tensor) else data[1]


def make(**kwargs) -> InfoBatch:
    return InfoBatch(N, EPOCHS, **{"device": "cpu", "delta": 0.7, **kwargs})


def losses_of(indices: torch.Tensor, epoch: int = 0) -> torch.Tensor:
    return (indices * 37 % 101).float() / 50 + epoch / 100


def train(infobatch: InfoBatch, loader: Any, epochs: range) -> list[list[int]]:
    """The indices of each epoch, every loss checked to have come with its own sample."""
    seen = []
    for epoch in epochs:
        order, length = [], len(loader)
        for data, batch in loader:
            assert numbers(data).tolist() == batch.indices.tolist()
            infobatch.update(losses_of(numbers(data), epoch), batch)
            order += batch.indices.tolist()
        assert len(set(order)) == len(order)
        if isinstance(loader, Loader):
            assert length == -(-len(order) // B)
        assert torch.equal(infobatch.scores[order], losses_of(torch.tensor(order), epoch))
        seen.append(order)
    return seen


def expected(**kwargs) -> list[list[int]]:
    """The same run by the plans alone."""
    infobatch = make(**kwargs)
    orders = []
    for epoch in range(EPOCHS):
        plan = infobatch.sample(epoch, B)
        for batch in plan.batches(B):
            infobatch.update(losses_of(batch.indices, epoch), batch)
        orders.append(plan.indices.tolist())
    assert min(map(len, orders)) < N == max(map(len, orders))
    return orders


DATASETS = {
    **{form: Samples(form) for form in ("tensor", "tuple", "named", "dict")},
    "items": Table(),
    "TensorDataset": TensorDataset(torch.arange(N).float()[:, None], torch.arange(N)),
    "Subset": Subset(Samples(n=N + 5), range(N)),
    "ConcatDataset": ConcatDataset([Samples(n=N)]),
    "list": [(torch.tensor([float(i)]), i) for i in range(N)],
}


@pytest.mark.parametrize("name", DATASETS)
def test_every_form_of_data_gives_the_plans_order(name: str) -> None:
    infobatch = make()
    assert train(infobatch, infobatch.loader(DATASETS[name], B), range(EPOCHS)) == expected()


WORKERS = {
    "two": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 5},
    "spawned": {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
}


@pytest.mark.parametrize("name", WORKERS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_looking_ahead_mispair_nothing(name: str) -> None:
    infobatch = make()
    loader = infobatch.loader(Samples("dict"), B, **WORKERS[name])
    assert train(infobatch, loader, range(EPOCHS)) == expected()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_batches_out_of_order_keep_their_own_weights() -> None:
    infobatch = make()
    loader = infobatch.loader(Samples(), B, num_workers=2, in_order=False)
    for epoch in range(EPOCHS):
        (order,) = train(infobatch, loader, range(epoch, epoch + 1))
        assert infobatch.plan is not None
        assert sorted(order) == sorted(infobatch.plan.indices.tolist())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_indices_and_weights_come_from_a_worker_without_a_shared_file() -> None:
    for samples, batch in make().loader(Samples(), B, num_workers=1):
        assert samples[0].is_shared()
        assert not batch.indices.is_shared()
        assert not batch.weights.is_shared()
        batch.weights.mul_(2)  # a user's to write to


def test_a_collate_of_ones_own_sees_the_users_samples() -> None:
    infobatch = make()
    texts = [("a" * (i % 7 + 1), i) for i in range(N)]
    loader = infobatch.loader(texts, B, collate_fn=lambda rows: ([r[0] for r in rows], len(rows)))
    for (words, size), batch in loader:
        assert words == [texts[i][0] for i in batch.indices.tolist()]
        assert size == len(batch.indices)


def test_the_parts_make_the_same_loader() -> None:
    infobatch = make()
    loader = DataLoader(
        infobatch.wrap(Samples()), B, sampler=infobatch.sampler(B), collate_fn=infobatch.collate()
    )
    assert train(infobatch, loader, range(EPOCHS)) == expected()


@pytest.mark.filterwarnings("ignore:epoch 2 is left after 24 of:UserWarning")
def test_drop_last_peeks_and_epochs_left_early() -> None:
    infobatch = make()
    loader = infobatch.loader(Samples(), B, drop_last=True)
    orders = []
    for epoch in range(EPOCHS):
        first = next(iter(loader))[1]  # a peek
        assert torch.equal(first.indices, next(iter(loader))[1].indices)
        assert infobatch.plan is not None
        assert infobatch.plan.epoch == epoch
        length, order = len(loader), []
        for (_, y), batch in loader:
            infobatch.update(losses_of(y), batch)
            order += batch.indices.tolist()
            if epoch == 2 and len(order) == 3 * B:
                break
            assert len(loader) == length
        assert order[:B] == first.indices.tolist()
        orders.append(order)
    assert [len(order) % B for order in orders] == [0] * EPOCHS
    with pytest.raises(ValueError, match=r"^num_epochs must be the number of .*, got 6 and one"):
        iter(loader.sampler)


@pytest.mark.parametrize("done", range(1, EPOCHS + 1))
def test_an_epoch_is_over_without_the_samples_that_drop_last_drops(done: int) -> None:
    infobatch = make()
    train(infobatch, infobatch.loader(Samples(), B, drop_last=True), range(done))
    assert infobatch.next_epoch == done
    assert infobatch.progress == done / EPOCHS
    again = make()
    again.load_state_dict(infobatch.state_dict())
    loader = again.loader(Samples(), B, drop_last=True)
    for epoch in range(again.next_epoch, EPOCHS):
        (order,) = train(again, loader, range(epoch, epoch + 1))
        assert again.plan is not None
        assert again.plan.epoch == epoch
        assert len(order) == len(again.plan) // B * B
    with pytest.raises(ValueError, match=r"^batch_size .* at most the 103 samples .*, got 104$"):
        len(make().loader(Samples(), 104, drop_last=True))


@pytest.mark.filterwarnings("ignore:epoch . is left after 24 of:UserWarning")
def test_a_loader_of_its_own_for_each_epoch_left_early() -> None:
    infobatch = make()
    for epoch in range(EPOCHS):
        for number, ((_, y), batch) in enumerate(infobatch.loader(Samples(), B), 1):
            infobatch.update(losses_of(y), batch)
            if number == 3:
                break
        assert infobatch.plan is not None
        assert infobatch.plan.epoch == epoch


def test_a_peek_in_mid_epoch_is_told_what_it_does() -> None:
    infobatch = make()
    loader = infobatch.loader(Samples(), B)
    (_, y), batch = next(iter(loader))
    infobatch.update(losses_of(y), batch)
    with pytest.warns(UserWarning, match="^epoch 0 is left after 8 of 103 samples, and the next"):
        iter(loader.sampler)


def ahead(loader: Any) -> Iterator[Any]:
    """One batch ahead, as a loader that moves the next to the device."""
    held = None
    for item in loader:
        if held is not None:
            yield held
        held = item
    yield held


def test_a_loop_that_looks_ahead_may_ask_for_the_length_at_any_time() -> None:
    infobatch = make()
    loader, seen = infobatch.loader(Samples(), B), []
    for epoch in range(EPOCHS):
        length, order = len(loader), []
        for (_, y), batch in ahead(loader):
            assert len(loader) == length
            infobatch.update(losses_of(y, epoch), batch)
            order += batch.indices.tolist()
        seen.append(order)
    assert seen == expected()


def test_set_epoch_wins() -> None:
    infobatch = make()
    loader: Any = infobatch.loader(Samples(), B)
    orders = []
    for epoch in range(EPOCHS):
        iter(loader.sampler)  # as Lightning does, before it sets the epoch
        loader.sampler.set_epoch(epoch)
        orders += train(infobatch, loader, range(epoch, epoch + 1))
    assert orders == expected()


def test_an_epoch_that_is_over_is_not_given_again() -> None:
    infobatch = make()
    orders = train(infobatch, infobatch.loader(Samples(), B), range(3))
    again = make()
    again.load_state_dict(infobatch.state_dict())
    loader: Any = again.loader(Samples(), B)
    for epoch in range(3, EPOCHS):
        loader.sampler.set_epoch(epoch - 3)
        orders += train(again, loader, range(epoch, epoch + 1))
    assert orders == expected()


def test_accumulation_and_updates_after_the_epoch() -> None:
    infobatch, waiting = make(), []
    loader = infobatch.loader(Samples(), B)
    for epoch in range(2):
        waiting = [(losses_of(y, epoch), batch) for (_, y), batch in loader]
        for losses, batch in waiting:
            infobatch.update(losses, batch)
    assert infobatch.plan is not None
    assert infobatch.plan.epoch == 1
    assert len(waiting) == len(infobatch.plan) / B


@pytest.mark.parametrize("stop", [1, 5, 12])
@pytest.mark.parametrize("policy", ["soft", "repb", "hard"])
def test_a_state_saved_in_mid_epoch_goes_on_with_the_rest(policy: str, stop: int, tmp_path) -> None:
    orders = expected(policy=policy)
    infobatch = make(policy=policy)
    loader = infobatch.loader(Samples(), B)
    train(infobatch, loader, range(2))
    number = 0
    for number, ((_, y), batch) in enumerate(loader, 1):
        infobatch.update(losses_of(y, 2), batch)
        if number == min(stop, len(orders[2]) // B):
            break
    torch.save(infobatch.state_dict(), tmp_path / "state")
    again = make(policy=policy)
    loader = again.loader(Samples(), B)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert "each once" in again.check(loader)
    rest = [] if number * B >= len(orders[2]) else [orders[2][number * B :]]
    got = []
    for epoch in range(3 - len(rest), EPOCHS):
        order = []
        for (_, y), batch in loader:
            again.update(losses_of(y, epoch), batch)
            order += batch.indices.tolist()
        got.append(order)
    assert got == rest + orders[3:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 10, 11], ids=["within", "last batch", "end"])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_stateful_dataloader_resumes_bit_for_bit(stop: int, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    orders = expected()
    assert len(orders[2]) == 10 * B

    def build(infobatch: InfoBatch) -> Any:
        return stateful(
            infobatch.wrap(Samples()),
            B,
            sampler=infobatch.sampler(B),
            collate_fn=infobatch.collate(),
            num_workers=workers,
        )

    infobatch = make()
    loader = build(infobatch)
    train(infobatch, loader, range(2))
    for number, ((_, y), batch) in enumerate(loader, 1):
        infobatch.update(losses_of(y, 2), batch)
        if number == stop:
            break
    states = infobatch.state_dict(), loader.state_dict()
    again = make()
    loader = build(again)
    again.load_state_dict(states[0])
    loader.load_state_dict(states[1])
    got = []
    for epoch in range(again.next_epoch, EPOCHS):
        order = []
        for (_, y), batch in loader:
            again.update(losses_of(y, epoch), batch)
            order += batch.indices.tolist()
        got.append(order)
    assert got == [orders[2][3 * B :]] * (stop == 3) + orders[3:]


def test_copies_and_pickles_of_the_wrapped_data() -> None:
    infobatch = make()
    wrapped = infobatch.wrap(Samples("dict"))
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert len(other) == N
        assert other.form == "dict"
    loader: Any = infobatch.loader(Samples(), B)
    loader.dataset.form = "tensor"
    assert isinstance(next(iter(loader))[0], torch.Tensor)
    assert loader.dataset[3].tolist() == [3, 3]


def test_check_says_what_is_wrong() -> None:
    infobatch = make()
    good = infobatch.loader(Samples(), B)
    assert infobatch.check(good) == f"{N} of {N} samples, each once, in 13 batches"
    assert train(infobatch, good, range(EPOCHS)) == expected()  # a dry pass changed nothing

    another = make()
    with pytest.raises(ValueError, match=r"^loader must be of this InfoBatch, got another's$"):
        another.check(good)
    parts: Any = another.wrap(Samples()), B
    loader = DataLoader(
        *parts, sampler=another.sampler(B), collate_fn=another.collate(), drop_last=True
    )
    for (_, y), batch in loader:  # and its last samples are not asked for: it is left early
        another.update(losses_of(y), batch)
    with pytest.warns(UserWarning, match="^epoch 0 is left after 96 of 103"):
        assert "each once" in another.check(loader)  # of epoch 1

    infobatch = make()

    class Heavier:
        def __call__(self, picked: Any) -> Any:
            data, batch = infobatch.collate()(picked)
            return data, Batch(batch.indices, batch.weights * 2)

    parts = infobatch.wrap(Samples()), B
    collates: Any = {"^collate_fn must give ": str, "^weights of batch 0 are not": Heavier()}
    for message, collate in collates.items():
        loader = DataLoader(*parts, sampler=infobatch.sampler(B), collate_fn=collate)
        with pytest.raises(ValueError, match=message):
            infobatch.check(loader)
    with pytest.raises(ValueError, match=r"^sampler of the loader must be infobatch.sampler\(\)"):
        infobatch.check(DataLoader(*parts))


def test_check_knows_no_default_dtype() -> None:
    infobatch = make()
    torch.set_default_dtype(torch.float64)
    try:
        assert "each once" in infobatch.check(infobatch.loader(Samples(), B))
    finally:
        torch.set_default_dtype(torch.float32)


def test_mistakes_get_one_line() -> None:
    infobatch = make()
    with pytest.raises(ValueError, match=r"^dataset must have the 103 samples .*, got 7$"):
        infobatch.loader(Samples(n=7), B)
    with pytest.raises(TypeError, match=r"^dataset must be map-style, with .*, got generator$"):
        infobatch.loader((i for i in range(3)), B)
    with pytest.raises(TypeError, match=r"^dataset must be map-style, with .*, got Stream$"):
        infobatch.loader(Stream(), B)
    growing = list(range(N))
    loader = infobatch.loader(growing, B)
    growing.append(N)
    with pytest.raises(ValueError, match=r"^dataset must have the 103 samples .*, got 104$"):
        iter(loader)
    parts: Any = infobatch.sampler(B), infobatch.collate(), infobatch.wrap(Samples())
    for dataset, collate, message in (
        (Samples(), parts[1], r"^dataset of the loader must be infobatch.wrap\(dataset\), got S"),
        (parts[2], None, r"^collate_fn of the DataLoader must be infobatch.collate\(\)"),
        (parts[2], list, r"^collate_fn of the DataLoader must be infobatch.collate\(\)"),
    ):
        loader = DataLoader(dataset, B, sampler=parts[0], collate_fn=collate)
        with pytest.raises((TypeError, ValueError), match=message):
            infobatch.check(loader)
    with pytest.raises(ValueError, match=r"^shuffle must be left to the InfoBatch"):
        infobatch.loader(Samples(), B, shuffle=True)
    with pytest.raises(TypeError, match=r"^a pick of infobatch.sampler\(\) must come"):
        next(iter(DataLoader(infobatch.wrap(Samples()), B)))
    loader = infobatch.loader(Samples(), B)
    list(loader)
    with pytest.warns(UserWarning, match=r"^the first epoch is given again, as update\(\)"):
        list(loader)


@pytest.mark.parametrize("kind", ["lambda", "onecycle"])
def test_a_scheduler_resumed_with_another_batch_size_ends_where_it_should(kind: str) -> None:
    infobatch = make()
    rates = []
    state: Any = None
    for size, epochs in ((2 * B, range(2)), (B, range(2, EPOCHS))):
        loader = infobatch.loader(Samples(), size)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        total = EPOCHS * -(-N // size)
        if kind == "lambda":
            scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step, total=total: 1 - step / total
            )
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=total)
        schedule = ProgressLR(scheduler, infobatch, total)
        if state:
            schedule.load_state_dict(state)
        for epoch in epochs:
            for (_, y), batch in loader:
                infobatch.update(losses_of(y, epoch), batch)
                optimizer.step()
                schedule.step()
                rates.append(schedule.get_last_lr()[0])
        state = schedule.state_dict()
    assert rates[-1] == pytest.approx(0, abs=2e-3)
    assert len(rates) < EPOCHS * -(-N // B)


def test_a_scheduler_that_goes_by_a_metric_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match=r"^scheduler must be one of steps, got ReduceLROnPlateau"):
        ProgressLR(plateau, make(), 8)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_any_scheduler_ends_where_it_should(accumulate: int) -> None:
    infobatch = make()
    loader = infobatch.loader(Samples(), B)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    total = EPOCHS * len(loader)
    onecycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=total)
    schedule = ProgressLR(onecycle, infobatch, total)
    rates, steps = [], 0
    for epoch in range(EPOCHS):
        for (_, y), batch in loader:
            infobatch.update(losses_of(y, epoch), batch)
            steps += 1
            if steps % accumulate == 0:
                optimizer.step()
                schedule.step()
                rates.append(optimizer.param_groups[0]["lr"])
    schedule.step()
    assert steps < total
    assert schedule.taken == total == onecycle.last_epoch
    assert max(rates) == pytest.approx(0.4, rel=0.05)
    assert rates[-1] < 0.01 * max(rates)
