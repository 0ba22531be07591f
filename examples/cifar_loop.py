"""The trainer's recipe `quick` in a loop of one's own, of PyTorch's and torchvision's parts.

python examples/cifar_loop.py --seed 0
"""

import argparse

import torch
import torch.nn.functional as F
from images import load
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from infobatch_fast import InfoBatch, ProgressLR
from infobatch_fast.train.models import make_model

NORMALISED = [
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
]


class Transformed(Dataset):
    def __init__(self, images, *steps):
        self.images, self.transform = images, v2.Compose([*steps, *NORMALISED])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images.pixels[i]), self.images.labels[i]


@torch.inference_mode()
def accuracy(model, loader, device):
    model.eval()
    right = [model(x.to(device)).argmax(1).cpu() == y for x, y in loader]
    return torch.cat(right).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train on so many images")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train, test = load(args.limit)
    crop = v2.RandomCrop(train.pixels.shape[-2:], padding=4, padding_mode="reflect")
    train = Transformed(train, crop, v2.RandomHorizontalFlip())
    loader_test = DataLoader(Transformed(test), 1000)
    infobatch = InfoBatch(len(train), args.epochs, ratio=0.5, seed=args.seed)
    loader = infobatch.loader(train, args.batch_size, num_workers=args.workers)

    model = make_model("small", seed=args.seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    total = args.epochs * len(loader)
    schedule = ProgressLR(OneCycleLR(optimizer, args.lr, total), infobatch, total)

    seen, result = 0, 0.0
    for epoch in range(args.epochs):
        model.train()
        for (x, y), batch in loader:
            output = model(x.to(device))
            losses = F.cross_entropy(output, y.to(device), reduction="none", label_smoothing=0.1)
            infobatch.update(losses, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            seen += len(y)
        result = accuracy(model, loader_test, device)
        print(f"epoch {epoch + 1}: {seen:,} samples so far, accuracy {result:.2%}", flush=True)
    print(f"{1 - seen / (args.epochs * len(train)):.1%} of the samples left out")
    return result


if __name__ == "__main__":
    main()
