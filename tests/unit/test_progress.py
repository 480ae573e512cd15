"""Long work tells how far it is, also where there is no terminal."""

import pytest

from pointbook_cli import progress
from pointbook_cli.progress import Meter, counted


@pytest.mark.parametrize(("total", "told"), [(200, "50%, so far\n"), (None, "so far\n")])
def test_lines_are_printed_where_there_is_no_terminal(
    total: int | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line has the share that is done, where it is known, and what the work tells of itself."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)

    with Meter(total, lambda: "so far") as meter:
        meter.advance(100)

    assert capsys.readouterr().err == told


def test_lines_come_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Work that moves fast does not fill a log."""
    with Meter(200, lambda: "so far") as meter:
        for _ in range(200):
            meter.advance(1)

    assert capsys.readouterr().err == ""


def test_one_is_singular() -> None:
    """Counts read as people write them."""
    assert [counted(n, "line", "lines") for n in (0, 1, 2_000)] == ["0 lines", "1 line", "2,000 lines"]
