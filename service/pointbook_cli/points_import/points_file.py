"""Files of points events, read in chunks: CSV with a header, or JSON Lines.

A line is one event, or with `opening_balances` the balance of an account at a time. An invalid line is refused by its
number and does not affect others; an invalid file raises PointsFileError.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import BinaryIO

from pointbook.v1 import points_pb2
from pointbook_cli.points_import.spreadsheets import (
    SAVE_AS,
    SEPARATORS,
    declared_separator,
    file_damage,
    id_damage,
    may_be_rounded,
    wrong_separator,
)
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.messages import SCENES, read_event
from pointbook_server.ledger.model import Event
from pointbook_server.rpc.request_fields import TIME_MS_MAX, TIME_MS_MIN, Fields, to_timestamp

ACCOUNT_COLUMNS = ("merchant_id", "store_id", "buyer_id")
ID_COLUMNS = ("event_id", *ACCOUNT_COLUMNS)
OPENING_COLUMNS = (*ACCOUNT_COLUMNS, "points_balance", "points_expiry_time", "updated_at")
EVENT_COLUMNS = ("event_id", *OPENING_COLUMNS, "update_type", "updated_scene", "updated_value")
OPTIONAL_COLUMNS = frozenset({"event_id", "points_expiry_time"})
TYPES = {
    "INCREASE": points_pb2.POINTS_UPDATE_TYPE_INCREASE,
    "DECREASE": points_pb2.POINTS_UPDATE_TYPE_DECREASE,
}
RENAMED = {"unrecognized_scene": "updated_scene"}
"""Fields of an event, and the column of a file that they are in."""
LINE_BYTES_MAX = 64 * 1024
"""Longer than any event: a file with a longer line is not a file of events."""
EMPTY_CELLS = b", \t\r\n\xef\xbb\xbf"
"""The bytes of a row of empty cells, with a byte order mark."""
PLACEHOLDER_ID = "-"
"""A valid id that replaces one that is not generated yet, or invalid."""
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_CELL = r'(?:"(?:[^"]|"")*+"|[^",]*+)'
_ROW = re.compile(rf"{_CELL}(?:,{_CELL})*+")
"""A cell is in double quotes, doubled inside, or has none; csv.reader would accept them anywhere."""
_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Format(StrEnum):
    """The format of a file."""

    CSV = "csv"
    JSONL = "jsonl"


FORMATS = {".csv": Format.CSV, ".jsonl": Format.JSONL, ".ndjson": Format.JSONL}
"""The formats by the suffix of a file's name."""


class PointsFileError(Exception):
    """A file that cannot be read; the message is one line."""


@dataclass(frozen=True, slots=True)
class PointsFileOptions:
    """A file's format, its kind of lines, and the values of missing columns."""

    format: Format
    merchant_id: str = ""
    store_id: str = ""
    at_ms: int | None = None
    opening_balances: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a line may have."""
        return OPENING_COLUMNS if self.opening_balances else EVENT_COLUMNS

    @property
    def required(self) -> list[str]:
        """The columns that every line needs."""
        defaults = {"merchant_id": self.merchant_id, "store_id": self.store_id, "updated_at": self.at_ms is not None}
        optional = OPTIONAL_COLUMNS | {name for name, value in defaults.items() if value}
        if not self.opening_balances:
            optional |= {"points_balance"}
        return [name for name in self.columns if name not in optional]


@dataclass(frozen=True, slots=True)
class ParsedLine:
    """A valid line.

    `update` has an empty event_id if identical lines are still to be numbered. `raw` is the line in the file. If
    `may_be_reused`, other lines may have the same event_id with other content.
    """

    number: int
    update: points_pb2.PointsUpdate
    event: Event
    raw: bytes
    may_be_reused: bool


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A line that was not imported, and the cause.

    `violations` are pairs of a column and a requirement.
    """

    number: int
    event_id: str
    reason: str
    message: str
    violations: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Chunk:
    """Consecutive lines of a file. `size` is in bytes."""

    lines: list[ParsedLine] = field(default_factory=list)
    refused: list[RefusedLine] = field(default_factory=list)
    size: int = 0


