"""What the kernels' benchmark measures without a GPU: counts, and choosing beside numpy's way."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from statistics import median
from typing import Any

import harness as measure
import torch
from kernels_counts import Counts, count_all, counting_ours, total
from kernels_timing import Bench, said
from overhead_sides import Contender, Setting, draw_scores

from infobatch_fast.report.text import figures, seconds

COUNTED = {  # how; kernels_counts.py says more
    "torch": "TorchDispatchMode",
    "loop": "TorchDispatchMode",
    "ours": "TorchDispatchMode and calls of Triton's launcher, kernels not run",
}
SIDES = {"device": "ours", "numpy": "numpy"}  # by their names in the overhead benchmark
ROUNDS = 3
MOST_SECONDS = 75.0  # for a size that nobody asked for
SWEEP = 2**27  # bytes, above the last cache of most CPUs


def record_counts(bench: Bench) -> None:
    """Rows of the parts "launches" and "step"."""
    sides: dict[str, dict[str, Any] | str] = {}
    done = bench.show("counting launches")
    with counting_ours() as ours:
        torchs = {side: count_all(side) for side in ("torch", "loop")}
        done(0.5)
        try:
            sides["ours"] = ours()
        except (RuntimeError, ValueError) as error:  # no Triton: its rows say so
            sides["ours"] = said(error)
    done(1.0)
    sides |= torchs
    kernels = [counts["kernels"] for counts in sides.values() if not isinstance(counts, str)]
    names = dict.fromkeys(name for counts in kernels for name in counts)
    for side, counts in sides.items():
        if isinstance(counts, str):
            bench.lines.add_absent("launches", {"side": side}, counts)
            bench.lines.add_absent("step", {"side": side}, counts)
            continue
        for name in names:
            if name in counts["kernels"]:
                case = {"what": name, "side": side}
                _add(bench, "launches", case, counts["kernels"][name])
        for model, parts in counts["steps"].items():
            for part, of in {**parts, "all": total(parts)}.items():
                _add(bench, "step", {"model": model, "part": part, "side": side}, of)
            case = {"model": model, "part": "all without InfoBatch", "side": side}
            _add(bench, "step", case, counts["without"][model])
    bench.say(f"{'launches':10} {len(names)} kernels and steps counted")


def _add(bench: Bench, part: str, case: Mapping[str, Any], counts: Counts) -> None:
    more = {
        "torch_operations": counts["operations"],
        "foreach_operations": counts["foreach"],
        "host_only_operations": counts["host_only"],
        "triton_launches": counts["launches"],
        "counted_by": COUNTED[case["side"]],
    }
    figures = {"median": counts["operations"] + counts["launches"], "count": 1}
    bench.lines.add(part, case, "launches at least", figures, more)


def measure_choosing(bench: Bench, sizes: Sequence[int], asked: bool) -> None:
    """Rows of part "choosing": InfoBatch's epoch and numpy's, and the ratio of their times.

    Args:
        bench: whose rows they are.
        sizes: N, ascending.
        asked: whether the user named them: they are then measured however long it takes.
    """
    pace = 0.0  # s that a round takes a sample, as the last size had it
    for samples in sizes:
        expected = pace * samples
        rounds = ROUNDS
        if not asked and expected * ROUNDS > MOST_SECONDS:
            rounds = int(MOST_SECONDS / expected)
        if rounds == 0:
            why = (
                f"a round would take about {seconds(expected)}, and a size that was not asked for "
                f"gets {figures(MOST_SECONDS)} s: --sizes {samples} asks"
            )
            _add_choosing(bench, samples, {}, dict.fromkeys(SIDES.values(), why))
            continue
        took, failures = _choose(bench, samples, rounds, warmup=int(expected < 5))
        _add_choosing(bench, samples, took, failures)
        pace = 1.6 * sum(map(median, took.values())) / samples  # the caches hold less and less


def _choose(
    bench: Bench, samples: int, rounds: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each round, and why a side has none, by side."""
    setting = Setting((samples,), bench.quick, 200, "small", 0.5, bench.seed)
    draw = cache(partial(draw_scores, samples, bench.seed))
    contenders = {
        side: Contender(name, samples, draw, setting, bench.device) for name, side in SIDES.items()
    }
    if warmup:  # where it takes long the sizes before it have told
        for contender in contenders.values():
            contender.check(torch.rand(min(200, samples // 2)))
    sweep = torch.zeros(SWEEP, dtype=torch.uint8)

    def timer(call: Any, device: torch.device) -> float:
        sweep.add_(1)  # or a warm cache would answer
        return measure.wall(call, device)

    took = measure.interleave(
        {side: c.choose for side, c in contenders.items() if c.failure is None},
        bench.device,
        seconds=1.0 if bench.quick else 8.0,
        rounds=(rounds, 1000),
        warmup=warmup,
        timer=timer,
        after_round=bench.show(f"choosing at N = {samples:,}"),
    )
    failures = {side: c.failure for side, c in contenders.items() if c.failure is not None}
    return {side: of for side, of in took.items() if side not in failures}, failures


def _add_choosing(
    bench: Bench, samples: int, took: Mapping[str, Sequence[float]], failures: Mapping[str, str]
) -> None:
    shown = []
    for side in SIDES.values():
        case = {"samples": samples, "side": side}
        if side in took:
            spread = measure.spread(took[side])
            bench.lines.add("choosing", case, "s", spread)
            shown.append(f"{side} {seconds(spread['median'])}")
        else:
            bench.lines.add_absent("choosing", case, failures[side])
            shown.append(f"{side} absent")
    case = {"samples": samples, "side": "ours / numpy"}
    if len(took) == len(SIDES):
        ratios = [a / b for a, b in zip(took["ours"], took["numpy"], strict=True)]
        bench.lines.add("choosing", case, "ratio", measure.spread(ratios))
        shown.append(f"ratio {figures(median(ratios))}")
    else:
        bench.lines.add_absent("choosing", case, "a side of it is absent")
    bench.say(f"{'choosing':10} N = {samples:,}: {', '.join(shown)}")
