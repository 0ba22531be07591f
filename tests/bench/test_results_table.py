"""The README's table of results: figures by hand, and nothing in it that is not on record."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from results_table import main, read, table

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"<!-- bench/results_table.py: (\S+) -->\n(.*?)<!-- end -->", re.S)


def line(accuracy: float, seed: int = 0, epochs: int = 8, **changed: Any) -> dict[str, Any]:
    full = changed.pop("full", False)
    saved = 0.0 if full else 0.25
    return {
        "method": {
            "policy": "none" if full else changed.pop("policy", "soft"),
            "ratio": None if full else 0.5,
            "delta": 0.0 if full else 0.875,
            "rescale": not full,
            "anneal": not full,
            "score": "loss",
            "ratio_schedule": "constant",
            "target_saving": None,
        },
        "seed": seed,
        "epochs": epochs,
        "state": "done",
        "accuracy_last": accuracy,
        "saved_share": saved,
        "samples_trained": round((1 - saved) * epochs * 1000),
        **{name: "same" for name in ("dataset", "data", "model", "data_fraction")},
        **{"source_hash": "same", "device": {"name": "same"}, **changed},
    }


def cells(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table(lines)[2:]]


def test_means_and_differences_by_hand() -> None:
    lines = [line(0.80 + 0.01 * seed, seed, full=True) for seed in range(3)]
    lines += [line(0.79 + 0.01 * seed, seed, full=True, epochs=6) for seed in range(3)]
    lines += [line(0.79 + 0.011 * seed, seed) for seed in range(3)]
    assert cells(lines) == [
        ["full data, 8 epochs", "0.0%", "81.00 ± 1.00", "-", "-", "3"],
        ["full data, 6 epochs", "25.0%", "80.00 ± 1.00", "-1.00 ± 0.00", "-", "3"],
        [
            "InfoBatch r=0.5, 8 epochs",
            "25.0%",
            "80.10 ± 1.10",
            "-0.90 ± 0.10",
            "(+0.10 ± 0.10)",
            "3",
        ],
    ]


def test_one_seed_and_others_epochs() -> None:
    lines = [line(0.9, full=True), line(0.8, policy="hard"), line(0.7, full=True, epochs=3)]
    lines += [line(0.75, full=True, epochs=5)]  # the nearer to six epochs' samples
    rows = cells(lines)
    assert rows[1] == [
        "hard r=0.5 + anneal, 8 epochs",
        "25.0%",
        "80.00",
        "(-10.00)",
        "(+5.00)",
        "1",
    ]
    assert rows[2][1] == "62.5%"  # of the longer training's samples


def test_what_is_not_done_is_left_out_and_strangers_refused(tmp_path, capsys) -> None:
    path = tmp_path / "results.jsonl"
    lines = [line(0.9, full=True), {**line(0.1), "state": "failed"}]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert [one["accuracy_last"] for one in read(path)] == [0.9]
    for text, told in (
        (json.dumps(lines[0]) + "\n" + json.dumps(line(0.5, model="r50")), "got 2"),
        ('{"name": 1}', "KeyError"),
        ("{", "JSONDecodeError"),
    ):
        path.write_text(text)
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert told in error
    assert main([str(tmp_path / "none")]) == 2
    assert main([]) == 2


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a checkout")
def test_the_readme_holds_the_committed_records() -> None:
    found = PLACE.findall((ROOT / "README.md").read_text())
    assert found
    for name, text in found:
        assert text.splitlines() == table(read(ROOT / name)), name
