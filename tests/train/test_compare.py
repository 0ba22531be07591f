"""`--compare`: which runs it trains, that it trains none twice, and what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from report_made import write_run
from runs import fails

from infobatch_fast import report
from infobatch_fast.pruning import Pruning
from infobatch_fast.train import config, main, queue

CALL = ["--compare", "--device", "cpu"]


@pytest.fixture
def reports() -> list[Sequence[str]]:
    """The words of those that were asked for; none is made."""
    return []


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, reports: list[Sequence[str]]) -> list[str]:
    """The folders that runs were begun in: they are made by formula, in the place of training."""
    begun: list[str] = []

    def child(words: Sequence[str], log: Path, show: object) -> tuple[int, str]:
        if "infobatch_fast.report" in words:
            reports.append(words[3:])
            return 0, ""
        settings = config.parse(words[3:], cuda=False)
        assert settings.out is not None
        if "label-noise" in settings.out.name and settings.pruning.full_data:
            return 1, "it broke"
        begun.append(settings.out.name)
        write_run(settings.out, settings.recorded())
        return 0, ""

    monkeypatch.setattr(queue, "run_child", child)
    return begun


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "label", "epochs", "full"),
    [
        ("--ratio 0.6 --validation 20 --max-lr 0.2", "InfoBatch r=0.6", 10, 10),
        ("--budget 0.6 --epochs 20 --seed 7", "hard, 33.3333% to save + anneal", 18, 20),
    ],
)
def test_each_seed_has_its_rivals(
    tmp_path: Path, capsys, trained, reports, words: str, label: str, epochs: int, full: int
) -> None:
    out = tmp_path / "out"
    call = [*CALL, *words.split(), "--out", str(out)]
    assert main([*call, "--seeds", "1"]) == 0
    assert main([*call, "--seeds", "2"]) == 0
    assert len(trained) == len(set(trained)) == 6
    lines = lines_of(out)
    for start in (0, 3):
        pruned, longer, shorter = lines[start : start + 3]
        assert [each["label"] for each in lines[start : start + 3]] == [label, *["full data"] * 2]
        assert (pruned["config"]["epochs"], longer["config"]["epochs"]) == (epochs, full)
        size = pruned["samples"]["train"]
        seen = [each["summary"]["samples_trained"] for each in (pruned, longer, shorter)]
        assert abs(seen[0] - seen[2]) <= size / 2  # half an epoch
        assert seen[1] == full * size > seen[2]
    free = {"seed", "epochs", *Pruning().settings()}
    settings = [{k: v for k, v in each["config"].items() if k not in free} for each in lines]
    assert all(each == settings[0] for each in settings)
    first = 7 if "--seed" in words else 0
    assert [each["config"]["seed"] for each in lines] == [first] * 3 + [first + 1] * 3
    capsys.readouterr()
    assert report.main(reports[-1]) == 0
    answer, where = capsys.readouterr().out.splitlines()
    assert answer.startswith(label)
    assert ": against full data" in answer
    assert "; against training shorter (full data" in answer
    assert "2 seeds" in answer
    assert "Not known" not in answer
    assert f"{out / 'report'}: report.md and report.html" in where
    assert main([*call, "--seeds", "2"]) == 0
    assert len(trained) == 6


def test_what_was_trained_before_is_found_by_what_it_trains_on(tmp_path: Path, trained) -> None:
    call = [*CALL, "--seeds", "1", "--out", str(tmp_path)]
    for more, runs in (
        ([], 3),
        (["--eval-every", "2"], 3),
        (["--policy", "hard"], 4),  # its rivals are there
        (["--max-lr", "0.1"], 7),
        (["--no-whole-batches", "--data-dir", "there"], 7),  # as the preset has it
        (["--dataset", "folder", "--data-dir", "there"], 10),
        (["--dataset", "folder", "--data-dir", "there/too"], 13),
    ):
        assert main([*call, *more]) == 0
        assert len(trained) == runs, more


def test_a_run_that_fails_is_named(tmp_path: Path, capsys, trained, reports) -> None:
    call = [*CALL, "--seeds", "1", "--label-noise", "0.1", "--out", str(tmp_path)]
    assert main(call) == 1
    said = capsys.readouterr()
    assert said.err == "error: 2 of 3 runs are not done; the same command tries again\n"
    assert [line.split()[0] for line in said.out.splitlines() if "it broke" in line] == (
        ["[2/3]", "[3/3]", "not", "not"]
    )
    ((folder, *_),) = reports
    assert [Path(folder).name] == trained


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--compare --ratio 0.0", "compare full data"),
        ("--compare --delta 0.0", "compare full data"),
        ("--compare --policy none", "compare full data"),
        ("--compare --budget 0.5 --epochs 2", "compare full data"),
        ("--compare --epochs 2", "compare epochs 2"),
        ("--compare --resume there", "resume there"),
        ("--compare --evaluate there", "there"),
        ("--compare --seeds 0", "seeds at least 1 0"),
        ("--seeds 3", "seeds --compare 3"),
    ],
)
def test_mistakes(tmp_path: Path, capsys, trained, monkeypatch, words: str, names: str) -> None:
    monkeypatch.chdir(tmp_path)
    said = fails(capsys, *words.split(), "--device", "cpu")
    assert all(name in said for name in names.split()), said
    assert list(tmp_path.iterdir()) == trained == []
