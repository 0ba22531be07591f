"""Training through Hugging Face's Trainer: each loss says which sample it is of."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

pytest.importorskip("transformers")
pytest.importorskip("datasets")
import datasets
from accelerate.state import AcceleratorState
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from two import both

from infobatch_fast import InfoBatch
from infobatch_fast.adapters.huggingface import INDICES, InfoBatchMixin, InfoBatchTrainer

N, B, EPOCHS = 103, 4, 6
PRUNING: dict[str, Any] = {"delta": 0.7, "ratio": 0.6}
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


def logits_of(i: torch.Tensor) -> torch.Tensor:
    """(B, 3), of the samples' numbers, so that each has a loss of its own."""
    return torch.stack([i % 7, i / 50, -i / 90], 1).float()


class Rows(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": float(i), "labels": i % 3, "not_for_the_model": str(i)}


class Told(PreTrainedModel):
    """A model that learns nothing: its losses are functions of the samples."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = logits_of(x) + self.weight * logits_of(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore


class Recorder(TrainerCallback):
    """What came of each optimizer's step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.evaluated: list[float] = []
        self.grads: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.grads.append(kwargs["model"].weight.grad.item())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.epoch)


class Checked(InfoBatchTrainer):
    """Writes down the samples of each epoch, by the data and by the batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epochs: dict[int, list[int]] = {}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if INDICES in inputs:
            indices = inputs[INDICES].tolist()
            assert inputs["x"].tolist() == indices
            assert self.infobatch.plan is not None
            self.epochs.setdefault(self.infobatch.plan.epoch, []).extend(indices)
        return super().compute_loss(model, inputs, *args, **kwargs)


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    own = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": B, "num_train_epochs": EPOCHS, "learning_rate": 1e-12}
    return TrainingArguments(str(folder), **{**own, **sizes, **kwargs})


def trainer_of(folder: Path, rows: Any = None, kind: Any = Checked, **kwargs: Any) -> Any:
    rows = Rows() if rows is None else rows
    recorder = Recorder()
    trainer = kind(
        Told(),
        arguments(folder, **kwargs),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[recorder],
        **({"pruning": PRUNING} if kind is Checked else {}),
    )
    trainer.recorder = recorder
    return trainer


def plans(whole: int, **kwargs: Any) -> dict[int, list[int]]:
    """The epochs by the library alone, from the same losses."""
    i = torch.arange(N)
    losses = F.cross_entropy(logits_of(i), i % 3, reduction="none")
    infobatch = InfoBatch(N, EPOCHS, seed=42, device="cpu", **{**PRUNING, **kwargs})
    orders = {}
    for epoch in range(EPOCHS):
        plan = infobatch.sample(epoch, whole)
        infobatch.record(losses[plan.indices], plan.batch(0, len(plan)))
        orders[epoch] = plan.indices.tolist()
    return orders


@pytest.mark.parametrize("form", ["rows", "arrow"])
@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (3, 2)])
def test_every_loss_is_of_its_sample(
    tmp_path: Path, form: str, accumulate: int, workers: int
) -> None:
    rows: Any = Rows()
    if form == "arrow":
        rows = datasets.Dataset.from_list([rows[i] for i in range(N)])
    trainer = trainer_of(
        tmp_path,
        rows,
        gradient_accumulation_steps=accumulate,
        dataloader_num_workers=workers,
        eval_strategy="epoch",
        lr_scheduler_type="linear",
        max_grad_norm=1e9,
    )
    metrics = trainer.train().metrics
    orders = plans(B * accumulate)
    assert trainer.epochs == orders
    assert len(orders[1]) < N
    i = torch.arange(N)
    losses = F.cross_entropy(logits_of(i), i % 3, reduction="none")
    torch.testing.assert_close(trainer.infobatch.scores, losses, rtol=0, atol=0)
    rates, steps = (
        trainer.recorder.rates,
        [-(-len(each) // (B * accumulate)) for each in orders.values()],
    )
    assert len(rates) == sum(steps) == trainer.state.global_step == trainer.state.max_steps
    assert rates[-1] == 0
    assert rates == sorted(rates, reverse=True)
    assert trainer.recorder.evaluated == pytest.approx(range(1, EPOCHS + 1))
    pace = metrics["train_samples_per_second"] / metrics["train_steps_per_second"]
    assert pace == pytest.approx(B * accumulate, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_the_trainers_own_times_the_weights(tmp_path: Path, accumulate: int) -> None:
    trainer = trainer_of(
        tmp_path,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=1e9,
        label_smoothing_factor=0.1,
    )
    trainer.train()
    infobatch = InfoBatch(N, EPOCHS, seed=42, device="cpu", **PRUNING)
    i, by_hand = torch.arange(N), []
    logits = logits_of(i)
    weight = torch.zeros((), requires_grad=True)
    losses = F.cross_entropy(logits + weight * logits, i % 3, reduction="none", label_smoothing=0.1)
    for epoch in range(EPOCHS):
        plan = infobatch.sample(epoch, B * accumulate)
        for batch in plan.batches(B * accumulate):
            # A model that does not take num_items_in_batch: a mean of the micro-batches' means.
            parts = [
                (losses[j] * w).mean()
                for j, w in zip(*(each.split(B) for each in batch), strict=True)
            ]
            mean = torch.stack(parts).mean()
            (gradient,) = torch.autograd.grad(mean, weight, retain_graph=True)
            by_hand.append(gradient.item())
        infobatch.record(losses.detach()[plan.indices], plan.batch(0, len(plan)))
    # None is left from one step, or epoch, for the next.
    assert trainer.recorder.grads == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


class Stopped(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            raise Stopped


@pytest.mark.parametrize("step", [9, 12, 13])
def test_a_resumed_run_goes_on_with_the_samples_that_were_left(tmp_path: Path, step: int) -> None:
    how = {"gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", **{**how, "save_strategy": "no"})
    whole.train()
    first = trainer_of(tmp_path / "run", **how)
    first.add_callback(StopAt(step))
    with pytest.raises(Stopped):
        first.train()
    second = trainer_of(tmp_path / "run", **how)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    both = {e: first.epochs.get(e, []) + second.epochs.get(e, []) for e in range(EPOCHS)}
    assert both == whole.epochs
    assert second.recorder.rates == pytest.approx(whole.recorder.rates[step:])
    assert second.state.global_step == whole.state.global_step
    torch.testing.assert_close(second.infobatch.scores, whole.infobatch.scores, rtol=0, atol=0)
    third = trainer_of(tmp_path / "run", **how)
    (tmp_path / "run" / f"checkpoint-{step}" / "infobatch.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint must hold infobatch.pt, got"):
        third.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))


def test_a_run_that_drops_last_goes_on_from_an_epochs_end(tmp_path: Path) -> None:
    how = {"gradient_accumulation_steps": 2, "dataloader_drop_last": True}
    whole = trainer_of(tmp_path, save_strategy="epoch", **how)
    whole.train()
    assert whole.recorder.rates[-1] == 0
    assert len(whole.epochs[0]) == N // (2 * B) * 2 * B
    for step in (12, whole.state.global_step - 12):
        again = trainer_of(tmp_path, **how)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.epochs == {e: whole.epochs[e] for e in again.epochs}
        assert again.state.global_step == whole.state.global_step
        assert again.recorder.rates == pytest.approx(whole.recorder.rates[step:])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedulers_that_go_by_evaluations_are_left_to_the_trainer(
    tmp_path: Path, name: str
) -> None:
    how = {"lr_scheduler_type": name, "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    own = {"patience": 0, "factor": 0.5, "eps": 0, "min_lr": 0}
    trainer = trainer_of(tmp_path, lr_scheduler_kwargs=own, **how)
    trainer.remove_callback(trainer.recorder)  # which asks for the rate otherwise
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-12  # nothing was learned


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_steps": 5}, "max_steps .* 5"),
        ({"num_train_epochs": 2.5}, "num_train_epochs .* 2.5"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy .* sequential"),
    ],
)
def test_what_is_refused(tmp_path: Path, kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, **kwargs)


def test_what_has_no_losses_of_classes_is_refused(tmp_path: Path) -> None:
    rows = [{"x": float(i), "labels": 0.5} for i in range(N)]
    with pytest.raises(TypeError, match=r"^labels must be int64, got torch.float32: override"):
        trainer_of(tmp_path, rows).train()
    rows = [{"x": float(i)} for i in range(N)]
    with pytest.raises(ValueError, match=r"^a batch must have labels, got x$"):
        trainer_of(tmp_path, rows).train()
    for name, value in (("compute_loss_func", F.cross_entropy), ("train_dataset", None)):
        given: dict[str, Any] = {"train_dataset": Rows(), name: value}
        with pytest.raises(ValueError, match=f"^{name} must be "):
            InfoBatchTrainer(Told(), arguments(tmp_path), **given).train()


def ranks() -> dict:
    """What a rank of two trains on, and its scores in the end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = trainer_of(Path("unused"), per_device_train_batch_size=B // 2, max_grad_norm=1e9)
    trainer.train()
    trainer.infobatch.merge()
    scores, grads = trainer.infobatch.scores, trainer.recorder.grads
    return {"epochs": trainer.epochs, "scores": scores, "grads": grads}


def test_two_ranks_share_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = both(ranks, tmp_path)
    alone = trainer_of(tmp_path / "alone", max_grad_norm=1e9)
    alone.train()
    for epoch, order in alone.epochs.items():
        halves = [torch.tensor(of["epochs"][epoch]).view(-1, B // 2) for of in (one, other)]
        # Global batches are the same; a full epoch's last one is filled up with repeated samples.
        dealt = torch.stack(halves, 1).flatten()[: len(order)].tolist()
        assert dealt == order
    for of in (one, other):
        torch.testing.assert_close(of["scores"], alone.infobatch.scores, rtol=0, atol=0)
    assert one["grads"] == other["grads"]
    whole = N // B  # steps of the first epoch without repeated samples
    assert one["grads"][:whole] == pytest.approx(alone.recorder.grads[:whole], rel=1e-4, abs=1e-6)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))  # pyright: ignore


def texts(n: int = 40) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        length = 3 + i % 6
        ids = torch.randint(3, 50, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return rows


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    ids = fill("input_ids", 0)
    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    )
    return {"input_ids": ids, "labels": fill("labels", -100), "attention_mask": mask}


def test_a_language_model_is_judged_by_its_real_tokens(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(texts())
    how: dict[str, Any] = {
        "learning_rate": 0.0,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
    }
    trainer: Any = InfoBatchTrainer(
        llama(),
        arguments(tmp_path, **how),
        train_dataset=rows,
        data_collator=padded,
        pruning={"delta": 1.0},
    )
    own: Any = Trainer(
        llama(), arguments(tmp_path, **how), train_dataset=rows, data_collator=padded
    )
    # The loss of a batch that is not pruned is the Trainer's own, over all real tokens of the step.
    batch = padded(texts()[:4])
    items = torch.tensor(30)
    trainer.get_train_dataloader()
    trainer.infobatch.sample(0)
    given = {**batch, INDICES: torch.arange(4), "infobatch_weights": torch.ones(4)}
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, given, num_items_in_batch=items),
        own.compute_loss(own.model, batch, num_items_in_batch=items),
    )
    trainer.train()
    scores = trainer.infobatch.scores
    with torch.no_grad():
        for i, row in enumerate(texts()):
            alone = own.model(
                **{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
            )
            assert scores[i].item() == pytest.approx(alone.loss.item(), rel=1e-4)


def test_images(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "image_size": 8, "patch_size": 4, "num_labels": 3}
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "label": i % 3}
        for i in range(40)
    ]
    trainer = InfoBatchTrainer(
        ViTForImageClassification(ViTConfig(**sizes)),
        arguments(tmp_path, eval_strategy="epoch"),
        train_dataset=rows,
        eval_dataset=rows,
        pruning=PRUNING,
    )
    trainer.train()
    assert trainer.infobatch.scores.isfinite().all()
    assert trainer.state.global_step < EPOCHS * 10
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.filterwarnings("ignore")  # of TRL's own dependencies
def test_supervised_fine_tuning(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    class PrunedSFTTrainer(InfoBatchMixin, trl.SFTTrainer):
        pass

    own = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 4, "num_train_epochs": 4}
    how: dict[str, Any] = {**own, **sizes, "gradient_accumulation_steps": 2, "bf16": False}
    args = trl.SFTConfig(str(tmp_path), **how)
    words = ["the loss of a sample", "is", "its mean over tokens, padding left out", "so it is"]
    tokenizer = word_tokenizer(words)
    rows = datasets.Dataset.from_list([{"text": words[i % 4] + f" {i % 5}"} for i in range(40)])
    trainer = PrunedSFTTrainer(
        llama(), args, train_dataset=rows, processing_class=tokenizer, pruning={"delta": 1.0}
    )
    trainer.train()
    assert trainer.infobatch.scores.isfinite().all()
    assert trainer.state.global_step == trainer.state.max_steps < 4 * 5
    assert trainer.lr_scheduler.get_last_lr()[0] == 0


def word_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    trainer: Any = trainers.WordLevelTrainer(special_tokens=["?", ".", "_"])  # pyright: ignore
    tokenizer.train_from_iterator(words, trainer)
    names = {"unk_token": "?", "eos_token": ".", "pad_token": "_"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
