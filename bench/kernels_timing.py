"""How the kernels' benchmark times a case: its sides checked, captured and interleaved.

A repetition works on buffers of its own, and before the clock starts a buffer four times the size
of the L2 cache is read: no input lies in the cache. (Read, not written: lines that have to be
written back would take of the bandwidth that is measured.) Up to 1 GiB moved, the repetitions are
one CUDA graph, so that no launch from the host is in the time; what is larger, or no graph can
hold, is one call behind a backlog. "wall" has the host's part in it, and its wait for the device.
"""

import gc
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness as measure
import torch
from harness import Lines
from kernels_work import COPIED_BYTES, Call, Case, GetKernels, Work
from tqdm import tqdm

from infobatch_fast.errors import reason
from infobatch_fast.kernels import select
from infobatch_fast.kernels.select import Kernels
from infobatch_fast.report.text import figures, seconds
from infobatch_fast.train.cli import Say, is_out_of_memory


@dataclass
class Bench:
    """What every part of the measuring needs.

    Attributes:
        device: measured.
        lines: where the rows go.
        say: shows a line to the user.
        bar: shows how far a case is.
        quick: figures too short to quote.
        seed: of scores, batches, parameters and models.
    """

    device: torch.device
    lines: Lines
    say: Say
    bar: tqdm
    quick: bool
    seed: int

    def show(self, what: str) -> Callable[[float], None]:
        """A bar for something new; returns what takes the share that is done."""
        self.bar.reset(total=100)
        self.bar.set_description(what)

        def done(share: float) -> None:
            self.bar.update(round(100 * share) - self.bar.n)

        return done


class Timed:
    """A side that is ready to be timed. After a failure it does nothing, so that others go on.

    Attributes:
        repetitions: that a call does.
        clock: graph, backlog or wall.
        failure: why it has no figures; None while all is well.
    """

    def __init__(self, call: Callable[[], object], repetitions: int, clock: str) -> None:
        self.repetitions, self.clock = repetitions, clock
        self.failure: str | None = None
        self._call = call

    def __call__(self) -> None:
        """Do all repetitions."""
        if self.failure is None:
            try:
                self._call()
            except Exception as error:  # of whichever side: its row says what
                self.failure = said(error)


def said(error: Exception) -> str:
    """Why a side has no figures, in a line."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {reason(error)}"


def proven(device: torch.device) -> GetKernels:
    """Gives the Triton kernels once they agree with torch on an example; else it raises why not."""
    try:
        kernels = select.load()
        with torch.cuda.device_of(torch.empty(0, device=device)):
            select.prove(kernels, device)
    except Exception as error:  # no Triton, or of its compiler or the driver, or of `prove`
        why = f"the kernels are not used: {reason(error)}"

        def refuse() -> Kernels:
            raise RuntimeError(why)

        return refuse
    return lambda: kernels


def measure_case(bench: Bench, case: Case, copy_rate: float) -> None:
    """Rows of part "kernels": each side of a case that does what it must.

    Args:
        bench: whose rows they are.
        case: measured.
        copy_rate: B/s of the device, which 100% of a row is.
    """
    name = f"{case.kernel} {', '.join(f'{size:,}' for size in case.size.values())}".rstrip()
    done = bench.show(name)
    release(bench.device)
    absent: dict[str, str] = {}
    timed: dict[str, Timed] = {}
    work = None
    try:
        work = case.build()
    except Exception as error:
        absent = dict.fromkeys(case.sides, said(error))
    if work is not None:
        for side in case.sides:
            try:
                timed[side] = _ready(case, work, work.sides[side], bench.device)
            except Exception as error:  # of whichever side: its row says what
                absent[side] = said(error)
    values = _time(bench, timed, done) if timed else {}
    absent |= {side: t.failure for side, t in timed.items() if t.failure is not None}
    shown = []
    for side in case.sides:
        row = {"kernel": case.kernel, **case.size, "side": side}
        if side in absent or work is None:
            bench.lines.add_absent("kernels", row, absent[side])
            shown.append(f"{side} absent")
            continue
        spread = measure.spread(values[side])
        more = {
            "clock": timed[side].clock,
            "graph_repetitions": timed[side].repetitions,
            **moved_figures(spread["median"], work.moved, copy_rate),
            **work.more,
        }
        if "moved_sectors_bytes" in work.more:
            sectors = moved_figures(spread["median"], work.more["moved_sectors_bytes"], copy_rate)
            more["sectors_copy_limit_percent"] = sectors["copy_limit_percent"]
        bench.lines.add("kernels", row, "s", spread, more)
        shown.append(f"{side} {seconds(spread['median'])}")
        if "copy_limit_percent" in more:
            shown[-1] += f" ({figures(more['copy_limit_percent'])}%)"
    bench.say(f"{name}: {', '.join(shown)}")


def moved_figures(took: float, moved: int, copy_rate: float) -> dict[str, float]:
    """Bytes, GB/s, and % of a copy's rate.

    Args:
        took: s.
        moved: bytes; of none there are no figures.
        copy_rate: B/s.
    """
    if not moved:
        return {}
    rate = moved / took
    return {
        "moved_bytes": moved,
        "moved_GB/s": rate / 1e9,
        "copy_limit_percent": 100 * rate / copy_rate,
    }


def _ready(case: Case, work: Work, make: Callable[[], Call], device: torch.device) -> Timed:
    """A side that was shown to do what it must; raises what went wrong."""
    call = make()
    outputs = call(0)
    work.check(outputs)
    del outputs
    measure.synchronize(device)
    if device.type == "cuda" and case.clock == "device" and work.moved <= COPIED_BYTES:
        calls = [partial(call, i) for i in range(work.copies)]
        for each in calls:  # whatever is compiled or tuned at a first call cannot be captured
            each()
        try:
            return Timed(_captured(calls), work.copies, "graph")
        except RuntimeError:  # it asks something of the host
            measure.synchronize(device)
    turns = itertools.cycle(range(work.copies))
    clock = "wall" if case.clock == "wall" or device.type != "cuda" else "backlog"
    return Timed(lambda: call(next(turns)), 1, clock)


def _captured(calls: list[Callable[[], Any]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # All kept until the end, or one repetition would write where the last one did.
        kept = [call() for call in calls]
    del kept

    def replay() -> None:
        assert calls  # they hold the buffers, which the graph does not
        graph.replay()

    return replay


def _time(
    bench: Bench, timed: Mapping[str, Timed], done: Callable[[float], None]
) -> dict[str, list[float]]:
    """Seconds of one repetition, by side."""
    sweep = _sweep(bench.device)

    def timer(call: Any, device: torch.device) -> float:
        sweep()
        clock = measure.wall if call.clock == "wall" else measure.on_device
        return clock(call, device) / call.repetitions

    return measure.interleave(
        timed,
        bench.device,
        seconds=0.2 if bench.quick else 1.0,
        rounds=(10, 1000),
        warmup=2,
        timer=timer,
        after_round=done,
    )


def _sweep(device: torch.device) -> Callable[[], object]:
    """Reads more than the L2 cache holds."""
    if device.type != "cuda":
        return lambda: None
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(size // 4, device=device).sum


def release(device: torch.device) -> None:
    """Give back what is cached: sides and cases of other sizes cannot use each other's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
