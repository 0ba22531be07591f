"""Training through accelerate's prepare: each loss says which sample it is of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampler import EPOCHS, B, Samples, expected, losses_of, make, numbers
from two import both

from infobatch_fast import ProgressLR

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def forget() -> None:
    """Accelerate keeps its state in globals."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """What a script builds."""

    def __init__(self, accumulate: int = 1, **kwargs: Any) -> None:
        forget()
        self.infobatch = make()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        onecycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=100)
        scheduler = ProgressLR(onecycle, self.infobatch, 100)
        self.size = B // self.accelerator.num_processes
        kwargs = {"dataset": Samples(), "batch_size": self.size, "shard": False, **kwargs}
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, self.infobatch.loader(**kwargs), scheduler
        )
        self.accelerator.register_for_checkpointing(self.infobatch)
        self.rates: list[float] = []

    def train(self, stop: tuple[int, int] = (EPOCHS, 0), told: bool = True) -> list[list[int]]:
        """The samples of each epoch, up to a batch of one."""
        seen: list[list[int]] = []
        for epoch in range(self.infobatch.next_epoch, EPOCHS):
            if told:  # else accelerate counts the passes, from 0
                self.loader.set_epoch(epoch)
            next(iter(self.loader))  # a peek
            length, number = len(self.loader), self.infobatch.resume_at // B
            seen.append([])
            for number, (data, batch) in enumerate(self.loader, 1 + number):  # noqa: B020
                assert len(self.loader) == length
                assert numbers(data).tolist() == batch.indices.tolist()
                seen[-1] += batch.indices.tolist()
                with self.accelerator.accumulate(self.model):
                    losses = losses_of(numbers(data), epoch) + 0 * self.model(torch.ones(1))
                    self.accelerator.backward(self.infobatch.update(losses, batch))
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.rates.append(self.scheduler.get_last_lr()[0])
                assert self.accelerator.gradient_state.end_of_dataloader == (number == length)
                if (epoch, number) == stop:
                    break
            self.infobatch.merge()
            if (epoch, number) == stop:
                break
            assert number == length
        return seen


@pytest.mark.parametrize("form", ["tuple", "dict", "named"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_fetched_ahead_keeps_its_own_numbers(form: str, workers: int) -> None:
    run = Run(dataset=Samples(form), num_workers=workers)
    assert run.train() == expected()
    assert max(run.rates) == pytest.approx(0.4, rel=0.05)
    assert run.rates[-1] < 0.01


def test_no_gradient_is_left_when_an_epoch_ends() -> None:
    run = Run(accumulate=3)
    run.train()
    assert run.rates[-1] < 0.01
    steps = sum(-(-len(order) // (3 * B)) for order in expected())
    assert len(set(run.rates)) <= 1 + steps  # the rate changes only where there was a step
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("stop", [(0, 13), (1, 1), (2, 6)])
def test_a_run_goes_on_from_a_saved_state(
    stop: tuple[int, int], told: bool, tmp_path: Path
) -> None:
    orders = expected()
    run = Run()
    run.train(stop)
    run.accelerator.save_state(str(tmp_path))
    again = Run()
    again.accelerator.load_state(str(tmp_path))
    epoch, number = (stop[0] + 1, 0) if stop == (0, 13) else stop
    assert again.train(told=told) == [orders[epoch][number * B :], *orders[epoch + 1 :]]
    assert again.rates[-1] < 0.01


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_two_processes_train_as_one_does(form: str, tmp_path: Path) -> None:
    """But for the samples that accelerate repeats to fill a full epoch's last batch."""

    def work() -> Any:
        run = Run(dataset=Samples(form))
        first = run.train((3, 4))
        run.accelerator.save_state(str(tmp_path))
        again = Run(dataset=Samples(form))
        again.accelerator.load_state(str(tmp_path))
        rest = again.train()
        return [*first[:3], first[3] + rest[0], *rest[1:]], again.infobatch.scores

    orders = expected()
    (one, scores), (other, same) = both(work, tmp_path)
    assert torch.equal(scores, same)
    for parts, order in zip(zip(one, other, strict=True), orders, strict=True):
        steps = zip(*(torch.tensor(part).split(B // 2) for part in parts), strict=True)
        got = torch.cat([torch.cat(step) for step in steps]).tolist()
        assert got[: len(order)] == order
        assert got[len(order) :] == order[: len(got) - len(order)]
        assert len(got) == -(-len(order) // B) * B
