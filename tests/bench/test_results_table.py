"""The README's table of results: figures by hand, and nothing in it that is not on record."""

import json
import re
from pathlib import Path

import pytest
from fake_trainer import summary
from results_table import read, table

from infobatch_fast.errors import UserError
from infobatch_fast.pruning import FULL, Pruning

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"<!-- bench/results_table.py: (\S+) -->\n(.*?)<!-- end -->", re.S)
SOFT, HARD = Pruning(), Pruning("hard")


def line(pruning: Pruning, accuracy: float, seed: int = 0, epochs: int = 8, **changed) -> str:
    """Of results.jsonl; what prunes leaves out a quarter."""
    seen = epochs * (1000 if pruning == FULL else 750)
    config = pruning.settings() | dict.fromkeys(("dataset", "model"), "same")
    config |= {"seed": seed, "data_fraction": 1.0}
    about = dict.fromkeys(("data", "source_hash", "device"), "same") | {"state": "done"}
    return json.dumps(
        about | {"config": config, "summary": summary(epochs, seen, accuracy)} | changed
    )


def rows(tmp_path: Path, lines: list[str]) -> list[list[str]]:
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table(read(path))[2:]]


def test_means_and_differences_by_hand(tmp_path: Path) -> None:
    lines = [line(FULL, 0.80 + 0.01 * seed, seed) for seed in range(3)]
    lines += [line(FULL, 0.79 + 0.01 * seed, seed, epochs=6) for seed in range(3)]
    lines += [line(SOFT, 0.79 + 0.011 * seed, seed) for seed in range(3)]
    full, shorter, soft = rows(tmp_path, lines)
    assert full == ["full data, 8 epochs", "0.0%", "81.00 ± 1.00", "-", "-", "3"]
    assert shorter == ["full data, 6 epochs", "25.0%", "80.00 ± 1.00", "-1.00 ± 0.00", "-", "3"]
    assert soft[:3] == ["InfoBatch r=0.5, 8 epochs", "25.0%", "80.10 ± 1.10"]
    assert soft[3:] == ["-0.90 ± 0.10", "(+0.10 ± 0.10)", "3"]


def test_one_seed_the_nearest_shorter_training_and_what_is_not_done(tmp_path: Path) -> None:
    lines = [line(FULL, 0.9), line(HARD, 0.8), line(FULL, 0.7, epochs=3)]
    lines += [line(FULL, 0.75, epochs=5)]  # the nearer to six epochs' samples
    lines += [line(SOFT, 0.1, state="failed"), line(FULL, 0.1, seed=1, epochs=6)]
    found = rows(tmp_path, lines)
    assert found[1][1:] == ["25.0%", "80.00", "(-10.00)", "(+5.00)", "1"]
    assert found[2][1] == "62.5%"  # of the longest training's samples
    assert len(found) == 5


@pytest.mark.parametrize(
    "text", [line(SOFT, 0.9) + "\n" + line(SOFT, 0.5, source_hash="other"), '{"name": 1}', "{", ""]
)
def test_strangers_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        read(path)


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a checkout")
def test_the_readme_holds_the_committed_records() -> None:
    found = PLACE.findall((ROOT / "README.md").read_text())
    assert found
    for name, text in found:
        assert text.splitlines() == table(read(ROOT / name)), name
