"""Tables that are Markdown, and numbers to three figures."""

import pytest

from infobatch_fast.report import text as tables


def test_markdown_is_aligned() -> None:
    rows = [["ours", "DALI", "1,234"], ["a | b\nc", "", "5"]]
    assert tables.markdown(["side", "of", "images/s"], rows, left=2) == [
        "| side     | of   | images/s |",
        "| -------- | ---- | -------: |",
        "| ours     | DALI |    1,234 |",
        "| a \\| b c |      |        5 |",
    ]


def test_a_row_of_another_length() -> None:
    with pytest.raises(AssertionError, match="another length"):
        tables.markdown(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.000123456, "0.000123"),
        (0.9999, "1.00"),
        (1.234, "1.23"),
        (9.996, "10.0"),
        (99.96, "100"),
        (45.678, "45.7"),
        (1234.5678, "1,235"),
        (-0.5, "-0.500"),
        (52_345_678.9, "52,345,679"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert tables.figures(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.891, "7.89 s"),
        (0.99951, "1.00 s"),
        (0.004567, "4.57 ms"),
        (0.00099951, "1.00 ms"),
        (0.0000123456, "12.3 us"),
        (-0.002, "-2.00 ms"),
        (0.0, "0 us"),
        (8893.2, "8,893 s"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert tables.seconds(value) == text
