"""The measuring of `throughput.py`: what the device can do, and the loaders."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import harness as measure
import loader_sides
import torch
from loader_peers import PEERS, make_sides
from loader_sides import IMAGE_BYTES, Setting, Side
from tqdm import tqdm

from infobatch_fast.data.cifar import Dataset
from infobatch_fast.errors import reason
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.report.text import figures
from infobatch_fast.train.cli import Say


class Limit(NamedTuple):
    """What the device can do.

    Attributes:
        what: "copy" or, with its dtype, "matrix product" or "convolution".
        rate: bytes/s of a copy, else FLOP/s.
    """

    what: str
    rate: float


@dataclass(frozen=True)
class Run:
    """What the parts of one run share.

    Attributes:
        data: on the CPU.
        device: measured.
        lines: where the rows go.
        say: shows a line to the user.
        quick: measure as little as shows that it works.
        seed: of plans, augmentation and weights.
    """

    data: Dataset
    device: torch.device
    lines: measure.Lines
    say: Say
    quick: bool
    seed: int

    def timed(
        self, what: str, calls: Mapping[str, Callable[[], object]], *, warmup: int = 0
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of the calls that got through, and why the others did not, by name."""
        guarded = {name: Guarded(call) for name, call in calls.items()}
        with progress(what) as done:
            values = measure.interleave(
                guarded,
                self.device,
                seconds=0 if self.quick else 10,
                rounds=(3, 3) if self.quick else (5, 100),
                warmup=warmup,
                after_round=done,
            )
        failures = {name: call.failure for name, call in guarded.items() if call.failure}
        return {name: took for name, took in values.items() if name not in failures}, failures


class Guarded:
    """A call that does nothing more once it has failed, so that the others go on."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.failure: str | None = None

    def __call__(self) -> None:
        """Call it, or remember why not."""
        if self.failure is None:
            try:
                self.call()
            except Exception as error:  # of whichever peer: its row says what
                self.failure = f"failed: {reason(error)}"


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, and nothing elsewhere; yields what takes the share that is done."""
    shape = "{desc} {bar} {percentage:3.0f}%"
    plain = not sys.stdout.isatty()
    with tqdm(
        total=1.0, desc=what, disable=plain, file=sys.stdout, leave=False, bar_format=shape
    ) as bar:

        def done(share: float) -> None:
            bar.update(share - bar.n)

        yield done


def measure_limits(run: Run, dtypes: Sequence[torch.dtype]) -> dict[str, Limit]:
    """Rows of part "limits": what the device can do.

    Arithmetic has two: on some processors torch's convolutions come from a better library than its
    matrix product. On a GPU float32 runs in TF32, as torch's float32 convolutions do by default.

    Returns:
        Under "copy" that of copying; under the name of each dtype the higher of the two.
    """
    seconds = 0.3 if run.quick else 1.0
    found: dict[str, Limit] = {}
    for dtype in dtypes:
        before = torch.get_float32_matmul_precision()
        if run.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            most = measure.limits(run.device, dtype, seconds)
        finally:
            torch.set_float32_matmul_precision(before)
        if not found:
            found["copy"] = Limit("copy", most["copy_bytes_per_second"])
            _limit_row(run, found["copy"], "B/s")
        name = dtype_name(dtype)
        product = Limit(f"{name} matrix product", most["matmul_flops_per_second"])
        convolution = Limit(f"{name} convolution", _convolution_rate(run.device, dtype, seconds))
        for limit in (product, convolution):
            _limit_row(run, limit, "FLOP/s")
        found[name] = max(product, convolution, key=lambda limit: limit.rate)
    return found


def _convolution_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of a 3x3 convolution of 256 channels in channels_last, the best of the repetitions."""
    images, channels, side = (512 if device.type == "cuda" else 64), 256, 16
    pixels = torch.randn(images, channels, side, side, device=device).to(dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    call = {"convolution": lambda: torch.conv2d(pixels, weight, padding=1)}
    took = measure.interleave(
        call, device, seconds=seconds, rounds=(3, 200), warmup=2, timer=measure.on_device
    )
    return 2 * images * side**2 * channels**2 * 9 / min(took["convolution"])


def _limit_row(run: Run, limit: Limit, unit: str) -> None:
    more = {"statistic": "best of the repetitions"}
    run.lines.add("limits", {"limit": limit.what}, unit, measure.spread([limit.rate]), more)
    run.say(f"limit      {limit.what}: {figures(limit.rate / 1e9)} G{unit}")


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which `measure_limits` has it."""
    return str(dtype).removeprefix("torch.")


def percent(part: float, whole: float) -> float:
    """The share of a limit, or of anything, in %."""
    return 100 * part / whole


def in_words(rate: Mapping[str, float]) -> str:
    """The median and the percentiles of images/s, in words."""
    median, p20, p80 = (figures(rate[name]) for name in ("median", "p20", "p80"))
    return f"{median} images/s ({p20} to {p80})"


def run_loaders(
    run: Run, limits: Mapping[str, Limit], sizes: Sequence[int], samples: int, workers: int
) -> None:
    """Rows of part "loaders": each side at each batch size.

    Args:
        run: whose rows they are.
        limits: of `measure_limits`.
        sizes: batch sizes.
        samples: of a pass.
        workers: processes of the sides that have any.
    """
    for name, peer in PEERS.items() if sizes else ():
        if why := peer.missing():
            run.lines.add_absent("loaders", {"side": name}, why)
            run.say(f"loaders    {name}: {why}")
    plan = InfoBatch(len(run.data.labels), 1, 0.0, seed=run.seed, device=run.device).sample(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for batch_size in sizes:
            part = loader_sides.first(plan, samples)
            _loaders_at(
                run,
                limits["copy"],
                Setting(run.data, run.device, part, batch_size, workers, run.seed, Path(folder)),
            )


def _loaders_at(run: Run, copy: Limit, setting: Setting) -> None:
    sides: dict[str, Side] = {}
    absent: dict[str, str] = {}
    makers = make_sides(setting.workers)
    with progress(f"comparing loaders at batch {setting.batch_size}") as done:
        for number, (name, make) in enumerate(makers.items(), 1):
            try:
                side = make(setting)
                if why := loader_sides.compare(side, setting):
                    absent[name] = why
                else:
                    sides[name] = side
            except Exception as error:  # of whichever peer: its row says what
                absent[name] = f"failed: {reason(error)}"
            done(number / len(makers))
    calls = {name: lambda side=side: loader_sides.run(side) for name, side in sides.items()}
    values, failures = run.timed(f"loaders at batch {setting.batch_size}", calls)
    absent |= failures
    for name in reversed(makers):  # ours first
        case = {"side": name, "batch_size": setting.batch_size}
        if name in absent:
            run.lines.add_absent("loaders", case, absent[name])
            run.say(f"loaders    batch {setting.batch_size}, {name}: {absent[name]}")
            continue
        side = sides[name]
        rate = measure.rates(values[name], len(side.plan))
        share = percent(rate["median"] * IMAGE_BYTES, copy.rate)
        more = {
            "copy_limit_percent": share,
            "image_bytes": IMAGE_BYTES,
            "pass_images": len(side.plan),
            "compared": side.compared,
            "note": side.note or None,
        }
        run.lines.add("loaders", case, "images/s", rate, more)
        run.say(
            f"loaders    batch {setting.batch_size}, {name}: {in_words(rate)}, "
            f"{figures(share)}% of the copy limit" + (f" ({side.note})" if side.note else "")
        )
