"""A dry run says of a file what is certain without a server, and no more."""

import contextlib
from collections.abc import Sequence

import pytest

from pointbook_cli.dry_run import DryRun
from unit.test_sorted_lines import row, sent


def judged(rows: Sequence[str]) -> tuple[list[int], list[str]]:
    """The numbers of the refused lines, counted from 1 without the header, and the notes."""
    with contextlib.closing(DryRun()) as dry_run:
        refused = [line.number - 1 for line in sent(rows) if dry_run.judge(line) is not None]
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
        # The second delivery of a content does not claim the id that it came with.
        ([row(balance="1", event_id="e-1"), row(balance="1", event_id="e-2"), row("z", event_id="e-2")], []),
        ([row(event_id="e-1"), row(event_id="e-2"), row("z", event_id="e-2")], [3]),
        # Only the server knows what an account holds.
        ([row(value=-5)], []),
    ],
)
def test_an_event_id_with_other_content_is_refused(rows: list[str], refused: list[int]) -> None:
    """The first by account and time has it, as when it is sent."""
    assert judged(rows)[0] == refused


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
def test_lines_that_repeat_others_are_counted(rows: list[str], count: int) -> None:
    """Identical lines without an event_id and a balance are events of their own."""
    found = [note for note in judged(rows)[1] if "repeat" in note]

    assert [note.partition(" ")[0] for note in found] == ([str(count)] if count else [])


@pytest.mark.parametrize(
    ("rows", "told"),
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
def test_lines_that_take_more_than_the_file_brings_are_told(rows: list[str], told: str) -> None:
    """They are not refused: the account may hold more than the file says."""
    refused, notes = judged(rows)

    assert refused == []
    assert [note for note in notes if note.startswith(told)] == notes
    assert bool(notes) is bool(told)


@pytest.mark.parametrize("value", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_lines_of_one_millisecond_are_judged_by_the_place_that_their_event_ids_give_them(value: int) -> None:
    """The ledger orders them so, and it is the ledger that refuses what is not covered at its place."""
    rows = [row(value=9), row(value=-value)]
    increase, decrease = sent(rows)

    notes = judged(rows)[1]

    assert bool(notes) is (decrease.update.event_id < increase.update.event_id)


@pytest.mark.parametrize(
    ("event_ids", "is_covered"), [(("a", "b"), True), (("b", "a"), False), (("1", "2"), True), (("b", "B"), False)]
)
def test_a_decrease_is_covered_by_increases_of_its_millisecond_that_come_before_it(
    event_ids: tuple[str, str], *, is_covered: bool
) -> None:
    """What other milliseconds have brought covers it anyway."""
    rows = [row(value=5, event_id=event_ids[0]), row(value=-5, event_id=event_ids[1])]

    assert (judged(rows)[1] == []) is is_covered
    assert judged([*rows, row(at_ms=-1, value=5)])[1] == []


@pytest.mark.parametrize(("is_opening", "cure"), [(False, "an id of its own"), (True, "opens this account")])
def test_a_refusal_names_what_the_file_can_change(*, is_opening: bool, cure: str) -> None:
    """Opening balances have no event_ids in the file."""
    lines = sent([row(event_id="e-1"), row(event_id="e-1", value=2)])
    with contextlib.closing(DryRun(opening_balances=is_opening)) as dry_run:
        (refused,) = filter(None, map(dry_run.judge, lines))

    assert cure in refused.message
