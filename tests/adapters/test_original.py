"""The original's three calls with a plain DataLoader: each loss says which sample it is of."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from infobatch_fast.adapters.original import InfoBatch

N, B, EPOCHS, RATIO = 103, 8, 6, 0.4
DATA = [(torch.tensor([float(i)]), i) for i in range(N)]


def make(data: Any = DATA, **kwargs) -> InfoBatch:
    return InfoBatch(data, EPOCHS, RATIO, 0.7, **{"device": "cpu", **kwargs})


def plain(dataset: InfoBatch, **kwargs) -> DataLoader:
    return DataLoader(dataset, B, sampler=dataset.sampler, **kwargs)


def losses_of(indices: torch.Tensor, epoch: int = 0) -> torch.Tensor:
    return (indices * 37 % 101).float() / 50 + epoch / 100


def train(dataset: InfoBatch, loader: Any, epochs: range = range(EPOCHS)) -> list[list[int]]:
    """The samples of each epoch; every loss was multiplied by its own weight, and recorded."""
    seen = []
    for epoch in epochs:
        order, steps, length = [], 0, len(loader)
        for steps, (_, y) in enumerate(loader, 1):
            if steps == 1 and loader.persistent_workers:
                length = len(loader)
            weights = dataset.weights  # after the first batch: the epoch's
            losses = losses_of(y, epoch)
            rescaled = dataset.update(losses)
            assert torch.equal(losses, losses_of(y, epoch))  # not in place
            assert torch.equal(rescaled, (losses * weights[y]).mean())
            order += y.tolist()
            assert len(loader) == length
        assert length - dataset.infobatch.resume_at // B == steps
        assert len(set(order)) == len(order)
        assert torch.equal(dataset.scores[order], losses_of(torch.tensor(order), epoch))
        seen.append(order)
    return seen


def by_the_original(scores: torch.Tensor, epoch: int, seed: int = 0) -> list[int]:
    """An epoch's order by the original's rule: numpy's lots, seeded by the passes begun so far."""
    lots = np.random.RandomState(epoch + 1 + 1_000_003 * seed)
    well = (scores < scores.mean()).numpy()
    kept = lots.choice(np.where(well)[0], int((1 - RATIO) * well.sum()), replace=False)
    order = np.where(~well)[0].tolist() + kept.tolist()
    lots.shuffle(order)
    return order


