"""Files of points events are read line by line: what is right becomes an event, what is wrong is told by its number."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from pointbook.v1 import points_pb2
from pointbook_cli.points_file import Format, Manner, PointsFile, PointsFileError, Portion, read_time_ms
from pointbook_cli.sorted_lines import SortedLines
from support.harness import NOW_MS, at

HEADER = (
    "event_id,merchant_id,store_id,buyer_id,update_type,updated_scene,updated_value,"
    "points_balance,points_expiry_time,updated_at"
)
RIGHT = f"e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,20,,{NOW_MS}"
WRONG_LINES = [
    ("e 1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,20,,1780000000000", {"event_id"}),
    ("e-1,,s,b,INCREASE,SUCCESSFUL_ORDERS,20,20,,1780000000000", {"merchant_id"}),
    ("e-1,m,,,INCREASE,SUCCESSFUL_ORDERS,20,20,,1780000000000", {"store_id", "buyer_id"}),
    ("e-1,m,s,b,SIDEWAYS,SUCCESSFUL_ORDERS,20,20,,1780000000000", {"update_type"}),
    ("e-1,m,s,b,,SUCCESSFUL_ORDERS,20,20,,1780000000000", {"update_type"}),
    ("e-1,m,s,b,INCREASE,,20,20,,1780000000000", {"updated_scene"}),
    ("e-1,m,s,b,INCREASE,TWO WORDS,20,20,,1780000000000", {"updated_scene"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,,20,,1780000000000", {"updated_value"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,-1,20,,1780000000000", {"updated_value"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,1.0,20,,1780000000000", {"updated_value"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,1e2,20,,1780000000000", {"updated_value"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,99999999999999999999,20,,1780000000000", {"updated_value"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,twenty,,1780000000000", {"points_balance"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,9000000000000000,,1780000000000", {"points_balance"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,20,tomorrow,1780000000000", {"points_expiry_time"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,20,,", {"updated_at"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,20,,1780000000", {"updated_at"}),
    ("e-1,m,s,b,INCREASE,SUCCESSFUL_ORDERS,20,20,,2026-02-30T00:00:00Z", {"updated_at"}),
    ("e-1,m,s,b\u00e9,,,x,x,x,x", {"buyer_id", "update_type", "updated_scene", "updated_value", "points_balance"}),
]


def read(text: str | bytes, count: int = 1_000, **manner: Any) -> list[Portion]:
    """Read a file to its end."""
    raw = io.BytesIO(text if isinstance(text, bytes) else text.encode())
    file = PointsFile(raw, Manner(**{"format": Format.CSV, **manner}), lambda: NOW_MS)
    batches = []
    while (batch := file.read(count)) is not None:
        batches.append(batch)
    return batches


def updates(text: str | bytes, **manner: Any) -> list[points_pb2.PointsUpdate]:
    """Read the events of a file in which nothing is wrong."""
    batches = read(text, **manner)
    assert [refused for batch in batches for refused in batch.refused] == []
    return [line.update for batch in batches for line in batch.lines]


def event_ids(text: str, **manner: Any) -> list[str]:
    """Read the event_ids of a file in which nothing is wrong, in the order of its lines."""
    with contextlib.closing(SortedLines()) as sorted_lines:
        for portion in read(text, **manner):
            assert portion.refused == []
            sorted_lines.add(portion.lines)
        sorted_lines.sort()
        batch = sorted_lines.read(1_000)
    assert batch is not None
    return [line.update.event_id for line in sorted(batch.lines)]


def test_a_row_is_an_event() -> None:
    """Each column is the field of its name; the type is taken in any case, and an empty cell is an absent field."""
    text = f"{HEADER}\ne-1,m,s,b,Decrease,CASHBACK,5,-5,1790000000000,2026-05-28T12:00:00.250+02:00\n\n{RIGHT}\n"

    first, second = updates(text)

    assert first == points_pb2.PointsUpdate(
        event_id="e-1",
        merchant_id="m",
        store_id="s",
        buyer_id="b",
        update_type=points_pb2.POINTS_UPDATE_TYPE_DECREASE,
        updated_scene=points_pb2.POINTS_UPDATE_SCENE_CASHBACK,
        updated_value=5,
        points_balance=-5,
        points_expiry_time=at(1_790_000_000_000),
        updated_at=at(1_779_962_400_250),
    )
    assert not second.HasField("points_expiry_time")


def test_an_object_is_an_event() -> None:
    """JSON Lines have the same names, numbers or their decimal strings, and null for what is absent."""
    members = {
        "buyer_id": 2404721679,
        "update_type": "increase",
        "updated_scene": "LUCKY_DRAW",
        "updated_value": "20",
        "points_balance": None,
        "updated_at": NOW_MS,
    }

    (update,) = updates(json.dumps(members), format=Format.JSONL, merchant_id="m", store_id="s")

    assert (update.merchant_id, update.store_id, update.buyer_id) == ("m", "s", "2404721679")
    assert (update.unrecognized_scene, update.updated_scene) == ("LUCKY_DRAW", 0)
    assert update.updated_value == 20
    assert not update.HasField("points_balance")
    assert update.updated_at == at(NOW_MS)


@pytest.mark.parametrize(("row", "columns"), WRONG_LINES)
def test_every_wrong_column_of_a_row_is_named(row: str, columns: set[str]) -> None:
    """A wrong row is told with its number and all its wrong columns, and its neighbours are read."""
    (batch,) = read(f"{HEADER}\n{RIGHT}\n{row}\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [2, 4]
    (refused,) = batch.refused
    assert (refused.number, refused.reason) == (3, "INVALID_FIELDS")
    assert columns <= {name for name, _ in refused.violations}
    assert all(name in refused.message for name in columns)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("a,b,c", "has 3 cells where the header has 10"),
        (RIGHT + ",more", "has 11 cells where the header has 10"),
        (RIGHT.replace("e-1", '"e-1'), "a double quote that is not closed"),
        (RIGHT.replace("e-1", '"e-1"x'), "a double quote that is not closed"),
        (RIGHT.replace("e-1", '"e-1""'), "a double quote that is not closed"),
        (RIGHT.replace("e-1", 'e"1'), "stands in a cell without quotes"),
        (RIGHT.replace("e-1", '1"'), "must not contain a line break"),
        (RIGHT.replace(",b,", ',b""c,'), "stands in a cell without quotes"),
        (RIGHT.replace(",b,", ', "b",'), "stands in a cell without quotes"),
        (RIGHT.replace("SUCCESSFUL_ORDERS", 'ORDERS"'), "stands in a cell without quotes"),
    ],
)
def test_a_row_that_cannot_be_taken_apart_spoils_itself_alone(row: str, told: str) -> None:
    """A quote that never ends, or a cell too many, does not swallow the lines behind it."""
    (batch,) = read(f"{HEADER}\n{row}\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [3]
    (refused,) = batch.refused
    assert refused.number == 2
    assert told in refused.message


def test_no_part_of_a_cell_with_a_line_break_becomes_an_event() -> None:
    """What stands behind the line break has as many cells as a row."""
    (batch,) = read(f"{HEADER}\n{RIGHT}\n" + RIGHT.replace("e-1", '"e\n1"') + f"\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [2, 5]
    assert [refused.number for refused in batch.refused] == [3, 4]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"nonsense", "is not JSONL"),
        (b"[1]", "is no JSON object"),
        (b'{"buyer_id": NaN}', "NaN"),
        (b'{"buyer_id": "a", "buyer_id": "b"}', "names a column twice"),
        (b'{"buyer_id": "\xff"}', "is not JSONL in UTF-8"),
        (b"[" * 60_000, "is not JSONL"),
        (b'{"updated_value": true}', "updated_value must be a whole number"),
        (b'{"updated_value": 1.0}', "updated_value must be a whole number"),
        (b'{"updated_value": ' + b"9" * 4_000 + b"}", "updated_value must be a whole number"),
        (b'{"updated_at": false}', "updated_at must be RFC 3339"),
        (b'{"buyer_id": "\\ud800"}', "buyer_id must be visible ASCII"),
        (b'{"buyer_id": ["b"]}', "buyer_id must be visible ASCII"),
        (b'{"points": 1}', "points is not a known column"),
        (b'{"event_id": true}', "event_id must be visible ASCII"),
    ],
)
def test_a_wrong_object_is_told(line: bytes, told: str) -> None:
    """Whatever a line holds, it is one refused line, and the next one is read."""
    right = json.dumps(dict(zip(HEADER.split(","), RIGHT.split(","), strict=True))).encode()

    (batch,) = read(line + b"\n" + right + b"\n", format=Format.JSONL)

    assert [line.number for line in batch.lines] == [2]
    (refused,) = batch.refused
    assert refused.number == 1
    assert told in refused.message


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("", "unknown columns: 'e-1'"),
        (f"{HEADER},colour", "unknown columns: 'colour'"),
        (f"{HEADER},buyer_id", "repeats columns: 'buyer_id'"),
        ("merchant_id,store_id,buyer_id", "lacks columns: 'updated_at', 'update_type'"),
        ('"', "there is no header"),
    ],
)
def test_a_wrong_header_is_told_before_anything_is_read(header: str, told: str) -> None:
    """The columns must be known, and those that every line needs be there."""
    with pytest.raises(PointsFileError, match=told):
        read(f"{header}\n{RIGHT}\n")


def test_what_is_given_for_all_lines_may_be_left_out() -> None:
    """A merchant, a store and a time may come from outside; a line that has its own keeps it."""
    text = "store_id,buyer_id,update_type,updated_scene,updated_value\n,b,INCREASE,LOGIN_SUCCESS,1\nt,b,INCREASE,X,1\n"

    first, second = updates(text, merchant_id="m", store_id="s", at_ms=NOW_MS)

    assert (first.merchant_id, first.store_id, first.updated_at) == ("m", "s", at(NOW_MS))
    assert second.store_id == "t"


@pytest.mark.parametrize(
    ("head", "end"),
    [
        ("\ufeff" + HEADER, ""),
        ("sep=,\r\n" + HEADER, ""),
        ("\ufeffSEP=,\r\n" + HEADER, ""),
        (HEADER.replace(",", " , "), ""),
        (HEADER + ",,", ",,"),
        (HEADER + ", ", ",\u00a0"),
        (HEADER, ",,"),
    ],
)
def test_spreadsheets_are_understood(head: str, end: str) -> None:
    """A byte order mark, quotes, Windows line ends, blanks and empty columns mean nothing."""
    quoted = ",".join(f'"{cell}"' for cell in RIGHT.split(",")).replace('""', '"  "')

    assert updates(f"{head}\r\n{quoted}{end}\r\n") == updates(f"{HEADER}\n{RIGHT}")


@pytest.mark.parametrize("row", [",,,,,,,,,", ",", '"",""', " , ,\t", "\u00a0,", ",,,,,,,,,,,,,", "\u3000"])
def test_a_row_of_empty_cells_is_skipped(row: str) -> None:
    """It is neither an event nor refused, whatever its length, and counts in the numbers of the lines."""
    (portion,) = read(f"{HEADER}\n{row}\n{RIGHT}\n")

    assert ([line.number for line in portion.lines], portion.refused) == ([3], [])


def test_a_value_needs_a_column_with_a_name() -> None:
    """What no header names is not guessed, nor dropped."""
    rows = [HEADER.replace("id,", "id,,", 1), RIGHT.replace("e-1,", "e-1,x,"), RIGHT.replace("e-1,", "e-1,,")]

    (portion,) = read("\n".join(rows))

    assert [line.number for line in portion.lines] == [3]
    assert "in a column that the header does not name" in portion.refused[0].message


@pytest.mark.parametrize("column", ["event_id", "merchant_id", "store_id", "buyer_id"])
def test_an_id_that_a_spreadsheet_has_changed_is_a_refused_line(column: str) -> None:
    """In every column of ids the cause and the cure are named, beside everything else that is wrong."""
    for damaged in ("1.72E+12", "'123", '="123"', "#REF!", "17.0", "1,718"):
        cells = dict(zip(HEADER.split(","), RIGHT.split(","), strict=True))
        row = ",".join(
            '"' + cell.replace('"', '""') + '"' for cell in {**cells, column: damaged, "updated_value": "x"}.values()
        )
        (portion,) = read(f"{HEADER}\n{row}\n{RIGHT}\n")

        assert [line.number for line in portion.lines] == [3]
        (refused,) = portion.refused
        assert refused.reason == "INVALID_FIELDS"
        assert {name for name, _ in refused.violations} == {column, "updated_value"}
        assert "spreadsheet" in refused.message
        assert "format the column as text" in refused.message


def test_json_lines_know_no_spreadsheets() -> None:
    """An id there is a string as it was meant."""
    members = {**dict(zip(HEADER.split(","), RIGHT.split(","), strict=True)), "buyer_id": "1.72E+12", "event_id": "'1"}

    (update,) = updates(json.dumps(members), format=Format.JSONL)

    assert (update.buyer_id, update.event_id) == ("1.72E+12", "'1")


def test_ids_that_may_be_rounded_are_counted() -> None:
    """It cannot be known, so that the lines are read, and the first of them is named."""
    rows = [RIGHT, RIGHT.replace(",b,", ",1718263946864520000,"), RIGHT.replace("e-1", "123456789012345000")]
    file = PointsFile(io.BytesIO("\n".join([HEADER, *rows]).encode()), Manner(Format.CSV), lambda: NOW_MS)
    portion = file.read(10)

    assert portion is not None
    assert len(portion.lines) == 3
    assert file.rounded == (2, 3)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (f"{HEADER}\n{RIGHT}".encode("utf-16"), "is in UTF-16"),
        (f"{HEADER}\n{RIGHT}".encode("utf-16-le"), "is in UTF-16"),
        (f"\ufeff{HEADER}\n{RIGHT}".encode("utf-16-be"), "is in UTF-16"),
        (b"PK\x03\x04" + b"x" * 100, "workbook"),
        (b"\xd0\xcf\x11\xe0" + b"x" * 100, "workbook"),
        (f"{HEADER}\r{RIGHT}\r".encode(), "old Macintoshes"),
        (b"\r".join([HEADER.encode(), *[RIGHT.encode()] * 2_000]), "old Macintoshes"),
        (HEADER.replace(",", ";").encode(), "separated by semicolons"),
        (HEADER.replace(",", "\t").encode(), "separated by tabs"),
        (('"' + HEADER.replace(",", '"|"') + '"').encode(), "separated by bars"),
        (b"sep=;\n" + HEADER.replace(",", ";").encode(), "separated by semicolons"),
        (b"sep=\t\r\n" + HEADER.encode(), "separated by tabs"),
        (f"buyer_id,h\xe9\n{RIGHT}".encode("latin-1"), "the header is not in UTF-8"),
    ],
)
def test_a_file_that_a_spreadsheet_wrote_otherwise_names_the_cure(raw: bytes, told: str) -> None:
    """Instead of a riddle about columns."""
    with pytest.raises(PointsFileError, match=told) as error:
        read(raw)

    assert re.search("save it (as CSV UTF-8, separated by commas|in UTF-8)", str(error.value))


def test_a_row_in_another_encoding_names_the_cure() -> None:
    """It spoils itself alone."""
    (portion,) = read(f"{HEADER}\n".encode() + RIGHT.replace("b", "\xe9").encode("latin-1") + f"\n{RIGHT}\n".encode())

    assert [line.number for line in portion.lines] == [3]
    assert portion.refused[0].message == "is not CSV in UTF-8: save it as CSV UTF-8, separated by commas"


def test_a_line_without_an_end_is_no_file_of_events() -> None:
    """Memory stays bounded whatever is read."""
    with pytest.raises(PointsFileError, match="longer than"):
        read(f"{HEADER}\n" + "x" * 1_000_000)


def test_a_file_is_read_in_batches() -> None:
    """A batch has as many lines as were asked for, wrong ones counted, and the sizes sum up to the file's."""
    text = f"{HEADER}\n{RIGHT}\nwrong\n{RIGHT}\n{RIGHT}\n{RIGHT}\n"

    batches = read(text, count=2)

    assert [(len(batch.lines), len(batch.refused)) for batch in batches] == [(1, 1), (2, 0), (1, 0)]
    assert sum(batch.size for batch in batches) == len(text)


