"""The parts of the overhead benchmark: pruning alone, whole steps, epochs and telemetry.

Each part appends its rows as soon as they are measured.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import harness as measure
import torch
from harness import Lines
from overhead_sides import SIDES, Contender, Setting, Steps, draw_scores
from tqdm import tqdm

from infobatch_fast.report.text import seconds
from infobatch_fast.telemetry.phases import Nvml, Phases, host_syncs
from infobatch_fast.train.cli import Say

# Its sign may be another than that of the medians' difference.
PAIRED = "median of paired differences"
SWEEP = 2**27  # bytes, above the last cache of most CPUs and GPUs

Timer = Callable[[Callable[[], object], torch.device], float]


@dataclass
class Bench:
    """What every part of the measuring needs."""

    setting: Setting
    device: torch.device
    lines: Lines
    say: Say
    bar: tqdm

    def __post_init__(self) -> None:
        self._sweep = torch.zeros(SWEEP, dtype=torch.uint8, device=self.device)
        self.clocks: dict[str, Timer] = {"wall": self.cold(measure.wall)}
        if self.device.type == "cuda":
            self.clocks["device"] = self.cold(measure.on_device)

    def cold(self, timer: Timer) -> Timer:
        """A timer before whose clock starts the caches are emptied."""

        def timed(call: Callable[[], object], device: torch.device) -> float:
            self._sweep.add_(1)
            return timer(call, device)

        return timed

    def budget(self, full: float, quick: float) -> float:
        """Seconds to measure for."""
        return quick if self.setting.quick else full

    def time(
        self,
        what: str,
        calls: Mapping[str, Callable[[], object]],
        budget: float,
        timer: Timer,
        rounds: int = 5,
    ) -> dict[str, list[float]]:
        """`measure.interleave` of at least so many rounds, shown in the bar."""
        self.bar.reset(total=100)
        self.bar.set_description(what)

        def show(share: float) -> None:
            self.bar.update(round(100 * share) - self.bar.n)

        return measure.interleave(
            calls,
            self.device,
            seconds=budget,
            rounds=(rounds, 1000),
            timer=timer,
            after_round=show,
        )


def measure_alone(bench: Bench) -> None:
    """`choose` and `update` of every side at every N; what the host does at the training's N."""
    setting, device = bench.setting, bench.device
    random = torch.Generator(device).manual_seed(setting.seed)
    losses = torch.empty(setting.batch_size, device=device).log_normal_(generator=random)
    refused: dict[str, str] = {}
    for samples in setting.sizes:
        draw = cache(partial(draw_scores, samples, setting.seed))  # unless no side has room for it
        contenders = [Contender(name, samples, draw, setting, device) for name in SIDES]
        if samples == setting.sizes[0]:
            for contender in contenders:
                contender.check(losses)
                if contender.failure is not None and contender.side is not None:
                    refused[contender.name] = contender.failure
        for contender in contenders:
            contender.failure = contender.failure or refused.get(contender.name)
        case = {"samples": samples}
        calls = {c.name: c.choose for c in contenders if c.failure is None}
        _measure_calls(bench, "choose", case, contenders, calls, bench.budget(5.0, 1.0))
        case = {**case, "batch_size": setting.batch_size}
        updates = {c.name: c.updates(losses) for c in contenders if c.failure is None}
        _measure_calls(bench, "update", case, contenders, updates, bench.budget(2.0, 0.5))


def _measure_calls(
    bench: Bench,
    part: str,
    case: dict[str, Any],
    contenders: Sequence[Contender],
    calls: Mapping[str, Callable[[], object]],
    budget: float,
) -> None:
    samples = case["samples"]
    for clock, timer in bench.clocks.items():
        took = bench.time(f"{part} at N = {samples:,}", calls, budget, timer) if calls else {}
        for c in contenders:
            row = {**case, "side": c.name, "clock": clock}
            if c.failure is None:
                bench.lines.add(part, row, "s", measure.spread(took[c.name]))
            else:
                bench.lines.add_absent(part, row, c.failure)
        bench.say(f"{part:10} N = {samples:,}, {clock}: {_medians(bench.lines, len(contenders))}")
    if samples == bench.setting.training_size:
        good = {c.name: calls[c.name] for c in contenders if c.failure is None}
        rows = _host_rows(bench, f"{part}, on the host", good, bench.cold(host_time))
        for c in contenders:
            row = {"what": part, "samples": samples, "side": c.name}
            if c.failure is None:
                bench.lines.add("host", row, "s", *rows[c.name])
            else:
                bench.lines.add_absent("host", row, c.failure)


