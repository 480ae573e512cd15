"""SHOPLINE's GraphQL response for one membership level, and its translation.

Most values are null, which means absent, as an empty text or list does; numbers may be texts. A value that no rule of
BenefitsInfo makes relevant is set aside with a note, instead of refused.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Generic, NoReturn, TypeGuard, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from pointbook.v1 import benefits_pb2
from pointbook_server.benefits.messages import ENUM_NAMES, ENUM_NUMBERS
from pointbook_server.benefits.model import CONTEXT_FIELDS
from pointbook_server.benefits.relevance import describe_rule, irrelevant_fields
from pointbook_server.rpc.request_fields import Fields

M = TypeVar("M", bound=Message)
FILE_BYTES_MAX = 16 * 1024 * 1024
ITEMS_MAX = 1_000
DIGITS_MAX = 40
"""The maximum number of digits before or after the decimal point of a number."""
INT32_MAX = 2**31 - 1
EXACT_INTEGER_MAX = 2**53
"""The largest integer that is exact among the values set aside, which are JSON numbers."""
WHOLE = re.compile(r"-?[0-9]{1,10}")
FIELDS = {field.json_name: field for field in benefits_pb2.Benefit.DESCRIPTOR.fields if field.number in range(7, 31)}
"""The 24 fields of BenefitsInfo by SHOPLINE's names, which are our JSON names."""
PRIVILEGE_FIELDS = {
    field.json_name: field for field in benefits_pb2.CustomPrivilege.DESCRIPTOR.fields if field.number in range(4, 8)
}
"""The fields of a custom privilege by SHOPLINE's names."""


class BenefitsFileError(Exception):
    """A file that is not SHOPLINE's response for a level.

    The message is a predicate of `the file`.
    """


@dataclass(frozen=True, slots=True)
class LevelContent:
    """The benefits and the custom privileges of a level in SHOPLINE's response.

    `custom_privileges` is None if the response does not contain them, which differs from an empty list.
    """

    benefits: list[object]
    custom_privileges: list[object] | None


@dataclass(frozen=True, slots=True)
class Translation(Generic[M]):
    """A benefit or custom privilege of a file, with notes.

    The notes are about values that are set aside, stored by their name or ignored.
    """

    message: M
    notes: tuple[str, ...]


def read_level(raw: bytes) -> LevelContent:
    """Read a response. Raises BenefitsFileError."""
    if len(raw) > FILE_BYTES_MAX:
        raise BenefitsFileError(f"must be at most {FILE_BYTES_MAX:,} bytes")
    try:
        response = json.loads(
            raw.decode("utf-8-sig"), parse_float=Decimal, parse_int=Decimal, parse_constant=_reject_constant
        )
    except (ValueError, InvalidOperation, RecursionError):
        raise BenefitsFileError("must be JSON in UTF-8") from None
    if isinstance(response, dict) and response.get("errors"):
        raise BenefitsFileError("is a response with errors, which may lack benefits")
    for name in ("data", "benefitsOfMembership"):
        response = response.get(name) if isinstance(response, dict) else None
    if not isinstance(response, dict) or "benefitsInfo" not in response:
        raise BenefitsFileError("must have data.benefitsOfMembership.benefitsInfo, as in SHOPLINE's response")
    # A null may be a failure as well as a level without benefits; `--prune` would then delete all of them.
    benefits = _to_list(response["benefitsInfo"], "benefits")
    # Older queries do not request them.
    privileges = response.get("customPrivileges")
    return LevelContent(benefits, None if privileges is None else _to_list(privileges, "custom privileges"))


def _to_list(items: object, nouns: str) -> list[object]:
    if not isinstance(items, list) or len(items) > ITEMS_MAX:
        raise BenefitsFileError(f"must have a list of at most {ITEMS_MAX:,} {nouns}")
    return items


def translate_privilege(
    path: str, item: object, context: benefits_pb2.CustomPrivilege
) -> Translation[benefits_pb2.CustomPrivilege]:
    """Translate a custom privilege of the file. Raises INVALID_FIELDS."""
    fields = Fields()
    values = item if isinstance(item, dict) else {}
    fields.present(path, is_present=bool(values))
    privilege = benefits_pb2.CustomPrivilege()
    privilege.CopyFrom(context)
    for json_name, field in PRIVILEGE_FIELDS.items():
        if not _is_empty(values.get(json_name)):
            setattr(privilege, field.name, _text(fields, f"{path}.{json_name}", values[json_name]))
    fields.check()
    return Translation(privilege, tuple(_ignored(values, PRIVILEGE_FIELDS, "custom privileges")))