def test_an_event_is_named_by_its_content() -> None:
    """A left out event_id is the same for the same content, however it is written, and another for another."""
    header = HEADER.removeprefix("event_id,")
    row = RIGHT.removeprefix("e-1,")
    rewritten = row.replace("INCREASE", "increase").replace(str(NOW_MS), "2026-05-28T20:26:40Z")
    others = [row.replace("20,20", "20,21"), row.replace(",b,", ",c,"), row.replace("SUCCESSFUL_ORDERS", "OTHER")]

    same = event_ids(f"{header}\n{row}\n{rewritten}\n{row}\n")
    different = event_ids("\n".join([header, row, *others]))

    assert event_ids(f"{HEADER}\n-,{row}\n") == ["-"]
    assert len(set(same)) == 1
    assert len(set(different)) == 4


def test_identical_lines_without_a_balance_all_count() -> None:
    """They are told apart by how many came before, so that the same file names them the same again."""
    header = HEADER.removeprefix("event_id,")
    row = RIGHT.removeprefix("e-1,").replace("20,20", "20,")
    text = f"{header}\n{row}\n{row}\n{row}\n"

    ids = event_ids(text)

    assert len(set(ids)) == 3
    assert ids == event_ids(text)


@pytest.mark.parametrize(
    ("row", "opening", "event_id"),
    [
        (
            "b,INCREASE,LUCKY_DRAW,20,20",
            False,
            "import-a93a075d04835279044bdfad2fd9a461bf920e27512271e289e16173586558d6",
        ),
        ("b,INCREASE,LUCKY_DRAW,20,", False, "import-a7a3d6b9665d151a92e43b9f4df37700bf99593545412bb545152b29c9cba88b"),
        ("b,20", True, "opening-2accb90572e9922cc42aa33928dcfe8948a01d78d54452bca077a7e1397c1bec"),
    ],
)
def test_an_event_has_the_name_that_earlier_releases_gave_it(row: str, opening: bool, event_id: str) -> None:  # noqa: FBT001 - a parameter
    """A file that an earlier release imported changes nothing today."""
    header = "buyer_id,points_balance" if opening else "buyer_id,update_type,updated_scene,updated_value,points_balance"
    given: dict[str, Any] = {"merchant_id": "m", "store_id": "s", "at_ms": NOW_MS, "opening_balances": opening}

    assert event_ids(f"{header}\n{row}\n", **given) == [event_id]


