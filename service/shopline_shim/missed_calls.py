"""A telephony provider's callback as a message of Pointbook's API.

Pure: headers and bytes in, a verdict, a message or everything that is wrong out. Providers tell of a call in their own
ways, so that the form of a callback is theirs, and only what it must tell is ours (Validation codes, Missed call).
"""

import base64
import contextlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from urllib.parse import parse_qsl

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import redemption_pb2
from pointbook_common.text import phone_text

_MERCHANT_ID = "merchant_id"
_BODY = "body"
_CONTENT_TYPE = "Content-Type"

_FORM_FIELDS_MAX = 1_000
_NO_TEXT = "\ufffd"
"""Stands for a value that is neither text nor number: no rule takes it."""

_ID = re.compile(r"[!-~]+")
_NUMBER = re.compile(r"\(?(?:\+|00)?\)? *\(?([1-9][0-9 ().-]*)")
_NUMBER_LENGTHS = range(7, 16)
_SINCE_1970 = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,9})?")
_MILLISECONDS_FROM = 100_000_000_000
"""What is less counts seconds, until the year 5138; what is more counts milliseconds, since 1973."""
_TIMES_MS = range(253_402_300_800_000)  # From 1970 to the end of the year 9999, where a Timestamp ends.
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class MalformedCall(ValueError):  # noqa: N818 - it is the callback that is wrong, not the program.
    """An authentic callback that does not tell of a call.

    `violations` tells of every wrong field, by the name that the callback has for it, what it must be; never its value.
    A flaw of the body as a whole has the name `body`, a header stands under its own name.
    """

    def __init__(self, violations: Mapping[str, str]) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{name} {description}" for name, description in violations.items()))


def knows_secret(secrets: Iterable[str], headers: Mapping[str, str]) -> bool:
    """Tell whether a callback's headers hold any of the secrets.

    It stands in `Authorization`, as a bearer token or as the password of any user, since most providers take user and
    password inside the callback's URL and nothing else; or in `X-Pointbook-Secret`, where a gateway on the way wants
    `Authorization` for itself. `headers` must find names in lower case.

    Everything is compared, in constant time each, so that the time taken tells nothing about what matched.
    """
    claims = [_claimed(headers.get("authorization", "")), headers.get("x-pointbook-secret", "").encode()]
    matches = [hmac.compare_digest(_digest(secret.encode()), _digest(claim)) for secret in secrets for claim in claims]
    return any(matches)


def missed_call(
    headers: Mapping[str, str], query: str, raw_body: bytes, names: Mapping[str, str], now_ms: int
) -> redemption_pb2.ConfirmMissedCallRequest:
    """Read a callback: a form, or a JSON object.

    `names` tells under which name the provider writes a field of ours, where it has another one. `merchant_id` may
    stand in the URL's query instead of the body, under our name, as providers cannot know it. `call_time` is RFC 3339,
    RFC 5322, or seconds or milliseconds since 1970; where there is none it is `now_ms`. Numbers are international ones;
    a `+` that turned into a blank, since a form must encode it, is made up for; invisible characters and digits of
    other scripts are read. Whether there are such numbers is the server's to say.

    Raises MalformedCall with all that is wrong.
    """
    pairs = _parse(headers.get("content-type", ""), raw_body)
    merchant_name = names.get(_MERCHANT_ID, _MERCHANT_ID)
    pairs += [(merchant_name, value) for name, value in parse_qsl(query) if name == _MERCHANT_ID]
    reader = _Reader(pairs, names)
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


