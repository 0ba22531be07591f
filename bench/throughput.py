"""Images a second of loaders and of training steps: `python bench/throughput.py`.

Loaders, each shown to give what ours gives (`sides/loaders.py`, `sides/peers.py`), and those of
files (`sides/folders.py`), from a folder that is made for it; forms of training, the network alone
and fed by our loader (`sides/steps.py`); and beside each figure its share of what the device can
do, measured in the same run, for work that is counted (`sides/work.py`): TFLOP/s, % of arithmetic,
% of copying. The bytes of training are those of an eager step at the form's precision, operation by
operation: a fused step moves fewer, so that its share may pass 100%.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from harness import Bench, Options, Side, main, shown
from sides.folders import LIMITS, folder_sides, write_folder
from sides.loaders import Pass, first, loader_side
from sides.peers import loader_sides
from sides.steps import FORMS, SWITCHES, Form, Model, make_network, trained_sides
from sides.work import Work, work_an_image

from infobatch_fast import InfoBatch
from infobatch_fast.data.cifar import DataMissing, default_data_dir, load_cifar
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.folder import load_folder
from infobatch_fast.data.loader import make_loader
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.errors import UserError
from infobatch_fast.plan import Plan
from infobatch_fast.train.cli import say
from infobatch_fast.train.loop import available_cores

TITLES = {
    "training": "Training, alone and fed (TFLOP/s, % of arithmetic, % of copying what "
    "an eager step moves)",
    "loaders": "Loaders, whole passes (% of copying)",
    "folders": "Loaders of JPEG files, passes over all of them and over half",
}
FormName = Literal["eager", "channels_last", "amp", "compiled", "graph"]


@dataclass(frozen=True)
class Throughput(Options):
    """Measure images/s of loaders and of training: throughput.jsonl and throughput.png.

    Without flags it takes some eight minutes on a GPU, most of it compiling, and two on a CPU. Exit
    codes: 0 done; 2 a mistake in the input; 130 or 143 stopped by a signal, with what was measured
    kept.

    Attributes:
        batch_sizes: of loaders and training, default 200; with no number, no loaders.
        models: default r50 on CUDA, small on a CPU; with no name, no training.
        forms: of training, each adding to the one before; default amp compiled graph on CUDA,
            eager channels_last on a CPU.
        max_autotune: compare the last form with max_autotune and conv_1x1_as_mm as well.
        foreach_lars: the same with torch's operations in the place of the LARS kernels.
        torch_cross_entropy: the same with torch's loss in the place of the kernel.
        workers: processes of the loaders that have any, by default one a core.
        files: JPEGs to read, made of the images; default 4096 on a GPU, 1024 on a CPU; 0: none.
    """

    batch_sizes: Annotated[tuple[int, ...], shown("[INT ...]")] = (200,)
    models: Annotated[tuple[Model, ...] | None, shown("[{small,r18,r34,r50,r101} ...]")] = None
    forms: Annotated[tuple[FormName, ...], shown("{" + ",".join(FORMS) + "} ...")] = ()
    max_autotune: bool = False
    foreach_lars: bool = False
    torch_cross_entropy: bool = False
    workers: int = field(default_factory=available_cores)
    files: Annotated[int | None, shown("INT")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = [("workers", self.workers), ("files", self.files or 1)]
        for name, value in counts + [("batch_sizes", each) for each in self.batch_sizes]:
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.models == () == self.batch_sizes and self.files == 0:
            raise UserError("files must be at least 1 where models and batch_sizes are none, got 0")

    def settle(self, cuda: bool) -> Self:
        """With everything that the device decides."""
        on_cpu = ("channels_last",) if self.quick else ("eager", "channels_last")
        files = 64 if self.quick else 4096 if cuda else 1024
        return replace(
            self,
            models=(("r50",) if cuda else ("small",)) if self.models is None else self.models,
            forms=self.forms or (("amp", "compiled", "graph") if cuda else on_cpu),
            files=files if self.files is None else self.files,
        )


def measure(bench: Bench, options: Throughput) -> None:
    """Limits, training and loaders."""
    data = load_data(options.seed).part(0.04 if options.quick else 1)
    if max(options.batch_sizes, default=0) > len(data.labels):
        most, got = len(data.labels), max(options.batch_sizes)
        raise UserError(f"batch_sizes must be at most the {most} images that there are, got {got}")
    bench.options |= {"data": data.name, "source": data.source}
    forms: dict[str, Form] = {name: FORMS[name] for name in options.forms}
    for switch, change in SWITCHES.items():
        if getattr(options, switch):
            last = options.forms[-1]
            forms[f"{last} + {switch}"] = change(FORMS[last])
    dtypes = dict.fromkeys(form.dtype for form in forms.values())
    bench.measure_limits(*(dtypes if options.models else ()))
    every = InfoBatch(len(data.labels), 1, delta=0.0, seed=options.seed, device=bench.device)
    whole = every.sample(0)
    part = first(whole, 1000 if options.quick else 50_000 if bench.device.type == "cuda" else 8192)
    for batch_size in options.batch_sizes:
        of = Pass(data, part, batch_size, options.workers, options.seed)
        sides = {
            name: partial(loader_side, make, of) for name, make in loader_sides(of.workers).items()
        }
        bench.compare("loaders", {"batch_size": batch_size}, sides, seconds=(10.0, 0.0))
    if options.files:
        measure_folders(bench, data, options)
    for model in options.models or ():
        for batch_size in options.batch_sizes or (200,):
            measure_training(bench, data, whole, model, batch_size, forms, options.seed)


def measure_folders(bench: Bench, data: Dataset, options: Throughput) -> None:
    """Loaders of files, all and half of them, in one comparison."""
    count = min(options.files or 0, len(data.labels))
    whole = InfoBatch(count, 1, delta=0.0, seed=options.seed, device=bench.device).sample(0)
    with tempfile.TemporaryDirectory() as scratch:
        files = load_folder(
            write_folder(data, count, Path(scratch)),
            workers=options.workers,
            cache="off",
            say=lambda line: None,
        ).to(bench.device)
        of = Pass(
            *(files, whole, min(128, count // 2), options.workers, options.seed),
            limits=LIMITS[bench.device.type],
            image_bytes=0,
        )
        sides = {
            (name, side): make
            for name, some in (("all", of), ("half", replace(of, plan=first(whole, count // 2))))
            for side, make in folder_sides(some).items()
        }
        case = {"images": count, "batch_size": of.batch_size}
        bench.compare("folders", case, sides, outer="files", seconds=(20.0, 0.0))


def measure_training(
    bench: Bench,
    data: Dataset,
    plan: Plan,
    model: str,
    batch_size: int,
    forms: dict[str, Form],
    seed: int,
) -> None:
    """A network in its forms, all in one comparison; a call is a number of steps."""
    cuda = bench.device.type == "cuda"
    here = data.to(bench.device)
    options = {"mean": data.mean, "std": data.std, "seed": seed}
    loader, note = make_loader("auto", here.images, here.labels, batch_size, **options)
    if note:
        say(note)
    steps = min(50 if cuda else 1 if bench.quick else 5, len(plan) // batch_size)
    more = {"loader": type(loader).__name__, "call_steps": steps}

    @cache
    def work(amp: str) -> Work:
        network = make_network(model, torch.contiguous_format, seed, torch.device("cpu"))
        return work_an_image(network, batch_size, amp=amp)

    def told(make: Callable[[], Side], form: Form) -> Side:
        images, of = steps * batch_size, work(form.amp)
        counted = {"flop": images * of.flop, "moved": images * of.bytes, "dtype": form.dtype}
        return replace(make(), images=images, more=more, **counted)

    sides = {
        (name, side): partial(told, make, form)
        for name, form in forms.items()
        for side, make in trained_sides(model, form, loader, plan, steps, seed).items()
    }
    case = {"model": model, "batch_size": batch_size}
    bench.compare("training", case, sides, outer="form", seconds=(40.0, 0.5))


def load_data(seed: int) -> Dataset:
    """CIFAR-10 where it lies on this machine, else synthetic images, on the CPU."""
    try:
        return load_cifar("cifar10", default_data_dir(), download=False)
    except DataMissing:
        return make_synthetic(seed=seed)


run = partial(main, Throughput, "throughput", measure, TITLES)


if __name__ == "__main__":
    sys.exit(run())
