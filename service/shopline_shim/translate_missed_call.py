"""Translation of a missed-call callback into a message of the API. Pure.

Providers differ in the form of a callback and in its field names, but every callback must identify a call.

Source: docs/reference/validation-codes.md#missed-calls
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from urllib.parse import parse_qsl

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import redemption_pb2
from pointbook_common.durations import SECOND_MS
from pointbook_common.text import phone_text
from shopline_shim.timestamps import TIMES_MS, epoch_ms, to_timestamp

_MERCHANT_ID = "merchant_id"
_BODY = "body"
_CONTENT_TYPE = "Content-Type"

_FORM_FIELDS_MAX = 1_000
_INVALID_VALUE = "\ufffd"
"""A placeholder for a JSON value that is neither text nor number. No field accepts it."""

_ID = re.compile(r"[!-~]+")
_NUMBER = re.compile(r"\(?(?:\+|00)?\)? *\(?([1-9][0-9 ().-]*)")
_NUMBER_LENGTHS = range(7, 16)
_SINCE_1970 = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,9})?")
_MILLISECONDS_MIN = 100_000_000_000
"""Smaller numbers are seconds, until the year 5138; others are milliseconds, from 1973 on."""


class MalformedCall(ValueError):  # noqa: N818 - the callback is wrong, not the program
    """An authentic callback that does not identify a call.

    `violations` has the rule that each wrong field breaks, by the provider's name of the field, never its value. A
    violation of the whole body has the name `body`, one of a header the header's name.
    """

    def __init__(self, violations: Mapping[str, str]) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{name} {description}" for name, description in violations.items()))


def missed_call(
    headers: Mapping[str, str], query: str, raw_body: bytes, field_names: Mapping[str, str], now_ms: int
) -> redemption_pb2.ConfirmMissedCallRequest:
    """Translate a callback, which is a form or a JSON object.

    `field_names` maps our field names to the provider's, if they differ. `merchant_id` may also be in the URL's query,
    under our name, because providers do not know it. `call_time` is RFC 3339, RFC 5322, or seconds or milliseconds
    since 1970, and defaults to `now_ms`. Numbers are international, with or without +: a form that does not encode the
    + turns it into a space. Invisible characters and digits of other scripts are normalized. The server checks whether
    a number exists.

    Raises MalformedCall with all violations.
    """
    pairs = _parse(headers.get("content-type", ""), raw_body)
    merchant_name = field_names.get(_MERCHANT_ID, _MERCHANT_ID)
    pairs += [(merchant_name, value) for name, value in parse_qsl(query) if name == _MERCHANT_ID]
    reader = _CallbackReader(pairs, field_names)
    call = redemption_pb2.ConfirmMissedCallRequest(
        merchant_id=reader.read_id(_MERCHANT_ID, 64),
        caller_number=reader.read_number("caller_number"),
        called_number=reader.read_number("called_number"),
        provider_call_id=reader.read_id("provider_call_id", 128),
        call_time=reader.read_time("call_time", now_ms),
    )
    if reader.violations:
        raise MalformedCall(reader.violations)
    return call


class _CallbackReader:
    """A reader of callback fields that collects all violations.

    Wrong fields are read as placeholders.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], field_names: Mapping[str, str]) -> None:
        self.violations: dict[str, str] = {}
        self._pairs = list(pairs)
        self._field_names = field_names

    def read_id(self, field: str, max_length: int) -> str:
        text = self._read_text(field)
        if len(text) <= max_length and _ID.fullmatch(text):
            return text
        return self._add_violation(field, f"must be an id of 1 to {max_length} visible ASCII characters")

    def read_number(self, field: str) -> str:
        number = _NUMBER.fullmatch(phone_text(self._read_text(field)))
        digits = re.sub("[^0-9]", "", number[1]) if number else ""
        if len(digits) in _NUMBER_LENGTHS:
            return f"+{digits}"
        return self._add_violation(field, "must be an international phone number, with its country code")

    def read_time(self, field: str, now_ms: int) -> Timestamp:
        text = self._read_text(field)
        time_ms = _parse_time_ms(text) if text else now_ms
        if time_ms is not None and time_ms in TIMES_MS:
            return to_timestamp(time_ms)
        self._add_violation(field, "must be a time with its offset from UTC, or seconds or milliseconds since 1970")
        return Timestamp()

    def _read_text(self, field: str) -> str:
        """Return the only value of a field; empty if it is missing."""
        name = self._field_names.get(field, field)
        values = {value.strip() for key, value in self._pairs if key == name}
        if len(values) > 1:
            self._add_violation(field, "must not have two values")
        return values.pop() if values else ""

    def _add_violation(self, field: str, description: str) -> str:
        """Store the first violation of a field, and return a placeholder."""
        self.violations.setdefault(self._field_names.get(field, field), description)
        return ""


def _parse(content_type: str, raw_body: bytes) -> list[tuple[str, str]]:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        return _parse_json(raw_body)
    if media_type == "application/x-www-form-urlencoded":
        return _parse_form(raw_body)
    raise MalformedCall({_CONTENT_TYPE: "must be application/x-www-form-urlencoded or application/json"})


def _parse_json(raw_body: bytes) -> list[tuple[str, str]]:
    """Return the members of an object, with numbers as they are written.

    A leading byte-order mark is skipped.
    """
    try:
        body = json.loads(raw_body.decode("utf-8-sig"), object_pairs_hook=tuple, parse_float=str, parse_int=str)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply.
        raise MalformedCall({_BODY: "must be JSON in UTF-8"}) from None
    if not isinstance(body, tuple):
        raise MalformedCall({_BODY: "must be a JSON object"})
    return [(name, value if isinstance(value, str) else _INVALID_VALUE) for name, value in body if value is not None]


def _parse_form(raw_body: bytes) -> list[tuple[str, str]]:
    """Return the fields of a form.

    Invalid UTF-8 is replaced, because it may be in a field that is not read.
    """
    try:
        return parse_qsl(raw_body.decode("utf-8-sig", errors="replace"), max_num_fields=_FORM_FIELDS_MAX)
    except ValueError:
        raise MalformedCall({_BODY: f"must have at most {_FORM_FIELDS_MAX} fields"}) from None


def _parse_time_ms(text: str) -> int | None:
    """Return a time in milliseconds since 1970, or None without an offset."""
    if _SINCE_1970.fullmatch(text):
        number = Decimal(text)
        return int(number if number >= _MILLISECONDS_MIN else number * SECOND_MS)
    for parse in (datetime.fromisoformat, _parse_rfc_5322):
        with contextlib.suppress(ValueError, OverflowError):
            return epoch_ms(parse(text))
    return None


def _parse_rfc_5322(text: str) -> datetime:
    """Parse a time such as "Sun, 22 Nov 2026 10:00:00 +0000"."""
    return datetime.strptime(text, "%a, %d %b %Y %H:%M:%S %z")