LOADERS = {
    "none": {},
    "two": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 5},
    "spawned": {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_three_calls_prune_as_the_original_does(name: str) -> None:
    dataset, scores = make(), torch.empty(N)
    np.random.seed(5)
    before: Any = np.random.get_state()
    orders = train(dataset, plain(dataset, **LOADERS[name]))
    after: Any = np.random.get_state()
    assert np.array_equal(before[1], after[1])
    for epoch, order in enumerate(orders):
        if epoch in (0, 4, 5):  # no scores yet; annealing begins at floor(6 * 0.7)
            assert sorted(order) == list(range(N))
        else:
            assert order == by_the_original(scores, epoch)
        scores[order] = losses_of(torch.tensor(order), epoch)
    assert dataset.get_pruned_count() == N * EPOCHS - sum(map(len, orders)) > 0
    assert dataset.weights.eq(1).all()


def test_weights_are_exact_and_a_seed_gives_other_lots() -> None:
    orders = []
    for seed in (0, 1):
        dataset = make(seed=seed)
        train(dataset, plain(dataset), range(2))
        orders.append(train(dataset, plain(dataset), range(2, 3))[0])
        well = dataset.infobatch.plan.num_prunable  # type: ignore[union-attr]
        weights = dataset.weights[orders[-1]]
        assert weights.sum().item() == pytest.approx(N)
        assert weights.max().item() == pytest.approx(well / int((1 - RATIO) * well))
    assert sorted(orders[0]) != sorted(orders[1])


def test_drop_last_peeks_and_passes_without_an_update() -> None:
    dataset = make()
    loader = plain(dataset, drop_last=True)
    for epoch in range(EPOCHS):
        first = next(iter(loader))[1]
        if epoch:
            assert list(dataset.sampler)[:B] == first.tolist()
        steps = 0
        for steps, (_, y) in enumerate(loader, 1):
            assert steps > 1 or torch.equal(y, first)
            dataset.update(losses_of(y, epoch))
        assert dataset.infobatch.plan.epoch == epoch  # type: ignore[union-attr]
        assert steps == len(dataset.infobatch.plan) // B  # type: ignore[arg-type]


def test_losses_may_wait_and_the_loop_may_look_ahead() -> None:
    dataset = make()
    loader = plain(dataset)
    for epoch in range(EPOCHS):
        waiting = []
        for number, (_, y) in enumerate(loader):
            waiting.append(y)
            if number % 3 == 2:
                for each in waiting:
                    dataset.update(losses_of(each, epoch))
                waiting = []
        for each in waiting:
            dataset.update(losses_of(each, epoch))
        order = dataset.infobatch.plan.indices  # type: ignore[union-attr]
        assert torch.equal(dataset.scores[order], losses_of(order, epoch))


# How often each of the 10 batches of the second epoch is updated, and what is then said of it.
SKIPPED = "^loss of epoch 1 must come for its 80 samples, got 72; "
MISTAKES: dict[str, tuple[Callable[[int], int], str]] = {
    "skipped": (lambda i: i != 4, SKIPPED + "from batch 4 on they were taken for other"),
    "first": (lambda i: i != 0, SKIPPED + "the first left out is batch 0 or one of 8 to 9"),
    "last but two": (lambda i: i != 7, SKIPPED + "from batch 7 on they were taken for other"),
    "last": (lambda i: i != 9, SKIPPED + "the first left out is batch 0 or one of 9 to 9"),
    "twice": (lambda i: 1 + (i == 4), "^loss must be of a batch .* got one more than it gave"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_batch_left_out_or_given_twice_is_named(name: str) -> None:
    times, message = MISTAKES[name]
    dataset = make(DATA[:100])
    loader = plain(dataset)
    train(dataset, loader, range(1))
    assert len(loader) == 10

    def mistaken() -> None:
        for i, (_, y) in enumerate(loader):
            for _ in range(times(i)):
                dataset.update(losses_of(y))
        next(iter(loader))

    with pytest.raises(ValueError, match=message) as caught:
        mistaken()
    assert "`dataset.update(loss, batch)`" in str(caught.value)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_batch_skipped_is_found_though_workers_look_ahead() -> None:
    dataset = make()
    loader = plain(dataset, num_workers=2)
    for i, (_, y) in enumerate(loader):
        if i not in (4, 12):  # the last being smaller, its loss would not fit
            dataset.update(losses_of(y))
    with pytest.raises(ValueError, match=r"103 samples, got 88; from batch 4 on they were"):
        iter(dataset.sampler)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_state_loaded_in_mid_epoch_leaves_no_batch_waiting() -> None:
    dataset = make()
    loader = plain(dataset, num_workers=2, prefetch_factor=8)  # has handed out the whole epoch
    orders = train(dataset, loader, range(1))
    state = dataset.state_dict()
    _, y = next(iter(loader))
    dataset.update(losses_of(y, 1))
    dataset.load_state_dict(state)
    orders += train(dataset, loader, range(1, EPOCHS))
    other = make()
    assert train(other, plain(other)) == orders


class OutOfOrder:
    _in_order, _sampler_iter = False, None  # as torch names them

    def ask(self, batches: BatchSampler) -> None:
        next(iter(batches))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_batches_out_of_order_are_refused_or_bring_their_numbers() -> None:
    data: Any = DATA
    genuine: Any = iter(DataLoader(data, num_workers=1, in_order=False))
    assert genuine._in_order is False
    assert genuine._sampler_iter is not None
    dataset = make()
    with pytest.raises(ValueError, match=r"^in_order of the DataLoader must be True, got False"):
        OutOfOrder().ask(BatchSampler(dataset.sampler, B, False))
    batches = [y for _, y in plain(dataset)]
    with pytest.raises(ValueError, match=r"^loss must hold the 8 values of batch 0 .*, got 7; "):
        dataset.update(losses_of(batches[-1]))
    for epoch in range(EPOCHS):
        for i, ((_, y), batch) in reversed(list(enumerate(dataset.loader(B)))):
            if i != 3:
                dataset.update(losses_of(y, epoch), batch)
        order = dataset.infobatch.plan.indices  # type: ignore[union-attr]
        scores = dataset.scores[torch.cat([order[: 3 * B], order[4 * B :]])]
        assert torch.equal(scores, losses_of(torch.cat([order[: 3 * B], order[4 * B :]]), epoch))


def test_any_sample_and_any_loss() -> None:
    class Words(list):
        classes = ("a", "b")

        def __getitems__(self, indices: list[int]) -> list[dict[str, int]]:
            return [self[i] for i in indices]

    dataset = make(Words({"y": i} for i in range(N)))
    assert (dataset.classes, dataset[3], len(dataset)) == (("a", "b"), {"y": 3}, N)
    with pytest.raises(AttributeError, match="shapes"):
        _ = dataset.shapes
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for number, data in enumerate(plain(dataset)):
        losses = losses_of(data["y"]).to(kinds[number % 4])
        losses = losses.clone().requires_grad_().exp()
        shape = [(-1,), (-1, 1), (-1, 1, 1)][number % 3]
        dataset.update(losses.view(shape)).backward()
        assert torch.equal(dataset.scores[data["y"]], losses.detach().float())
    with pytest.raises(ValueError, match=r"got one more than it gave"):
        dataset.update(torch.ones(B))


def test_a_mean_in_the_place_of_losses_leaves_the_batch_waiting() -> None:
    dataset = make()
    for _, y in plain(dataset):
        with pytest.raises(ValueError, match=r'one value per sample .* \(reduction="none"\)'):
            dataset.update(losses_of(y).mean())
        dataset.update(losses_of(y))


def test_an_odd_loss_neither_stops_pruning_nor_prunes_all() -> None:
    dataset = make()
    loader = plain(dataset)
    for _, y in loader:
        losses = losses_of(y)
        losses[y == 7] = torch.nan
        losses[y == 9] = torch.inf
        dataset.update(losses)
    (order,) = train(dataset, loader, range(1, 2))
    assert {7, 9} < set(order)
    assert len(order) < N


def test_copies_and_states_go_on_alike() -> None:
    dataset = make()
    loader = plain(dataset)
    train(dataset, loader, range(2))
    for number, (_, y) in enumerate(loader):
        dataset.update(losses_of(y, 2))
        if number == 4:
            break
    again = make()
    again.load_state_dict(dataset.state_dict())
    others = [copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))]
    (rest,) = train(again, plain(again), range(2, 3))
    assert len(rest) == len(again.infobatch.plan) - 5 * B  # type: ignore[arg-type]
    following = train(again, plain(again), range(3, EPOCHS))
    for other in others:  # of what is left they know: their loaders begin the next epoch
        assert other.sampler.infobatch is other.infobatch is not dataset.infobatch
        order = torch.tensor(rest)
        other.infobatch.scores[order] = losses_of(order, 2)
        with pytest.warns(UserWarning, match="^epoch 2 is left after 40 of"):
            assert train(other, plain(other), range(3, EPOCHS)) == following


def test_arguments_are_checked_by_name() -> None:
    wrongs: Any = {
        "prune_ratio": (1.5, r"^ratio must be in \[0, 1\), got 1.5$"),
        "delta": (2.0, r"^delta must be in \[0, 1\], got 2.0$"),
        "num_epochs": (0, r"^num_epochs must be a whole number of at least 1, got 0$"),
    }
    for name, (value, message) in wrongs.items():
        with pytest.raises(ValueError, match=message):
            InfoBatch(DATA, **{"num_epochs": 3, name: value})
