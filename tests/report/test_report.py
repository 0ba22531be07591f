"""The command: what it prints and writes, and what it refuses."""

import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_made import CPU, FULL, line, write_arrays, write_run

from infobatch_fast.report import text as tables
from infobatch_fast.report.__main__ import main
from infobatch_fast.train import config as trainer

VOID = {"meta", "link", "img", "br", "path", "use", "image", "rect", "circle"}


class Page(HTMLParser):
    """Checks that a page is nested well and asks for nothing; keeps its text and its tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            self.ids += [value or ""] if name == "id" else []
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:", "#")), (tag, name, value)
            self.references += re.findall(r"url\(#(.*?)\)", value or "")
            if name in ("href", "xlink:href") and (value or "").startswith("#"):
                self.references.append((value or "")[1:])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_runs(folder: Path) -> Path:
    """Two seeds of InfoBatch and of full data, one of training shorter, and a benchmark."""
    for seed, accuracy in enumerate((0.80, 0.81)):
        classes = ["犬", "<b>&", "$x$", "d" * 40]
        mine = folder / f"mine{seed}"
        run = write_run(mine, {"seed": seed}, accuracy=accuracy, classes=classes)
        write_run(folder / f"full{seed}", {"seed": seed, **FULL}, accuracy=0.82)
        write_arrays(run)
    write_run(folder / "shorter", {"epochs": 3, **FULL}, accuracy=0.79)
    (folder / "bench.jsonl").write_text(json.dumps(line()) + "\n")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a report of those, and what was printed, by a process without torch."""
    root = tmp_path_factory.mktemp("report")
    words = [str(write_runs(root / "runs")), "--out", str(root / "out")]
    code = (
        "import sys\n"
        "from infobatch_fast.report import main\n"
        f"assert main({words!r}) == 0\n"
        "assert not {'torch', 'torchvision', 'triton'} & sys.modules.keys(), 'torch is loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return root / "out", done.stdout


def test_the_first_screen_answers(report: tuple[Path, str]) -> None:
    out, told = report
    answer = told.splitlines()[2]
    # -2 and -1 points: deviation 0.7071, half 12.706 * 0.7071 / sqrt(2) = 6.35; for ± 0.2 that
    # takes 51 seeds, as 2.009 * 0.7071 / sqrt(51) = 0.199.
    for figure in ("-1.50", "-7.85", "+4.85", "2 seeds", "undecided", "49 more", "15% fewer"):
        assert figure in answer
    assert "15% less" in answer
    assert "+1.00" in answer  # one seed against training shorter, which saw 3,000 of 3,400
    assert answer.endswith("13% more samples.")
    assert "80.50 ± 0.71" in told
    first = (out / "report.md").read_text()
    assert first.index("-1.50") < first.index("mine0")
    assert "95.52" not in first  # the paper's, of another setting
    page = Page(out / "report.html")
    assert page.text.index("-1.50") < page.text.index("mine0")


def test_the_page_needs_nothing_and_is_small(report: tuple[Path, str]) -> None:
    path = report[0] / "report.html"
    page = Page(path)
    assert "script" not in page.tags
    assert page.tags.count("svg") >= 7
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.references) <= set(page.ids)
    assert path.stat().st_size < 400_000
    assert "<b>&" in page.text  # a class's name, in a plot


@pytest.fixture
def unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of a report's time."""
    monkeypatch.setattr("infobatch_fast.report.__main__.plots", lambda section: [])


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')|`_*\n\x1b[31m"
    write_run(tmp_path / evil, {"model": "<img src=x>", "optimizer": "</style>"})
    write_run(tmp_path / os.fsdecode(b"\xff"), {"seed": 1, "model": "<img src=x>"})
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page = Page(tmp_path / "out" / "report.html")
    assert {"script", "img"}.isdisjoint(page.tags)
    assert "<script>alert('x')" in page.text
    assert "<img src=x>" in page.text
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<script>" not in text.replace("\\<", "")
    assert "\x1b" not in text


def commands(told: str) -> list[list[str]]:
    """The trainer's words of each command that a report told."""
    joined = told.replace(" \\\n", " ")
    return [shlex.split(of) for of in re.findall(r"infobatch_fast\.train (.*)", joined)]


@pytest.mark.usefixtures("unplotted")
def test_a_lone_run_is_told_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As commands that make the run's own settings, but for what is to differ."""
    mine = {"seed": 3, "max_lr": 0.25, "whole_batches": True}
    run = write_run(tmp_path / "a", mine)
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    full, shorter = commands(capsys.readouterr().out)
    recorded = json.loads((run / "config.json").read_text())["config"]
    for words, epochs in ((full, 4), (shorter, 3)):
        asked = trainer.parse(words, cuda=False).recorded()
        differ = {name for name in recorded if asked[name] != recorded[name]}
        assert differ - {"loader"} == {"delta"} | ({"epochs"} if epochs == 3 else set())
        assert (asked["delta"], asked["epochs"]) == (0.0, epochs)


@pytest.mark.usefixtures("unplotted")
def test_other_seeds_of_what_is_lacking_are_named_once(tmp_path: Path, capsys) -> None:
    for number, seed in enumerate((0, 0, 2)):
        write_run(tmp_path / "runs" / str(number), {"seed": seed})
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "; and likewise with --seed 2:" in capsys.readouterr().out