class PointsFile:
    """A file of points events, read in chunks from its start. Raises PointsFileError.

    `rounded_count` lines have an id that a spreadsheet may have rounded; `first_rounded` is the first one's number.
    """

    def __init__(self, raw: BinaryIO, options: PointsFileOptions, clock: Clock) -> None:
        self.rounded_count = 0
        self.first_rounded = 0
        self._raw = raw
        self._options = options
        self._clock = clock
        self._number = 0
        self._split: Callable[[str], dict[str, object] | None] = _split_json
        self._header_size = 0
        self._is_csv = options.format is Format.CSV
        if self._is_csv:
            self._split = self._split_row
            self._header = self._read_header()

    def read(self, count: int) -> Chunk | None:
        """Read at most `count` lines; None at the end."""
        chunk = Chunk(size=self._header_size)
        self._header_size = 0
        while len(chunk.lines) + len(chunk.refused) < count:
            raw = self._next_line()
            if not raw:
                return chunk if chunk.lines or chunk.refused else None
            chunk.size += len(raw)
            if raw.strip():
                self._read_line(raw, chunk)
        return chunk

    def _next_line(self) -> bytes:
        raw = self._raw.readline(LINE_BYTES_MAX)
        self._number += 1
        if self._number == 1 and (damage := file_damage(raw)):
            raise PointsFileError(f"the file {damage}")
        if len(raw) == LINE_BYTES_MAX:
            raise PointsFileError(f"line {self._number} is longer than {LINE_BYTES_MAX:,} bytes")
        return raw

    def _read_header(self) -> list[str]:
        """Read the names of the columns.

        Raises PointsFileError if one is unknown or missing.
        """
        text = self._next_header_line()
        separator = declared_separator(text)
        if separator == ",":
            text = self._next_header_line()
        elif separator is None:
            separator = wrong_separator(text, self._options.columns)
        if separator not in {None, ","}:
            name = SEPARATORS.get(separator or "", f"{separator!a}")
            raise PointsFileError(f"the columns are separated by {name}, as spreadsheets of some regions do: {SAVE_AS}")
        try:
            (cells,) = csv.reader([text], strict=True)
        except (ValueError, csv.Error):
            raise PointsFileError("there is no header: the first line must name the columns, in UTF-8") from None
        header = _without_trailing_empty([name.strip() for name in cells])
        self._check_header([name for name in header if name])
        return header

    def _next_header_line(self) -> str:
        raw = b","
        while raw and not raw.strip(EMPTY_CELLS):
            raw = self._next_line()
            self._header_size += len(raw)
        try:
            # Spreadsheets start UTF-8 files with a byte order mark.
            return raw.decode("utf-8-sig").rstrip("\r\n")
        except ValueError:
            raise PointsFileError(f"the header is not in UTF-8: {SAVE_AS}") from None

    def _check_header(self, header: list[str]) -> None:
        repeated = [name for name, times in Counter(header).items() if times > 1]
        unknown = [name for name in header if name not in self._options.columns]
        missing = [name for name in self._options.required if name not in header]
        for names, problem in (
            (unknown, "has unknown columns"),
            (repeated, "repeats columns"),
            (missing, "lacks columns"),
        ):
            if names:
                known = ", ".join(self._options.columns)
                raise PointsFileError(f"the header {problem}: {', '.join(map(ascii, names))}; the columns are {known}")

    def _read_line(self, raw: bytes, chunk: Chunk) -> None:
        cells: Mapping[str, object] | None = {}
        try:
            cells = self._split(raw.decode("utf-8-sig" if self._number == 1 else "utf-8").rstrip("\r\n"))
            if cells is not None:
                chunk.lines.append(self._read_cells(cells, raw))
        except (ValueError, RecursionError, csv.Error) as error:
            chunk.refused.append(RefusedLine(self._number, "", "INVALID_LINE", self._message_of(error)))
        except PointbookError as error:
            pairs = ((violation.field, violation.description) for violation in error.violations)
            event_id = _text_or_empty((cells or {}).get("event_id"))
            chunk.refused.append(refused_line(self._number, event_id, error.reason, "", pairs))

    def _message_of(self, error: Exception) -> str:
        if isinstance(error, _LineError):
            return str(error)
        remedy = f": {SAVE_AS}" if self._is_csv and isinstance(error, UnicodeDecodeError) else ""
        return f"is not {self._options.format.upper()} in UTF-8{remedy}"

    def _split_row(self, text: str) -> dict[str, object] | None:
        """Split a row into cells; None if all are empty."""
        # Split line by line, since no value of an event has a line break: an unclosed quote then affects only its own
        # line.
        if not _ROW.fullmatch(text):
            raise _LineError(
                "has a double quote that is not closed, or in a cell without quotes; "
                "a value must not contain a line break"
            )
        (row,) = csv.reader([text], strict=True)
        row = [cell if cell.strip() else "" for cell in row]
        if not any(row):
            return None
        row = row[: len(self._header)] + _without_trailing_empty(row[len(self._header) :])
        if len(row) != len(self._header):
            raise _LineError(
                f"has {len(row)} cells, the header has {len(self._header)}; "
                "a value with a comma must be in double quotes"
            )
        if any(cell and not name for name, cell in zip(self._header, row, strict=True)):
            raise _LineError("has a value in a column that the header does not name")
        return {name: cell for name, cell in zip(self._header, row, strict=True) if name}

    def _read_cells(self, cells: Mapping[str, object], raw: bytes) -> ParsedLine:
        """Read a line's event. Raises INVALID_FIELDS with all violations."""
        fields = Fields()
        for name in sorted(cells.keys() - set(self._options.columns)):
            fields.wrong(ascii(name)[1:-1], "is not a known column")
        if self._is_csv:
            cells = self._check_ids(fields, cells)
        update = (self._read_opening if self._options.opening_balances else self._read_change)(fields, cells)
        has_event_id = bool(update.event_id)
        update.event_id = update.event_id or PLACEHOLDER_ID
        event = read_event(fields, "update", update, self._clock())
        fields.check()
        if not has_event_id:
            update.event_id = self._generate_event_id(update.merchant_id, event)
        may_be_reused = has_event_id or self._options.opening_balances
        return ParsedLine(self._number, update, event, raw.strip(), may_be_reused)

    def _check_ids(self, fields: Fields, cells: Mapping[str, object]) -> Mapping[str, object]:
        """Report ids damaged by a spreadsheet; return the cells without them.

        A placeholder replaces each damaged id.
        """
        damages = {name: id_damage(str(cells[name])) for name in ID_COLUMNS if cells.get(name)}
        for name, damage in damages.items():
            if damage is not None:
                fields.wrong(f"update.{name}", damage)
        if any(may_be_rounded(str(cells[name])) for name in damages):
            self.rounded_count += 1
            self.first_rounded = self.first_rounded or self._number
        return {**cells, **{name: PLACEHOLDER_ID for name, damage in damages.items() if damage is not None}}

    def _read_change(self, fields: Fields, cells: Mapping[str, object]) -> points_pb2.PointsUpdate:
        """Read a line with an event."""
        update = self._read_common(fields, cells)
        update.event_id = _text(fields, "event_id", cells)
        update.update_type = TYPES.get(
            _text(fields, "update_type", cells).upper(), points_pb2.POINTS_UPDATE_TYPE_UNSPECIFIED
        )
        scene = _text(fields, "updated_scene", cells)
        fields.present("updated_scene", is_present=bool(scene))
        if scene in SCENES:
            update.updated_scene = SCENES[scene]
        else:
            update.unrecognized_scene = scene
        value = _integer(fields, "updated_value", cells)
        fields.present("updated_value", is_present=value is not None)
        update.updated_value = value or 0
        return update

    def _read_opening(self, fields: Fields, cells: Mapping[str, object]) -> points_pb2.PointsUpdate:
        """Read a line with a balance as the event that opens the account with it.

        A negative balance is a DECREASE; a zero balance opens an empty account.
        """
        update = self._read_common(fields, cells)
        fields.present("points_balance", is_present=update.HasField("points_balance"))
        update.update_type = TYPES["INCREASE"]
        update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_CUSTOMER_IMPORT_INCREASE
        if update.points_balance < 0:
            update.update_type = TYPES["DECREASE"]
            update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_CUSTOMER_IMPORT_DECREASE
        update.updated_value = abs(update.points_balance)
        return update

    def _read_common(self, fields: Fields, cells: Mapping[str, object]) -> points_pb2.PointsUpdate:
        """Read the columns of both kinds of lines."""
        update = points_pb2.PointsUpdate(
            merchant_id=_text(fields, "merchant_id", cells) or self._options.merchant_id,
            store_id=_text(fields, "store_id", cells) or self._options.store_id,
            buyer_id=_text(fields, "buyer_id", cells),
            points_balance=_integer(fields, "points_balance", cells),
        )
        expires_at_ms = _expiry_ms(fields, "points_expiry_time", cells)
        if expires_at_ms is not None:
            update.points_expiry_time.CopyFrom(to_timestamp(expires_at_ms))
        updated_at_ms = _time_ms(fields, "updated_at", cells)
        updated_at_ms = self._options.at_ms if updated_at_ms is None else updated_at_ms
        if updated_at_ms is not None:
            update.updated_at.CopyFrom(to_timestamp(updated_at_ms))
        return update

    def _generate_event_id(self, merchant_id: str, event: Event) -> str:
        """Generate an event_id from the content.

        A second import of the file then has the same ids. It is empty for lines without a balance: identical ones are
        numbered once the file is sorted. The id of an opening does not depend on its balance, so that a second opening
        at the same time is refused as a reused event_id.
        """
        if self._options.opening_balances:
            key = (merchant_id, event.account_key.store_id, event.account_key.buyer_id, event.updated_at_ms)
            return f"opening-{_digest(key)}"
        return "" if event.balance is None else f"import-{_digest(content_of(merchant_id, event))}"


