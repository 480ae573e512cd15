"""Field checks of requests.

A collector finds every invalid field before a call changes anything.
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook_server.errors import FieldViolation, PointbookError
from pointbook_server.reasons import Reason

ID_LENGTH_MAX = 64
EVENT_ID_LENGTH_MAX = 128
REASON_LENGTH_MAX = 500
"""The length of the reason that an operator gives for the audit log."""
PROGRAM_ID_MAX = 2**63 - 1
STORES_MAX = 1_000
"""How many stores a program or a benefit may list."""
SCENES_MAX = 100
"""How many scenes a program or a filter of entries may list."""
SCENE_LENGTH_MAX = 64
LANGUAGE_LENGTH_MAX = 35
PAGE_SIZE_MAX = 1_000
PAGE_SIZE_DEFAULT = 50
YEAR_2000_MS = 946_684_800_000
TIME_MS_MIN = -62_135_596_800_000
TIME_MS_MAX = 253_402_300_799_999
BEFORE_2000 = (
    "; the time is before 2000: a value in seconds may have been taken for milliseconds; milliseconds are expected"
)
NANOS_PER_MS = 1_000_000
NANOS_PER_SECOND = 1_000_000_000
MACHINE_TIME_ZONES = {"localtime", "Factory", "posixrules"}
"""Files among the time zones whose meaning differs between machines."""
MACHINE_FOLDERS = ("posix/", "right/")
"""Folders that many machines lack; some of their zones count leap seconds."""
_VISIBLE_ASCII = re.compile(r"[!-~]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that texts for people must not contain, including all line breaks: a text can become a header."""
_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*")
_ETAG = re.compile(r"[0-9]{1,18}")


def to_timestamp(time_ms: int) -> Timestamp:
    """Build a Timestamp from milliseconds since 1970 (UTC)."""
    seconds, rest = divmod(time_ms, 1_000)
    return Timestamp(seconds=seconds, nanos=rest * NANOS_PER_MS)


def write_timestamp(field: Timestamp, time_ms: int) -> None:
    """Write milliseconds since 1970 (UTC) into a field of a message.

    It costs half as much as copying the Timestamp that `to_timestamp` builds.
    """
    field.seconds, rest = divmod(time_ms, 1_000)
    field.nanos = rest * NANOS_PER_MS


def to_decimal_text(value: Decimal | None) -> str:
    """Return a decimal without an exponent; empty for None."""
    return "" if value is None else f"{value:f}"


def is_language(tag: str) -> bool:
    """Return whether a text has the form of a BCP 47 tag.

    Subtags may also be separated by _, as in zh_TW.
    """
    return len(tag) <= LANGUAGE_LENGTH_MAX and _LANGUAGE.fullmatch(tag) is not None


def is_identifier(value: str) -> bool:
    """Return whether a text has the form of an id: 1 to 64 visible ASCII characters."""
    return 0 < len(value) <= ID_LENGTH_MAX and _VISIBLE_ASCII.fullmatch(value) is not None


def read_etag(etag: str) -> int | None:
    """Return the revision that an etag names; None for an empty one.

    An etag that this service never issued becomes -1, which is always stale.
    """
    if not etag:
        return None
    return int(etag) if _ETAG.fullmatch(etag) else -1


def parse(deserialize: Callable[[bytes], Any] | None, request: bytes) -> Any:
    """Return the parsed request. Raises INVALID_FIELDS.

    gRPC itself would report an internal error.
    """
    if deserialize is None:
        return request
    try:
        return deserialize(request)
    except (DecodeError, ValueError):
        violation = FieldViolation("", "is not a valid request message of this method")
        raise PointbookError(Reason.INVALID_FIELDS, "The request cannot be parsed.", violations=(violation,)) from None


