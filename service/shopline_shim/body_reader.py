"""Reading of the JSON bodies of SHOPLINE's webhooks. Pure.

Source: docs/reference/shopline-webhooks.md#number-formats
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from pointbook.v1 import points_pb2
from pointbook_common.durations import SECOND_MS
from shopline_shim.timestamps import TIMES_MS, epoch_ms

Violation = tuple[str, str]
"""The name of a wrong field, and the rule it breaks. Never its value, which may be personal data."""

ID = re.compile(r"[!-~]{1,64}")

_BODY = "body"
_FIELDS = frozenset(
    {
        "buyer_id",
        "customer",
        "email",
        "id",
        "phone",
        "points_balance",
        "points_expiry_time",
        "shop_id",
        "store_domain",
        "store_id",
        "update_time",
        "update_type",
        "updated_at",
        "updated_scene",
        "updated_value",
    }
)
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_INT64 = range(-(2**63), 2**63)
_INT64_EXPONENTS = range(19)
_NEVER_SECONDS = 4_102_415_999
"""2099-12-31T15:59:59Z, which SHOPLINE also uses for "does not expire"."""
_UPDATE_TYPES = {
    "INCREASE": points_pb2.POINTS_UPDATE_TYPE_INCREASE,
    "DECREASE": points_pb2.POINTS_UPDATE_TYPE_DECREASE,
}


class MalformedWebhook(ValueError):  # noqa: N818 - the webhook is wrong, not the program
    """An authentic webhook whose content cannot be read.

    `violations` has each wrong field once, in the order of reading. A violation of the whole body has the name `body`,
    one of a header the header's name.
    """

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(dict.fromkeys(violations))
        super().__init__("; ".join(f"{field} {description}" for field, description in self.violations))


class OutOfBoundsWebhook(MalformedWebhook):
    """An authentic webhook with times that a Timestamp cannot hold.

    It has no other violations.
    """


class BodyReader:
    """A reader of body fields that collects all violations.

    A method whose field is wrong returns a placeholder of the right type, which is never used: call `check` before
    building a message.
    """

    def __init__(self, raw_body: bytes) -> None:
        self._body, self._violations = _parse(raw_body)
        self._only_out_of_bounds = not self._violations

    def check(self) -> None:
        """Raise MalformedWebhook if there are violations.

        It is OutOfBoundsWebhook if all of them are times out of bounds.
        """
        if self._violations:
            raise (OutOfBoundsWebhook if self._only_out_of_bounds else MalformedWebhook)(self._violations)

    def read_id(self, name: str) -> str:
        """Read an id, which may be written as an integer."""
        return self.check_id(name, _id_text(self._body.get(name)))

    def read_nested_id(self, parent: str, name: str) -> str:
        """Read an id from an object in the body."""
        value = self._body.get(parent)
        return self.check_id(f"{parent}.{name}", _id_text(value.get(name)) if isinstance(value, dict) else None)

    def check_id(self, name: str, value: object) -> str:
        """Return the value of a field or header if it is an id."""
        if isinstance(value, str) and ID.fullmatch(value):
            return value
        self._add_violation(name, "must be an id of 1 to 64 visible ASCII characters")
        return ""

    def read_text(self, name: str) -> str | None:
        """Read an optional text: None if it is missing, empty if it is null."""
        if name not in self._body:
            return None
        value = self._body[name]
        if value is None:
            return ""
        if isinstance(value, str) and _is_utf8(value):
            return value
        self._add_violation(name, "must be a text")
        return ""

    def read_required_text(self, name: str) -> str:
        """Read a text that must be present."""
        text = self.read_text(name)
        if text is None:
            self._add_violation(name, "must be a text")
        return text or ""

    def read_iso_time(self, name: str) -> int:
        """Read an ISO 8601 time with its offset from UTC, as milliseconds since 1970."""
        value = self._body.get(name)
        with contextlib.suppress(ValueError, OverflowError):
            time_ms = epoch_ms(datetime.fromisoformat(value)) if isinstance(value, str) else None
            if time_ms is not None and time_ms in TIMES_MS:
                return time_ms
        self._add_violation(name, "must be an ISO 8601 time since 1970 with its offset from UTC")
        return 0

    def read_scene(self, name: str) -> str:
        """Read the name of a scene, known or not."""
        value = self._body.get(name)
        if isinstance(value, str) and ID.fullmatch(value):
            return value
        self._add_violation(name, "must be a name of 1 to 64 visible ASCII characters")
        return ""

    def read_update_type(self, name: str) -> points_pb2.PointsUpdateType.ValueType:
        """Read INCREASE or DECREASE in any case."""
        value = self._body.get(name)
        # Only ASCII: upper() turns other letters, such as the dotless i, into those of a type's name.
        if isinstance(value, str) and value.isascii() and value.upper() in _UPDATE_TYPES:
            return _UPDATE_TYPES[value.upper()]
        self._add_violation(name, "must be INCREASE or DECREASE")
        return points_pb2.POINTS_UPDATE_TYPE_UNSPECIFIED

    def read_long(self, name: str) -> int:
        """Read an integer of 64 bits."""
        integer = _integer(self._body.get(name))
        if integer is None:
            self._add_violation(name, "must be a whole number of 64 bits")
            return 0
        return integer

    def read_magnitude(self, name: str) -> int:
        """Read an integer of 64 bits that is not negative."""
        integer = _integer(self._body.get(name))
        if integer is None or integer < 0:
            self._add_violation(name, "must be a whole number of 64 bits, not negative: update_type gives the sign")
            return 0
        return integer

    def read_time(self, name: str) -> int:
        """Read a time in milliseconds since 1970."""
        integer = _integer(self._body.get(name))
        if integer is None or integer not in TIMES_MS:
            description = "must be a time in milliseconds since 1970, before the year 10000"
            self._add_violation(name, description, out_of_bounds=integer is not None)
            return 0
        return integer

    def read_expiry(self, name: str, *, relevant: bool) -> int | None:
        """Read an expiry time, or None if the points do not expire.

        An irrelevant one is dropped, but must be a long.

        Source: docs/reference/shopline-webhooks.md#points-expiry-time
        """
        value = self._body.get(name)
        if value is None or value == "":
            return None
        if not relevant:
            self.read_long(name)
            return None
        expiry_ms = self.read_time(name)
        return None if expiry_ms == 0 or expiry_ms // SECOND_MS == _NEVER_SECONDS else expiry_ms

    def _add_violation(self, name: str, description: str, *, out_of_bounds: bool = False) -> None:
        self._violations.append((name, description))
        self._only_out_of_bounds = self._only_out_of_bounds and out_of_bounds


def _parse(raw_body: bytes) -> tuple[dict[str, Any], list[Violation]]:
    """Parse a JSON object, and return it with the violations of the JSON itself.

    All numbers are Decimals.

    A repeated name is a violation because parsers differ in the value they use; so are NaN and Infinity, which JSON
    does not have. A leading byte-order mark is skipped (https://www.rfc-editor.org/rfc/rfc8259#section-8.1). Raises
    MalformedWebhook if the body is not a JSON object in UTF-8.
    """
    violations: list[Violation] = []

    def parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated = [name for name, count in counts.items() if count > 1]
            violations.extend((name if name in _FIELDS else _BODY, "must not name a member twice") for name in repeated)
        return parsed

    def parse_constant(_: str) -> Decimal:
        violations.append((_BODY, "must not hold NaN or Infinity"))
        return Decimal("NaN")

    try:
        body = json.loads(
            raw_body.decode("utf-8-sig"),
            object_pairs_hook=parse_object,
            parse_constant=parse_constant,
            parse_float=_decimal,
            parse_int=_decimal,
        )
    except (ValueError, RecursionError):  # RecursionError: nested too deeply.
        raise MalformedWebhook([(_BODY, "must be JSON in UTF-8")]) from None
    if not isinstance(body, dict):
        raise MalformedWebhook([(_BODY, "must be a JSON object")])
    return body, violations


def _decimal(literal: str) -> Decimal:
    """Parse a number exactly.

    float() rounds longs, and int() rejects thousands of digits or is slow for them.
    """
    try:
        return Decimal(literal)
    except InvalidOperation:  # The exponent is out of range.
        return Decimal("NaN")


def _integer(value: object) -> int | None:
    """Return a long in any notation as an integer, or None if it is not one.

    The exponent is checked before the digits are expanded: 1e999999999 is short as a Decimal and very long as an int.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = _decimal(value)
    if not isinstance(value, Decimal) or not value.is_finite():
        return None
    if value.is_zero():
        return 0
    if value.adjusted() not in _INT64_EXPONENTS or value != value.to_integral_value():
        return None
    integer = int(value)
    return integer if integer in _INT64 else None


def _id_text(value: object) -> object:
    """Return an id that is written as a number as text, and any other value unchanged."""
    integer = _integer(value) if isinstance(value, Decimal) else None
    return value if integer is None else str(integer)


def _is_utf8(text: str) -> bool:
    """Return whether a text can be encoded: JSON may contain escaped lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
