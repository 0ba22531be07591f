"""The report as a whole: every word of its Markdown, its page, and its command line."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_made import CPU, OTHER_SOURCE, PAPER, QUICK, write_lines, write_run, write_samples

from infobatch_fast.report.__main__ import main
from infobatch_fast.report.page import MARK
from infobatch_fast.report.plots import _reach, _shares
from infobatch_fast.report.read import read

# Of the GPU, of the CPU without energy, of the older record, and of the samples.
PLOTS = 6 + 5 + 3 + 5
EXPECTED = Path(__file__).with_name("report_expected.md")
NASTY = "<script>alert('|`*&amp;\"$)"


def write_all(root: Path) -> list[str]:
    """Records of every kind, and the words that report them."""
    runs = root / "runs"
    write_run(runs / "full", {**PAPER, "delta": 0.0}, accuracy=0.9540, epoch_seconds=2)
    write_samples(runs / "full")
    write_run(runs / "half-0", PAPER, accuracy=0.9500, epoch_seconds=2)
    write_samples(runs / "half-0", [f"$\\{number}$é{NASTY}" for number in range(10)])
    write_run(runs / "half-1", {**PAPER, "seed": 1}, accuracy=0.9600, epoch_seconds=3)
    write_run(runs / "half-2", {**PAPER, "seed": 2}, done=3, epoch_seconds=2)
    random = {"policy": "random", "rescale": False, "anneal": False}
    other = {"source_hash": OTHER_SOURCE, "commit": None}
    write_run(runs / "random", {**PAPER, **random}, accuracy=0.94, epoch_seconds=2, about=other)
    write_run(root / NASTY, {**QUICK, "eval_every": 4}, eval_every=4)
    write_run(root / "twin", QUICK, accuracy=0.83, epoch_seconds=30)
    write_run(
        root / "old", {**QUICK, "dataset": "synthetic"}, new=False, about={"data": "synthetic"}
    )
    quiet = {**QUICK, "seed": 1, "telemetry": False, "host_syncs": "count"}
    write_run(root / "quiet", quiet, accuracy=0.82, epoch_seconds=45)
    (root / "quiet" / "kept.npy").write_bytes(b"no array")
    shutil.copytree(runs / "half-1", root / "half-1-copy")
    write_run(root / "broken", {"ratio": 2.0})
    write_lines(
        root / "bench-1" / "overhead.jsonl",
        [
            {
                "case": {"samples": 50_000, "side": "device"},
                "more": {"share_percent": 0.0512, "host_seconds": 1.25e-5, "inside": True},
            },
            {
                "case": {"samples": 50_000, "side": NASTY},
                "unit": "images/s",
                "median": 1.5e6,
                "p20": 1.4e6,
                "p80": 1520,
            },
            {
                "case": {"samples": 10**8},
                **dict.fromkeys(("unit", "median", "p20", "p80", "count")),
                "absent": "80 GB are needed | 8 are there",
            },
            {
                "part": "step",
                "case": {"batch_size": 200, "side": "difference"},
                "p20": None,
                "p80": None,
                "complete": False,
                "more": {
                    "low_seconds": -1.5e-4,
                    "high_seconds": 0.0025,
                    "update_wall_inside": True,
                },
            },
            {
                "part": "limits",
                "case": {"ratio": 0.5, "form": None},
                "more": {"choose_s": 0.00103, "note": "best", "low": None},
                "unit": "B/s",
                **{"median": 3.9e10, "p20": 3.85e10, "p80": 4e10},
            },
        ],
        quick=True,
    )
    names = ("runs", NASTY, "twin", "old", "quiet", "half-1-copy", "broken", "missing", "bench-1")
    return [str(root / name) for name in (*names, "runs/full")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of a report of everything, written from beside the records."""
    root = tmp_path_factory.mktemp("report")
    words = [str(Path(word).relative_to(root)) for word in write_all(root)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(words) == 0
    return root / "report"


class Page(HTMLParser):
    """Tables of a page as rows of texts, its tags, attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closed out of turn"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Tables of a Markdown text as rows of texts, unescaped."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        if not re.fullmatch(r"[-:| ]+", line):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables[-1].append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
    return tables


def test_the_markdown_in_full(report):
    assert (report / "report.md").read_text() == EXPECTED.read_text()


def test_figures_by_hand(report):
    by_ratio, hours, ablation, against, *_ = markdown_tables((report / "report.md").read_text())
    # Of 200 epochs, 2 to 175 keep 800 of 1000: (26 + 174 x 0.8) of 200 are trained, 17.4% saved.
    # 165.2 full epochs take 5.5067 min at 2 s and 8.2600 at 3 s: mean 6.8833, deviation their
    # difference over the root of 2. Accuracies 95 and 96: 95.5, 0.7071. 1% of it is pruning.
    assert by_ratio[3] == [
        *("InfoBatch r=0.5", "95.53", "95.50 ± 0.71", "148.44", "6.88 ± 1.95"),
        *("17.40 ± 0.00", "2", "b, c"),
    ]
    # In hours 0.11472 and 0.03245; all of it adds 1.6 s an epoch: 320 s, 0.08889 h.
    assert hours[3] == [
        *("InfoBatch r=0.5", "95.53", "95.50 ± 0.71", "2.47", "0.115 ± 0.032", "0.057"),
        *("0.00115 ± 0.00032", "2.48", "0.204 ± 0.032", "2", "b, c"),
    ]
    # Of the quiet run the pruning is not known; 1% of the others' 3.4 and 1.7 minutes is.
    _, hours, *_ = markdown_tables((report / "report.md").read_text())[4:]
    assert next(row for row in hours if row[0] == "InfoBatch r=0.5") == [
        *("InfoBatch r=0.5", "81.67 ± 1.53", "0.0425 ± 0.0142", "0.000425 ± 0.000200 (of 2)"),
        *("0.0443 ± 0.0142", "3 (SAME SEED 0)", "f, g, i"),
    ]
    assert by_ratio[1] == ["full data", "95.52", "95.40", "231.10", "6.67", "0.00", "1", "a"]
    assert by_ratio[2][1:] == [
        *("95.50", "not measured", "184.66", "not measured", "not measured", "0", "none")
    ]
    # Of the seed that both have: 95.00 - 95.40; 165.2 of 200 epochs, and as much of the time.
    assert against[1:] == [
        [
            *("InfoBatch r=0.5", "full data", "one seed: noise unknown", "-0.40", "–", "1"),
            *("165.20", "82.6", "200.00", "0.826"),
        ]
    ]
    assert ablation[1] == [*("random (OTHER SOURCE c3c3c3c3)", "95.52", "94.00", "17.40", "1", "e")]


def test_the_page_has_the_tables_of_the_markdown(report):
    page = Page((report / "report.html").read_text())
    assert page.tables == markdown_tables((report / "report.md").read_text())
    assert page.open == []


def test_the_page_asks_for_nothing_from_outside(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50
    links = set()
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            links.add(re.sub(r"^(data:[a-z/]*|#).*", r"\1", value, flags=re.S))
            assert not value.startswith("#") or value[1:] in ids
        assert all(target in ids for target in re.findall(r"url\(#([^)]+)\)", value))
        assert "url(h" not in value
    assert links == {"https://arxiv.org/abs/2303.04947", "#", "data:", "data:image/png"}
    beyond = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert set(re.findall(r"https?://[^\"'<> ]*", beyond)) == {"https://arxiv.org/abs/2303.04947"}
    assert "@import" not in text
    assert "url(" not in text.split("<svg")[0]


def test_each_plot_has_words_for_those_who_do_not_see_it(report):
    page = Page((report / "report.html").read_text())
    svgs = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(svgs) == page.tags.count("svg") == PLOTS
    assert "a ends at 95.4 after 6.667; b ends at 95 after 5.507" in svgs[0]
    assert svgs[4].startswith("A bar for each run, in energy (kJ). a: training 200 kJ, evaluation")
    assert (report / "report.md").read_text().count("*Plot, in report.html:*") == PLOTS


def test_what_a_record_holds_is_escaped(report):
    text = (report / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;|`*&amp;amp;&quot;$)" in text
    assert "\\<script\\>alert('\\|\\`\\*\\&amp;\"\\$)" in (report / "report.md").read_text()


def test_two_reports_of_the_same_are_the_same(tmp_path, monkeypatch, report):
    monkeypatch.chdir(report.parent)
    names = ("runs", NASTY, "twin", "old", "quiet", "half-1-copy", "broken", "missing", "bench-1")
    (tmp_path / "report.md").write_text(f"{MARK}\nolder")
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*names, "--out", str(tmp_path)]) == 0
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "notes.txt"}


def test_the_terminal_gets_the_essence(tmp_path, monkeypatch, capsys, report):
    monkeypatch.chdir(report.parent)
    assert main(["runs", "missing", "twin", "--out", str(tmp_path / "r")]) == 0
    said, warned = capsys.readouterr()
    assert warned == "warning: missing: there is no such file or folder\n"
    lines = said.splitlines()
    assert lines[1] == "r50 on cifar10, 200 epochs, batch 200, lars, max lr 5.2; Test GPU (cuda)"
    assert any(re.search(r"InfoBatch r=0.5 .* 95.50 ± 0.71 .* 6.88 ± 1.95 ", x) for x in lines)
    assert any(line.startswith("small on cifar10, 4 epochs") for line in lines)
    assert lines[-1] == f"report     {tmp_path / 'r'}: report.md and report.html"
    assert main(["twin", "--out", str(tmp_path / "r")]) == 0
    assert capsys.readouterr().out.startswith("No run of the reported setting was given")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "runs must name at least one folder or .jsonl file, got none"),
        (["missing"], "runs must hold something to report, got nothing that can be read"),
        (["--tables", "x"], "Unrecognized"),
    ],
)
def test_nothing_to_report(tmp_path, monkeypatch, capsys, words, error):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said, complaint = capsys.readouterr()
    assert said == ""
    last = complaint.splitlines()[-1]
    assert last.startswith("error: ")
    assert error in last
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_would_steer_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a\x1b[31m\nb")
    assert main(["a\x1b[31m\nb", "gone\x1b[0m"]) == 0
    said, warned = capsys.readouterr()
    assert "\x1b" not in said + warned
    assert warned == "warning: gone\\x1b[0m: there is no such file or folder\n"
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "\x1b" not in text
        assert "x1b[31m" in text


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    write_run(tmp_path / "one")
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "one"), "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'file'}: File exists\n")
    (tmp_path / "taken" / "report.md").mkdir(parents=True)
    assert main([str(tmp_path / "one"), "--out", str(tmp_path / "taken")]) == 2
    path = tmp_path / "taken" / "report.md"
    error = f"error: out must hold no report.md that this command did not write, got {path}\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_what_somebody_else_wrote_stays(tmp_path, capsys, name):
    write_run(tmp_path / "one")
    out = tmp_path / "r"
    out.mkdir()
    (out / name).write_text(f"# My thesis\n{'x' * 200}{MARK}\n")
    assert main([str(tmp_path / "one"), "--out", str(out)]) == 2
    said, complaint = capsys.readouterr()
    assert said == ""
    assert (
        complaint
        == f"error: out must hold no {name} that this command did not write, got {out / name}\n"
    )
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text().startswith("# My thesis")


def test_an_older_report_is_replaced(tmp_path):
    write_run(tmp_path / "one", accuracy=0.5)
    words = [str(tmp_path / "one"), "--out", str(tmp_path / "r")]
    assert main(words) == 0
    shutil.rmtree(tmp_path / "one")
    write_run(tmp_path / "one", accuracy=0.75)
    assert main(words) == 0
    assert "75.00" in (tmp_path / "r" / "report.md").read_text()
    assert "75.00" in (tmp_path / "r" / "report.html").read_text()


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "(default: )" not in said
    assert "[[" not in said
    assert "PATH" in said.splitlines()[0]


def test_runs_without_an_epoch_an_accuracy_or_telemetry(tmp_path):
    write_run(tmp_path / "none", done=0)
    write_run(tmp_path / "unseen", {"max_lr": 1.0}, done=2, eval_every=3)
    write_run(tmp_path / "one", {"epochs": 1})
    write_run(tmp_path / "old", {"max_lr": 2.0}, new=False)
    assert main([str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    for line in (
        "No plots: no epoch is finished.",
        "No plot of the accuracy: no epoch was evaluated.",
        "No time by phase of b: it was not recorded.",
        "No energy of d: the run is incomplete.",
        "No energy of c: the device is no GPU.",
        "No plot of the scores: no histogram was recorded.",
    ):
        assert text.count(line) == 1, line


def test_only_benchmarks(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{}], device={**CPU, "name": "A"})
    write_lines(tmp_path / "b.jsonl", [{}], device={**CPU, "name": "B"})
    assert main([str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    folder = tmp_path.name
    for name in ("a", "b"):
        assert text.count(f"### overhead: choose, {folder}/{name}.jsonl\n") == 1
    assert "on A (cpu, torch threads: 1); commit abababab-dirty; source 5a5a5a5a" in text
    assert f"file {folder}/b.jsonl; started 2026-01-02T03:04:05+00:00; seed 0; sizes" in text
    for mark in ("QUICK", "MIDWAY", "DAMAGED", "BUSY"):
        assert mark not in text
    assert "experiments\n\n##" not in text


def test_many_settings_are_reported_and_the_first_are_drawn(tmp_path):
    for number in range(9):
        write_run(
            tmp_path / str(number), {"max_lr": 1.0 + number}, accuracy=0.8 + number / 100, new=False
        )
    assert main([str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    assert text.count("*Plot, in report.html:* Test accuracy against time") == 8
    assert "Left out: the plots of 1 further setting." in text
    assert "max lr 9; Test CPU" in text


def test_in_a_browser(tmp_path, report):
    """The page's own layout: every table there, every plot with an area, nothing to complain of."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--enable-logging=stderr --user-data-dir={tmp_path / 'profile'}"
    ).split()
    # The plots' areas are read by a script that the page itself does not have.
    text = (report / "report.html").read_text()
    measured = tmp_path / "measured.html"
    # A browser's window may have a least width; a page's body has none.
    for width in (1280, 400):
        script = (
            f"<script>document.body.style.width = '{width}px';"
            "for (const e of document.querySelectorAll('svg, .scroll')) {"
            "const b = e.getBoundingClientRect();"
            "e.setAttribute('data-box', [b.width, b.height].map(Math.round).join('x')); }"
            "document.body.setAttribute('data-wide', document.body.scrollWidth);</script>"
        )
        measured.write_text(
            re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</main>", f"</main>{script}")
        )
        window = f"--window-size={width},900"
        dumped = subprocess.run(
            [browser, *flags, window, "--dump-dom", measured.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        page = Page(dumped.stdout)
        assert page.tables == Page(text).tables
        boxes = [(tag, value) for tag, name, value in page.attributes if name == "data-box"]
        assert len(boxes) == PLOTS + len(page.tables)
        for tag, box in boxes:
            wide, high = map(int, box.split("x"))
            # A plot is scaled to the narrow page, and keeps its proportions.
            assert (300 if width == 400 else 400) <= wide <= width, box
            assert high >= (0.3 * wide if tag == "svg" else 20), box
        (wide,) = (int(value) for _, name, value in page.attributes if name == "data-wide")
        assert wide <= width, "the page itself must not scroll sideways"
    # As it is, under its own rules of what it may load: no complaint, and a picture.
    shot = tmp_path / "shot.png"
    run = subprocess.run(
        [
            browser,
            *flags,
            "--window-size=1280,900",
            f"--screenshot={shot}",
            (report / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in run.stderr
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 20_000


def test_the_shares_of_scores_by_hand(tmp_path):
    run = write_run(tmp_path / "one", {"epochs": 2})
    write_run(tmp_path / "two", {"epochs": 2, "seed": 1})  # with another number of bins
    first, second = (json.loads(x) for x in (run / "epochs.jsonl").read_text().splitlines())
    first["score_histogram"] = None
    second["score_histogram"] = {"low": 0.1, "high": 10, "counts": [0, 1, 3, 0], "unseen": 6}
    (run / "epochs.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    one, _ = read([tmp_path]).runs
    edges, shares = _shares(one)
    # Two bins over two decades, and a row for what lies beyond on either side.
    assert edges.tolist() == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert shares.shape == (4, 2)
    assert all(math.isnan(share) for share in shares[:, 0])
    assert shares[:, 1].tolist() == [0, 25, 75, 0]
    assert _reach(edges, shares) == pytest.approx((0.1, 10))
    assert main([str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    assert "A heat map for each of 2 runs: epochs across" in text


def test_the_plots_take_the_colour_of_the_pages_text(report):
    text = (report / "report.html").read_text()
    assert "#010203" not in text
    assert text.count("currentColor") > 1000


def test_a_table_of_nothing_is_left_out_where_nothing_is_reported(tmp_path):
    write_run(tmp_path / "full", {"delta": 0.0})
    assert main([str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    # Once beside the reported figures, of which none is measured, and of this setting.
    assert text.count("**Accuracy and minutes by r**") == 2
    assert text.count("**Ablation at r = 0.5**") == 1


def test_pruning_that_is_in_part_in_the_step_is_said_to_be(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole")
    part = write_run(tmp_path / "part", {"seed": 1})
    path = part / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "update_timed": False}))
    assert main([str(whole), str(part), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("1.00 (PART) |") == 1
    assert text.count("PART: the choosing and what of the update is not in one kernel") == 1
    assert main([str(whole), "--out", str(tmp_path / "out")]) == 0
    assert "PART" not in (tmp_path / "out" / "report.md").read_text()
