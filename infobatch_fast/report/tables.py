"""The tables of a report's runs, and the sentence above them that answers what pruning did."""

import shlex
from collections.abc import Callable, Sequence

import pandas as pd

from infobatch_fast.pruning import FULL, Pruning
from infobatch_fast.report.page import Block, Code, Heading, Table, Text
from infobatch_fast.report.paired import (
    ALIKE,
    WIDTH,
    Paired,
    Training,
    against_full,
    against_shorter,
    by_budget,
    shorter_epochs,
    trainings,
)
from infobatch_fast.report.runs import FREE, ONLY_OF, Run, Section
from infobatch_fast.report.text import figures, mean
from infobatch_fast.train.records import CHECKPOINT

NONE = "–"
# Settings that no suggested command repeats; the last two are older records', no flags any more.
_UNASKED = FREE - {"seed", "preset", "epochs", "device"} | {"synthetic_easy", "synthetic_hard"}
_HOW = (
    "A difference is in points of the last epoch's accuracy, paired by seed, with its 95% t "
    "interval: lower or higher where that leaves out 0, equal where it holds 0 and is at most "
    f"±{WIDTH:g} points, else undecided, with about how many more seeds would bring it there "
    "(+n). Full data is of as many epochs, else of the most that there are. Training shorter is "
    "full data for fewer epochs, on as many samples as whole epochs come near: what pruning has to "
    "beat. Time is of training with its pruning, without start-up and evaluation, the median over "
    "seeds with its range; it is compared on one device and form alone, and means little where "
    "other work ran beside it."
)
# The paper's accuracy in percent, minutes, and seconds of overhead an epoch.
REPORTED: dict[Pruning, tuple[float, float, float | None]] = {
    FULL: (95.52, 231.10, None),
    Pruning(ratio=0.3): (95.50, 184.66, None),
    Pruning(ratio=0.5): (95.53, 148.44, 1.03),
    Pruning(ratio=0.7): (95.17, 113.83, None),
}
ABLATION = {
    Pruning(policy="random", rescale=False, anneal=False): 95.52,
    Pruning(rescale=False, anneal=False): 95.60,
    Pruning(anneal=False): 95.34,
    Pruning(rescale=False): 95.59,
    Pruning(): 95.53,
}


def answer(section: Section) -> list[Block]:
    """One sentence on what pruning cost and saved, a small table of all, and what is lacking."""
    rows = trainings(section)
    if not rows:
        begun = [f"{run.name}, {run.state}" for run in section.runs]
        told: list[Block] = [Text(f"No run is complete yet: {'; '.join(begun)}.", "answer")]
        for run in section.runs:
            if (run.folder / CHECKPOINT).exists():
                goes_on = _command(run, ["--resume", str(run.folder)])
                return [*told, Text("This goes on:"), Code(goes_on)]
        return told
    against = [(against_full(row, rows), against_shorter(row, rows)) for row in rows]
    # The first that prunes, of those that are held against anything if there are any.
    lead, pair = min(
        zip(rows, against, strict=True),
        key=lambda of: (of[0].pruning == FULL, of[1] == (None,) * 2),
    )
    blocks: list[Block] = [Text(_sentence(lead, *pair), "answer")]
    if len(rows) > 1:
        cells = [
            [
                *(row.label, str(len(row.frame)), mean([*row.frame["accuracy"]], 2)),
                *(NONE if one is None else _brief(one) for one in (full, shorter)),
                NONE if row.pruning == FULL else f"{100 * (full or row).saved:.1f}%",
                NONE if full is None else _time(full) or NONE,
            ]
            for row, (full, shorter) in zip(rows, against, strict=True)
        ]
        head = ["training", "seeds", "accuracy %", "against full data", "against training shorter"]
        blocks += [Table([*head, "fewer samples", "less time"], cells), Text(_HOW, "aside")]
    seeds = {run.config["seed"] for run in lead.runs} - {lead.runs[0].config["seed"]}
    others = ", ".join(map(str, sorted(seeds)))
    likewise = f"; and likewise with --seed {others}" * bool(seeds)
    for what, pruning, epochs in _lacking(lead, *pair):
        command = _train(lead.runs[0], pruning, epochs)
        blocks += [Text(f"Lacking is {what}{likewise}:"), Code(command)]
    return blocks


