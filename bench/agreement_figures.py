"""What the parts of `agreement.py` share: how far results lie apart, and rows that have a limit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import harness as measure
import torch
from harness import Lines
from torch import Tensor

from infobatch_fast.errors import UserError, reason
from infobatch_fast.report.text import markdown
from infobatch_fast.train.cli import Say

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
_COLUMNS = ("samples", "amp")  # of a case: they stand side by side in the tables


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest distance of two results in units in the last place.

    That is how many steps from one number of the dtype to the next lead from one value to the
    other: 0 and -0 are the same, the largest finite number is one step from infinity.

    Args:
        got: float16, bfloat16 or float32.
        want: of the same dtype and shape.

    Returns:
        A whole number; 0 where there are no elements or both are NaN, infinite where one is.

    Raises:
        ValueError: the dtypes or shapes differ.
    """
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        raise ValueError(
            f"got must be {want.dtype} of shape {tuple(want.shape)} like want, "
            f"got {got.dtype} of shape {tuple(got.shape)}"
        )
    want = want.to(got.device)
    one_is_nan = got.isnan() != want.isnan()
    if bool(one_is_nan.any()):
        return math.inf
    steps = (_ordered(got) - _ordered(want)).abs().masked_fill(got.isnan(), 0)
    return float(steps.max()) if steps.numel() else 0.0


def _ordered(values: Tensor) -> Tensor:
    """Whole numbers that follow each other as the values do."""
    kind = _BITS[values.dtype]
    bits = values.contiguous().view(kind).long()
    # The sign is a bit of its own: of negative numbers, greater bits are smaller values.
    return torch.where(bits < 0, torch.iinfo(kind).min - bits, bits)


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference, of the largest value that is wanted; 0 where all are equal.

    Args:
        got: any dtype; compared in float64 on the host.
        want: of the same shape; where it is NaN `got` must be.
    """
    got, want = (values.detach().double().cpu() for values in (got, want))
    if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
        return math.inf
    if torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0)):
        return 0.0
    worst = (got - want).abs().nan_to_num(0.0).max().item()
    largest = want.abs().nan_to_num(0.0).max().item()
    return worst / largest if largest else math.inf


def unequal(got: Tensor, want: Tensor) -> int:
    """How many elements differ; all of the longer one where the shapes do."""
    if got.shape != want.shape:
        return max(got.numel(), want.numel())
    return int((got != want.to(got.device)).sum())


@dataclass
class Bench:
    """Where the parts write their rows.

    Attributes:
        device: whose fast forms are compared.
        lines: the rows.
        say: shows a line to the user.
        quick: fewer samples and steps.
        seed: of scores, plans, augmentation and weights.
        failures: what kept a row from having a figure where it should have one.
    """

    device: torch.device
    lines: Lines
    say: Say
    quick: bool
    seed: int
    failures: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def add(
        self,
        part: str,
        case: Mapping[str, Any],
        figure: float,
        unit: str,
        limit: float | None = None,
        *,
        at_least: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a figure, and whether it keeps its limit; one that is not finite is a failure.

        Args:
            part: loader, choose, step or resume.
            case: what was compared.
            figure: what came of it.
            unit: of it.
            limit: that it has to keep; None is a figure for information.
            at_least: the limit is the least that it may be, else the most.
            more: further figures.
        """
        if not math.isfinite(figure):
            self.add_absent(part, case, f"the figure is {figure}", failed=True)
            return
        words = f"{part:10} {_in_words(case)}: {_shown(figure)} {unit}"
        extra = dict(more or {})
        if limit is not None:
            kept = figure >= limit if at_least else figure <= limit
            bound = "at least" if at_least else "at most"
            extra |= {"limit": limit, "bound": bound, "kept": kept}
            words += f" ({bound} {_shown(limit)}{'' if kept else ': NOT KEPT'})"
        self.lines.add(part, case, unit, measure.spread([figure]), extra)
        self.say(words)

    def add_absent(
        self, part: str, case: Mapping[str, Any], why: str, *, failed: bool = False
    ) -> None:
        """Write a row without a figure.

        Args:
            part: as of `add`.
            case: the same.
            why: in one line.
            failed: the device should have had a figure: the command fails.
        """
        self.lines.add_absent(part, case, why)
        self.say(f"{part:10} {_in_words(case)}: absent: {why}")
        if failed:
            self.failures.append(f"{part} {_in_words(case)}: {why}")

    @contextmanager
    def guard(self, part: str, case: Mapping[str, Any]) -> Iterator[None]:
        """What fails within becomes a row that failed, so that the rest goes on."""
        try:
            yield
        except UserError:  # of the disk
            raise
        except Exception as error:
            why = f"it failed: {type(error).__name__}: {reason(error)}"
            self.add_absent(part, case, why, failed=True)

    @property
    def broken(self) -> list[str]:
        """The rows whose limit is not kept, in words."""
        return [
            f"{line['part']} {_in_words(line['case'])}: {_shown(line['median'])} {line['unit']}, "
            f"{line['more']['bound']} {_shown(line['more']['limit'])} allowed"
            for line in self.lines.lines
            if line["more"].get("kept") is False
        ]


def tables(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table for each part, with the reasons of what is absent below it."""
    out: list[str] = []
    for part in dict.fromkeys(line["part"] for line in lines):
        of = [line for line in lines if line["part"] == part]
        shown = [line for line in of if line["absent"] is None]
        out += ["", f"## {part}", "", *(_table(shown) if shown else [])]
        absent = [line for line in of if line["absent"] is not None]
        whys = [f"- absent: {_in_words(a['case'])}: {a['absent']}" for a in absent]
        out += ["", *whys] if shown and whys else whys
    return out


def _table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(n for line in lines for n in line["case"] if n not in _COLUMNS))
    columns = list(dict.fromkeys(_column(line) for line in lines))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        case, more = line["case"], line["more"]
        bound = {"at most": "<= ", "at least": ">= "}.get(more.get("bound", ""), "")
        limit = bound + _shown(more["limit"]) if bound else "none"
        key = (*(str(case.get(name, "")) for name in names), line["unit"])
        mark = " NOT KEPT" if more.get("kept") is False else ""
        row = rows.setdefault(key, {})
        row[_column(line)] = _shown(line["median"]) + mark
        before = row.get("limit", limit)
        row["limit"] = limit if limit == before else f"{before}, {limit}"
    cells = [[*key, *(row.get(c, "-") for c in columns), row["limit"]] for key, row in rows.items()]
    return markdown([*names, "unit", *columns, "limit"], cells, left=len(names) + 1)


def _column(line: Mapping[str, Any]) -> str:
    case = line["case"]
    if "samples" in case:
        return f"N = {case['samples']:,}"
    return {"off": "float32", "bf16": "bf16"}.get(case.get("amp", ""), "value")


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _in_words(case: Mapping[str, Any]) -> str:
    return ", ".join(
        f"N = {value:,}" if name == "samples" else {"off": "float32"}.get(str(value), str(value))
        for name, value in case.items()
    )


@contextmanager
def like_for_like() -> Iterator[None]:
    """On a GPU: the same algorithm each time, and float32 that is not rounded to TF32.

    What is left to differ is the form. It costs time, which is not what is measured.
    """
    cudnn = torch.backends.cudnn
    names = ("deterministic", "benchmark", "allow_tf32")
    before = {name: getattr(cudnn, name) for name in names}
    precision = torch.get_float32_matmul_precision()
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in before.items():
            setattr(cudnn, name, value)
