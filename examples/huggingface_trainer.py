"""Hugging Face's Trainer: image classification, text classification, or a causal language model.

python examples/huggingface_trainer.py images --epochs 10

Images are as in images.py. Texts are the sentences of scikit-learn's descriptions of its data sets,
byte by byte, to be told by the data set; the language model learns to go on with them.
"""

import argparse
import re
from pathlib import Path

import torch
from images import load
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

from infobatch_fast.adapters.huggingface import InfoBatchTrainer

LENGTH, PAD = 128, 0  # bytes of a text at most; none of them is 0
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def images(limit):
    """Rows with pixels and a label, the collate function of the Trainer's, and a small ResNet."""
    train, test = load(limit)
    train, test = (
        [dict(zip(("pixel_values", "labels"), split[i], strict=True)) for i in range(len(split))]
        for split in (train, test)
    )
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return train, test, None, ResNetForImageClassification(config)


def sentences():
    """(text, number of its data set) of what scikit-learn says of its data sets."""
    import sklearn.datasets

    pages = sorted(Path(sklearn.datasets.__file__).parent.glob("descr/*.rst"))
    for number, page in enumerate(pages):
        for sentence in re.split(r"(?<=[.:])\s+", page.read_text(encoding="utf-8")):
            if len(words := " ".join(sentence.split())) > 20:
                yield words.encode()[:LENGTH], number


def texts(limit):
    """Rows of bytes with the data set's number, and a small BERT."""
    rows = [{"input_ids": list(words), "labels": number} for words, number in sentences()]
    labels = rows[-1]["labels"] + 1
    config = BertConfig(vocab_size=256, intermediate_size=128, num_labels=labels, **SIZES)
    return *split(rows, limit), padded, BertForSequenceClassification(config)


def language(limit):
    """Rows of bytes, each the label of the one before, and a small Llama."""
    rows = [{"input_ids": list(words), "labels": list(words)} for words, _ in sentences()]
    config = LlamaConfig(vocab_size=256, intermediate_size=128, num_key_value_heads=4, **SIZES)
    return *split(rows, limit), padded, LlamaForCausalLM(config)


def split(rows, limit):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order][: None if limit is None else limit * 5 // 4]
    return rows[len(rows) // 5 :], rows[: len(rows) // 5]


def padded(rows):
    """A batch of one length; what fills it up is neither read nor learned."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(ids, batch_first=True, padding_value=PAD)}
    batch["attention_mask"] = batch["input_ids"].ne(PAD).long()
    labels = [torch.tensor(row["labels"]) for row in rows]
    several = labels[0].dim() > 0
    batch["labels"] = pad(labels, True, -100) if several else torch.stack(labels)
    return batch


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["images", "texts", "language"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.5, help="0 trains on all data")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train on so many samples")
    parser.add_argument("--out", default="runs/huggingface")
    parser.add_argument("--resume", help="a checkpoint's folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    train, test, collate, model = globals()[args.task](args.limit)
    trainer = InfoBatchTrainer(
        model,
        TrainingArguments(
            args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            dataloader_num_workers=args.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=None if args.task == "language" else accuracy,
        pruning={"ratio": args.ratio},
    )
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer.evaluate() | {"steps": trainer.state.global_step}


if __name__ == "__main__":
    print(main())
