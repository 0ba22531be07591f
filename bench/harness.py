"""What every benchmark does: options, a folder, sides interleaved, lines, one table and one plot.

A benchmark is its sides, a title for each of its parts, and one call of `main`.
"""

import sys
from pathlib import Path

# What is measured is the checkout that this file lies in, not an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import io
import itertools
import json
import math
import os
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, StrMethodFormatter
from tqdm import tqdm

from infobatch_fast.errors import UserError, reason
from infobatch_fast.report.benchmarks import (
    DIFFERENCE,
    absences,
    cautions,
    cell,
    pivot,
    words,
)
from infobatch_fast.report.lines import Line
from infobatch_fast.report.runs import device_of
from infobatch_fast.report.text import markdown
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupted, command, is_out_of_memory, parse, say
from infobatch_fast.train.loop import find_device
from infobatch_fast.train.records import make_folder, write_atomically

Call = Callable[[], object]
Timer = Callable[[Call, torch.device], float]


def shown(metavar: str) -> Any:
    """How --help shows a flag's value, where None stands for a default of the device's."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Options:
    """The options of every benchmark.

    Attributes:
        quick: seconds, not minutes: figures too short to quote.
        device: auto is CUDA where there is one.
        out: folder for the lines and the plot, new or empty; default below runs/.
        seed: of all that is drawn.
    """

    quick: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"
    out: Annotated[Path | None, shown("PATH")] = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), got {self.seed}")

    def settle(self, cuda: bool) -> Self:
        """The same with what the device decides filled in."""
        return self


OptionsT = TypeVar("OptionsT", bound=Options)


class Absent(Exception):
    """Why a side has no figures here, in words."""


def require(right: bool | torch.Tensor, problem: str) -> None:
    """Raise Absent unless a side's work is right."""
    if not right:
        raise Absent(f"it does other work: {problem}")


