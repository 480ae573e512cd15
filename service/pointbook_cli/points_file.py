"""Files of points events, read a portion at a time: CSV with a header, or JSON Lines.

A line is one event, or with `opening_balances` what an account held at a moment. Every wrong line is told by its
number and spoils nothing but itself; what is wrong with the file as a whole is a PointsFileError.
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
from pointbook_cli.spreadsheets import (
    SAVE_AS,
    SEPARATORS,
    damage_of,
    file_damage_of,
    may_be_rounded,
    separator_of,
    wrong_separator_of,
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
MAY_BE_LEFT_OUT = frozenset({"event_id", "points_expiry_time"})
TYPES = {
    "INCREASE": points_pb2.POINTS_UPDATE_TYPE_INCREASE,
    "DECREASE": points_pb2.POINTS_UPDATE_TYPE_DECREASE,
}
RENAMED = {"unrecognized_scene": "updated_scene"}
"""Fields of an event that a file has in another column."""
LINE_BYTES_MAX = 64 * 1024
"""Longer than any event can be written: what goes on without an end of line is no file of events."""
EMPTY_CELLS = b", \t\r\n\xef\xbb\xbf"
"""The bytes of a row of empty cells, and of a byte order mark before it."""
UNNAMED = "-"
"""Stands for an event_id that is still to be made."""
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_CELL = r'(?:"(?:[^"]|"")*+"|[^",]*+)'
_ROW = re.compile(rf"{_CELL}(?:,{_CELL})*+")
"""Cells either stand in double quotes, which are doubled inside, or have none; csv.reader allows them anywhere."""
_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Format(StrEnum):
    """How a file is written."""

    CSV = "csv"
    JSONL = "jsonl"


FORMATS = {".csv": Format.CSV, ".jsonl": Format.JSONL, ".ndjson": Format.JSONL}
"""What a file's name says of it."""


class PointsFileError(Exception):
    """The file as a whole cannot be read: one line that says why."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How to read a file: what its lines are, and what counts where they leave a column out."""

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
        """The columns without which no line would be accepted."""
        given = {"merchant_id": self.merchant_id, "store_id": self.store_id, "updated_at": self.at_ms is not None}
        optional = MAY_BE_LEFT_OUT | {name for name, value in given.items() if value}
        if not self.opening_balances:
            optional |= {"points_balance"}
        return [name for name in self.columns if name not in optional]


