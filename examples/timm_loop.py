"""In the style of timm's training script: a batch fetched ahead, accumulation, averaged weights."""

import argparse
import math
import time
from copy import deepcopy

import torch
from images import load, network
from torch import nn
from torch.utils.data import DataLoader


class Prefetcher:
    """Moves the next batch to the device while the last one is trained on."""

    def __init__(self, loader, device):
        self.loader, self.device = loader, device

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        ahead = None
        for x, y in self.loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            if ahead is not None:
                yield ahead
            ahead = x, y
        if ahead is not None:
            yield ahead


class Cosine:
    """Warm-up and half a cosine over `total` updates."""

    def __init__(self, optimizer, lr, total, warmup):
        self.optimizer, self.lr, self.total, self.warmup = optimizer, lr, total, warmup

    def step_update(self, updates):
        if updates < self.warmup:
            lr = self.lr * (updates + 1) / self.warmup
        else:
            lr = self.lr * 0.5 * (1 + math.cos(math.pi * min(1, updates / self.total)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def train_one_epoch(epoch, model, ema, loader, optimizer, scheduler, criterion, args):
    model.train()
    start, total, seen = time.perf_counter(), 0.0, 0
    updates_per_epoch = math.ceil(len(loader) / args.accumulate)
    for i, (x, y) in enumerate(loader):
        output = model(x)
        loss = criterion(output, y)
        (loss / args.accumulate).backward()
        total, seen = total + loss.item() * len(x), seen + len(x)
        if (i + 1) % args.accumulate and i + 1 < len(loader):
            continue
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, now in zip(ema.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - args.model_ema_decay)
            for mean, now in zip(ema.buffers(), model.buffers(), strict=True):
                mean.copy_(now)
        scheduler.step_update(epoch * updates_per_epoch + (i + 1) // args.accumulate)
    seconds = time.perf_counter() - start
    return {"loss": total / seen, "images": seen, "seconds": seconds}


@torch.no_grad()
def validate(model, loader, device):
    model.eval()
    right = seen = 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        right, seen = right + int((model(x).argmax(1) == y).sum()), seen + len(y)
    return 100 * right / seen


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--model-ema-decay", type=float, default=0.98)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="train on so many images")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    dataset_train, dataset_eval = load(args.limit)
    arguments = {"num_workers": args.workers, "drop_last": True}
    loader_train = DataLoader(dataset_train, args.batch_size, shuffle=True, **arguments)
    loader_train = Prefetcher(loader_train, device)
    loader_eval = DataLoader(dataset_eval, 500)

    model = network().to(device)
    ema = deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    updates = args.epochs * math.ceil(len(loader_train) / args.accumulate)
    scheduler = Cosine(optimizer, args.lr, updates, warmup=updates // 10)

    result = {}
    for epoch in range(args.epochs):
        parts = ema, loader_train, optimizer, scheduler, criterion, args
        result = train_one_epoch(epoch, model, *parts)
        result["top1"] = validate(ema, loader_eval, device)
        print(f"epoch {epoch + 1}:", ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
    return {**result, "lr": optimizer.param_groups[0]["lr"]}


if __name__ == "__main__":
    main()