def _without_trailing_empty(cells: Sequence[str]) -> list[str]:
    """Return cells without trailing empty ones, which spreadsheets add."""
    count = max((index + 1 for index, cell in enumerate(cells) if cell), default=0)
    return list(cells[:count])


class _LineError(ValueError):
    """A line that cannot be split; the message is a predicate of `the line`."""


def content_of(merchant_id: str, event: Event) -> tuple[object, ...]:
    """Return the content that distinguishes a line's event from others without an id."""
    account = event.account_key
    key = (merchant_id, account.store_id, account.buyer_id, event.updated_at_ms)
    return (*key, event.delta, event.balance, event.expires_at_ms, event.scene)


def numbered_event_id(content: Sequence[object], ordinal: int) -> str:
    """Generate the event_id of one of several identical lines without a balance.

    `ordinal` starts at 1.
    """
    return f"import-{_digest((*content, ordinal))}"


def refused_line(
    number: int, event_id: str, reason: str, message: str, violations: Iterable[tuple[str, str]] = ()
) -> RefusedLine:
    """Return a refused line with the first violation of each column.

    Violations have the file's names of columns.
    """
    by_column: dict[str, str] = {}
    for path, description in violations:
        name = path.removeprefix("update.")
        by_column.setdefault(RENAMED.get(name, name), description)
    requirements = "; ".join(f"{name} {description}" for name, description in by_column.items())
    return RefusedLine(number, event_id, reason, requirements or message, tuple(by_column.items()))


