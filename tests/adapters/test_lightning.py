"""Training through Lightning: each loss says which sample it is of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampler import EPOCHS, B, N, Samples, expected, losses_of, make, numbers
from torch.utils.data import DataLoader
from two import both

from infobatch_fast import InfoBatch, ProgressLR

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from infobatch_fast.adapters.lightning import InfoBatchCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (
        r".*isinstance\(treespec, LeafSpec\)",
        "The '.*' does not have many workers",
        "The number of training batches",
        "This process .* is multi-threaded",
        "Checkpoint directory",
    )
]


class Module(LightningModule):
    """Trains nothing; writes down what came."""

    def __init__(self, infobatch: InfoBatch) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.infobatch = infobatch
        self.epochs: dict[int, list[int]] = {}
        self.lengths: dict[int, Any] = {}
        self.validated: list[int] = []
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        data, batch = batch
        assert numbers(data).tolist() == batch.indices.tolist()
        order = self.epochs.setdefault(self.current_epoch, [])
        order += batch.indices.tolist()
        length = self.lengths.setdefault(self.current_epoch, self.trainer.num_training_batches)
        assert self.trainer.is_last_batch == (batch_idx + 1 == length)
        losses = losses_of(numbers(data), self.current_epoch) + 0 * self.weight
        return self.infobatch.update(losses, batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        total = int(self.trainer.estimated_stepping_batches)  # smaller in a pruned epoch
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total)
        scheduler = ProgressLR(scheduler, self.infobatch, total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def fit(module: Module, loader: Any = None, ckpt_path: Any = None, **kwargs: Any) -> Module:
    infobatch = module.infobatch
    callbacks = [InfoBatchCallback(infobatch), *kwargs.pop("callbacks", [])]
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    quiet["enable_checkpointing"] = len(callbacks) > 1
    kwargs = {"accelerator": "cpu", "num_sanity_val_steps": 0, "max_epochs": EPOCHS, **kwargs}
    trainer = Trainer(callbacks=callbacks, **quiet, **kwargs)
    trainer.fit(module, loader, DataLoader(Samples(n=1)), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_epochs_are_planned_whole_and_validated(workers: int, form: str) -> None:
    infobatch = make()
    loader = infobatch.loader(Samples(form), B, num_workers=workers, persistent_workers=workers > 0)
    module = fit(Module(infobatch), loader)
    orders = expected()
    assert list(module.epochs.values()) == orders
    assert list(module.lengths.values()) == [-(-len(order) // B) for order in orders]
    assert module.validated == list(range(EPOCHS))
    assert max(module.rates) == pytest.approx(0.4, rel=0.05)
    assert module.rates[-1] < 0.01


def test_a_loader_of_its_own_for_each_epoch_and_accumulation() -> None:
    class Own(Module):
        def train_dataloader(self) -> Any:
            return self.infobatch.loader(Samples(), B, drop_last=True)

    module = fit(Own(make()), accumulate_grad_batches=3)
    assert list(module.lengths.values()) == [len(order) // B for order in module.epochs.values()]
    assert module.lengths[1] < module.lengths[0] == N // B == module.lengths[EPOCHS - 1]
    assert module.validated == list(range(EPOCHS))


STEPS = {"every_n_train_steps": 1, "filename": "{step}"}
EPOCH = {"save_on_train_epoch_end": True, "filename": "{epoch}"}
VALIDATED = {"save_on_train_epoch_end": False, "filename": "{epoch}"}


@pytest.mark.parametrize(
    ("when", "name", "epoch", "done"),
    [
        *((STEPS, f"step={step}", 0, step) for step in (2, 12)),
        (STEPS, "step=13", 1, 0),  # before the first epoch's end is seen to
        *((STEPS, f"step={13 + step}", 1, step) for step in (1, 6)),
        *((when, f"epoch={e}", e + 1, 0) for when in (EPOCH, VALIDATED) for e in (0, 1, 3)),
    ],
)
def test_a_run_goes_on_from_any_checkpoint(
    when: Any, name: str, epoch: int, done: int, tmp_path: Path
) -> None:
    def run(**kwargs: Any) -> Module:
        infobatch = make()
        every = ModelCheckpoint(tmp_path, save_top_k=-1, **when)
        return fit(Module(infobatch), infobatch.loader(Samples(), B), callbacks=[every], **kwargs)

    orders = expected()
    run(max_epochs=5)
    module = run(ckpt_path=tmp_path / f"{name}.ckpt")
    rest = {e: orders[e] for e in range(epoch, EPOCHS)}
    rest[epoch] = rest[epoch][done * B :]
    assert module.epochs == rest
    assert module.validated == list(range(epoch, EPOCHS))
    assert module.lengths == {e: -(-len(orders[e]) // B) for e in rest}
    assert module.rates[-1] < 0.01


def together(parts: list[list[int]]) -> list[int]:
    """An epoch's order from those of two ranks, of batches of B / 2."""
    steps = zip(*(torch.tensor(part).split(B // 2) for part in parts), strict=True)
    return torch.cat([torch.cat(step) for step in steps]).tolist()


@pytest.mark.parametrize(
    ("when", "name", "epoch", "done"),
    [(STEPS, "step=16", 1, 3), (EPOCH, "epoch=1", 2, 0), (VALIDATED, "epoch=3", 4, 0)],
)
def test_two_processes_train_as_one_does(
    when: Any, name: str, epoch: int, done: int, tmp_path: Path
) -> None:
    """And go on together from a checkpoint."""

    def run(**kwargs: Any) -> Module:
        infobatch = make()
        loader = infobatch.loader(Samples(), B // 2)
        every = ModelCheckpoint(tmp_path, save_top_k=-1, **when)
        kwargs.update(strategy="ddp", devices=2, callbacks=[every])
        return fit(Module(infobatch), loader, **kwargs)

    def work() -> Any:
        names = ("epochs", "lengths", "validated", "rates")
        runs = run(), run(ckpt_path=tmp_path / f"{name}.ckpt")
        return [{name: vars(module)[name] for name in names} for module in runs]

    orders = expected()
    ranks = both(work, tmp_path)
    parts = [whole["epochs"].values() for whole, _ in ranks]
    assert [together(list(epoch)) for epoch in zip(*parts, strict=True)] == orders
    for whole, rest in ranks:
        assert whole["validated"] == list(range(EPOCHS))
        assert whole["lengths"] == {e: -(-len(order) // B) for e, order in enumerate(orders)}
        expect = {e: whole["epochs"][e] for e in range(epoch, EPOCHS)}
        expect[epoch] = expect[epoch][done * B // 2 :]
        assert rest["epochs"] == expect
        assert rest["validated"] == list(range(epoch, EPOCHS))
        assert rest["rates"] == whole["rates"][-len(rest["rates"]) :]
        assert rest["rates"][-1] < 0.01


def test_a_loader_or_a_run_that_is_not_the_callbacks_is_refused() -> None:
    infobatch = make()
    with pytest.raises(ValueError, match=r"^a train_dataloader must be of the callback's Info"):
        fit(Module(infobatch), make().loader(Samples(), B))
    loader = infobatch.loader(Samples(), B)
    fit(Module(infobatch), loader, max_epochs=2)
    with pytest.raises(ValueError, match=r"^the InfoBatch must be at .*, 0, got one at epoch 2:"):
        fit(Module(infobatch), loader)


def test_a_trainer_of_more_epochs_or_another_sampler_is_refused() -> None:
    infobatch = make()
    for given in (EPOCHS + 1, -1):
        with pytest.raises(ValueError, match=rf"^max_epochs of .* num_epochs, 6, got {given}$"):
            fit(Module(infobatch), infobatch.loader(Samples(), B), max_epochs=given)
    with pytest.raises(ValueError, match=r"^overfit_batches of the Trainer must be 0, got 2:"):
        fit(Module(infobatch), infobatch.loader(Samples(), B), overfit_batches=2)
