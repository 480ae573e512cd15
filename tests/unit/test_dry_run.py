"""Dry runs refuse only what the server would certainly refuse."""

import contextlib
from collections.abc import Sequence

import pytest

from pointbook_cli.points_import.dry_run import DryRun
from unit.test_sorted_lines import row, sent


def check_file(rows: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the numbers of refused lines, from 1 without the header, and the notes."""
    with contextlib.closing(DryRun()) as dry_run:
        refused = [line.number - 1 for line in sent(rows) if dry_run.check(line) is not None]
        return sorted(refused), dry_run.notes()


@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        ([row(event_id="e-1"), row(event_id="e-1", value=2)], [1]),
        ([row(event_id="e-1", value=2), row(event_id="e-1")], [2]),
        ([row("a", event_id="e-1"), row("b", event_id="e-1"), row("c", event_id="e-1")], [2, 3]),
        ([row(at_ms=5, event_id="e-1"), row(at_ms=1, event_id="e-1")], [1]),
        ([row(event_id="e-1"), row(event_id="e-1")], []),
        ([row(event_id="e-1"), row(event_id="e-2"), row(), row()], []),
        # A repeated content does not use up its event_id.
        ([row(balance="1", event_id="e-1"), row(balance="1", event_id="e-2"), row("z", event_id="e-2")], []),
        ([row(event_id="e-1"), row(event_id="e-2"), row("z", event_id="e-2")], [3]),
        # Only the server has the balance of the account.
        ([row(value=-5)], []),
    ],
)
def test_an_event_id_with_other_content_is_refused(rows: list[str], refused: list[int]) -> None:
    assert check_file(rows)[0] == refused


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([row(event_id="e-1"), row(event_id="e-1")], 1),
        ([row(balance="1")] * 3, 2),
        ([row(balance="1", event_id="e-1"), row(balance="1", event_id="e-2"), row(balance="1")], 2),
        ([row()] * 3, 0),
        ([row(balance="1"), row(balance="2"), row("c", balance="1")], 0),
    ],
)
def test_repeated_lines_are_counted_in_a_note(rows: list[str], count: int) -> None:
    found = [note for note in check_file(rows)[1] if "repeat" in note]

    assert [note.partition(" ")[0] for note in found] == ([str(count)] if count else [])


@pytest.mark.parametrize(
    ("rows", "note_start"),
    [
        ([row(value=-5)], "1 line takes"),
        ([row(at_ms=2, value=-5), row(at_ms=1, value=5)], ""),
        ([row(at_ms=2, value=5), row(at_ms=1, value=-5)], "1 line takes"),
        ([row(value=-1, event_id="c"), row(value=-1, event_id="b"), row(value=1, event_id="a")], "1 line takes"),
        ([row(at_ms=1, value=3, balance="9"), row(at_ms=2, value=-9), row(at_ms=3, value=-9)], "1 line takes"),
        ([row("a", value=5), row("b", value=-5), row("c", value=-5)], "2 lines take"),
        ([row(value=-5, balance="-5")], ""),
    ],
)
def test_lines_that_overdraw_the_files_points_are_noted_not_refused(rows: list[str], note_start: str) -> None:
    refused, notes = check_file(rows)

    assert refused == []
    assert [note for note in notes if note.startswith(note_start)] == notes
    assert bool(notes) is bool(note_start)


@pytest.mark.parametrize("value", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_lines_of_one_millisecond_are_checked_in_order_of_their_event_ids(value: int) -> None:
    rows = [row(value=9), row(value=-value)]
    increase, decrease = sent(rows)

    notes = check_file(rows)[1]

    assert bool(notes) is (decrease.update.event_id < increase.update.event_id)


@pytest.mark.parametrize(
    ("event_ids", "is_covered"), [(("a", "b"), True), (("b", "a"), False), (("1", "2"), True), (("b", "B"), False)]
)
def test_a_decrease_is_covered_by_earlier_increases_of_its_millisecond(
    event_ids: tuple[str, str], *, is_covered: bool
) -> None:
    rows = [row(value=5, event_id=event_ids[0]), row(value=-5, event_id=event_ids[1])]

    assert (check_file(rows)[1] == []) is is_covered
    assert check_file([*rows, row(at_ms=-1, value=5)])[1] == []


@pytest.mark.parametrize(("is_opening", "cure"), [(False, "use a unique event_id"), (True, "opens this account")])
def test_a_refused_opening_is_described_without_an_event_id(*, is_opening: bool, cure: str) -> None:
    lines = sent([row(event_id="e-1"), row(event_id="e-1", value=2)])
    with contextlib.closing(DryRun(opening_balances=is_opening)) as dry_run:
        (refused,) = filter(None, map(dry_run.check, lines))

    assert cure in refused.message