class Fields:
    """Reads the fields of one request and collects the violations.

    Each method gets a field's path and value, and returns a value that is safe to continue with. `check` then raises
    INVALID_FIELDS with all violations, so that a caller can fix a request at once.
    """

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def wrong(self, field: str, description: str) -> None:
        """Add a violation: the field, and what it must be."""
        self._violations.append(FieldViolation(field, description))

    @property
    def is_clean(self) -> bool:
        """Whether there is no violation so far."""
        return not self._violations

    def check(self) -> None:
        """Raise INVALID_FIELDS if there are violations."""
        if self._violations:
            names = ", ".join(dict.fromkeys(violation.field for violation in self._violations[:5]))
            raise PointbookError(Reason.INVALID_FIELDS, f"Wrong fields: {names}.", violations=self._violations)

    def present(self, field: str, *, is_present: bool) -> bool:
        """Check that a required message or oneof is set; return whether it is."""
        if not is_present:
            self.wrong(field, "is required")
        return is_present

    def identifier(self, field: str, value: str, *, length_max: int = ID_LENGTH_MAX) -> str:
        """Read a required id."""
        if not value:
            self.wrong(field, "is required")
        return self.ascii(field, value, length_max=length_max)

    def ascii(self, field: str, value: str, *, length_max: int) -> str:
        """Read an optional string of visible ASCII characters."""
        if len(value) > length_max or not _VISIBLE_ASCII.fullmatch(value):
            self.wrong(field, f"must be at most {length_max} visible ASCII characters without spaces")
        return value

    def text(self, field: str, value: str, *, length_max: int) -> str:
        """Read an optional string for people."""
        if len(value) > length_max or _CONTROL.search(value):
            self.wrong(field, f"must be at most {length_max} characters without control characters")
        return value

    def reason(self, field: str, value: str, *, may_be_blank: bool = False) -> str:
        """Read the required reason of an audited operation.

        `may_be_blank` accepts a reason that consists of spaces.
        """
        self.present(field, is_present=bool(value if may_be_blank else value.strip()))
        return self.text(field, value, length_max=REASON_LENGTH_MAX)

    def integer(self, field: str, value: int, *, low: int, high: int) -> int:
        """Read an integer from `low` to `high`."""
        if not low <= value <= high:
            self.wrong(field, f"must be {low:,} to {high:,}")
        return value

    def decimal(self, field: str, value: str, *, digits_after: int = 12, zero_allowed: bool = False) -> Decimal | None:
        """Read an optional positive decimal; None if it is empty or invalid."""
        if not value:
            return None
        form = _DECIMAL.fullmatch(value) and len(value.partition(".")[2]) <= digits_after
        if not form or not (zero_allowed or Decimal(value)):
            least = "of at least" if zero_allowed else "above"
            self.wrong(
                field, f"must be a decimal {least} 0 with at most 12 digits before and {digits_after} after the point"
            )
            return None
        return Decimal(value)

    def time_ms(self, field: str, value: Timestamp, *, low: int = TIME_MS_MIN, high: int = TIME_MS_MAX) -> int:
        """Read a Timestamp, and return it in milliseconds since 1970 (UTC), rounded down."""
        time_ms = value.seconds * 1_000 + value.nanos // NANOS_PER_MS
        if not 0 <= value.nanos < NANOS_PER_SECOND or not TIME_MS_MIN <= time_ms <= TIME_MS_MAX:
            self.wrong(field, "must be a valid timestamp from year 1 to 9999")
            return YEAR_2000_MS
        if not low <= time_ms <= high:
            bounds = f"must be {to_timestamp(low).ToJsonString()} to {to_timestamp(high).ToJsonString()}"
            self.wrong(field, bounds + (BEFORE_2000 if time_ms < YEAR_2000_MS <= low else ""))
        return time_ms

    def time_zone(self, field: str, name: str) -> str:
        """Read an optional IANA time zone.

        Those whose meaning differs between machines are refused.
        """
        try:
            is_local = name in MACHINE_TIME_ZONES or name.startswith(MACHINE_FOLDERS)
            is_known = not is_local and (not name or bool(ZoneInfo(name)))
        except (ValueError, OSError, KeyError):
            is_known = False
        if not is_known:
            self.wrong(field, "must be an IANA time zone such as Asia/Shanghai")
        return name

    def page_size(self, field: str, value: int) -> int:
        """Read a page size; 0 means the default."""
        return self.integer(field, value, low=0, high=PAGE_SIZE_MAX) or PAGE_SIZE_DEFAULT

    def each(
        self,
        field: str,
        values: Sequence[str],
        read: Callable[[str, str], str],
        *,
        count_max: int,
        count_min: int = 0,
    ) -> tuple[str, ...]:
        """Read a list of distinct items, each with `read`."""
        if not count_min <= len(values) <= count_max:
            self.wrong(field, f"must have {count_min} to {count_max:,} items")
            return ()
        if len(set(values)) < len(values):
            self.wrong(field, "must name each item once")
        return tuple(read(f"{field}[{index}]", value) for index, value in enumerate(values))