def translate(path: str, item: object, context: benefits_pb2.Benefit) -> Translation[benefits_pb2.Benefit]:
    """Translate a benefit of the file; `context` has the fields that are not in it.

    Raises INVALID_FIELDS.
    """
    fields = Fields()
    item_values = item if isinstance(item, dict) else {}
    fields.present(path, is_present=bool(item_values))
    values = {
        FIELDS[name].name: value for name, value in item_values.items() if name in FIELDS and not _is_empty(value)
    }
    irrelevant = irrelevant_fields({**_names_of(context), **values})
    benefit = benefits_pb2.Benefit()
    benefit.CopyFrom(context)
    for json_name, field in FIELDS.items():
        if field.name in irrelevant:
            benefit.irrelevant_values[field.name] = _json_value(fields, f"{path}.{json_name}", values[field.name])
        elif field.name in values:
            _set(fields, f"{path}.{json_name}", benefit, field, values[field.name])
    fields.check()
    return Translation(benefit, tuple(_notes(item_values, irrelevant, benefit)))


def _notes(
    item_values: Mapping[str, object], irrelevant: Collection[str], benefit: benefits_pb2.Benefit
) -> Iterator[str]:
    """Return a note for each value that is set aside, stored by its name or ignored."""
    for json_name, field in FIELDS.items():
        if field.name in irrelevant:
            yield f"set aside: {json_name}, which is {describe_rule(field.name)}"
        elif field.name in benefit.unrecognized_values:
            yield f"stored by its name: {json_name} {benefit.unrecognized_values[field.name]}"
    yield from _ignored(item_values, FIELDS, "BenefitsInfo")


def _ignored(values: Mapping[str, object], known: Collection[str], owner: str) -> Iterator[str]:
    for json_name, value in values.items():
        if json_name not in known and not _is_empty(value):
            yield f"ignored: {json_name}, which is not a field of {owner}"


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [])


def _reject_constant(_: str) -> NoReturn:
    raise ValueError


def _names_of(context: benefits_pb2.Benefit) -> dict[str, str]:
    """Return the names in the context that rules depend on."""
    names = {name: ENUM_NAMES[name].get(getattr(context, name), "") for name in CONTEXT_FIELDS}
    return {name: known or context.unrecognized_values.get(name, "") for name, known in names.items()}


def _set(fields: Fields, path: str, benefit: benefits_pb2.Benefit, field: FieldDescriptor, value: object) -> None:
    """Set a field to the value in the file."""
    if field.is_repeated:
        getattr(benefit, field.name).extend(_ids(fields, path, value))
    elif field.name not in ENUM_NUMBERS:
        setattr(benefit, field.name, READERS[field.type](fields, path, value))
    elif not isinstance(value, str):
        fields.wrong(path, "must be a name")
    elif value in ENUM_NUMBERS[field.name]:
        setattr(benefit, field.name, ENUM_NUMBERS[field.name][value])
    else:
        benefit.unrecognized_values[field.name] = _text(fields, path, value)


def _ids(fields: Fields, path: str, value: object) -> Iterable[str]:
    """Read a list of ids; nulls are skipped, duplicates removed."""
    if not isinstance(value, list):
        fields.wrong(path, "must be a list")
        return ()
    return dict.fromkeys(_text(fields, path, each) for each in value if each is not None)


def _text(fields: Fields, path: str, value: object) -> str:
    """Read a text; a number becomes its digits."""
    if isinstance(value, Decimal) and abs(value.adjusted()) <= DIGITS_MAX:
        return f"{value:f}"
    # JSON escapes may contain lone surrogates, which are not characters.
    if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value
    fields.wrong(path, "must be a text")
    return ""


def _integer(fields: Fields, path: str, value: object) -> int:
    """Read an integer, which may be a text."""
    if isinstance(value, str) and WHOLE.fullmatch(value):
        value = Decimal(value)
    if _is_integer(value, INT32_MAX):
        return int(value)
    fields.wrong(path, "must be a whole number of 32 bits")
    return 0


def _is_integer(value: object, high: int) -> TypeGuard[Decimal]:
    """Return whether a number is an integer up to a limit.

    The number of digits is checked first, since arithmetic on huge numbers is slow.
    """
    if not isinstance(value, Decimal) or value.adjusted() > DIGITS_MAX:
        return False
    return value == value.to_integral_value() and abs(value) <= high


def _boolean(fields: Fields, path: str, value: object) -> bool:
    """Read a boolean, which may be a text."""
    if value in (True, "true") or value in (False, "false"):
        return value in (True, "true")
    fields.wrong(path, "must be true or false")
    return False


def _json_value(fields: Fields, path: str, value: object) -> Any:
    """Read a value to set aside; a number that would be rounded becomes a text."""
    if isinstance(value, list):
        return [None if each is None else _json_scalar(fields, path, each) for each in value]
    return _json_scalar(fields, path, value)


def _json_scalar(fields: Fields, path: str, value: object) -> Any:
    if _is_integer(value, EXACT_INTEGER_MAX):
        return int(value)
    return value if isinstance(value, bool) else _text(fields, path, value)


READERS: Mapping[int, Callable[[Fields, str, object], Any]] = {
    FieldDescriptor.TYPE_BOOL: _boolean,
    FieldDescriptor.TYPE_INT32: _integer,
    FieldDescriptor.TYPE_STRING: _text,
}
"""The reader of each field type."""
