"""Measuring: the sides of a comparison interleaved in one run, and lines that say what of."""

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from infobatch_fast.errors import UserError
from infobatch_fast.report import lines as schema
from infobatch_fast.report.lines import Line
from infobatch_fast.report.text import figures
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupted
from infobatch_fast.train.records import write_atomically

LINE = tuple(field.name for field in fields(Line))


def interleave(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 1000),
    warmup: int = 1,
    timer: Callable[[Callable[[], object], torch.device], float] | None = None,
    after_round: Callable[[float], None] | None = None,
) -> dict[str, list[float]]:
    """Time the sides of a comparison against each other in one run.

    Every round calls each side once, in an order drawn anew, so that a machine that slows down
    slows all sides; the n-th values of two sides are a pair.

    Args:
        sides: what to call, by name.
        device: waited for around each call.
        seconds: start no round after these.
        rounds: at least and at most so many.
        warmup: rounds before the first that counts.
        timer: seconds that one call takes; None is `wall`.
        after_round: told the share of the time that has gone, in [0, 1].

    Returns:
        Seconds of each call, by side.
    """
    timer = timer or wall
    order = list(sides)
    shuffle = random.Random(0).shuffle
    for _ in range(warmup):
        for name in order:
            timer(sides[name], device)
    values: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for number in range(rounds[1]):
        gone = time.perf_counter() - began
        if number >= rounds[0] and gone >= seconds:
            break
        shuffle(order)
        for name in order:
            values[name].append(timer(sides[name], device))
        if after_round is not None:
            share = max(gone / seconds if seconds else 1.0, (number + 1) / rounds[1])
            after_round(min(share, (number + 1) / rounds[0], 1.0))
    return values


