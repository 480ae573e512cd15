"""Reports as CSV."""

import io

import pytest

from pointbook_cli.report_tables import ReportTable, write_csv


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_text_that_starts_as_a_formula_gets_an_apostrophe(start: str) -> None:
    output = io.StringIO()
    write_csv(ReportTable(("text", "points"), ((f"{start}1", -1), (f"a{start}", 0)), ""), output)

    assert output.getvalue() == f"text,points\n'{start}1,-1\na{start},0\n"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("積分 ✓", "積分 ✓"),
        ("\t=1", "\\t=1"),
        ("\x1b[31m", "\\x1b[31m"),
        ('a,"b"\n', '"a,""b""\\n"'),
        ("\u202e1", "\\u202e1"),
    ],
)
def test_texts_stay_on_their_line_and_in_their_cell(text: str, cell: str) -> None:
    output = io.StringIO()
    write_csv(ReportTable(("text",), ((text,),), ""), output)

    assert output.getvalue() == f"text\n{cell}\n"