@pytest.mark.usefixtures("unplotted")
def test_a_brief_answer_names_the_settings_that_it_leaves_out(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b", FULL, source_hash="c3" * 32)  # of a later version
    assert main([str(tmp_path / "runs"), "--brief", "--out", str(tmp_path / "out")]) == 0
    answer, others, _ = capsys.readouterr().out.splitlines()
    assert answer.startswith("InfoBatch r=0.5: 80.00%")
    assert "source c3c3c3c3" in others


@pytest.mark.usefixtures("unplotted")
def test_lone_full_data_and_an_incomplete_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = write_run(tmp_path / "full", {"dataset": "synthetic", **FULL}, data="synthetic")
    assert main([str(full), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "SYNTHETIC" in told
    ((*words,),) = commands(told)
    assert trainer.parse(words, cuda=False).recorded()["delta"] == 0.875
    half = write_run(tmp_path / "half", done=2)
    for resumed in ([], [["--resume", str(half)]]):
        assert main([str(half), "--out", str(tmp_path / "out")]) == 0
        assert commands(capsys.readouterr().out) == resumed
        (half / "checkpoint.pt").touch()  # without it a record stands alone
    two = write_run(tmp_path / "two", {"dataset": "folder"}, device={**CPU, "processes": 2})
    assert main([str(two), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.count("  torchrun --nproc-per-node 2 -m infobatch_fast.train") == 2
    assert all("--train-size" in words for words in commands(told))


@pytest.mark.usefixtures("unplotted")
def test_the_paper_stands_beside_its_own_setting_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_run(tmp_path / "small")
    paper = {"model": "r50", "epochs": 200, "optimizer": "lars", "device": "cuda", "max_lr": 5.2}
    for seed, accuracy in enumerate((0.951, 0.953)):
        write_run(tmp_path / f"r{seed}", {**paper, "seed": seed}, accuracy=accuracy)
    assert main([str(tmp_path), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    rows = [re.split(r" *\| *", row)[1:-1] for row in text.splitlines() if "95.53" in row]
    # Of 200 epochs 174 keep 800: at 60 s for 1000 that is 165.2 minutes; pruning is 1% of them.
    assert rows[0][1:5] == ["95.53", "95.20 ± 0.14", "148.44", "165.20 ± 0.00"]
    assert rows[0][5:] == ["1.03", "0.49560 ± 0.00000", "2"]
    assert rows[1][1:] == ["95.53", "95.20 ± 0.14", "2"]
    assert text.index("r50") < text.index("small on")
    assert "small on" in capsys.readouterr().out  # the first screen says what else there is
    assert "energy" in text


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        ({"quick": True}, "QUICK"),
        ({"complete": False}, "STOPPED"),
        ({"options": {"load_average": 3.5, "cores": 2}}, "BUSY"),
        ({}, None),
    ],
)
def test_benchmarks_and_their_marks(tmp_path: Path, changes: dict, mark: str | None) -> None:
    absent = {"median": None, "unit": None, "p20": None, "p80": None, "count": None}
    rows = [line(**changes), line(part="update", **absent, absent="no GPU", **changes)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    for figure in ("840 us [800 us, 900 us]", "49.7", "0.840", "no GPU", "50,000", "Test CPU"):
        assert figure in text
    assert [of for of in ("QUICK", "STOPPED", "BUSY") if of in text] == ([mark] if mark else [])


def test_what_is_damaged_gets_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_runs(tmp_path / "runs")
    (runs / "full1" / "config.json").write_text("{")
    np_file = runs / "mine0" / "kept.npy"
    np_file.write_bytes(b"x")
    assert main([str(runs), str(tmp_path / "gone"), "--out", str(tmp_path / "out")]) == 0
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2
    assert "full1" in warned[0]
    assert "gone" in warned[1]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "gone" in text
    assert ".npy files of mine0" in text


@pytest.mark.parametrize("what", ["none", "empty", "missing", "foreign", "image", "flag"])
def test_mistakes(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.jsonl").write_text('{"loss": 1}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    words = {
        "none": [],
        "foreign": [str(tmp_path / "foreign.jsonl")],
        "image": [str(tmp_path / "image.png")],
        "flag": ["--markdown"],
    }.get(what, [str(tmp_path / what)])
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_files_of_others_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(line()) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    words = [str(tmp_path / "b.jsonl"), "--out"]
    assert main([*words, str(out)]) == 2
    assert (out / "report.html").read_text() == "mine"
    (out / "report.html").unlink()
    assert main([*words, str(out)]) == 0
    assert main([*words, str(out)]) == 0  # its own are written over
    assert main([*words, str(tmp_path / "b.jsonl")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("value", "figures", "seconds"),
    [
        (0, "0", "0 us"),
        (0.000123456, "0.000123", "123 us"),
        (0.99951, "1.00", "1.00 s"),
        (0.00099951, "0.00100", "1.00 ms"),
        (-0.002, "-0.00200", "-2.00 ms"),
        (99.96, "100", "100 s"),
        (8893.2, "8,893", "8,893 s"),
    ],
)
def test_numbers_to_three_figures(value: float, figures: str, seconds: str) -> None:
    assert (tables.figures(value), tables.seconds(value)) == (figures, seconds)


def test_markdown_is_aligned() -> None:
    rows = [["ours", "DALI", "1,234"], ["a | b\nc", "", "5"]]
    assert tables.markdown(["side", "of", "images/s"], rows, left=2) == [
        "| side     | of   | images/s |",
        "| -------- | ---- | -------: |",
        "| ours     | DALI |    1,234 |",
        "| a \\| b c |      |        5 |",
    ]