def wall(call: Callable[[], object], device: torch.device) -> float:
    """Seconds by the clock until the call's work is done, on the host and on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def on_device(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that the device works for a call, without what the host takes to launch it.

    On a GPU the call is queued behind a backlog of a few milliseconds, so that its kernels follow
    each other without gaps; a call that makes the host wait is timed with that wait in it. On a
    CPU it is `wall`.
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


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median with the 20th and 80th percentile (interpolated), and how many values they are of."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        position = share * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return {
        "median": statistics.median(ordered),
        "p20": quantile(0.2),
        "p80": quantile(0.8),
        "count": len(ordered),
    }


def rates(values: Sequence[float], work: float) -> dict[str, float | int]:
    """The spread of work per second, of seconds that each took; p20 is the slow end."""
    return spread([work / value for value in values])


def difference(with_it: Sequence[float], without: Sequence[float]) -> dict[str, float]:
    """What one side takes longer than the other: the median of the paired differences.

    Args:
        with_it: of `interleave`.
        without: the other side of the same rounds.

    Returns:
        median, and the ends low and high of its interval of at least 95% confidence: order
        statistics of the differences, by the sign test, whatever their distribution. With fewer
        than six pairs there is no such interval: low and high are infinite.
    """
    differences = sorted(a - b for a, b in zip(with_it, without, strict=True))
    count = len(differences)
    rank, outside = -1, 0.0
    while rank + 1 < count:
        # the chance that at most `rank + 1` of `count` fall below the true median
        outside += math.comb(count, rank + 1) / 2**count
        if outside > 0.025:
            break
        rank += 1
    low, high = (differences[rank], differences[-1 - rank]) if rank >= 0 else (-math.inf, math.inf)
    return {"median": statistics.median(differences), "low": low, "high": high}


def limits(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> dict[str, float]:
    """The most the device can do, measured now.

    Args:
        device: measured.
        dtype: of the matrices.
        seconds: spent on each of the two, about.

    Returns:
        copy_bytes_per_second: of a device-to-device copy far larger than the cache, bytes read plus
            bytes written; matmul_flops_per_second: of a square matrix product. Each is the best of
            the repetitions: a limit is what was possible.
    """
    cuda = device.type == "cuda"
    size = 2**30 if cuda else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    best = {}
    for name, work, call in (
        ("copy_bytes_per_second", 2 * size, lambda: target.copy_(source)),
        ("matmul_flops_per_second", 2 * side**3, lambda: torch.mm(a, b, out=product)),
    ):
        took = interleave(
            {name: call}, device, seconds=seconds, rounds=(3, 200), warmup=2, timer=on_device
        )
        best[name] = work / min(took[name])
    return best


def cautions(options: Mapping[str, Any], quick: bool) -> list[str]:
    """What a reader of a benchmark's figures must know.

    Args:
        options: of a line, with load_average, of others before the benchmark began, and cores.
        quick: of the line.
    """
    said = ["a --quick run: too short to quote"] if quick else []
    load, cores = options["load_average"], options["cores"]
    if load > cores / 2:
        busy = f"load average {figures(load)} of {cores} cores"
        said.append(f"the machine is busy: {busy}: it is faster than these figures")
    return said


class Lines:
    """The lines of one benchmark, in a file that is whole after each of them.

    Args:
        path: of the .jsonl file; its folder is made. An existing file is replaced.
        benchmark: its name.
        device: measured.
        options: the benchmark's settings, as JSON types, without places.
        quick: whether the figures are too short to quote.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        benchmark: str,
        device: torch.device,
        options: Mapping[str, Any],
        *,
        quick: bool,
    ) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._benchmark, self._quick = benchmark, quick
        self._of = {
            "options": dict(options),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **record.provenance(device),
        }
        record.make_folder(path.parent)
        self._write()  # what cannot be written is known before the measuring

    def add(
        self,
        part: str,
        case: Mapping[str, Any],
        unit: str,
        figures: Mapping[str, float | int],
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write a row of figures, and return its line.

        Args:
            part: the table that it is a row of.
            case: what was measured.
            unit: of the figures.
            figures: from `spread` or `rates`.
            more: further figures; one that is not finite becomes null.
        """
        return self._add(part, case, unit, figures, more, None)

    def add_absent(self, part: str, case: Mapping[str, Any], why: str) -> dict[str, Any]:
        """Write a row that has no figures, with the reason in one line."""
        return self._add(part, case, None, {}, None, why)

    @contextmanager
    def kept_if_stopped(self, draw: Callable[[], object] | None = None) -> Iterator[None]:
        """Say of a benchmark that a signal stops within the block how many rows it leaves.

        Args:
            draw: a plot of the rows there are.

        Raises:
            Interrupted: by the signal.
        """
        try:
            yield
        except Interrupted as stop:
            with suppress(Interrupted, UserError):  # of a second signal, of a full disk
                if draw is not None:
                    draw()
            kept = f"{len(self.lines)} rows are kept in {self.path}"
            raise Interrupted(stop.number, f"stopped; {kept}") from None

    def finish(self) -> None:
        """Say of each line that the benchmark ended as it should."""
        for line in self.lines:
            line["complete"] = True
        self._write()

    def _add(
        self,
        part: str,
        case: Mapping[str, Any],
        unit: str | None,
        figures: Mapping[str, float | int],
        more: Mapping[str, Any] | None,
        absent: str | None,
    ) -> dict[str, Any]:
        line = {
            "benchmark": self._benchmark,
            "part": part,
            "case": dict(case),
            "unit": unit,
            **{name: _finite(figures.get(name)) for name in ("median", "p20", "p80", "count")},
            "more": {name: _finite(value) for name, value in (more or {}).items()},
            "absent": absent,
            "complete": False,
            "quick": self._quick,
            **self._of,
        }
        assert tuple(line) == LINE
        self.lines.append(line)
        self._write()
        return line

    def _write(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(self.path, text.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a benchmark's file, as objects."""
    return [asdict(line) for line in schema.read_lines(path)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
