"""Lines are sorted on disk by account and time."""

import contextlib
import io
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pointbook_cli.points_import.points_file import Format, PointsFile, PointsFileOptions, RefusedLine
from pointbook_cli.points_import.sorted_lines import LineBatch, RefusedLines, SortedLine, SortedLines
from support.clocks import NOW_MS

HEADER = "event_id,buyer_id,update_type,updated_scene,updated_value,points_balance,updated_at"
PLAIN = "{event_id},{buyer},{kind},LUCKY_DRAW,{value},{balance},{at_ms}"


def row(buyer: str = "b", at_ms: int = 0, value: int = 1, balance: str = "", event_id: str = "") -> str:
    """Return a line of a file."""
    kind = "INCREASE" if value >= 0 else "DECREASE"
    return PLAIN.format(
        event_id=event_id, buyer=buyer, kind=kind, value=abs(value), balance=balance, at_ms=NOW_MS - 1_000 + at_ms
    )


@contextlib.contextmanager
def sorted_lines(rows: Sequence[str]) -> Iterator[SortedLines]:
    """Return the sorted lines of a file."""
    text = "\n".join([HEADER, *rows])
    file = PointsFile(io.BytesIO(text.encode()), PointsFileOptions(Format.CSV, "m", "s"), lambda: NOW_MS)
    with contextlib.closing(SortedLines()) as lines:
        while (portion := file.read(100)) is not None:
            assert portion.refused == []
            lines.add(portion.lines)
        lines.sort()
        yield lines


def batches(rows: Sequence[str], count: int = 1_000) -> list[LineBatch]:
    """Read all batches of sorted lines."""
    with sorted_lines(rows) as lines:
        return list(iter(lambda: lines.read(count), None))


def sent(rows: Sequence[str]) -> list[SortedLine]:
    """Return the lines of a file as they are sent."""
    return [line for batch in batches(rows) for line in batch.lines]


def test_lines_are_sorted_by_account_time_and_content() -> None:
    expected = [
        row("a", 1, 2),
        row("a", 2, 3),
        row("a", 2, 1),
        row("a", 2, 1, event_id="e-1"),
        row("a", 2, -1),
        row("a", 2, -2),
        row("a", 2, -2, "5"),
        row("a", 2, 2, "4"),
        row("a", 2, 2, "5"),
        row("b", 0),
        row("b:c", 1),
    ]
    rows = list(expected)
    for order in range(20):
        random.Random(order).shuffle(rows)  # noqa: S311 - an order

        assert [rows[line.number - 2] for line in sent(rows)] == expected


def test_numbers_of_identical_lines_do_not_depend_on_their_order() -> None:
    ways = [row(value=1), row(value=1).replace("INCREASE", "increase"), row(value=1) + " "]
    ways[2] = ways[0].replace("LUCKY_DRAW", '"LUCKY_DRAW"')
    named = [
        {rows[line.number - 2]: line.update.event_id for line in sent(rows)} for rows in itertools.permutations(ways)
    ]

    assert len(set(named[0].values())) == 3
    assert all(names == named[0] for names in named)


def test_only_generated_ids_without_a_balance_set_forget_refusal() -> None:
    rows = [row(at_ms=1), row(at_ms=2, event_id="e-1"), row(at_ms=3, balance="1"), row(at_ms=4, value=-1)]

    assert [line.update.forget_refusal for line in sent(rows)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("buyers", "count", "sizes"),
    [
        ("aabbcc", 4, [4, 2]),
        ("aabbcc", 3, [2, 2, 2]),
        ("aaaaab", 2, [2, 2, 2]),
        ("aaaaabb", 2, [2, 2, 1, 2]),
        ("abbbbb", 3, [1, 3, 2]),
        ("abc", 1, [1, 1, 1]),
        ("abc", 3, [3]),
        ("abc", 4, [3]),
    ],
)
def test_an_account_is_split_only_if_it_exceeds_a_batch(buyers: str, count: int, sizes: list[int]) -> None:
    found = batches([row(buyer, number) for number, buyer in enumerate(buyers)], count)

    assert [len(batch.lines) for batch in found] == sizes
    accounts = [{line.account for line in batch.lines} for batch in found]
    for one, other in itertools.combinations(range(len(found)), 2):
        is_divided = not accounts[one].isdisjoint(accounts[other])
        assert found[one].shared.isdisjoint(found[other].shared) is not is_divided


def test_batches_with_the_same_event_id_share_it() -> None:
    found = batches([row("a", event_id="e-1"), row("b"), row("c", event_id="e-2"), row("d", event_id="e-1")], 1)

    assert [batch.lines[0].repeated_id for batch in found] == [b"m\0e-1", None, None, b"m\0e-1"]
    assert not found[0].shared.isdisjoint(found[3].shared)
    assert found[2].shared.isdisjoint(found[0].shared | found[3].shared)


LOOK_AT_FILES = """
import os, sys
from pathlib import Path
from pointbook_cli.points_import import sorted_lines as module
from unit.test_sorted_lines import row, sorted_lines

module.PRAGMAS += ("cache_size = -64",)
with sorted_lines([row(event_id="e" * 100 + str(number)) for number in range(2_000)]):
    for link in Path("/proc/self/fd").iterdir():
        if os.path.islink(link) and os.readlink(link).startswith(sys.argv[1]):
            print(os.readlink(link).endswith(" (deleted)"), oct(os.stat(link).st_mode & 0o777), os.stat(link).st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked at in /proc")
def test_temporary_files_are_private_and_unlinked(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": tests}
    command = [sys.executable, "-c", LOOK_AT_FILES, str(tmp_path)]

    seen = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()

    assert {each.rpartition(" ")[0] for each in seen} == {"True 0o600"}
    assert sum(int(each.rpartition(" ")[2]) for each in seen) > 100_000
    assert list(tmp_path.iterdir()) == []


def test_stop_interrupts_the_sort() -> None:
    with sorted_lines([row(at_ms=number) for number in range(10)]) as lines:
        lines.stop()
        assert lines.read(3) is None
    with contextlib.closing(SortedLines()) as lines:
        lines.stop()
        lines.sort()
        assert lines.read(3) is None


def test_refused_lines_are_in_the_order_of_the_file() -> None:
    refused = [
        RefusedLine(3, "e-3", "INVALID_FIELDS", "a is required", (("a", "is required"), ("b", "is long"))),
        RefusedLine(1, "", "INVALID_LINE", "is no JSON object"),
        RefusedLine(2, "e-2", "STORE_NOT_FOUND", "No."),
    ]
    with contextlib.closing(RefusedLines()) as refusals:
        for each in refused:
            refusals.add(each)

        assert list(refusals) == sorted(refused, key=lambda each: each.number)
