"""The measuring of `throughput.py`: training in its forms, fed by our loader and without it."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import harness as measure
import torch
import training_forms
from loader_sides import IMAGE_BYTES
from throughput_rows import Limit, Run, dtype_name, in_words, percent, progress
from training_forms import FORMS, Trainer, Unavailable
from training_work import Work, work_an_image

from infobatch_fast.data.cifar import Dataset
from infobatch_fast.data.loader import Loader, make_loader
from infobatch_fast.errors import reason
from infobatch_fast.report.text import figures
from infobatch_fast.train.models import make_model

LOADED = 8192  # images of the loader alone, at least: its start is a small part of that


def run_training(
    run: Run,
    limits: Mapping[str, Limit],
    models: Mapping[str, Sequence[str]],
    ratio: float,
    batch_sizes: Mapping[str, int],
) -> None:
    """Rows of part "training": each network in each form, on full and on pruned epochs.

    Args:
        run: whose rows they are.
        limits: of `measure_limits`.
        models: the forms of each network.
        ratio: of the pruned epochs.
        batch_sizes: of each network.
    """
    data = run.data.to(run.device)
    for model, names in models.items():
        size = batch_sizes[model]
        options = {"mean": data.mean, "std": data.std, "seed": run.seed}
        loader, note = make_loader("auto", data.images, data.labels, size, **options)
        if note:
            run.say(note)
        _Training(run, model, data, loader, ratio).measure(names, limits)
        torch.compiler.reset()


class _Training:
    """One network in its forms, each on a full and on a pruned epoch.

    Args:
        run: whose rows they are.
        model: name of the network.
        data: on the device.
        loader: of its batches.
        ratio: of the pruned epoch.
    """

    def __init__(self, run: Run, model: str, data: Dataset, loader: Loader, ratio: float) -> None:
        self.run, self.model, self.data, self.loader = run, model, data, loader
        self.samples, self.batch_size = len(data.labels), loader.batch_size
        self.epochs = {
            r: training_forms.make_epoch(self.samples, self.batch_size, r, run.seed, run.device)
            for r in (0.0, ratio)
        }
        pruned = self.epochs[ratio].plan
        run.say(
            f"training   {model}: epochs of {epoch_name(ratio)} keep {len(pruned):,} of "
            f"{self.samples:,}: by drawn scores, {pruned.num_prunable / self.samples:.0%} of them "
            "well-learned"
        )

    def measure(self, names: Sequence[str], limits: Mapping[str, Limit]) -> None:
        """Time the forms against each other, and write their rows."""
        choosing = measure.interleave(
            {str(r): epoch.choose for r, epoch in self.epochs.items()},
            self.run.device,
            seconds=0.2,
            rounds=(5, 50),
        )
        choose = {r: statistics.median(choosing[str(r)]) for r in self.epochs}
        keys = [(name, r) for name in names for r in self.epochs]
        trainers, absent = self._warm(keys)
        steps = self._steps(list(trainers.values()))
        load = max(steps, min(self._most_steps(), LOADED // self.batch_size))
        calls: dict[str, Callable[[], object]] = {"loader": lambda: self._load(load)}
        for key, trainer in trainers.items():
            calls[f"{key} resident"] = lambda trainer=trainer: trainer.resident(steps)
            calls[f"{key} fed"] = lambda trainer=trainer: trainer.fed(steps)
        values, failures = self.run.timed(f"training {self.model}", calls, warmup=1)
        work = self._work(names)
        for key in keys:
            sides = ("loader", f"{key} resident", f"{key} fed")
            why = absent.get(key) or next((failures[s] for s in sides if s in failures), None)
            if why is None:
                images = [number * self.batch_size for number in (load, steps, steps)]
                rates = [measure.rates(values[s], n) for s, n in zip(sides, images, strict=True)]
                self._write(key, rates, steps, choose[key[1]], work[key[0]], limits)
            else:
                self.run.lines.add_absent("training", self._case(key), why)
                self.run.say(f"training   {self._words(key)}: {why}")

    def _warm(
        self, keys: Sequence[tuple[str, float]]
    ) -> tuple[dict[tuple[str, float], Trainer], dict[tuple[str, float], str]]:
        trainers: dict[tuple[str, float], Trainer] = {}
        absent: dict[tuple[str, float], str] = {}
        with progress(f"warming up {self.model}") as done:
            for number, (name, ratio) in enumerate(keys, 1):
                try:
                    epoch = self.epochs[ratio]
                    trainer = Trainer(
                        self.model, FORMS[name], epoch, self.data, self.loader, self.run.seed
                    )
                    trainer.warm_up()
                    trainers[name, ratio] = trainer
                except Unavailable as why:
                    absent[name, ratio] = str(why)
                except Exception as error:  # no compiler, no memory: the other forms go on
                    absent[name, ratio] = f"failed: {reason(error)}"
                done(number / len(keys))
        return trainers, absent

    def _work(self, names: Sequence[str]) -> dict[str, Work]:
        """Of each form; those of one precision do the same, whatever is fused in them."""
        network = make_model(self.model, self.data.num_classes, seed=0)
        precisions = {FORMS[name].amp for name in names}
        of = {amp: work_an_image(network, self.batch_size, amp=amp) for amp in precisions}
        return {name: of[FORMS[name].amp] for name in names}

    def _steps(self, trainers: Sequence[Trainer]) -> int:
        """Steps of a call: of a part of a second, and no more than an epoch has."""
        device = self.run.device
        took = [measure.wall(lambda t=t: t.resident(2), device) / 2 for t in trainers]
        target = 0.5 if device.type == "cuda" else 0.15 if self.run.quick else 0.3
        return training_forms.whole_steps(min(took, default=target), target, self._most_steps())

    def _most_steps(self) -> int:
        return min(len(epoch.plan) for epoch in self.epochs.values()) // self.batch_size

    def _load(self, steps: int) -> None:
        for _ in training_forms.feed(self.loader, self.epochs[0.0].plan, steps):
            pass

    def _case(self, key: tuple[str, float]) -> dict[str, str | int | float]:
        name, ratio = key
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "form": name,
            "ratio": ratio,
        }

    def _words(self, key: tuple[str, float]) -> str:
        return f"{self.model}, batch {self.batch_size}, {key[0]}, {epoch_name(key[1])}"

    def _write(
        self,
        key: tuple[str, float],
        rates: Sequence[Mapping[str, float]],
        steps: int,
        choose: float,
        work: Work,
        limits: Mapping[str, Limit],
    ) -> None:
        loader, resident, fed = rates
        kept = len(self.epochs[key[1]].plan)
        limit, copy = limits[dtype_name(FORMS[key[0]].dtype)], limits["copy"]
        more = {
            "compute_limit": limit.what,
            **_shares("", fed["median"], work, limit, copy),
            "resident_images/s": resident["median"],
            **_shares("resident_", resident["median"], work, limit, copy),
            "loader_images/s": loader["median"],
            "loader_copy_limit_percent": percent(loader["median"] * IMAGE_BYTES, copy.rate),
            "image_FLOP": work.flop,
            "eager_image_bytes": work.bytes,
            "epoch_images": kept,
            "well_learned_percent": percent(self.epochs[key[1]].plan.num_prunable, self.samples),
            "choose_s": choose,
            "dataset_images/s": training_forms.dataset_rate(
                self.samples, kept, fed["median"], choose
            ),
            "call_steps": steps,
            "loader": type(self.loader).__name__,
        }
        self.run.lines.add("training", self._case(key), "images/s", fed, more)
        self.run.say(
            f"training   {self._words(key)}: fed {in_words(fed)}, "
            f"{figures(more['TFLOP/s'])} TFLOP/s, {figures(more['compute_limit_percent'])}% of the "
            f"limit, {limit.what}, and {figures(more['copy_limit_percent'])}% of the copy limit; "
            f"network alone {figures(resident['median'])}, "
            f"loader alone {figures(loader['median'])}"
        )


def _shares(
    side: str, images_per_second: float, work: Work, limit: Limit, copy: Limit
) -> dict[str, float]:
    """What is achieved, of both limits; of copying, what an eager step would need for it."""
    flops = images_per_second * work.flop
    return {
        f"{side}TFLOP/s": flops / 1e12,
        f"{side}compute_limit_percent": percent(flops, limit.rate),
        f"{side}copy_limit_percent": percent(images_per_second * work.bytes, copy.rate),
    }


def epoch_name(ratio: float) -> str:
    """What an epoch is of."""
    return f"r={ratio:g}" if ratio else "full data"