def test_an_opening_balance_is_what_brings_an_account_there() -> None:
    """A balance came in, one below zero was taken, and one of zero opens the account with nothing."""
    text = "buyer_id,points_balance,points_expiry_time\na,30,2027-01-01T00:00:00Z\nb,0,\nc,-4,\n"
    opening: dict[str, Any] = {"opening_balances": True, "merchant_id": "m", "store_id": "s", "at_ms": NOW_MS}

    a, b, c = updates(text, **opening)

    scene = points_pb2.PointsUpdateScene
    assert (a.updated_value, a.points_balance, scene.Name(a.updated_scene)[20:]) == (30, 30, "CUSTOMER_IMPORT_INCREASE")
    assert (b.updated_value, b.points_balance, scene.Name(b.updated_scene)[20:]) == (0, 0, "CUSTOMER_IMPORT_INCREASE")
    assert (c.updated_value, c.points_balance, scene.Name(c.updated_scene)[20:]) == (4, -4, "CUSTOMER_IMPORT_DECREASE")
    assert a.points_expiry_time == at(1_798_761_600_000)
    assert event_ids("buyer_id,points_balance\na,31\n", **opening) == [a.event_id]


@pytest.mark.parametrize(
    ("text", "told"),
    [("buyer_id\na\n", "lacks columns: 'points_balance'"), ("buyer_id,points_balance,event_id\n", "unknown columns")],
)
def test_opening_balances_have_columns_of_their_own(text: str, told: str) -> None:
    """A file of events is not taken for one of balances, nor the other way round."""
    with pytest.raises(PointsFileError, match=told):
        read(text, opening_balances=True, merchant_id="m", store_id="s", at_ms=NOW_MS)


