"""Files of points events: valid lines become events, others are refused."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from pointbook.v1 import points_pb2
from pointbook_cli.points_import.points_file import (
    Chunk,
    Format,
    PointsFile,
    PointsFileError,
    PointsFileOptions,
    parse_time_ms,
)
from pointbook_cli.points_import.sorted_lines import SortedLines
from support.clocks import NOW_MS, at

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


def read(text: str | bytes, count: int = 1_000, **manner: Any) -> list[Chunk]:
    """Read a file to its end."""
    raw = io.BytesIO(text if isinstance(text, bytes) else text.encode())
    file = PointsFile(raw, PointsFileOptions(**{"format": Format.CSV, **manner}), lambda: NOW_MS)
    batches = []
    while (batch := file.read(count)) is not None:
        batches.append(batch)
    return batches


def updates(text: str | bytes, **manner: Any) -> list[points_pb2.PointsUpdate]:
    """Return the events of a valid file."""
    batches = read(text, **manner)
    assert [refused for batch in batches for refused in batch.refused] == []
    return [line.update for batch in batches for line in batch.lines]


def event_ids(text: str, **manner: Any) -> list[str]:
    """Return the event_ids of a valid file in order of its lines."""
    with contextlib.closing(SortedLines()) as sorted_lines:
        for portion in read(text, **manner):
            assert portion.refused == []
            sorted_lines.add(portion.lines)
        sorted_lines.sort()
        batch = sorted_lines.read(1_000)
    assert batch is not None
    return [line.update.event_id for line in sorted(batch.lines)]


def test_a_csv_row_becomes_an_event() -> None:
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


def test_a_json_object_becomes_an_event() -> None:
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
def test_all_invalid_columns_of_a_row_are_named(row: str, columns: set[str]) -> None:
    (batch,) = read(f"{HEADER}\n{RIGHT}\n{row}\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [2, 4]
    (refused,) = batch.refused
    assert (refused.number, refused.reason) == (3, "INVALID_FIELDS")
    assert columns <= {name for name, _ in refused.violations}
    assert all(name in refused.message for name in columns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,b,c", "has 3 cells, the header has 10"),
        (RIGHT + ",more", "has 11 cells, the header has 10"),
        (RIGHT.replace("e-1", '"e-1'), "a double quote that is not closed"),
        (RIGHT.replace("e-1", '"e-1"x'), "a double quote that is not closed"),
        (RIGHT.replace("e-1", '"e-1""'), "a double quote that is not closed"),
        (RIGHT.replace("e-1", 'e"1'), "in a cell without quotes"),
        (RIGHT.replace("e-1", '1"'), "must not contain a line break"),
        (RIGHT.replace(",b,", ',b""c,'), "in a cell without quotes"),
        (RIGHT.replace(",b,", ', "b",'), "in a cell without quotes"),
        (RIGHT.replace("SUCCESSFUL_ORDERS", 'ORDERS"'), "in a cell without quotes"),
    ],
)
def test_a_row_that_cannot_be_split_does_not_affect_other_rows(row: str, message: str) -> None:
    (batch,) = read(f"{HEADER}\n{row}\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [3]
    (refused,) = batch.refused
    assert refused.number == 2
    assert message in refused.message


def test_no_part_of_a_cell_with_a_line_break_becomes_an_event() -> None:
    (batch,) = read(f"{HEADER}\n{RIGHT}\n" + RIGHT.replace("e-1", '"e\n1"') + f"\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [2, 5]
    assert [refused.number for refused in batch.refused] == [3, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "is not JSONL"),
        (b"[1]", "is not a JSON object"),
        (b'{"buyer_id": NaN}', "NaN"),
        (b'{"buyer_id": "a", "buyer_id": "b"}', "has a column twice"),
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
def test_an_invalid_json_line_is_refused_with_its_cause(line: bytes, message: str) -> None:
    right = json.dumps(dict(zip(HEADER.split(","), RIGHT.split(","), strict=True))).encode()

    (batch,) = read(line + b"\n" + right + b"\n", format=Format.JSONL)

    assert [line.number for line in batch.lines] == [2]
    (refused,) = batch.refused
    assert refused.number == 1
    assert message in refused.message


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "unknown columns: 'e-1'"),
        (f"{HEADER},colour", "unknown columns: 'colour'"),
        (f"{HEADER},buyer_id", "repeats columns: 'buyer_id'"),
        ("merchant_id,store_id,buyer_id", "lacks columns: 'updated_at', 'update_type'"),
        ('"', "there is no header"),
    ],
)
def test_an_invalid_header_raises_before_any_line_is_read(header: str, message: str) -> None:
    with pytest.raises(PointsFileError, match=message):
        read(f"{header}\n{RIGHT}\n")


def test_defaults_of_the_options_apply_to_lines_without_the_column() -> None:
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
def test_csv_variants_of_spreadsheets_are_accepted(head: str, end: str) -> None:
    quoted = ",".join(f'"{cell}"' for cell in RIGHT.split(",")).replace('""', '"  "')

    assert updates(f"{head}\r\n{quoted}{end}\r\n") == updates(f"{HEADER}\n{RIGHT}")


@pytest.mark.parametrize("row", [",,,,,,,,,", ",", '"",""', " , ,\t", "\u00a0,", ",,,,,,,,,,,,,", "\u3000"])
def test_a_row_of_empty_cells_is_skipped(row: str) -> None:
    (portion,) = read(f"{HEADER}\n{row}\n{RIGHT}\n")

    assert ([line.number for line in portion.lines], portion.refused) == ([3], [])


def test_a_value_in_a_column_without_a_name_is_refused() -> None:
    rows = [HEADER.replace("id,", "id,,", 1), RIGHT.replace("e-1,", "e-1,x,"), RIGHT.replace("e-1,", "e-1,,")]

    (portion,) = read("\n".join(rows))

    assert [line.number for line in portion.lines] == [3]
    assert "in a column that the header does not name" in portion.refused[0].message


@pytest.mark.parametrize("column", ["event_id", "merchant_id", "store_id", "buyer_id"])
def test_an_id_damaged_by_a_spreadsheet_is_refused_with_a_remedy(column: str) -> None:
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


def test_ids_in_json_lines_are_not_checked_for_spreadsheet_damage() -> None:
    members = {**dict(zip(HEADER.split(","), RIGHT.split(","), strict=True)), "buyer_id": "1.72E+12", "event_id": "'1"}

    (update,) = updates(json.dumps(members), format=Format.JSONL)

    assert (update.buyer_id, update.event_id) == ("1.72E+12", "'1")


def test_lines_with_ids_that_may_be_rounded_are_counted() -> None:
    rows = [RIGHT, RIGHT.replace(",b,", ",1718263946864520000,"), RIGHT.replace("e-1", "123456789012345000")]
    file = PointsFile(io.BytesIO("\n".join([HEADER, *rows]).encode()), PointsFileOptions(Format.CSV), lambda: NOW_MS)
    portion = file.read(10)

    assert portion is not None
    assert len(portion.lines) == 3
    assert (file.rounded_count, file.first_rounded) == (2, 3)


@pytest.mark.parametrize(
    ("raw", "message"),
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
def test_a_spreadsheets_other_file_formats_raise_with_a_remedy(raw: bytes, message: str) -> None:
    with pytest.raises(PointsFileError, match=message) as error:
        read(raw)

    assert re.search("save it (as CSV UTF-8, separated by commas|as UTF-8)", str(error.value))


def test_a_row_in_another_encoding_is_refused_with_a_remedy() -> None:
    (portion,) = read(f"{HEADER}\n".encode() + RIGHT.replace("b", "\xe9").encode("latin-1") + f"\n{RIGHT}\n".encode())

    assert [line.number for line in portion.lines] == [3]
    assert portion.refused[0].message == "is not CSV in UTF-8: save it as CSV UTF-8, separated by commas"


def test_a_line_that_is_too_long_raises() -> None:
    with pytest.raises(PointsFileError, match="longer than"):
        read(f"{HEADER}\n" + "x" * 1_000_000)


def test_chunks_have_the_requested_number_of_lines() -> None:
    text = f"{HEADER}\n{RIGHT}\nwrong\n{RIGHT}\n{RIGHT}\n{RIGHT}\n"

    batches = read(text, count=2)

    assert [(len(batch.lines), len(batch.refused)) for batch in batches] == [(1, 1), (2, 0), (1, 0)]
    assert sum(batch.size for batch in batches) == len(text)


def test_a_missing_event_id_is_generated_from_the_content() -> None:
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
def test_generated_event_ids_equal_those_of_earlier_releases(row: str, opening: bool, event_id: str) -> None:  # noqa: FBT001 - a parameter
    header = "buyer_id,points_balance" if opening else "buyer_id,update_type,updated_scene,updated_value,points_balance"
    given: dict[str, Any] = {"merchant_id": "m", "store_id": "s", "at_ms": NOW_MS, "opening_balances": opening}

    assert event_ids(f"{header}\n{row}\n", **given) == [event_id]


def test_an_opening_balance_becomes_one_event_with_that_balance() -> None:
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
    ("text", "message"),
    [("buyer_id\na\n", "lacks columns: 'points_balance'"), ("buyer_id,points_balance,event_id\n", "unknown columns")],
)
def test_files_of_events_and_of_opening_balances_have_different_columns(text: str, message: str) -> None:
    with pytest.raises(PointsFileError, match=message):
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


def _opening(expiry: object, **more: object) -> list[Chunk]:
    """Read an opening balance with an expiry."""
    line = {"buyer_id": "a", "points_balance": 30, "points_expiry_time": expiry, **more}
    manner: dict[str, Any] = {"opening_balances": True, "merchant_id": "m", "store_id": "s", "at_ms": NOW_MS}
    return read(json.dumps(line), format=Format.JSONL, **manner)


def _change(expiry: object, **more: object) -> list[Chunk]:
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
def test_an_expiry_of_zero_or_none_means_never(read_line: Callable[[object], list[Chunk]], expiry: object) -> None:
    (batch,) = read_line(expiry)

    assert not batch.refused
    assert not batch.lines[0].update.HasField("points_expiry_time")


@pytest.mark.parametrize("read_line", [_opening, _change])
@pytest.mark.parametrize("expiry", [*BEFORE_2000, *BEYOND_9999])
def test_an_expiry_in_seconds_or_microseconds_is_refused(
    read_line: Callable[[object], list[Chunk]], expiry: object
) -> None:
    (batch,) = read_line(expiry)

    assert not batch.lines
    assert [name for name, _ in batch.refused[0].violations] == ["points_expiry_time"]
    assert "milliseconds" in batch.refused[0].message


@pytest.mark.parametrize("read_line", [_opening, _change])
@pytest.mark.parametrize("updated_at", ["1798761600", 1_798_761_600_000_000])
def test_a_time_in_seconds_or_microseconds_is_refused(
    read_line: Callable[..., list[Chunk]], updated_at: object
) -> None:
    (batch,) = read_line("", updated_at=updated_at)

    assert [name for name, _ in batch.refused[0].violations] == ["updated_at"]
    assert "milliseconds" in batch.refused[0].message


@pytest.mark.parametrize("expiry", ["946684800000", "2000-01-01T00:00:00Z", str(NOW_MS - 1)])
def test_an_expiry_before_the_event_is_accepted_from_2000_on(expiry: str) -> None:
    (batch,) = _opening(expiry)

    assert batch.lines[0].update.points_expiry_time.ToMilliseconds() <= NOW_MS


def test_an_opening_without_a_balance_is_refused() -> None:
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
    assert parse_time_ms(text) == time_ms


@pytest.mark.parametrize("head", ["\n", "\r\n\r\n", ",,,\n", "\ufeff\n", "\ufeff,,\r\n ,\t\n", ",,\nsep=,\n,\n"])
def test_rows_of_empty_cells_before_the_header_are_skipped(head: str) -> None:
    (batch,) = read(f"{head}{HEADER}\n{RIGHT}\n")

    assert [line.number for line in batch.lines] == [head.count("\n") + 2]


def test_a_file_of_empty_rows_lacks_a_header() -> None:
    with pytest.raises(PointsFileError, match="lacks columns"):
        read(",,,\n\n")
