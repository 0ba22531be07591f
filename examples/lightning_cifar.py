"""Lightning: a module, its Trainer, and the callback that InfoBatch needs.

python examples/lightning_cifar.py --epochs 10
"""

import argparse

import torch
import torch.nn.functional as F
from images import load, network
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from infobatch_fast import InfoBatch, ProgressLR
from infobatch_fast.adapters.lightning import InfoBatchCallback


class Classifier(LightningModule):
    def __init__(self, infobatch, lr):
        super().__init__()
        self.network, self.infobatch, self.lr = network(), infobatch, lr

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        (x, y), batch = batch
        loss = self.infobatch.update(F.cross_entropy(self(x), y, reduction="none"), batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        accuracy = (self(x).argmax(1) == y).float().mean()
        self.log("accuracy", accuracy, prog_bar=True, batch_size=len(y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, 0.9, weight_decay=5e-4)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total)
        scheduler = ProgressLR(scheduler, self.infobatch, total)
        config = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--devices", default="auto", help="how many; several train together")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="train on so many images")
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--resume", help="a checkpoint")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    train, test = load(args.limit)
    infobatch = InfoBatch(len(train), args.epochs, ratio=0.5)
    loader = infobatch.loader(train, args.batch_size, num_workers=args.workers)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[InfoBatchCallback(infobatch), ModelCheckpoint(args.out, save_last=True)],
        default_root_dir=args.out,
        devices=args.devices,
    )
    model = Classifier(infobatch, args.lr)
    trainer.fit(model, loader, DataLoader(test, 500), ckpt_path=args.resume)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main()