NEVER = ["", "0", 0]
BEFORE_2000 = [
    -1,
    "-1",
    1_798_761_600,
    "1798761600",
    "1",
    946_684_799_999,
    "1970-01-01T00:00:00Z",
    "1999-12-31T23:59:59Z",
]
BEYOND_9999 = [1_798_761_600_000_000, "999999999999999999"]


def _opening(expiry: object, **more: object) -> list[Portion]:
    """Read an opening balance with an expiry."""
    line = {"buyer_id": "a", "points_balance": 30, "points_expiry_time": expiry, **more}
    manner: dict[str, Any] = {"opening_balances": True, "merchant_id": "m", "store_id": "s", "at_ms": NOW_MS}
    return read(json.dumps(line), format=Format.JSONL, **manner)


def _change(expiry: object, **more: object) -> list[Portion]:
    """Read an event with an expiry."""
    line = {
        "buyer_id": "a",
        "updated_value": 30,
        "update_type": "INCREASE",
        "updated_scene": "SUCCESSFUL_ORDERS",
        "points_expiry_time": expiry,
        "updated_at": NOW_MS,
        **more,
    }
    return read(json.dumps(line), format=Format.JSONL, merchant_id="m", store_id="s")


@pytest.mark.parametrize("read_line", [_opening, _change])
@pytest.mark.parametrize("expiry", NEVER)
def test_an_expiry_of_zero_or_nothing_means_never(read_line: Callable[[object], list[Portion]], expiry: object) -> None:
    """As in SHOPLINE's webhooks."""
    (batch,) = read_line(expiry)

    assert not batch.refused
    assert not batch.lines[0].update.HasField("points_expiry_time")


