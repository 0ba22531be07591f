"""What became of single samples: the arrays as read, and what is drawn and told of them."""

import json
import os

import numpy as np
import pytest
from report_made import PAPER, write_run, write_samples

from infobatch_fast.report.groups import main_source, sections
from infobatch_fast.report.page import Heading, Plot, Table, Text
from infobatch_fast.report.read import read
from infobatch_fast.report.records import NOTHING
from infobatch_fast.report.samples import TITLE, samples

ANIMALS = [*"abcdefghi", "a $very$ long name of a class"]
TEN = {"epochs": 16, "delta": 0.5}  # epochs 2 to 8 leave out 200 of 1000


def write(path, config=None, classes=None, **others):
    write_run(path, {**TEN, **(config or {})}, **others)
    return write_samples(path, classes)


def blocks_of(folder):
    found = read([folder])
    return samples(sections(found.runs, main_source(found.runs)[0])), found


def plots_of(blocks, title):
    return [b for b in blocks if isinstance(b, Plot) and b.title.startswith(title)]


def test_the_arrays_as_read(tmp_path):
    write(tmp_path / "one")
    found = read([tmp_path])
    assert found.bad == []
    inside = found.runs[0].inside
    # Each of the seven epochs leaves out samples 0 to 99, and 100 of the next 300 by turns: in
    # epochs 2, 5 and 8 (start 100 + 200) those from 300, in 3 and 6 from 100, in 4 and 7 from 200.
    assert inside.classes == {
        0: pytest.approx(7 / 16),
        1: pytest.approx(2 / 16),
        2: pytest.approx(2 / 16),
        3: pytest.approx(3 / 16),
        **dict.fromkeys(range(4, 10), 0.0),
    }
    least = [(s.number, s.label, s.kept) for s in inside.least]
    assert least == [(number, 0, 9) for number in range(12)]
    assert [(s.number, s.label, s.kept) for s in inside.most] == [
        (400 + number, 4, 16) for number in range(12)
    ]
    assert np.isnan(inside.least[0].score)
    assert [s.score for s in inside.least[1:3]] == pytest.approx([2 * 16 / 1000, 3 * 16 / 1000])
    assert all(s.data.shape == (32, 32, 3) for s in (*inside.least, *inside.most))
    assert [int(s.data[0, 0, 0]) for s in inside.most[:2]] == [400 % 256, 401 % 256]
    # Of the ten by how often they were kept: 0 (9), 300 (13), 100 and 200 (14), the others (16).
    ranked = [0, 300, 100, 200, 400, 500, 600, 700, 800, 900]
    # Eight even steps from 0 to 9: 0, 1.29, 2.57, 3.86, 5.14, 6.43, 7.71, 9.
    assert [s.number for s in inside.tracked] == [ranked[i] for i in (0, 1, 3, 4, 5, 6, 8, 9)]
    assert [s.kept for s in inside.tracked] == [9, 13, 14, 16, 16, 16, 16, 16]
    for s in inside.tracked[1:]:
        assert s.data == pytest.approx([(s.number + 1) * e / 1000 for e in range(1, 17)])
    assert np.isnan(inside.tracked[0].data).all()


def test_full_data_has_scores_alone(tmp_path):
    write(tmp_path / "one", {"delta": 0.0})
    (run,) = read([tmp_path]).runs
    assert (run.inside.least, run.inside.most, dict(run.inside.classes)) == ((), (), {})
    assert len(run.inside.tracked) == 8
    blocks, _ = blocks_of(tmp_path)
    assert [type(b) for b in blocks] == [Heading, Heading, Plot]
    assert len(plots_of(blocks, "Scores of single samples: a, full data")) == 1


def test_older_records_have_none_of_it(tmp_path):
    write_run(tmp_path / "one")
    blocks, found = blocks_of(tmp_path)
    assert blocks == []
    assert found.bad == []
    assert found.runs[0].inside is NOTHING


def test_what_is_told_of_one_run(tmp_path):
    write(tmp_path / "one", classes=ANIMALS)
    blocks, _ = blocks_of(tmp_path)
    assert next(b.text for b in blocks if isinstance(b, Heading)) == TITLE
    (images,) = plots_of(blocks, "Images pruned most and least: a, InfoBatch r=0.5 delta=0.5")
    assert "pruned most: a 0 kept 9 of 16, a 1 kept 9 of 16" in images.alt
    assert "pruned least: e 400 kept 16 of 16, e 401 kept 16 of 16" in images.alt
    assert images.svg.count("<image ") == 24
    (classes,) = plots_of(blocks, "Saving by class")
    # The most first; of equals in the order of their labels. All: 7 x 200 of 16000.
    assert ": a 43.8, d 18.8, b 12.5, c 12.5, e 0.0, f 0.0" in classes.alt
    assert f"{ANIMALS[9]} 0.0. All classes: 8.8." in classes.alt
    (scores,) = plots_of(blocks, "Scores of single samples")
    assert "a 0 kept 9 of 16: none to none; d 300 kept 13 of 16: 0.301 to 4.82; " in scores.alt