def budget_table(section: Section) -> list[Block]:
    """What was reached on equally many samples, where there are several numbers of them."""
    rows = trainings(section)
    if len(groups := by_budget(rows)) < 2:
        return []
    cells = [
        [
            *(f"{100 * share:.1f}%", row.label, str(row.epochs), str(len(row.frame))),
            mean([*row.frame["accuracy"]], 2),
            *(NONE if of is None else _brief(of) for of in (full, against_shorter(row, rows))),
        ]
        for group in groups
        for share, row, full in group
    ]
    head = ["samples", "training", "epochs", "seeds", "accuracy %"]
    about = (
        "Samples are a share of those of the longest training on full data, which the first "
        "difference is against."
    )
    return [
        Heading("On equally many samples", 2),
        Table([*head, "against full data", "against training shorter"], cells, left=2),
        Text(about, "aside"),
    ]


def run_table(section: Section) -> list[Block]:
    """Every run's figures, without columns that say nothing, and what they were measured with."""
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda run: run.name,
        "training": section.label,
        "seed": lambda run: str(run.config["seed"]),
        "state": lambda run: run.state,
        "accuracy %": lambda run: NONE if run.accuracy is None else f"{run.accuracy:.2f}",
        "saved %": lambda run: f"{100 * (run.saved_share or 0.0):.1f}",
        "s an epoch": lambda run: figures(run.epoch_seconds) if run.epoch_seconds else NONE,
        "images/s": lambda run: f"{run.images_per_second or 0:,.0f}",
        "pruning % of it": _overhead,
        "start-up s": lambda run: figures(run.startup_seconds),
        "all in all min": lambda run: figures(run.total_seconds / 60),
        "energy kJ": lambda run: figures(run.joules / 1000) if run.joules else NONE,
    }
    cells = {head: [of(run) for run in section.runs] for head, of in columns.items()}
    frame = pd.DataFrame(cells, dtype=object)  # arrow's strings take no name that is no UTF-8
    dull = {"state": "complete", "start-up s": "0", "energy kJ": NONE}
    frame = frame.drop(columns=[of for of, same in dull.items() if (frame[of] == same).all()])
    note = "Seconds an epoch are the median of training with its pruning; start-up is apart. "
    note += "Every run is complete. " * ("state" not in frame)
    if frame["pruning % of it"].str.contains("PART").any():
        note += "PART: of choosing alone, as the update is in one kernel or graph with the step. "
    names = ("device", "form", "torch", "commit", "source", "data")
    origin = pd.DataFrame([_origin(run) for run in section.runs], columns=pd.Index(names))
    counts = origin.value_counts(sort=False).reset_index(name="runs").astype(str)
    told = ", ".join(f"{name} {value}" for name, value in section.setting.items())
    return [
        Table([*map(str, frame)], frame.to_numpy().tolist(), left=3 + ("state" in frame)),
        Text(f"{note}In common are: {told}.", "aside"),
        Table([*map(str, counts)], counts.to_numpy().tolist(), left=6),
    ]


def reported_tables(section: Section) -> list[Block]:
    """The reported experiments beside ours; nothing for another setting."""
    if not section.reported:
        return []
    ours = {row.pruning: row.runs for row in trainings(section) if row.epochs == 200}

    def measured(of: Pruning, figure: Callable[[Run], float | None], digits: int = 2) -> str:
        values = [figure(run) for run in ours.get(of.method, [])]
        known = [value for value in values if value is not None]
        return mean(known, digits) if known else "not measured"

    def overhead(run: Run) -> float | None:
        return None if run.pruning_seconds is None else run.pruning_seconds / len(run.epochs)

    def row(of: Pruning, paper: float, *more: str) -> list[str]:
        runs = str(len(ours.get(of.method, [])))
        return [of.label, f"{paper:.2f}", measured(of, lambda run: run.accuracy), *more, runs]

    cells = []
    for of, (percent, minutes, cost) in REPORTED.items():
        took = [f"{minutes:.2f}", measured(of, lambda run: run.seconds / 60)]
        cells.append(
            row(of, percent, *took, f"{cost:.2f}" if cost else NONE, measured(of, overhead, 5))
        )
    names = ("accuracy %", "minutes", "overhead s")
    heads = ["training", *(f"{of} {by}" for of in names for by in ("paper", "ours")), "runs"]
    devices = ", ".join(dict.fromkeys(run.device for run in section.runs))
    about = (
        "The paper's (arXiv:2303.04947) are of one A100, batch 200, LARS, and of single runs in "
        f"the ablation; ours of {devices}. Overhead is the pruning of an epoch, minutes are of "
        "training with it."
    )
    return [
        Heading("Beside the reported experiments", 2),
        Table(heads, cells),
        Table([*heads[:3], "runs"], [row(of, percent) for of, percent in ABLATION.items()]),
        Text(about, "aside"),
    ]