@dataclass(frozen=True, slots=True)
class Line:
    """A line that was read well.

    `update` has an empty event_id where it is still to be numbered among identical lines. `written` is the line as it
    stands in the file. With `may_be_reused` other content may stand under the same event_id.
    """

    number: int
    update: points_pb2.PointsUpdate
    event: Event
    written: bytes
    may_be_reused: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that is not in the book, and why; `violations` are pairs of a column and what it must be."""

    number: int
    event_id: str
    reason: str
    message: str
    violations: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Portion:
    """Some lines of a file, in their order. `size` is what they take of the file, in bytes."""

    lines: list[Line] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    size: int = 0


class PointsFile:
    """Reads a file from its beginning to its end, no more of it at a time than was asked for.

    `rounded` are how many lines have an id that a spreadsheet may have rounded, and the number of the first of them.
    Raises PointsFileError.
    """

    def __init__(self, raw: BinaryIO, manner: Manner, clock: Clock) -> None:
        self.rounded = (0, 0)
        self._raw = raw
        self._manner = manner
        self._clock = clock
        self._number = 0
        self._split: Callable[[str], dict[str, object] | None] = _split_json
        self._head_size = 0
        self._is_csv = manner.format is Format.CSV
        if self._is_csv:
            self._split = self._split_row
            self._header = self._read_header()

    def read(self, count: int) -> Portion | None:
        """Read the next lines, at most so many; None at the end."""
        portion = Portion(size=self._head_size)
        self._head_size = 0
        while len(portion.lines) + len(portion.refused) < count:
            raw = self._next()
            if not raw:
                return portion if portion.lines or portion.refused else None
            portion.size += len(raw)
            if raw.strip():
                self._read_line(raw, portion)
        return portion

    def _next(self) -> bytes:
        raw = self._raw.readline(LINE_BYTES_MAX)
        self._number += 1
        if self._number == 1 and (damage := file_damage_of(raw)):
            raise PointsFileError(f"the file {damage}")
        if len(raw) == LINE_BYTES_MAX:
            raise PointsFileError(f"line {self._number} is longer than {LINE_BYTES_MAX:,} bytes")
        return raw

    def _read_header(self) -> list[str]:
        """Read the names of the columns, all of which must be known, and none missing."""
        text = self._next_head()
        separator = separator_of(text)
        if separator == ",":
            text = self._next_head()
        elif separator is None:
            separator = wrong_separator_of(text, self._manner.columns)
        if separator not in {None, ","}:
            name = SEPARATORS.get(separator or "", f"{separator!a}")
            raise PointsFileError(f"the columns are separated by {name}, as spreadsheets of some regions do: {SAVE_AS}")
        try:
            (cells,) = csv.reader([text], strict=True)
        except (ValueError, csv.Error):
            raise PointsFileError("there is no header: the first line must name the columns, in UTF-8") from None
        header = _without_empty_end([name.strip() for name in cells])
        self._check_header([name for name in header if name])
        return header

    def _next_head(self) -> str:
        raw = b","
        while raw and not raw.strip(EMPTY_CELLS):
            raw = self._next()
            self._head_size += len(raw)
        try:
            # Spreadsheets begin UTF-8 with a byte order mark.
            return raw.decode("utf-8-sig").rstrip("\r\n")
        except ValueError:
            raise PointsFileError(f"the header is not in UTF-8: {SAVE_AS}") from None

    def _check_header(self, header: list[str]) -> None:
        repeated = [name for name, times in Counter(header).items() if times > 1]
        unknown = [name for name in header if name not in self._manner.columns]
        missing = [name for name in self._manner.required if name not in header]
        for names, what in (
            (unknown, "has unknown columns"),
            (repeated, "repeats columns"),
            (missing, "lacks columns"),
        ):
            if names:
                known = ", ".join(self._manner.columns)
                raise PointsFileError(f"the header {what}: {', '.join(map(ascii, names))}; there are {known}")

    def _read_line(self, raw: bytes, portion: Portion) -> None:
        cells: Mapping[str, object] | None = {}
        try:
            cells = self._split(raw.decode("utf-8-sig" if self._number == 1 else "utf-8").rstrip("\r\n"))
            if cells is not None:
                portion.lines.append(self._read_cells(cells, raw))
        except (ValueError, RecursionError, csv.Error) as error:
            portion.refused.append(Refused(self._number, "", "INVALID_LINE", self._message_of(error)))
        except PointbookError as error:
            pairs = ((violation.field, violation.description) for violation in error.violations)
            event_id = _shown((cells or {}).get("event_id"))
            portion.refused.append(refusal(self._number, event_id, error.reason, "", pairs))

    def _message_of(self, error: Exception) -> str:
        if isinstance(error, _LineError):
            return str(error)
        cure = f": {SAVE_AS}" if self._is_csv and isinstance(error, UnicodeDecodeError) else ""
        return f"is not {self._manner.format.upper()} in UTF-8{cure}"

    def _split_row(self, text: str) -> dict[str, object] | None:
        """Split a row into its cells; None where all of them are empty."""
        # Line by line, since no value of an event has a line break: a quote that never ends spoils its own line alone,
        # and the rest of a cell after a line break is no id.
        if not _ROW.fullmatch(text):
            raise _LineError(
                "has a double quote that is not closed, or that stands in a cell without quotes; "
                "a value must not contain a line break"
            )
        (row,) = csv.reader([text], strict=True)
        row = [cell if cell.strip() else "" for cell in row]
        if not any(row):
            return None
        row = row[: len(self._header)] + _without_empty_end(row[len(self._header) :])
        if len(row) != len(self._header):
            raise _LineError(
                f"has {len(row)} cells where the header has {len(self._header)}; "
                "a value that contains a comma must stand in double quotes"
            )
        if any(cell and not name for name, cell in zip(self._header, row, strict=True)):
            raise _LineError("has a value in a column that the header does not name")
        return {name: cell for name, cell in zip(self._header, row, strict=True) if name}

    def _read_cells(self, cells: Mapping[str, object], raw: bytes) -> Line:
        """Read a line's event. Raises INVALID_FIELDS with all that is wrong."""
        fields = Fields()
        for name in sorted(cells.keys() - set(self._manner.columns)):
            fields.wrong(ascii(name)[1:-1], "is not a known column")
        if self._is_csv:
            cells = self._check_ids(fields, cells)
        update = (self._read_opening if self._manner.opening_balances else self._read_change)(fields, cells)
        is_named = bool(update.event_id)
        update.event_id = update.event_id or UNNAMED
        event = read_event(fields, "update", update, self._clock())
        fields.check()
        if not is_named:
            update.event_id = self._make_event_id(update.merchant_id, event)
        may_be_reused = is_named or self._manner.opening_balances
        return Line(self._number, update, event, raw.strip(), may_be_reused)

    def _check_ids(self, fields: Fields, cells: Mapping[str, object]) -> Mapping[str, object]:
        """Note each id that a spreadsheet has damaged, and return the cells without them."""
        damages = {name: damage_of(str(cells[name])) for name in ID_COLUMNS if cells.get(name)}
        for name, damage in damages.items():
            if damage is not None:
                fields.wrong(f"update.{name}", damage)
        if any(may_be_rounded(str(cells[name])) for name in damages):
            count, first = self.rounded
            self.rounded = (count + 1, first or self._number)
        return {**cells, **{name: UNNAMED for name, damage in damages.items() if damage is not None}}

    def _read_change(self, fields: Fields, cells: Mapping[str, object]) -> points_pb2.PointsUpdate:
        """Read a line that is an event."""
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
        """Read a line that is a balance: the event that brings an account there from nothing.

        What is below zero was taken, so that it is a DECREASE; a balance of zero opens the account with nothing in it.
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
        """Read the columns that both kinds of lines have."""
        update = points_pb2.PointsUpdate(
            merchant_id=_text(fields, "merchant_id", cells) or self._manner.merchant_id,
            store_id=_text(fields, "store_id", cells) or self._manner.store_id,
            buyer_id=_text(fields, "buyer_id", cells),
            points_balance=_integer(fields, "points_balance", cells),
        )
        expires_at_ms = _expiry_ms(fields, "points_expiry_time", cells)
        if expires_at_ms is not None:
            update.points_expiry_time.CopyFrom(to_timestamp(expires_at_ms))
        updated_at_ms = _time_ms(fields, "updated_at", cells)
        updated_at_ms = self._manner.at_ms if updated_at_ms is None else updated_at_ms
        if updated_at_ms is not None:
            update.updated_at.CopyFrom(to_timestamp(updated_at_ms))
        return update

    def _make_event_id(self, merchant_id: str, event: Event) -> str:
        """Build an event_id from the content, so that the same file gives the same one again.

        It is empty without a balance, where identical lines are numbered once the file is sorted. An account opens once
        at a moment, so that another balance then is refused as another content of the same event.
        """
        if self._manner.opening_balances:
            place = (merchant_id, event.account_key.store_id, event.account_key.buyer_id, event.updated_at_ms)
            return f"opening-{_digest(place)}"
        return "" if event.balance is None else f"import-{_digest(content_of(merchant_id, event))}"


def _without_empty_end(cells: Sequence[str]) -> list[str]:
    """Return cells without the empty ones at their end, which spreadsheets add."""
    count = max((index + 1 for index, cell in enumerate(cells) if cell), default=0)
    return list(cells[:count])


class _LineError(ValueError):
    """A line that cannot be taken apart, and why."""


def content_of(merchant_id: str, event: Event) -> tuple[object, ...]:
    """Return what distinguishes a line's event from others besides its id."""
    key = event.account_key
    place = (merchant_id, key.store_id, key.buyer_id, event.updated_at_ms)
    return (*place, event.delta, event.balance, event.expires_at_ms, event.scene)


