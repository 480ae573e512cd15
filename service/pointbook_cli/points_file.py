"""Files of points events, read a batch at a time: CSV with a header, or JSON Lines.

A line is one event, or with `opening_balances` what an account held at a moment. Every wrong line is told by its
number and spoils nothing but itself; what is wrong with the file as a whole is a PointsFileError.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import BinaryIO

from pointbook.v1 import points_pb2
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.fields import TIME_MS_MAX, TIME_MS_MIN, Fields, to_timestamp
from pointbook_server.ledger.model import Event
from pointbook_server.ledger.servicer import SCENES, read_event

ACCOUNT_COLUMNS = ("merchant_id", "store_id", "buyer_id")
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
UNNAMED = "-"
"""Stands for an event_id that is still to be made."""
_INTEGER = re.compile(r"-?[0-9]{1,18}")
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
    """A line that was read well."""

    number: int
    update: points_pb2.PointsUpdate


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that is not in the book, and why; `violations` are pairs of a column and what it must be."""

    number: int
    event_id: str
    reason: str
    message: str
    violations: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Batch:
    """Some lines of a file, in their order. `size` is what they take of the file, in bytes."""

    lines: list[Line] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    size: int = 0

    @property
    def keeps_order(self) -> bool:
        """Whether a line has no balance: it is judged by what came before it, so that nothing may overtake it."""
        return any(not line.update.HasField("points_balance") for line in self.lines)


class PointsFile:
    """Reads a file from its beginning to its end, no more of it at a time than was asked for.

    Beyond that it remembers eight bytes of the digest of each line that has neither an event_id nor a balance, to
    count the identical ones. Raises PointsFileError.
    """

    def __init__(self, raw: BinaryIO, manner: Manner, clock: Clock) -> None:
        self._raw = raw
        self._manner = manner
        self._clock = clock
        self._number = 0
        self._identical: Counter[bytes] = Counter()
        self._split: Callable[[str], dict[str, object]] = _split_json
        self._head_size = 0
        if manner.format is Format.CSV:
            self._split = self._split_row
            self._header = self._read_header()

    def read(self, count: int) -> Batch | None:
        """Read the next lines, at most so many; None at the end."""
        batch = Batch(size=self._head_size)
        self._head_size = 0
        while len(batch.lines) + len(batch.refused) < count:
            raw = self._next()
            if not raw:
                return batch if batch.lines or batch.refused else None
            batch.size += len(raw)
            if raw.strip():
                self._read_line(raw, batch)
        return batch

    def _next(self) -> bytes:
        raw = self._raw.readline(LINE_BYTES_MAX)
        self._number += 1
        if len(raw) == LINE_BYTES_MAX:
            raise PointsFileError(f"line {self._number} is longer than {LINE_BYTES_MAX:,} bytes")
        return raw

    def _read_header(self) -> list[str]:
        """Read the names of the columns, all of which must be known, and none missing."""
        raw = self._next()
        self._head_size = len(raw)
        try:
            # Spreadsheets begin UTF-8 with a byte order mark.
            (header,) = csv.reader([raw.decode("utf-8-sig").rstrip("\r\n")], strict=True)
        except (ValueError, csv.Error):
            raise PointsFileError("there is no header: the first line must name the columns, in UTF-8") from None
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
        return header

    def _read_line(self, raw: bytes, batch: Batch) -> None:
        cells: Mapping[str, object] = {}
        try:
            cells = self._split(raw.decode("utf-8-sig" if self._number == 1 else "utf-8").rstrip("\r\n"))
            batch.lines.append(Line(self._number, self._read_update(cells)))
        except (ValueError, RecursionError, csv.Error) as error:
            message = str(error) if isinstance(error, _LineError) else f"is not {self._manner.format.upper()} in UTF-8"
            batch.refused.append(Refused(self._number, "", "INVALID_LINE", message))
        except PointbookError as error:
            pairs = ((violation.field, violation.description) for violation in error.violations)
            batch.refused.append(refusal(self._number, _shown(cells.get("event_id")), error.reason, "", pairs))

    def _split_row(self, text: str) -> dict[str, object]:
        # Line by line, since no value of an event has a line break: a quote that never ends spoils its own line alone.
        (row,) = csv.reader([text], strict=True)
        if len(row) != len(self._header):
            raise _LineError(f"has {len(row)} cells where the header has {len(self._header)}")
        return dict(zip(self._header, row, strict=True))

    def _read_update(self, cells: Mapping[str, object]) -> points_pb2.PointsUpdate:
        """Read a line's event. Raises INVALID_FIELDS with all that is wrong."""
        fields = Fields()
        for name in sorted(cells.keys() - set(self._manner.columns)):
            fields.wrong(ascii(name)[1:-1], "is no column that there is")
        update = (self._read_opening if self._manner.opening_balances else self._read_change)(fields, cells)
        is_named = bool(update.event_id)
        update.event_id = update.event_id or UNNAMED
        event = read_event(fields, "update", update, self._clock())
        fields.check()
        if not is_named:
            update.event_id = self._make_event_id(update.merchant_id, event)
        return update

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
        """Name an event by its content, so that the same file names it the same again.

        Lines without a balance are told apart by how many identical ones came before them. An account opens once at a
        moment, so that another balance then is refused as another content of the same event.
        """
        key = event.account
        content: tuple[object, ...] = (merchant_id, key.store_id, key.buyer_id, event.updated_at_ms)
        if self._manner.opening_balances:
            return f"opening-{_digest(content).hex()}"
        content = (*content, event.delta, event.balance, event.expires_at_ms, event.scene)
        if event.balance is None:
            identical = _digest(content)[:8]
            self._identical[identical] += 1
            content = (*content, self._identical[identical])
        return f"import-{_digest(content).hex()}"


class _LineError(ValueError):
    """A line that cannot be taken apart, and why."""


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


def _digest(content: tuple[object, ...]) -> bytes:
    """Digest values. A JSON array is unambiguous: no two contents are written alike."""
    return hashlib.sha256(json.dumps(content).encode()).digest()