class _Reader:
    """Reads fields and collects what is wrong with them, so that one answer names it all."""

    def __init__(self, pairs: Iterable[tuple[str, str]], names: Mapping[str, str]) -> None:
        self.violations: dict[str, str] = {}
        self._pairs = list(pairs)
        self._names = names

    def read_id(self, field: str, max_length: int) -> str:
        text = self._read_text(field)
        if len(text) <= max_length and _ID.fullmatch(text):
            return text
        return self._refuse(field, f"must be an id of 1 to {max_length} visible ASCII characters")

    def read_number(self, field: str) -> str:
        number = _NUMBER.fullmatch(phone_text(self._read_text(field)))
        digits = re.sub("[^0-9]", "", number[1]) if number else ""
        if len(digits) in _NUMBER_LENGTHS:
            return f"+{digits}"
        return self._refuse(field, "must be an international phone number, with its country code")

    def read_time(self, field: str, now_ms: int) -> Timestamp:
        text = self._read_text(field)
        time_ms = _time_ms(text) if text else now_ms
        timestamp = Timestamp()
        if time_ms in _TIMES_MS:
            timestamp.FromMilliseconds(time_ms)
        else:
            self._refuse(field, "must be a time with its offset from UTC, or seconds or milliseconds since 1970")
        return timestamp

    def _read_text(self, field: str) -> str:
        """Read a field's one value; empty where there is none."""
        name = self._names.get(field, field)
        values = {value.strip() for key, value in self._pairs if key == name}
        if len(values) > 1:
            self._refuse(field, "must not have two values")
        return values.pop() if values else ""

    def _refuse(self, field: str, description: str) -> str:
        """Keep the first flaw of a field; answers what stands for it until the callback is refused."""
        self.violations.setdefault(self._names.get(field, field), description)
        return ""


def _claimed(authorization: str) -> bytes:
    """Read the secret that an `Authorization` header claims to know; empty where there is none."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    return b""


def _digest(secret: bytes) -> bytes:
    """Make secrets equally long, since comparing takes as long as they are."""
    return sha256(secret).digest()


def _parse(content_type: str, raw_body: bytes) -> list[tuple[str, str]]:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        return _parse_json(raw_body)
    if media_type == "application/x-www-form-urlencoded":
        return _parse_form(raw_body)
    raise MalformedCall({_CONTENT_TYPE: "must be application/x-www-form-urlencoded or application/json"})


def _parse_json(raw_body: bytes) -> list[tuple[str, str]]:
    """Read an object's members, the numbers as they are written; a leading byte-order mark is skipped."""
    try:
        body = json.loads(raw_body.decode("utf-8-sig"), object_pairs_hook=tuple, parse_float=str, parse_int=str)
    except (ValueError, RecursionError):  # RecursionError: nested more deeply than any call is told.
        raise MalformedCall({_BODY: "must be JSON in UTF-8"}) from None
    if not isinstance(body, tuple):
        raise MalformedCall({_BODY: "must be a JSON object"})
    return [(name, value if isinstance(value, str) else _NO_TEXT) for name, value in body if value is not None]


def _parse_form(raw_body: bytes) -> list[tuple[str, str]]:
    """Read a form's fields. What is no UTF-8 in one that nobody asked for must cost no call."""
    try:
        return parse_qsl(raw_body.decode("utf-8-sig", errors="replace"), max_num_fields=_FORM_FIELDS_MAX)
    except ValueError:
        raise MalformedCall({_BODY: f"must have at most {_FORM_FIELDS_MAX} fields"}) from None


def _time_ms(text: str) -> int:
    """Read a time in milliseconds; -1 where it is none."""
    if _SINCE_1970.fullmatch(text):
        number = Decimal(text)
        return int(number if number >= _MILLISECONDS_FROM else number * 1_000)
    for read in (datetime.fromisoformat, _read_mail_time):
        with contextlib.suppress(ValueError, OverflowError):
            time = read(text)
            return -1 if time.tzinfo is None else (time - _EPOCH) // _MILLISECOND
    return -1


def _read_mail_time(text: str) -> datetime:
    """Read a time of RFC 5322, as in "Sun, 22 Nov 2026 10:00:00 +0000"."""
    return datetime.strptime(text, "%a, %d %b %Y %H:%M:%S %z")
