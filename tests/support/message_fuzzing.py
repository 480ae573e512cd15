"""Random messages for every method: valid, hostile and corrupt."""

import random
import string
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from pointbook.v1 import (
    access_pb2,
    benefits_pb2,
    customers_pb2,
    points_pb2,
    programs_pb2,
    redemption_pb2,
    webhooks_pb2,
)

METHODS: tuple[MethodDescriptor, ...] = tuple(
    method
    for module in (access_pb2, benefits_pb2, customers_pb2, points_pb2, programs_pb2, redemption_pb2, webhooks_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
DEPTH_MAX = 6
REPEATS_MAX = 4
KNOWN_VALUES_MAX = 40
RARELY_SET = {"etag", "page_token", "validation_code", "challenge_id", "user_group2", "unrecognized_scene"}
"""Fields that make most calls fail, because they must match other fields."""
SURROGATES = b"\xed\xa0\x80\xed\xb0\x80"
SURROGATES_PLACEHOLDER = "SURRGT"
"""A text that is replaced by SURROGATES, of the same length, after encoding: Python cannot encode surrogates."""
INTEGERS = (0, 1, -1, 2, 10, 20, 50, 100, 1_000, 10**9, 10**15, 10**15 + 1, 10**18, 2**31 - 1, 2**31, 2**63 - 1)
SECONDS = (0, 1, -1, 1_780_000_000, 1_779_999_000, 4_102_415_999, 253_402_300_799, 253_402_300_800, -(2**63), 2**63 - 1)
TEXTS = (
    "",
    " ",
    "\x00",
    "a\x00b",
    "é" * 64,
    "x" * 65,
    "x" * 10_000,
    "\u202e\u200b\ufeff",
    "😀" * 32,
    SURROGATES_PLACEHOLDER,
    "'; DROP TABLE points_entries; --",
    "%s%n{0}{}",
    "../../etc/passwd",
    "NaN",
    "1e999999999",
    "-0.0",
    "0.01",
    "12.50",
    "9" * 400,
    "\uff19\uff19",
    "+12025550123",
    "00886912345678",
    "\uff21@example.com",
    "a@example.com",
    "a" * 255 + "@example.com",
    "a@" + "b." * 120 + "com",
    "USD",
    "TWD",
    "UTC",
    "Asia/Taipei",
    "Asia/../Taipei",
    "en",
    "zh-Hant-TW",
    "02-29",
    "13-45",
    "2404721679",
)
FIELD_NUMBER_MAX = 536_870_911
"""The largest field number."""


@dataclass
class MessageFuzzer:
    """A generator of calls that learns from responses.

    Later calls use ids, etags and tokens of earlier responses.
    """

    random: random.Random
    known: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    examples: dict[str, list[Message]] = field(default_factory=dict)
    """Valid requests by the name of their message."""
    _fixed: set[str] = field(default_factory=set)

    def call(self) -> tuple[str, bytes]:
        """Return the path of a method and an encoded request."""
        method = self.random.choice(METHODS)
        message = GetMessageClass(method.input_type)()
        examples = self.examples.get(method.input_type.name, ())
        if examples and self.random.random() < 0.6:
            message.CopyFrom(self.random.choice(examples))
            for _ in range(self.random.randrange(3)):
                self._change(message)
        else:
            self._fill(message, self.random.choice((0.0, 0.0, 0.02, 0.1, 0.5)), 0)
        raw = message.SerializeToString().replace(SURROGATES_PLACEHOLDER.encode(), SURROGATES)
        if self.random.random() < 0.15:
            raw = self._corrupt(raw)
        return f"/{method.containing_service.full_name}/{method.name}", raw

    def learn(self, message: Message) -> None:
        """Store the texts of a response by the names of their fields."""
        for descriptor, value in message.ListFields():
            if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
                if _is_map(descriptor):
                    continue
                for item in list(value)[:3] if descriptor.is_repeated else [value]:
                    self.learn(item)
            elif descriptor.type == FieldDescriptor.TYPE_STRING:
                self._add_values(descriptor.name.removeprefix("next_"), value if descriptor.is_repeated else [value])

    def set_values(self, name: str, *values: Any) -> None:
        """Set the values of a field, to which responses add none."""
        self._add_values(name, values)
        self._fixed.add(name)

    def _add_values(self, name: str, values: Iterable[Any]) -> None:
        """Add values of a field, and drop a random one if there are too many."""
        if name in self._fixed:
            return
        known = self.known[name]
        for value in values:
            if value not in known:
                known.append(value)
        if len(known) > KNOWN_VALUES_MAX:
            del known[self.random.randrange(len(known))]

    def _fill(self, message: Message, hostility: float, depth: int) -> None:
        kind: Any = message.DESCRIPTOR
        oneofs = {one.name: self.random.choice(one.fields).name for one in kind.oneofs}
        for descriptor in kind.fields:
            one = descriptor.containing_oneof
            if one is not None and len(one.fields) > 1 and oneofs[one.name] != descriptor.name:
                continue
            if self.random.random() < self._omit_probability(descriptor, hostility, depth):
                continue
            self._set(message, descriptor, hostility, depth)

    def _change(self, message: Message) -> None:
        """Change one random field of the message or of a nested message."""
        changed_message = self.random.choice(list(_with_nested(message)))
        if changed_message.DESCRIPTOR.fields:
            changed: Any = self.random.choice(changed_message.DESCRIPTOR.fields)
            changed_message.ClearField(changed.name)
            if self.random.random() < 0.8:
                self._set(changed_message, changed, self.random.choice((0.0, 1.0)), DEPTH_MAX - 2)

    def _omit_probability(self, descriptor: Any, hostility: float, depth: int) -> float:
        """Return the probability that a field is not set.

        Most calls without ids fail early, so ids are usually set.
        """
        if depth >= DEPTH_MAX:
            return 1.0
        if descriptor.name in RARELY_SET:
            return 0.8
        if descriptor.name in self.known or descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            return max(0.04, hostility / 2)
        return 0.5

    def _set(self, message: Message, descriptor: Any, hostility: float, depth: int) -> None:
        target: Any = message
        if _is_map(descriptor):
            value_field = descriptor.message_type.fields_by_name["value"]
            for _ in range(self.random.randrange(REPEATS_MAX)):
                key, place = self._text("key", hostility), getattr(target, descriptor.name)
                if value_field.type == FieldDescriptor.TYPE_MESSAGE:
                    self._fill(place[key], hostility, depth + 1)
                else:
                    place[key] = self._scalar(value_field, hostility)
        elif descriptor.is_repeated:
            place = getattr(target, descriptor.name)
            for _ in range(self._count(hostility)):
                if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
                    self._fill(place.add(), hostility, depth + 1)
                else:
                    place.append(self._scalar(descriptor, hostility))
        elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            inner = getattr(target, descriptor.name)
            inner.SetInParent()
            self._fill_known(inner, hostility, depth + 1)
        else:
            setattr(target, descriptor.name, self._scalar(descriptor, hostility))

    def _fill_known(self, message: Message, hostility: float, depth: int) -> None:
        target: Any = message
        if message.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
            hostile = self.random.random() < hostility
            target.seconds = (
                self.random.choice(SECONDS) if hostile else 1_780_000_000 + self.random.randrange(-9_999, 0)
            )
            target.nanos = self.random.choice((0, 1, -1, 10**9, 2**31 - 1)) if hostile else 0
        elif message.DESCRIPTOR.full_name == "google.protobuf.Duration":
            target.seconds = self.random.choice(SECONDS) if self.random.random() < hostility else 600
        else:
            self._fill(message, hostility, depth)

    def _count(self, hostility: float) -> int:
        if self.random.random() < hostility / 10:
            return self.random.choice((60, 1_100))
        return self.random.randrange(REPEATS_MAX)

    def _scalar(self, descriptor: Any, hostility: float) -> Any:  # noqa: PLR0911 - one for each type
        kind = descriptor.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            text = self._text(descriptor.name, hostility)
            return text.encode() if descriptor.type == FieldDescriptor.TYPE_BYTES else text
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.random.random() < 0.3
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            if self.random.random() < hostility:
                return self.random.choice((0, 99, -1, 2**31 - 1, -(2**31)))
            return self.random.choice(descriptor.enum_type.values[1:] or descriptor.enum_type.values).number
        if kind in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
            # Only Struct has numbers of this type.
            return self.random.choice((0.0, 1.5, -1.0, float("nan"), float("inf"), 1e308))
        values = [value for value in self.known.get(descriptor.name, ()) if isinstance(value, int)]
        if values and self.random.random() >= hostility:
            return self.random.choice(values)
        if self.random.random() >= hostility:
            return self.random.randrange(1, 100)
        limit = 2**31 if kind in {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32} else 2**63
        value = self.random.choice((*INTEGERS, -INTEGERS[-1], self.random.randrange(500)))
        return value if -limit <= value < limit else limit - 1

    def _text(self, name: str, hostility: float) -> str:
        values = self.known.get(name, ())
        if values and self.random.random() >= hostility:
            return str(self.random.choice(values))
        if self.random.random() < hostility:
            return self.random.choice(TEXTS)
        return "".join(self.random.choices(string.ascii_lowercase, k=self.random.choice((1, 8, 30))))

    def _corrupt(self, raw: bytes) -> bytes:
        """Corrupt an encoded message."""
        changes = (self._flip, self._truncate, self._double, self._append_unknown, self._nest, self._garbage)
        return self.random.choice(changes)(raw)

    def _flip(self, raw: bytes) -> bytes:
        flipped = bytearray(raw)
        for _ in range(self.random.randint(1, 8) if raw else 0):
            flipped[self.random.randrange(len(flipped))] = self.random.randrange(256)
        return bytes(flipped)

    def _truncate(self, raw: bytes) -> bytes:
        return raw[: self.random.randrange(len(raw) + 1)]

    def _double(self, raw: bytes) -> bytes:
        """Repeat every field. Parsers use the last value, and merge messages."""
        return raw + raw

    def _append_unknown(self, raw: bytes) -> bytes:
        number = self.random.choice((99, 19_000, FIELD_NUMBER_MAX))
        return raw + _varint(number << 3 | 2) + _varint(4) + self.random.randbytes(4)

    def _nest(self, raw: bytes) -> bytes:
        """Nest a field in itself beyond the depth limit of parsers."""
        number, inner = self.random.randint(1, 30), raw
        for _ in range(self.random.choice((10, 99, 101, 2_000))):
            inner = _varint(number << 3 | 2) + _varint(len(inner)) + inner
        return inner

    def _garbage(self, _raw: bytes) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 7, 100, 5_000)))


def response_classes() -> Iterator[tuple[str, type[Message]]]:
    """Yield the path and the response class of every method."""
    for method in METHODS:
        yield f"/{method.containing_service.full_name}/{method.name}", GetMessageClass(method.output_type)


def _with_nested(message: Message) -> Iterator[Message]:
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE and not _is_map(descriptor):
            for inner in value if descriptor.is_repeated else [value]:
                yield from _with_nested(inner)


def _is_map(descriptor: Any) -> bool:
    return bool(descriptor.type == FieldDescriptor.TYPE_MESSAGE and descriptor.message_type.GetOptions().map_entry)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    encoded.append(value)
    return bytes(encoded)
