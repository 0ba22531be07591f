"""Several processes share an epoch: each loss is a function of its sample's number and epoch."""

import datetime
import itertools
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_sampler import EPOCHS, N, Samples, expected, losses_of, make
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from infobatch_fast import InfoBatch, Plan, ProgressLR
from infobatch_fast.adapters import original
from infobatch_fast.adapters.sampler import _Picks
from infobatch_fast.ranks import Share, fingerprint, merge

GLOBAL = 8  # samples of a step, on all ranks


def serve(rank: int, world: int, file: str, jobs: Any) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{file}", limit, world, rank)
    groups = {world: None, 2: dist.new_group([0, 1])}
    while (job := jobs.recv()) is not None:
        function, ranks, arguments = job
        try:
            jobs.send((function(groups[ranks], *arguments), None) if rank < ranks else None)
        except Exception as error:
            jobs.send((f"{type(error).__name__}: {error}", traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Four processes of one gloo group, of which the first two have another of their own."""

    def __init__(self, file: str) -> None:
        context = torch.multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(4)]
        self.jobs = [here for here, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, 4, file, there))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, ranks: int, function: Callable, *arguments: Any, fails: bool = False) -> list:
        """What the function gives on each rank, or what error it raises."""
        for job in self.jobs:
            job.send((function, ranks, arguments))
        results = [self._result(job) for job in self.jobs][:ranks]
        for _, error in results:
            assert fails == (error is not None), error
        return [result for result, _ in results]

    def _result(self, job: Any) -> Any:
        assert job.poll(60), "a rank hangs"
        return job.recv()

    def end(self) -> None:
        for job, process in zip(self.jobs, self.processes, strict=True):
            job.send(None)
            process.join(20)
            process.kill()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(str(tmp_path_factory.mktemp("group") / "store"))
    yield ranks
    ranks.end()


def flat(lists: Iterable[Sequence]) -> list:
    return list(itertools.chain.from_iterable(lists))


def place(group: Any) -> tuple[int, int]:
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def train(group: Any, kwargs: dict, arguments: dict) -> dict[str, Any]:
    """A whole run of this rank's: what came, and what was known of it at each step."""
    rank, world = place(group)
    infobatch = make(**kwargs, group=group)
    loader = infobatch.loader(Samples(), GLOBAL // world, **arguments)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    onecycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, EPOCHS * 13)
    schedule = ProgressLR(onecycle, infobatch, EPOCHS * 13)
    said: dict[str, Any] = {"batches": [], "progress": [], "rates": [], "lengths": []}
    for epoch in range(EPOCHS):
        batches = []
        for (_, y), batch in loader:
            assert y.tolist() == batch.indices.tolist()
            infobatch.update(losses_of(y, epoch), batch)
            optimizer.step()
            schedule.step()
            batches.append((y.tolist(), batch.weights.tolist()))
            said["progress"].append(infobatch.progress)
            said["rates"].append(onecycle.get_last_lr())
        said["batches"].append(batches)
        if rank == 0:  # no collective: others are not here
            infobatch.state_dict()
            said["lengths"].append(len(loader))
    return {**said, "scores": infobatch.scores.tolist()}


RUNS: dict[str, tuple[dict, dict]] = {
    "soft": ({}, {}),
    "remembers": ({"policy": "repb"}, {}),
    "target": ({"policy": "hard", "target_saving": 0.3}, {}),
    "drop_last": ({}, {"drop_last": True}),
    "workers": ({}, {"num_workers": 1, "persistent_workers": True}),
}


@pytest.mark.parametrize(
    ("name", "world"), [*((name, 2) for name in RUNS), ("soft", 4), ("remembers", 4)]
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_all_train_together_on_what_one_would_train_on(ranks: Ranks, name: str, world: int) -> None:
    alone = train(None, *RUNS[name])
    assert len(alone["batches"][1]) < N // GLOBAL
    said = ranks.run(world, train, *RUNS[name])
    batches = [each.pop("batches") for each in said]
    for epoch, whole in enumerate(alone.pop("batches")):
        assert [len(each[epoch]) for each in batches] == [len(whole)] * world
        for step, (samples, weights) in enumerate(whole):
            parts = [each[epoch][step] for each in batches]
            assert flat(part[0] for part in parts) == samples
            assert flat(part[1] for part in parts) == weights
    assert said[0].pop("lengths") == alone.pop("lengths")
    for each in said:
        each.pop("lengths", None)
        assert str(each) == str(alone)  # a NaN is not equal to itself


def shared_out(group: Any, late: bool) -> tuple[list[list[int]], list[float]]:
    """A loop that shares out batches by itself, as accelerate does; or that updates late."""
    rank, world = place(group)
    infobatch = make(group=group)
    loader = infobatch.loader(Samples(), GLOBAL // world, shard=False)
    orders, waiting = [], None
    for epoch in range(EPOCHS):
        order = []
        for number, ((_, y), batch) in enumerate(loader):
            order += y.tolist()
            if number % world != rank:
                continue
            if waiting is not None:
                infobatch.update(*waiting)
            waiting = losses_of(y, epoch), batch
            if not late:
                infobatch.update(*waiting)
                waiting = None
        orders.append(order)
    infobatch.merge()
    return orders, infobatch.scores.tolist()


def test_batches_that_are_shared_out_elsewhere(ranks: Ranks) -> None:
    said = ranks.run(2, shared_out, False)
    assert [orders for orders, _ in said] == [expected()] * 2
    late = ranks.run(2, shared_out, True)
    for (_, a), (_, b) in (said, late):
        assert a == pytest.approx(b, abs=0, nan_ok=True)


def prepared(group: Any, shard: bool) -> list[float]:
    """What accelerate's `prepare` makes of a loader; it fills the last batches by repeating."""
    from accelerate.data_loader import prepare_data_loader

    rank, world = place(group)
    infobatch = make(group=group)
    loader: Any = infobatch.loader(Samples(), GLOBAL // world, shard=shard)
    loader = prepare_data_loader(loader, num_processes=world, process_index=rank)
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        assert infobatch.progress == epoch / EPOCHS
        for _, batch in loader:
            infobatch.update(losses_of(batch.indices, epoch), batch)
    infobatch.merge()
    return infobatch.scores.tolist()


def test_what_accelerate_shares_out(ranks: Ranks) -> None:
    pytest.importorskip("accelerate")
    scores = losses_of(torch.arange(N), EPOCHS - 1).tolist()
    assert ranks.run(2, prepared, False) == [scores] * 2
    assert (
        ranks.run(2, prepared, True, fails=True)
        == ["ValueError: shard must be False where accelerate shares batches out, got True"] * 2
    )


def stop(group: Any, policy: str, steps: int) -> dict[str, Any]:
    """The state after so many steps of epoch 2."""
    infobatch = make(policy=policy, group=group)
    loader = infobatch.loader(Samples(), GLOBAL // place(group)[1])
    for epoch in range(3):
        for number, ((_, y), batch) in enumerate(loader, 1):
            infobatch.update(losses_of(y, epoch), batch)
            if epoch == 2 and number == steps:
                break
    with pytest.raises(RuntimeError, match=r"^merge\(\) must be called on every rank before"):
        infobatch.state_dict()
    infobatch.merge()
    return infobatch.state_dict()


def go_on(group: Any, policy: str, state: dict) -> tuple[list[list[list[int]]], str]:
    infobatch = make(policy=policy, group=group)
    loader = infobatch.loader(Samples(), GLOBAL // place(group)[1])
    infobatch.load_state_dict(state)
    found = infobatch.check(loader)
    batches: list[list[list[int]]] = []
    for epoch in range(infobatch.next_epoch, EPOCHS):
        batches.append([])
        for (_, y), batch in loader:
            infobatch.update(losses_of(y, epoch), batch)
            batches[-1].append(y.tolist())
    return batches, found


@pytest.mark.parametrize("policy", ["soft", "repb"])
def test_a_state_goes_on_with_any_number_of_ranks(ranks: Ranks, policy: str) -> None:
    orders = expected(policy=policy)
    states = ranks.run(2, stop, policy, 3)
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert str(one) == str(other)
    resumed = {1: [go_on(None, policy, states[0])]}
    resumed |= {world: ranks.run(world, go_on, policy, states[0]) for world in (2, 4)}
    for world, each in resumed.items():
        got = []
        for parts in zip(*(batches for batches, _ in each), strict=True):
            got.append(flat(flat(step) for step in zip(*parts, strict=True)))
        assert got == [orders[2][3 * GLOBAL :], *orders[3:]]
        where = f" on each of {world} ranks, of one plan" if world > 1 else ""
        left, steps = len(got[0]), len(got[0]) // GLOBAL
        found = f"{left} of {N} samples, each once, in {steps} batches{where}"
        assert [said for _, said in each] == [found] * world


def another(group: Any, what: str, odd: list[int]) -> None:
    """Some ranks are odd: by their seed, or by a score before epoch 1."""
    mine = place(group)[0] in odd
    infobatch = make(seed=int(mine and what == "seed"), group=group)
    loader = infobatch.loader(Samples(), 3 if mine and what == "batch size" else 2)
    for _ in range(2):
        for (_, y), batch in loader:
            infobatch.update(losses_of(y), batch)
        infobatch.scores[7] = 1e9 if mine else 0.0


@pytest.mark.parametrize(
    ("what", "odd", "message"),
    [
        ("seed", [1, 3], "plan of epoch 0 .* on rank 1, 3$"),
        ("score", [2], "plan of epoch 1 .* on rank 2$"),
        ("batch size", [3], "plan of epoch 0 .* on rank 3$"),
    ],
)
def test_ranks_that_differ_are_named(ranks: Ranks, what: str, odd: list, message: str) -> None:
    said = ranks.run(4, another, what, odd, fails=True)
    assert len(set(said)) == 1
    assert re.match(f"Unlike: {message}", said[0])


def bits(group: Any, given: Tensor) -> list[int]:
    """Rank r records the samples r, r + 4, ...; 5 is nobody's, 6 is everybody's."""
    rank = place(group)[0]
    scores, mine = torch.full_like(given, rank - 0.5), torch.arange(len(given)) % 4 == rank
    scores[5], mine[5] = -0.0, False
    scores[mine] = given[mine]
    scores[6], mine[6] = rank / 2, True
    merge(scores, mine, group)
    return scores.view(torch.int32).tolist()


def test_scores_are_copied_bit_for_bit(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1000, generator=generator)
    given[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45, 0.0])
    given[5], given[6], given[7] = -0.0, 1.5, 0.0
    sent = given.clone()
    sent[7] = -0.0  # the one that is not copied as it is
    assert ranks.run(4, bits, sent) == [given.view(torch.int32).tolist()] * 4


def descend(group: Any, sharded: bool = False) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(104, 5, generator=generator), torch.arange(104) % 3
    infobatch = InfoBatch(104, EPOCHS, delta=0.7, device="cpu", group=group)
    loader = infobatch.loader(TensorDataset(x, y), GLOBAL // place(group)[1])
    model: Any = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    if sharded:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    elif dist.is_initialized():
        model = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(EPOCHS):
        for (images, labels), batch in loader:
            losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
            infobatch.update(losses, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole]).tolist()


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP"])
def test_parallel_models_descend_as_one_process_does(ranks: Ranks, sharded: bool) -> None:
    first, second = ranks.run(2, descend, sharded)
    assert first == second == pytest.approx(descend(None), rel=1e-4, abs=1e-6)


def drop_in(group: Any) -> tuple[list[list[int]], list[float]]:
    dataset = original.InfoBatch(Samples(), EPOCHS, device="cpu")
    dataset.infobatch.group = group
    loader = torch.utils.data.DataLoader(
        dataset, GLOBAL // place(group)[1], sampler=dataset.sampler
    )
    orders = []
    for epoch in range(EPOCHS):
        length, steps = len(loader), []
        for _, y in loader:
            dataset.update(losses_of(y, epoch))
            steps.append(y)
        assert len(steps) == length
        orders.append(torch.cat(steps).tolist())
    dataset.infobatch.merge()
    return orders, dataset.scores.tolist()


def test_the_originals_calls(ranks: Ranks) -> None:
    alone, scores = drop_in(None)
    said = ranks.run(2, drop_in)
    for epoch, order in enumerate(alone):
        assert sorted(flat(orders[epoch] for orders, _ in said)) == sorted(order)
    assert [each for _, each in said] == [scores] * 2


SHARES = [
    (count, world, size)
    for count in (0, 1, 3, 8, 97, 103)
    for world in (1, 2, 3, 4)
    for size in (1, 2, 5)
]


@pytest.mark.parametrize("start", [0, 5])
def test_shares_are_whole_even_and_counted(start: int) -> None:
    for count, world, size in SHARES:
        order = torch.arange(count + start)
        plan = Plan(0, count + start, 0, order, order.float())
        shares = [Share(rank, world, size) for rank in range(world)]
        parts = [share.of(plan, start) for share in shares]
        for share, part in zip(shares, parts, strict=True):
            assert len(part) == share.own(count)
            assert torch.equal(part.indices.float(), part.weights)
        steps = [part.indices.split(size) if len(part) else () for part in parts]
        assert len(set(map(len, steps))) == 1
        got = [int(i) for step in zip(*steps, strict=True) for i in torch.cat(step)]
        assert got == list(range(start, start + len(got)))
        whole = count // (world * size) * world * size
        rest = count - whole
        assert len(got) == whole + (rest if rest >= world else 0)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for step in range(whole // world // size):
            reached = {share.reached(count, size * step) for share in shares}
            assert reached == {world * size * step}
        reached = [s.reached(count, len(p)) for s, p in zip(shares, parts, strict=True)]
        assert reached == [count] * world


@pytest.mark.parametrize("world", [1, 2])
def test_a_stateful_loader_finds_its_place_in_a_share(world: int) -> None:
    plan = make().sample(0)
    for rank in range(world):
        for start, given in ((0, 8), (0, 0), (16, 24)):
            picks = _Picks(plan, Share(rank, world, 4), start)
            for _ in range(given):
                next(picks)
            again = _Picks(plan, Share(rank, world, 4), start)
            again.load_state_dict(picks.state_dict())
            assert list(again) == list(picks)
            assert picks.state_dict() == {"epoch": 1, "position": 0}


def test_a_plans_fingerprint_tells_its_order_and_weights() -> None:
    order, weights = torch.arange(N), torch.ones(N)
    swapped = order.clone()
    swapped[:2] = torch.tensor([1, 0])
    heavier = weights.clone()
    heavier[5] = 1 + 2**-23
    plans = [
        Plan(0, N, 0, order, weights),
        Plan(1, N, 0, order, weights),
        Plan(0, N, 0, order[:-1], weights[:-1]),
        Plan(0, N, 0, swapped, weights),
        Plan(0, N, 0, order, heavier),
    ]
    values = [int(fingerprint(plan)) for plan in plans]
    assert len({value & 0xFFFFFFFF for value in values}) == len(plans)
    assert int(fingerprint(Plan(0, N, 0, order.clone(), weights.clone()))) == values[0]


def test_processes_that_have_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    infobatch = make()
    loader = infobatch.loader(Samples(), 2)
    for call in (lambda: len(loader), lambda: next(iter(loader)), lambda: infobatch.sample(0, 2)):
        with pytest.raises(RuntimeError, match=r"^torch.distributed.init_process_.* got 4$"):
            call()


def batchless(group: Any) -> None:
    make(group=group).sample(0)


def test_a_batch_size_must_be_given(ranks: Ranks) -> None:
    (said, _) = ranks.run(2, batchless, fails=True)
    assert said == "ValueError: batch_size must be given where 2 processes share an epoch"
