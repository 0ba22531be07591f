"""`torchvision_loop.py` with InfoBatch: a `diff` of the two shows the change."""

import argparse
import time
from pathlib import Path

import torch
from images import load, network
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from infobatch_fast import InfoBatch


class MetricLogger:
    """Means of what is measured in a pass, printed every few batches."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def update(self, n=1, **values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * n
            self.counts[name] = self.counts.get(name, 0) + n

    def mean(self, name):
        return self.sums[name] / self.counts[name]

    def log_every(self, iterable, every, header):
        start = time.perf_counter()
        for i, item in enumerate(iterable):
            yield item
            if i % every == 0 or i == len(iterable) - 1:
                means = ", ".join(f"{name} {self.mean(name):.4f}" for name in self.sums)
                seconds = time.perf_counter() - start
                print(f"{header} [{i + 1}/{len(iterable)}] {means}, {seconds:.1f} s")


def accuracy(output, target):
    return 100 * (output.argmax(1) == target).float().mean()


def train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, infobatch):
    model.train()
    logger = MetricLogger()
    for (image, target), batch in logger.log_every(data_loader, args.print_freq, f"epoch {epoch}"):
        image, target = image.to(device), target.to(device)
        output = model(image)
        loss = infobatch.update(criterion(output, target), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        optimizer.step()
        logger.update(len(target), loss=loss.item(), acc1=accuracy(output, target))
    return logger.mean("loss")


@torch.inference_mode()
def evaluate(model, criterion, data_loader, device):
    model.eval()
    logger = MetricLogger()
    for image, target in logger.log_every(data_loader, 100, "test"):
        image, target = image.to(device), target.to(device)
        output = model(image)
        loss = criterion(output, target).mean()
        logger.update(len(target), loss=loss.item(), acc1=accuracy(output, target))
    return logger.mean("acc1")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--lr-warmup-epochs", type=int, default=1)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--clip-grad-norm", type=float, default=1.0)
    parser.add_argument("--print-freq", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--limit", type=int, help="train on so many images")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    dataset, dataset_test = load(args.limit)
    infobatch = InfoBatch(len(dataset), args.epochs, ratio=0.5)
    data_loader = infobatch.loader(dataset, args.batch_size, num_workers=args.workers)
    data_loader_test = DataLoader(dataset_test, 500, sampler=SequentialSampler(dataset_test))

    model = network().to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing, reduction="none")
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=1e-4)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, args.lr_warmup_epochs)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, max(1, args.epochs // 3), 0.1)
    lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warmup, steps], milestones=[args.lr_warmup_epochs]
    )

    start_epoch, acc1, loss = 0, 0.0, 0.0
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        infobatch.load_state_dict(checkpoint["infobatch"])
        start_epoch = checkpoint["epoch"] + 1

    for epoch in range(start_epoch, args.epochs):
        parts = model, criterion, optimizer, data_loader, device, epoch, args, infobatch
        loss = train_one_epoch(*parts)
        lr_scheduler.step()
        acc1 = evaluate(model, criterion, data_loader_test, device)
        if args.output_dir:
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "infobatch": infobatch.state_dict(),
                "epoch": epoch,
            }
            args.output_dir.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, args.output_dir / "checkpoint.pth")
    return {"loss": loss, "acc1": acc1}


if __name__ == "__main__":
    main()