@pytest.mark.parametrize("read_line", [_opening, _change])
@pytest.mark.parametrize("expiry", [*BEFORE_2000, *BEYOND_9999])
def test_an_expiry_in_another_unit_is_a_refused_line(
    read_line: Callable[[object], list[Portion]], expiry: object
) -> None:
    """Points would be born expired, or never expire; the line says that milliseconds are expected."""
    (batch,) = read_line(expiry)

    assert not batch.lines
    assert [name for name, _ in batch.refused[0].violations] == ["points_expiry_time"]
    assert "milliseconds" in batch.refused[0].message


@pytest.mark.parametrize("read_line", [_opening, _change])
@pytest.mark.parametrize("updated_at", ["1798761600", 1_798_761_600_000_000])
def test_a_moment_in_another_unit_is_a_refused_line(
    read_line: Callable[..., list[Portion]], updated_at: object
) -> None:
    """So is the moment of the event itself."""
    (batch,) = read_line("", updated_at=updated_at)

    assert [name for name, _ in batch.refused[0].violations] == ["updated_at"]
    assert "milliseconds" in batch.refused[0].message


@pytest.mark.parametrize("expiry", ["946684800000", "2000-01-01T00:00:00Z", str(NOW_MS - 1)])
def test_an_expiry_from_2000_on_may_be_before_the_event(expiry: str) -> None:
    """The account then opens with points that have expired."""
    (batch,) = _opening(expiry)

    assert batch.lines[0].update.points_expiry_time.ToMilliseconds() <= NOW_MS