def parse_time_ms(text: str) -> int | None:
    """Parse a time, RFC 3339 or milliseconds since 1970; None if it is neither."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _RFC_3339.fullmatch(text):
        return None
    try:
        return (datetime.fromisoformat(text.upper()) - _EPOCH) // timedelta(milliseconds=1)
    except ValueError:
        return None


def _split_json(text: str) -> dict[str, object]:
    value = json.loads(text, object_pairs_hook=_unique_members, parse_constant=_reject_constant)
    if not isinstance(value, dict):
        raise _LineError("is not a JSON object")
    return value


def _unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _LineError("has a column twice")
    return members


def _reject_constant(_: str) -> object:
    raise _LineError("has NaN or Infinity, which are not JSON")


def _text(fields: Fields, name: str, cells: Mapping[str, object]) -> str:
    """Read a name or an id; empty if absent."""
    value = cells.get(name)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.isascii():
        fields.wrong(f"update.{name}", "must be visible ASCII characters")
        return PLACEHOLDER_ID
    return value


def _integer(fields: Fields, name: str, cells: Mapping[str, object]) -> int | None:
    """Read an integer; None if absent."""
    value = cells.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not _INTEGER.fullmatch(value):
        fields.wrong(f"update.{name}", "must be a whole number")
        return 0
    return int(value)


def _time_ms(fields: Fields, name: str, cells: Mapping[str, object]) -> int | None:
    """Read a time; None if absent."""
    value = cells.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    time_ms = parse_time_ms(value) if isinstance(value, str) else None
    if time_ms is None or not TIME_MS_MIN <= time_ms <= TIME_MS_MAX:
        fields.wrong(f"update.{name}", "must be RFC 3339, such as 2026-01-31T12:00:00Z, or milliseconds since 1970")
    return time_ms


def _expiry_ms(fields: Fields, name: str, cells: Mapping[str, object]) -> int | None:
    """Read the expiry of points.

    Return None for never, written as 0 or absent, as in SHOPLINE's webhooks.
    """
    return None if str(cells.get(name)) == "0" else _time_ms(fields, name, cells)


def _text_or_empty(value: object) -> str:
    return value if isinstance(value, str) else ""


def _digest(content: tuple[object, ...]) -> str:
    """Return a digest of values, from an unambiguous JSON array."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