def test_classes_without_names_are_numbered(tmp_path):
    write(tmp_path / "one")
    blocks, _ = blocks_of(tmp_path)
    (classes,) = plots_of(blocks, "Saving by class")
    assert ": class 0 43.8, class 3 18.8," in classes.alt


def test_of_many_classes_the_ends_are_drawn(tmp_path):
    run = write(tmp_path / "one")
    np.save(run / "labels.npy", np.arange(1000, dtype=np.int32) // 40)
    blocks, _ = blocks_of(tmp_path)
    (classes,) = plots_of(blocks, "Saving by class")
    assert classes.title.endswith("(10 most and 10 least of 25)")
    assert "class 0 43.8, class 1 43.8, class 2 " in classes.alt
    named = [f"class {n} " for n in range(25) if f"class {n} " in classes.alt]
    # Those above 0 are ten, up to number 9; of the equal ones the last ten are at the end.
    assert named == [f"class {n} " for n in (*range(10), *range(15, 25))]


def test_expected_and_realised(tmp_path):
    write(tmp_path / "a", {"target_saving": 0.1})
    write(tmp_path / "b", {"policy": "hard", "rescale": False}, accuracy=0.7)
    write(tmp_path / "c", {"delta": 0.0})
    write_run(tmp_path / "d", {**TEN, "seed": 1})  # of an older record
    blocks, _ = blocks_of(tmp_path)
    (table,) = [b for b in blocks if isinstance(b, Table)]
    # Realised 7 x 200 of 16000, 8.75%; expected a tenth of a percent more in seven of 16 epochs.
    figures = ["8.79", "8.75", "-0.044"]
    assert [list(row) for row in table.rows] == [
        ["a", "InfoBatch, 10% to save delta=0.5", *figures, "10.00"],
        ["b", "hard r=0.5 + anneal delta=0.5", *figures, "–"],
    ]
    (curves,) = plots_of(blocks, "Expected (lines) and realised (markers)")
    assert "a leaves out 20 at most, 20.1 expected; b leaves out 20 at" in curves.alt


def test_an_exact_saving_has_no_minus(tmp_path):
    run = write(tmp_path / "one")
    write_samples(run, missing=1e-7)
    blocks, _ = blocks_of(tmp_path)
    (table,) = [b for b in blocks if isinstance(b, Table)]
    assert table.rows[0][2:5] == ["8.75", "8.75", "+0.000"]


def test_an_incomplete_run_is_marked(tmp_path):
    run = write(tmp_path / "one")
    (run / "summary.json").unlink()
    blocks, _ = blocks_of(tmp_path)
    (table,) = [b for b in blocks if isinstance(b, Table)]
    assert table.rows[0][0] == "a (incomplete)"


def test_at_most_eight_runs_are_drawn_of_each_training_the_first(tmp_path):
    write(tmp_path / "0", {"delta": 0.0})  # a: drawn only where a place is left
    for seed in range(7):
        write(tmp_path / f"1{seed}", {"seed": seed}, accuracy=0.8 + seed / 100)
    for seed in range(2):
        write(tmp_path / f"2{seed}", {"ratio": 0.3, "seed": seed}, accuracy=0.7 + seed / 100)
    for path in tmp_path.glob("*/pictures.npy"):
        path.unlink()  # they take long to draw
    blocks, _ = blocks_of(tmp_path)
    drawn = [b.title.split(": ")[1][0] for b in plots_of(blocks, "Saving by class")]
    assert "".join(drawn) == "bcdefgij"
    (text,) = [b.text for b in blocks if isinstance(b, Text) and b.text.startswith("Left out")]
    assert text.startswith("Left out: the plots of 2 further runs, a, h. ")
    (table,) = [b for b in blocks if isinstance(b, Table)]
    assert [row[0] for row in table.rows] == list("bcdefghij")


def save(path, array):
    np.save(path, array)


BROKEN = {
    ("kept", "it is no .npy file"): lambda path: path.write_bytes(b"\x80\x04N."),
    ("kept", "it holds no array: "): lambda path: path.write_bytes(path.read_bytes()[:90]),
    ("scores", "it holds no array: mmap length is greater"): lambda path: path.write_bytes(
        path.read_bytes()[:-4]
    ),
    ("kept", "it must hold int32, got int64"): lambda path: save(path, np.zeros(1000, np.int64)),
    ("labels", "it holds no array: "): lambda path: np.save(
        path, np.array([{}, []], dtype=object), allow_pickle=True
    ),
    ("labels", "its shape must be (1000,), got (999,)"): lambda path: save(
        path, np.zeros(999, np.int32)
    ),
    ("labels", "it must hold numbers in [0, 9], got 0 to 10"): lambda path: save(
        path, np.arange(1000, dtype=np.int32) % 11
    ),
    ("kept", "it must hold numbers in [0, 16], got -1 to 16"): lambda path: save(
        path, np.array([-1] + 999 * [16], np.int32)
    ),
    ("kept", "it must add up to the 14600 samples of epochs.jsonl, got 16000"): lambda path: save(
        path, np.full(1000, 16, np.int32)
    ),
    ("tracked", "it must hold numbers in [0, 999], got 5 to 1000"): lambda path: save(
        path, np.array([5, 1000])
    ),
    ("tracked", "its shape must be (2,), got (2, 2)"): lambda path: save(
        path, np.zeros((2, 2), np.int64)
    ),
    ("score_history", "its shape must be (16, 10), got (15, 10)"): lambda path: save(
        path, np.zeros((15, 10), np.float32)
    ),
    ("pictured", "it must hold numbers in [0, 999], got -1 to -1"): lambda path: save(
        path, np.array([-1])
    ),
    ("pictures", "its shape must be (48, 32, 32, 3), got (47, 32, 32, 3)"): lambda path: save(
        path, np.zeros((47, 32, 32, 3), np.uint8)
    ),
    ("pictures", "it must be a regular file"): lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize(("name", "why"), BROKEN)
def test_a_broken_array_is_named_and_the_rest_is_read(tmp_path, name, why):
    run = write(tmp_path / "one", classes=ANIMALS)
    whole = read([tmp_path]).runs[0].inside
    BROKEN[name, why](run / f"{name}.npy")
    found = read([tmp_path])
    ((path, reason),) = found.bad
    assert path == str(run / f"{name}.npy")
    assert reason.startswith(why), reason
    assert reason.endswith("; the rest is reported")
    inside = found.runs[0].inside
    assert found.runs[0].complete
    pictured = name not in ("kept", "labels", "pictured", "pictures")
    assert [s.number for s in inside.least] == [s.number for s in whole.least] * pictured
    assert len(inside.classes) == (0 if name in ("kept", "labels") else 10)
    tracked = name not in ("kept", "labels", "tracked", "score_history")
    assert len(inside.tracked) == 8 * tracked


def test_a_header_that_claims_too_much_takes_no_memory(tmp_path):
    run = write(tmp_path / "one")
    path = run / "kept.npy"
    path.write_bytes(path.read_bytes().replace(b"(1000,)", b"(10**9,)"[:7]))
    assert [why.split(":")[0] for _, why in read([tmp_path]).bad] == ["it holds no array"]
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (999999999999,), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    ((_, why),) = read([tmp_path]).bad
    assert why.startswith("it holds no array: mmap length is greater than file size")


def test_scores_that_are_missing_or_far_apart(tmp_path):
    run = write(tmp_path / "one")
    (run / "scores.npy").unlink()
    history = np.load(run / "score_history.npy")
    history[3] = np.inf
    history[:, 1] = 0.0
    np.save(run / "score_history.npy", history)
    blocks, found = blocks_of(tmp_path)
    assert found.bad == []
    assert all(np.isnan(s.score) for s in found.runs[0].inside.least)
    assert len(plots_of(blocks, "Scores of single samples")) == 1


def test_a_single_picture_and_a_single_tracked_sample(tmp_path):
    run = write(tmp_path / "one")
    for name in ("pictured", "pictures", "tracked"):
        np.save(run / f"{name}.npy", np.load(run / f"{name}.npy")[:1])
    np.save(run / "score_history.npy", np.load(run / "score_history.npy")[:, :1])
    blocks, found = blocks_of(tmp_path)
    assert found.bad == []
    (images,) = plots_of(blocks, "Images")
    assert images.svg.count("<image ") == 1
    assert len(plots_of(blocks, "Scores of single samples")) == 1


def test_a_copy_of_a_run_is_not_drawn_again(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, {**PAPER, **TEN})
    blocks, found = blocks_of(tmp_path)
    assert [run.copy_of for run in found.runs] == [None, "a"]
    assert len(plots_of(blocks, "Images")) == 1
    assert json.loads((tmp_path / "a" / "config.json").read_text())["classes"] is None