def _sentence(row: Training, full: Paired | None, shorter: Paired | None) -> str:
    alone = f"{mean([*row.frame['accuracy']], 2)}% accuracy"
    if row.pruning == FULL:
        return f"{row.label}: {alone}. Nothing is pruned: a pruned run is lacking."
    unknown = []
    if full is None:
        parts = [f"{alone} with {_less(row.saved, 'samples')}"]
        unknown = ["what that cost in accuracy, and saved in time"]
    else:
        parts = [
            f"against {full.against} {_told(full, ' of accuracy')}",
            _less(full.saved, "samples"),
        ]
        if full.time is not None:
            range_ = f" ({_range(full)} by seed)" if _range(full) else ""
            parts.append(_less(full.time, "training time") + range_)
    told = f"{row.label}: {', '.join(parts)}"
    if shorter is None:
        unknown.append("whether training shorter does as well")
    else:
        told += f"; against training shorter ({shorter.against}) {_told(shorter)}"
        if abs(shorter.saved) > ALIKE:  # as near as whole epochs come
            told += f", {_less(shorter.saved, 'samples')}"
    return told + f". Not known is {', nor '.join(unknown)}" * bool(unknown) + "."


def _told(one: Paired, unit: str = "") -> str:
    points = f"{one.mean:+.2f} points{unit}, {one.verdict}"
    if one.half is None:
        return f"{points} (1 seed: the noise is not known)"
    more = f"; about {one.more} more would tell to ±{WIDTH:g}" if one.verdict == "undecided" else ""
    interval = f"{one.mean - one.half:+.2f} to {one.mean + one.half:+.2f}"
    return f"{points} (95% interval {interval}, {len(one.points)} seeds{more})"


def _brief(one: Paired) -> str:
    half = "" if one.half is None else f" ± {one.half:.2f}"
    more = f" (+{one.more})" if one.verdict == "undecided" and one.more else ""
    return f"{one.mean:+.2f}{half} {one.verdict}{more}"


def _time(one: Paired) -> str:
    range_ = _range(one)
    return "" if one.time is None else f"{100 * one.time:.0f}%" + f" ({range_})" * bool(range_)


def _range(one: Paired) -> str:
    """Of the times by seed, where it is worth a word."""
    low, high = 100 * one.times.min(), 100 * one.times.max()
    return f"{low:.0f} to {high:.0f}%" if high - low >= 2 else ""


def _less(share: float, what: str) -> str:
    less = "less" if what.endswith("time") else "fewer"
    return f"{abs(100 * share):.0f}% {less if share >= 0 else 'more'} {what}"


def _lacking(
    row: Training, full: Paired | None, shorter: Paired | None
) -> list[tuple[str, Pruning, int]]:
    """What a training has nothing to be compared with: what it leaves out, and its epochs."""
    if row.pruning == FULL:
        return [("a pruned run", Pruning(), row.epochs)]
    fewer = shorter_epochs(row.runs[0])
    short = [("training shorter", FULL, fewer)] * (shorter is None and fewer < row.epochs)
    return [("full data", FULL, row.epochs)] * (full is None) + short


def _train(run: Run, pruning: Pruning, epochs: int) -> list[str]:
    """The trainer's command for a run like this one."""
    words, dataset = [], run.config["dataset"]
    for name, value in {**run.config, "epochs": epochs}.items():
        flag = name.replace("_", "-")
        if name in _UNASKED or value is None or ONLY_OF.get(name, dataset) != dataset:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return _command(run, [*words, *pruning.flags])


def _command(run: Run, words: Sequence[str]) -> list[str]:
    """Lines to paste into a shell, each beginning with a flag; by as many processes as the run."""
    processes = run.record.device.get("processes")
    by = f"torchrun --nproc-per-node {processes}" if processes else "python"
    lines = [f"{by} -m infobatch_fast.train"]
    for word in words:
        if word.startswith("--") and len(lines[-1]) > 76:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {shlex.quote(word)}"
    return lines


def _overhead(run: Run) -> str:
    if run.pruning_seconds is None or not run.seconds:
        return NONE
    part = run.summary is not None and not run.summary.update_timed
    return f"{100 * run.pruning_seconds / run.seconds:.2f}" + " (PART)" * part


def _origin(run: Run) -> tuple[str, ...]:
    of = run.record
    commit = str(of.commit)[:8] + "-dirty" * str(of.commit).endswith("-dirty")
    torch = of.packages.get("torch") or "unknown"
    return run.device, run.form or NONE, torch, commit, of.source_hash[:8], of.data