@dataclass(frozen=True)
class Side:
    """One side of a comparison, ready to be timed, and what a call of it does.

    Attributes:
        call: timed.
        repetitions: of the work within a call; the rest is of one repetition.
        images: that it goes through; its figures are then images/s in the place of seconds.
        flop: of arithmetic at `dtype`; of it, and of `moved`, the limits were measured before.
        moved: bytes; where it is counted is the comment to a GB/s.
        clock: None is the comparison's.
        more: for its line.
    """

    call: Call
    repetitions: int = 1
    images: int = 0
    flop: float = 0
    dtype: torch.dtype = torch.float32
    moved: float = 0
    clock: Timer | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def interleave(
    sides: Mapping[Any, Callable[[], float]],
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 1000),
    after_round: Callable[[float], object] = lambda share: None,
) -> dict[Any, list[float]]:
    """Seconds of each call, by side, all sides in one run.

    Every round calls each side once, in an order drawn anew, so that a machine that slows down
    slows all sides; the n-th values of two sides are a pair.

    Args:
        sides: what times a call of each, by name, and returns its seconds.
        seconds: start no round after these.
        rounds: at least and at most so many, after one that does not count.
        after_round: told the share of the time that has gone, in [0, 1].
    """
    order = list(sides)
    shuffle = random.Random(0).shuffle
    for name in order:
        sides[name]()
    values: dict[Any, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for number in range(rounds[1]):
        gone = time.perf_counter() - began
        if number >= rounds[0] and gone >= seconds:
            break
        shuffle(order)
        for name in order:
            values[name].append(sides[name]())
        share = max(gone / seconds if seconds else 1.0, (number + 1) / rounds[1])
        after_round(min(share, (number + 1) / rounds[0], 1.0))
    return values


def wall(call: Call, device: torch.device) -> float:
    """Seconds by the clock until the call's work is done, on the host and on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def on_device(call: Call, device: torch.device) -> float:
    """Seconds that the device works for a call, without what the host takes to launch it.

    On a GPU the call is queued behind a backlog of a few milliseconds, so that its kernels follow
    each other without gaps; a call that makes the host wait is timed with that wait in it. On a
    CPU it is `wall`. (`triton.testing.do_bench` times the launches of small kernels as well.)
    """
    if device.type != "cuda":
        return wall(call, device)
    synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)  # cycles, some 5 ms
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median with the 20th and 80th percentile (interpolated), and how many values they are of."""
    p20, p80 = np.quantile(values, (0.2, 0.8)).tolist()
    return {"median": statistics.median(values), "p20": p20, "p80": p80, "count": len(values)}


def difference(with_it: Sequence[float], without: Sequence[float]) -> dict[str, float]:
    """What one side takes longer than the other: the median of the paired differences.

    Returns:
        median, and the ends low and high of its interval of at least 95% confidence: order
        statistics of the differences, by the sign test, whatever their distribution. With fewer
        than six pairs there is no such interval: low and high are infinite.
    """
    differences = sorted(a - b for a, b in zip(with_it, without, strict=True))
    count = len(differences)
    # The chances that at most 0, 1, ... of them fall below the true median.
    chances = itertools.accumulate(math.comb(count, i) / 2**count for i in range(count))
    rank = sum(chance <= 0.025 for chance in chances)
    low, high = (differences[rank - 1], differences[-rank]) if rank else (-math.inf, math.inf)
    return {"median": statistics.median(differences), "low": low, "high": high}


def said(error: Exception) -> str:
    """Why a side has no figures, in a line."""
    if isinstance(error, (Absent, UserError)):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {reason(error)}"


class Bench:
    """One run of a benchmark: its lines, in a file that is whole after each of them.

    Attributes:
        lines: so far.
        limits: the most that the device can do, of `measure_limits`: B/s under "copy", FLOP/s under
            a dtype.
    """

    def __init__(
        self, path: Path, device: torch.device, options: Mapping[str, Any], quick: bool
    ) -> None:
        self.path, self.device, self.quick = path, device, quick
        self.lines: list[Line] = []
        self.limits: dict[Any, float] = {}
        self.options = dict(options)
        self._of = {
            "benchmark": path.stem.removesuffix("_bench"),
            "complete": False,
            "quick": quick,
            "options": self.options,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **record.provenance(device),
        }
        self._cold: torch.Tensor | None = None
        self._write()  # what cannot be written is known before the measuring

    def compare(
        self,
        part: str,
        case: Mapping[str, Any],
        sides: Mapping[Any, Callable[[], Side]],
        *,
        outer: str = "",
        seconds: tuple[float, float] = (5.0, 0.3),
        rounds: int = 5,
        clock: Timer = wall,
        cold: bool = False,
    ) -> dict[Any, list[float]]:
        """Make the sides, time them interleaved and write a row of each; one that fails is absent.

        Args:
            part: the table that they are rows of.
            case: what was measured; the side's name is added.
            sides: what makes each; it raises `Absent` where it cannot be had or does other work.
            outer: what the first part of a side's name is, where that is a pair: "form", say.
            seconds: to spend, and of a quick run.
            rounds: at least so many; in a quick run three.
            clock: of the sides that have none of their own.
            cold: read more than the caches hold before each call, as the rest of a step would.

        Returns:
            Seconds of a repetition in each round, by side, of those that got through.
        """
        ready: dict[Any, Side] = {}
        failed: dict[Any, str] = {}
        label = f"{part:10} {words(case)}"

        def timed(name: Any) -> float:
            if name in failed:
                return math.nan  # it does nothing more, so that the others go on
            if cold:
                self._sweep()
            side = ready[name]
            try:
                return (side.clock or clock)(side.call, self.device) / side.repetitions
            except Exception as error:
                failed[name] = said(error)
                return math.nan

        shape: Any = {"bar_format": "{desc} {bar} {percentage:3.0f}%", "file": sys.stdout}
        with tqdm(total=1.0, desc=label, disable=None, leave=False, **shape) as bar:
            for name, make in sides.items():
                try:
                    ready[name] = make()
                except Exception as error:  # of whichever side: its row says what
                    failed[name] = said(error)
            took = interleave(
                {name: partial(timed, name) for name in ready},
                seconds=seconds[self.quick],
                rounds=(3 if self.quick else rounds, 1000),
                after_round=lambda share: bar.update(share - bar.n),
            )
        cells = []
        for name in sides:
            of = {**case, **({outer: name[0], "side": name[1]} if outer else {"side": name})}
            if name in failed:
                line = self.add_absent(part, of, failed[name])
            else:
                line = self._add_side(part, of, ready[name], took[name])
            cells.append(f"{', '.join(name) if outer else name} {cell(line)}")
        say(f"{label}: {'; '.join(cells)}")
        return {name: values for name, values in took.items() if name not in failed}

    def compare_pair(
        self,
        part: str,
        case: Mapping[str, Any],
        sides: Mapping[str, Callable[[], Side]],
        **how: Any,
    ) -> dict[str, list[float]]:
        """`compare` of two sides, and a row of what the first takes more than the second.

        That row has the median of the paired differences, and its 95% interval from low to high.
        """
        took = self.compare(part, case, sides, **how)
        of = {**case, "side": DIFFERENCE}
        if len(took) < 2:
            self.add_absent(part, of, f"{' or '.join(sides)} is absent")
            return took
        first, second = (took[name] for name in sides)
        gap = difference(first, second)
        base = statistics.median(second) / 100
        more = {f"{end}_seconds": gap[end] for end in ("low", "high")}
        more |= {f"{name}_percent": value / base for name, value in gap.items()}
        line = self.add(part, of, "s", {"median": gap["median"], "count": len(first)}, more)
        say(f"{part:10} {words(of)}: {cell(line)}")
        return took

    def add(
        self,
        part: str,
        case: Mapping[str, Any],
        unit: str | None,
        values: Mapping[str, Any],
        more: Mapping[str, Any] | None = None,
        absent: str | None = None,
    ) -> Line:
        """Write a row of figures; what is not finite becomes null."""
        line = Line(
            part=part,
            case=dict(case),
            unit=unit,
            **{name: _finite(values.get(name)) for name in ("median", "p20", "p80", "count")},
            more={name: _finite(value) for name, value in (more or {}).items()},
            absent=absent,
            **self._of,
        )
        self.lines.append(line)
        self._write()
        return line

    def add_absent(self, part: str, case: Mapping[str, Any], why: str) -> Line:
        """Write a row that has no figures, with the reason in one line."""
        return self.add(part, case, None, {}, absent=why)

    def find(self, part: str, **case: object) -> Line | None:
        """The row of figures of a part whose case has these values; None if it is absent."""
        for line in self.lines:
            if line.part == part and line.absent is None and case.items() <= line.case.items():
                return line
        return None

    def measure_limits(self, *dtypes: torch.dtype) -> None:
        """Rows of part "limits", the best of the repetitions: a limit is what was possible.

        Arithmetic is the higher of a matrix product and a 3x3 convolution in channels_last, as on
        some processors torch's convolutions come from a better library. On a GPU float32 runs in
        TF32, as torch's convolutions do by default.
        """
        cuda = self.device.type == "cuda"
        size = 2**30 if cuda else 2**27  # bytes, far larger than the caches
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self._limit("copy", "copy", "B/s", 2 * size, lambda: target.copy_(source))
        for dtype in dtypes:
            name, n = str(dtype).removeprefix("torch."), 8192 if cuda else 512
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            images = torch.randn(512 if cuda else 8, 256, 16, 16, device=self.device).to(dtype)
            images = images.contiguous(memory_format=torch.channels_last)
            weight = torch.randn(256, 256, 3, 3, device=self.device).to(dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            of_conv = 2 * images.numel() * 256 * 9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if cuda else before)
            try:
                for what, flop, call in (
                    ("matrix product", 2 * n**3, partial(torch.mm, a, b)),
                    ("convolution", of_conv, partial(torch.conv2d, images, weight, padding=1)),
                ):
                    self._limit(dtype, f"{name} {what}", "FLOP/s", flop, call)
            finally:
                torch.set_float32_matmul_precision(before)

    def _limit(self, key: Any, what: str, unit: str, work: float, call: Call) -> None:
        sides = {what: partial(on_device, call, self.device)}
        took = interleave(sides, seconds=0.1 if self.quick else 1.0, rounds=(3, 200))
        rate = work / min(took[what])
        self.limits[key] = max(rate, self.limits.get(key, 0.0))
        line = self.add("limits", {"limit": what}, unit, {"median": rate, "count": 1})
        say(f"{'limits':10} {what}: {cell(line)}")

    def finish(self) -> None:
        """Say of each line that the benchmark ended as it should."""
        self.lines = [replace(line, complete=True) for line in self.lines]
        self._write()

    def _add_side(
        self, part: str, case: Mapping[str, Any], side: Side, values: Sequence[float]
    ) -> Line:
        took, more = statistics.median(values), dict(side.more)
        if side.flop:
            more["TFLOP/s"] = side.flop / took / 1e12
            more["compute_limit_percent"] = 100 * side.flop / took / self.limits[side.dtype]
        if side.moved:
            more |= {"moved_bytes": side.moved, "moved_GB/s": side.moved / took / 1e9}
            more["copy_limit_percent"] = 100 * side.moved / took / self.limits["copy"]
        if side.images:
            rates = spread([side.images / value for value in values])
            return self.add(part, case, "images/s", rates, more)
        return self.add(part, case, "s", spread(values), more)

    def _sweep(self) -> None:
        # Read, not written: lines to write back would take of the bandwidth that is measured.
        if self._cold is None:
            size = 2**27  # bytes, above the last cache of most CPUs
            if self.device.type == "cuda":
                size = 4 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._cold = torch.zeros(size // 4, device=self.device)
        self._cold.sum()

    def _write(self) -> None:
        text = "".join(json.dumps(asdict(line)) + "\n" for line in self.lines)
        write_atomically(self.path, text.encode())


def main(
    kind: type[OptionsT],
    name: str,
    measure: Callable[[Bench, OptionsT], None],
    titles: Mapping[str, str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a benchmark's command line; returns the exit code.

    Args:
        kind: its options.
        name: of its script and of its file of lines.
        measure: writes the rows.
        titles: of its parts, in the order of the tables.
        arguments: None is the command line's.
    """
    given = sys.argv[1:] if arguments is None else arguments

    def body(_: object) -> None:
        options = parse(kind, given, f"python bench/{name}.py", kind())
        load = os.getloadavg()[0]  # of others: our own work begins below
        device = find_device(options.device)
        options = options.settle(device.type == "cuda")
        folder = options.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = folder.expanduser()
        made = make_folder(folder)
        record.check_empty(folder)
        asked = {key: value for key, value in asdict(options).items() if key != "out"}
        asked |= {"load_average": load, "cores": os.cpu_count() or 1}
        bench = Bench(folder / f"{name}.jsonl", device, asked, options.quick)
        plot = folder / f"{name}.png"
        torch.backends.cudnn.benchmark = True  # as the trainer has it
        say(f"{'device':10} {device_of(record.describe(device))}: all figures are of it")
        for caution in cautions(asked, options.quick):
            say(f"WARNING: {caution}")
        try:
            measure(bench, options)
            bench.finish()
        except Interrupted as stop:
            with suppress(Interrupted, UserError):  # of a second signal, of a full disk
                draw(bench.lines, titles, plot)
            kept = f"{len(bench.lines)} rows are kept in {bench.path}"
            raise Interrupted(stop.number, f"stopped; {kept}") from None
        except UserError:
            if not bench.lines:  # the mended command may name the same folder
                bench.path.unlink()
                if made:
                    folder.rmdir()
            raise
        drawn = draw(bench.lines, titles, plot)
        for line in tables(bench.lines, titles):
            say(line)
        say(f"written    {folder}: {name}.jsonl" + f", {plot.name}" * drawn)

    return command(body, "ask for smaller sizes")


def tables(lines: Sequence[Line], titles: Mapping[str, str]) -> list[str]:
    """A Markdown table for each part; then what is absent, and why."""
    out: list[str] = []
    for title, rows in _by_title(lines, titles).items():
        out += ["", f"## {title}", "", *markdown(*pivot(rows))]
    if missing := absences(lines):
        out += ["", "## Absent", "", *(f"- {each}" for each in missing)]
    notes = cautions(lines[0].options, lines[0].quick) if lines else []
    return [*out, "", *(f"WARNING: {note}" for note in notes)]


def _by_title(lines: Sequence[Line], titles: Mapping[str, str]) -> dict[str, list[Line]]:
    """The rows of each part that has figures."""
    parts = {
        title: [line for line in lines if line.part == part and line.absent is None]
        for part, title in titles.items()
    }
    return {title: rows for title, rows in parts.items() if rows}


def draw(lines: Sequence[Line], titles: Mapping[str, str], path: Path) -> bool:
    """Draw a PNG, a panel for each part that has figures; returns whether one has.

    A point for each row: its median, with the 20th to 80th percentile.
    """
    panels = _by_title(lines, titles)
    if not panels:
        return False
    heights = [0.8 + 0.22 * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(11, 1.2 + sum(heights) + 0.5 * len(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        _draw_points(axis, rows)
        axis.set_title("\n".join(textwrap.wrap(title, 110)), fontsize=10, loc="left")
    notes = cautions(lines[0].options, lines[0].quick)
    notes += ["stopped midway"] * (not lines[0].complete)
    heading = f"{lines[0].benchmark.capitalize()} on {device_of(lines[0].device)}"
    figure.suptitle("\n".join([heading, *textwrap.wrap("; ".join(notes), 120)]), fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())
    return True


def _draw_points(axis: Axes, rows: Sequence[Line]) -> None:
    sides = list(dict.fromkeys(row.case.get("side", "") for row in rows))
    same = [key for key in rows[0].case if len({repr(row.case.get(key)) for row in rows}) == 1]
    drawn = []
    for number, row in enumerate(rows):
        if row.case.get("side") == DIFFERENCE:
            continue  # its name says all
        middle = row.median or 0.0
        bars: Any = [[middle - (row.p20 or middle)], [(row.p80 or middle) - middle]]
        colour = f"C{sides.index(row.case.get('side', '')) % 10}"
        axis.errorbar([middle], [number], xerr=bars, color=colour, marker="o", capsize=3)
        drawn.append(middle)
    names = [f"{words(row.case, same)}:  {cell(row)}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    if max(drawn) > 8 * min(drawn) > 0:
        axis.set_xscale("log")
    else:
        axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    small = rows[0].unit == "images/s"  # which takes no "k" or "M"
    form = StrMethodFormatter("{x:,g}") if small else EngFormatter(rows[0].unit or "")
    axis.xaxis.set_major_formatter(form)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=8)
    label = words({key: rows[0].case[key] for key in same}, ())
    axis.set_xlabel(label if rows[0].unit == "s" else f"{rows[0].unit}; {label}", fontsize=8)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