def test_an_opening_balance_is_needed_in_each_line() -> None:
    """An empty cell is no balance of zero."""
    (batch,) = read(
        f"merchant_id,store_id,buyer_id,points_balance,updated_at\nm,s,b,,{NOW_MS}\n", opening_balances=True
    )

    assert batch.refused[0].message == "points_balance is required"


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        ("1780000000000", 1_780_000_000_000),
        ("2026-05-28t20:26:40z", 1_780_000_000_000),
        ("2026-05-28 22:26:40.123456789+02:00", 1_780_000_000_123),
        ("2026-05-28", None),
        ("2026-05-28T20:26:40", None),
        ("2026-W22-4T20:26:40Z", None),
        ("20260528T202640Z", None),
        ("1.78e12", None),
        ("", None),
    ],
)
def test_a_time_is_rfc_3339_or_milliseconds(text: str, time_ms: int | None) -> None:
    """Nothing is guessed: a time without a zone, or a date alone, is wrong."""
    assert read_time_ms(text) == time_ms


@pytest.mark.parametrize("head", ["\n", "\r\n\r\n", ",,,\n", "\ufeff\n", "\ufeff,,\r\n ,\t\n", ",,\nsep=,\n,\n"])
def test_rows_of_empty_cells_before_the_header_are_skipped(head: str) -> None:
    """They count as lines of the file."""
    (batch,) = read(f"{head}{HEADER}\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [head.count("\n") + 2]


def test_a_file_of_empty_rows_lacks_a_header() -> None:
    """It is not read for ever."""
    with pytest.raises(PointsFileError, match="lacks columns"):
        read(",,,\n\n")
