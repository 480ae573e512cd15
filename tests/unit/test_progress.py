"""Progress output, with and without a terminal."""

import pytest

from pointbook_cli import progress
from pointbook_cli.progress import Meter
from pointbook_cli.terminal import count_of


@pytest.mark.parametrize(("total", "output"), [(200, "50%, so far\n"), (None, "so far\n")])
def test_lines_are_printed_without_a_terminal(
    total: int | None, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)

    with Meter(total, lambda: "so far") as meter:
        meter.advance(100)

    assert capsys.readouterr().err == output


def test_lines_are_printed_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(200, lambda: "so far") as meter:
        for _ in range(200):
            meter.advance(1)

    assert capsys.readouterr().err == ""


def test_a_count_of_one_has_the_singular_noun() -> None:
    assert [count_of(n, "line", "lines") for n in (0, 1, 2_000)] == ["0 lines", "1 line", "2,000 lines"]
