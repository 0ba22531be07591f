"""accelerate: a script whose model, optimizer, loader and schedule it prepares.

python examples/accelerate_cifar.py --epochs 10
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from images import load, network
from torch.utils.data import DataLoader

from infobatch_fast import InfoBatch, ProgressLR


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="train on so many images")
    parser.add_argument("--out", help="a folder for the state after each epoch")
    parser.add_argument("--resume", help="such a folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=args.accumulate)
    train, test = load(args.limit)
    infobatch = InfoBatch(len(train), args.epochs, ratio=0.5)
    arguments = {"num_workers": args.workers, "shard": False}
    loader = infobatch.loader(train, args.batch_size, **arguments)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=5e-4)
    total = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total)
    schedule = ProgressLR(schedule, infobatch, total)
    model, optimizer, loader, loader_test, schedule = accelerator.prepare(
        model, optimizer, loader, DataLoader(test, 500), schedule
    )
    accelerator.register_for_checkpointing(infobatch)
    if args.resume:
        accelerator.load_state(args.resume)

    accuracy = 0.0
    for epoch in range(infobatch.next_epoch, args.epochs):
        loader.set_epoch(epoch)
        model.train()
        for (x, y), batch in loader:
            with accelerator.accumulate(model):
                loss = infobatch.update(F.cross_entropy(model(x), y, reduction="none"), batch)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        model.eval()
        right = []
        for x, y in loader_test:
            with torch.inference_mode():
                right.append(accelerator.gather_for_metrics(model(x).argmax(1) == y))
        accuracy = torch.cat(right).float().mean().item()
        accelerator.print(f"epoch {epoch + 1}: {len(loader)} steps, accuracy {accuracy:.2%}")
        if args.out:  # the scores of all processes go into it
            infobatch.merge()
            accelerator.save_state(args.out)
    return accuracy


if __name__ == "__main__":
    main()