def numbered_event_id(content: Sequence[object], ordinal: int) -> str:
    """Build the event_id of the first, second, … of identical lines without a balance."""
    return f"import-{_digest((*content, ordinal))}"


def refusal(
    number: int, event_id: str, reason: str, message: str, violations: Iterable[tuple[str, str]] = ()
) -> Refused:
    """Tell why a line is refused. Its columns are named as the file names them, each once."""
    named: dict[str, str] = {}
    for path, description in violations:
        name = path.removeprefix("update.")
        named.setdefault(RENAMED.get(name, name), description)
    told = "; ".join(f"{name} {description}" for name, description in named.items())
    return Refused(number, event_id, reason, told or message, tuple(named.items()))


def read_time_ms(text: str) -> int | None:
    """Read a time, RFC 3339 or milliseconds since 1970; None where it is neither."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _RFC_3339.fullmatch(text):
        return None
    try:
        return (datetime.fromisoformat(text.upper()) - _EPOCH) // timedelta(milliseconds=1)
    except ValueError:
        return None


def _split_json(text: str) -> dict[str, object]:
    value = json.loads(text, object_pairs_hook=_members, parse_constant=_refuse_constant)
    if not isinstance(value, dict):
        raise _LineError("is no JSON object")
    return value


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _LineError("names a column twice")
    return members


def _refuse_constant(_: str) -> object:
    raise _LineError("has NaN or Infinity, which JSON does not have")


def _text(fields: Fields, name: str, cells: Mapping[str, object]) -> str:
    """Read a name or an id; empty where it is absent."""
    value = cells.get(name)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.isascii():
        fields.wrong(f"update.{name}", "must be visible ASCII characters")
        return UNNAMED
    return value


def _integer(fields: Fields, name: str, cells: Mapping[str, object]) -> int | None:
    """Read a whole number; None where it is absent."""
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
    """Read a time; None where it is absent."""
    value = cells.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    time_ms = read_time_ms(value) if isinstance(value, str) else None
    if time_ms is None or not TIME_MS_MIN <= time_ms <= TIME_MS_MAX:
        fields.wrong(f"update.{name}", "must be RFC 3339, such as 2026-01-31T12:00:00Z, or milliseconds since 1970")
    return time_ms


def _expiry_ms(fields: Fields, name: str, cells: Mapping[str, object]) -> int | None:
    """Return when points expire; None where they never do, which 0 also says, as in SHOPLINE's webhooks."""
    return None if str(cells.get(name)) == "0" else _time_ms(fields, name, cells)


def _shown(event_id: object) -> str:
    return event_id if isinstance(event_id, str) else ""


def _digest(content: tuple[object, ...]) -> str:
    """Digest values. A JSON array is unambiguous: no two contents are written alike."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