def _medians(lines: Lines, count: int) -> str:
    rows = [line for line in lines.lines[-count:] if line["absent"] is None]
    words = {"difference": PAIRED}
    sides = [(words.get(row["case"]["side"], row["case"]["side"]), row["median"]) for row in rows]
    return ", ".join(f"{side} {seconds(median)}" for side, median in sides) or "none"


def _host_rows(
    bench: Bench, what: str, calls: Mapping[str, Callable[[], object]], timer: Timer
) -> dict[str, tuple[dict[str, float | int], dict[str, int | None]]]:
    """By side the spread of the seconds until a call returns, and its host syncs."""
    if not calls:
        return {}
    took = bench.time(what, calls, bench.budget(1.0, 0.2), timer)
    rows = {}
    for side, call in calls.items():
        syncs = None
        # On a CPU a copy "to the host" is none, so those of the sides on the host are not seen.
        if bench.device.type == "cuda" or side not in ("numpy", "original"):
            with host_syncs(bench.device, "count") as seen:
                call()
            syncs = seen.count
        rows[side] = measure.spread(took[side]), {"host_syncs": syncs}
    return rows


def host_time(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until a call returns; a device that is still at work is waited for afterwards."""
    measure.synchronize(device)
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    measure.synchronize(device)
    return took


def measure_steps(bench: Bench, steps: Steps) -> None:
    """Steps with and without InfoBatch, their difference, and what the host does in them.

    What `update` takes alone beyond the plain mean is measured again in the same rounds, since on a
    machine that others use two minutes do not compare.
    """
    setting, device = bench.setting, bench.device
    case = {"samples": setting.training_size, "batch_size": setting.batch_size, **steps.training}
    # On a GPU the host runs ahead of the device: several steps are timed as one call.
    count = 10 if device.type == "cuda" else 1
    off = Phases(device, enabled=False)
    calls: dict[str, Callable[[], object]] = {
        side: lambda side=side: steps.run(side, count, off) for side in steps.steps
    }
    timers: dict[Callable[[], object], Timer] = dict.fromkeys(calls.values(), measure.wall)
    draw = cache(partial(draw_scores, setting.training_size, setting.seed))
    losses = torch.ones(setting.batch_size, device=device)
    contenders = [
        Contender(side, setting.training_size, draw, setting, device) for side in ("device", "none")
    ]
    for contender in contenders:
        for clock, timer in bench.clocks.items():
            calls[f"{contender.name} {clock}"] = call = contender.updates(losses)
            timers[call] = timer
    took = bench.time(
        "whole steps",
        calls,
        bench.budget(30.0, 5.0),
        lambda call, device: timers[call](call, device),
        rounds=6,
    )
    if any(contender.failure for contender in contenders):
        raise MemoryError  # of ours nothing else is a failure
    each = {side: [value / count for value in took[side]] for side in steps.steps}
    for side, values in each.items():
        bench.lines.add("step", {**case, "side": side}, "s", measure.spread(values))
    gap = measure.difference(each["with"], each["without"])
    alone = {}
    for clock in bench.clocks:
        added = measure.difference(took[f"device {clock}"], took[f"none {clock}"])["median"]
        inside = gap["low"] <= added <= gap["high"]
        alone |= {f"update_{clock}_seconds": added, f"update_{clock}_inside": inside}
    more = {"low_seconds": gap["low"], "high_seconds": gap["high"], **alone}
    spread = {"median": gap["median"], "count": len(each["with"])}
    bench.lines.add("step", {**case, "side": "difference"}, "s", spread, more)
    bench.say(f"{'step':10} {_medians(bench.lines, 3)}")
    once = {side: lambda side=side: steps.run(side, 1, off) for side in steps.steps}
    for side, row in _host_rows(bench, "steps, on the host", once, host_time).items():
        case = {"what": "step", "samples": setting.training_size, "side": side}
        bench.lines.add("host", case, "s", *row)


def measure_epoch(bench: Bench, kept: int) -> None:
    """Overhead of an epoch: what was measured alone, over the steps without InfoBatch."""
    setting, lines = bench.setting, bench.lines.lines
    samples, b = setting.training_size, setting.batch_size
    step = find(lines, "step", side="without")
    clock = list(bench.clocks)[-1]
    for side in SIDES:
        case = {"samples": samples, "batch_size": b, "side": side}
        choose = find(lines, "choose", samples=samples, side=side, clock="wall")
        update = find(lines, "update", samples=samples, side=side, clock=clock)
        if step is None or choose is None or update is None:
            bench.lines.add_absent("epoch", case, "its choose, its update or the step is absent")
            continue
        more = shares(choose["median"], update["median"], step["median"], kept, samples, b)
        bench.lines.add("epoch", case, "s", {"median": more.pop("overhead_seconds")}, more)


def shares(
    choose: float, update: float, step: float, kept: int, samples: int, batch_size: int
) -> dict[str, float]:
    """Overhead of a pruned epoch, in s and in % of that epoch's steps and of a full epoch's.

    Args:
        choose: s an epoch.
        update: s a step.
        step: s of a step without pruning.
        kept: K.
        samples: N.
        batch_size: B; the last batch of an epoch counts as a whole one.
    """
    pruned, full = math.ceil(kept / batch_size), math.ceil(samples / batch_size)
    overhead = choose + pruned * update
    return {
        "overhead_seconds": overhead,
        "choose_seconds": choose,
        "updates_seconds": pruned * update,
        "pruned_epoch_steps": pruned,
        "full_epoch_steps": full,
        "pruned_epoch_percent": 100 * overhead / (pruned * step),
        "full_epoch_percent": 100 * overhead / (full * step),
    }


def measure_telemetry(bench: Bench, steps: Steps) -> None:
    """Whole steps with the phases and the NVML sampler on, and with both off.

    Groups of steps are timed: on a GPU long enough for several samples, the sampler starting before
    a group's clock and ending after it; on a CPU, which has no sampler, short ones, as its pace
    changes within seconds. The histogram of the scores, one an epoch, is not in it.
    """
    setting, device = bench.setting, bench.device
    step = find(bench.lines.lines, "step", side="with")
    assert step is not None
    count = 2
    if device.type == "cuda":
        count = min(500, max(count, math.ceil(0.3 / step["median"])))
    phases = {name: Phases(device, enabled=name == "on") for name in ("on", "off")}

    def on() -> None:
        steps.run("with", count, phases["on"])
        phases["on"].read()

    def off() -> None:
        steps.run("with", count, phases["off"])

    def timer(call: Callable[[], object], device: torch.device) -> float:
        with Nvml(device, enabled=call is on):
            return measure.wall(call, device)

    budget = bench.budget(35.0, 5.0)
    took = bench.time("telemetry", {"on": on, "off": off}, budget, timer, rounds=6)
    each = {name: [value / count for value in values] for name, values in took.items()}
    case = {"samples": setting.training_size, "batch_size": setting.batch_size, **steps.training}
    for name, values in each.items():
        more = {"group_steps": count}
        bench.lines.add("telemetry", {**case, "side": name}, "s", measure.spread(values), more)
    gap = measure.difference(each["on"], each["off"])
    of = measure.spread(each["off"])["median"] / 100
    percent = {f"{name}_percent": value / of for name, value in gap.items()}
    spread = {"median": gap["median"], "count": len(each["on"])}
    bench.lines.add("telemetry", {**case, "side": "difference"}, "s", spread, percent)
    bench.say(f"{'telemetry':10} {_medians(bench.lines, 3)}")


def find(lines: Sequence[Mapping[str, Any]], part: str, **case: object) -> Mapping[str, Any] | None:
    """The row of figures of a part whose case has these values; None if it is absent."""
    for line in lines:
        if line["part"] == part and line["absent"] is None and case.items() <= line["case"].items():
            return line
    return None
