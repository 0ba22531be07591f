"""The table of policies is what the report says of the committed records."""

import re
from pathlib import Path

import pytest

from infobatch_fast.report.page import terminal
from infobatch_fast.report.read import read
from infobatch_fast.report.runs import sections
from infobatch_fast.report.tables import answer, budget_table
from infobatch_fast.train.console import WORTH

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"<!-- python -m infobatch_fast.report (\S+) -->\n(.*?)<!-- end -->", re.S)


@pytest.mark.skipif(not (ROOT / "docs/policies.md").exists(), reason="not in a checkout")
def test_the_policies_table_is_of_the_committed_records() -> None:
    found = PLACE.findall((ROOT / "docs/policies.md").read_text())
    assert found
    for folder, text in found:
        [section] = sections(read([ROOT / folder]).runs)
        # The table of equally many samples, where there are several numbers of them.
        blocks = budget_table(section) or answer(section)
        assert text.splitlines() == [line for line in terminal(blocks) if line.startswith("|")]


@pytest.mark.skipif(not (ROOT / "docs/policies.md").exists(), reason="not in a checkout")
def test_what_a_budget_is_said_to_be_worth_is_in_the_table() -> None:
    text = (ROOT / "docs/policies.md").read_text()
    rows = [line for line in text.splitlines() if re.search("hard, (25|33.3333)% to save", line)]
    least, most, longer = re.findall(r"\d\.\d\d", WORTH)
    assert [any(f"+{figure} ±" in row for row in rows) for figure in (least, most)] == [True, True]
    (row,) = (line for line in text.splitlines() if line.startswith("| all of them, 40 epochs"))
    assert row.endswith("undecided |")
    assert f"+{longer} ±" in row
