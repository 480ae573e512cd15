"""SHOPLINE's answer for one membership level, translated into benefits and custom privileges as the service keeps them.

Most values are null, which says nothing, as an empty text or list does; numbers may be texts. What no rule of
BenefitsInfo lets be relevant is set aside and told, instead of refused.
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
"""A number with more digits before or after its point is none of SHOPLINE's."""
INT32_MAX = 2**31 - 1
EXACT_MAX = 2**53
"""Up to here whole numbers are exact among the values that are set aside."""
WHOLE = re.compile(r"-?[0-9]{1,10}")
FIELDS = {field.json_name: field for field in benefits_pb2.Benefit.DESCRIPTOR.fields if field.number in range(7, 31)}
"""The 24 fields of BenefitsInfo by SHOPLINE's names, which are those of ours in JSON."""
PRIVILEGE_FIELDS = {
    field.json_name: field for field in benefits_pb2.CustomPrivilege.DESCRIPTOR.fields if field.number in range(4, 8)
}
"""The fields of a custom privilege by SHOPLINE's names."""


class BenefitsFileError(Exception):
    """A file that is no answer of SHOPLINE's for a level; the message says what it must be."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The benefits and the custom privileges of a level as SHOPLINE answers them.

    `custom_privileges` is None where the answer says nothing of them, which is another thing than an empty list.
    """

    benefits: list[object]
    custom_privileges: list[object] | None


@dataclass(frozen=True, slots=True)
class Translated(Generic[M]):
    """What a file says of a benefit or custom privilege, and what became of values that no field takes."""

    message: M
    notes: tuple[str, ...]


def read_answer(raw: bytes) -> Answer:
    """Read an answer. Raises BenefitsFileError."""
    if len(raw) > FILE_BYTES_MAX:
        raise BenefitsFileError(f"must be at most {FILE_BYTES_MAX:,} bytes")
    try:
        answer = json.loads(raw.decode("utf-8-sig"), parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse)
    except (ValueError, InvalidOperation, RecursionError):
        raise BenefitsFileError("must be JSON in UTF-8") from None
    if isinstance(answer, dict) and answer.get("errors"):
        raise BenefitsFileError("is an answer with errors, which may lack benefits")
    for name in ("data", "benefitsOfMembership"):
        answer = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or "benefitsInfo" not in answer:
        raise BenefitsFileError("must have data.benefitsOfMembership.benefitsInfo, as SHOPLINE answers it")
    # A null may be a failure as well as a level without benefits, all of which `--prune` would then delete.
    benefits = _list_of(answer["benefitsInfo"], "benefits")
    # An older query does not ask for them.
    privileges = answer.get("customPrivileges")
    return Answer(benefits, None if privileges is None else _list_of(privileges, "custom privileges"))


def _list_of(items: object, nouns: str) -> list[object]:
    if not isinstance(items, list) or len(items) > ITEMS_MAX:
        raise BenefitsFileError(f"must have at most {ITEMS_MAX:,} {nouns} as a list")
    return items


def translate_privilege(
    path: str, item: object, context: benefits_pb2.CustomPrivilege
) -> Translated[benefits_pb2.CustomPrivilege]:
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
    return Translated(privilege, tuple(_left_out(values, PRIVILEGE_FIELDS, "custom privileges")))


def translate(path: str, item: object, context: benefits_pb2.Benefit) -> Translated[benefits_pb2.Benefit]:
    """Translate a benefit of the file into one with a context, which the file does not tell. Raises INVALID_FIELDS."""
    fields = Fields()
    told = item if isinstance(item, dict) else {}
    fields.present(path, is_present=bool(told))
    values = {FIELDS[name].name: value for name, value in told.items() if name in FIELDS and not _is_empty(value)}
    irrelevant = irrelevant_fields({**_names_of(context), **values})
    benefit = benefits_pb2.Benefit()
    benefit.CopyFrom(context)
    for json_name, field in FIELDS.items():
        if field.name in irrelevant:
            benefit.irrelevant_values[field.name] = _plain(fields, f"{path}.{json_name}", values[field.name])
        elif field.name in values:
            _set(fields, f"{path}.{json_name}", benefit, field, values[field.name])
    fields.check()
    return Translated(benefit, tuple(_notes(told, irrelevant, benefit)))


def _notes(told: Mapping[str, object], irrelevant: Collection[str], benefit: benefits_pb2.Benefit) -> Iterator[str]:
    """Tell what became of values that no field could take."""
    for json_name, field in FIELDS.items():
        if field.name in irrelevant:
            yield f"set aside: {json_name}, which is {describe_rule(field.name)}"
        elif field.name in benefit.unrecognized_values:
            yield f"kept by its name: {json_name} {benefit.unrecognized_values[field.name]}"
    yield from _left_out(told, FIELDS, "BenefitsInfo")


def _left_out(values: Mapping[str, object], known: Collection[str], owner: str) -> Iterator[str]:
    for json_name, value in values.items():
        if json_name not in known and not _is_empty(value):
            yield f"left out: {json_name}, which is no field of {owner}"


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [])


def _refuse(_: str) -> NoReturn:
    raise ValueError


def _names_of(context: benefits_pb2.Benefit) -> dict[str, str]:
    """Tell the names of the context that rules cite."""
    names = {name: ENUM_NAMES[name].get(getattr(context, name), "") for name in CONTEXT_FIELDS}
    return {name: known or context.unrecognized_values.get(name, "") for name, known in names.items()}


def _set(fields: Fields, path: str, benefit: benefits_pb2.Benefit, field: FieldDescriptor, value: object) -> None:
    """Set a field to what the file says."""
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
    """Read a list of ids, which may have holes and repeat itself."""
    if not isinstance(value, list):
        fields.wrong(path, "must be a list")
        return ()
    return dict.fromkeys(_text(fields, path, each) for each in value if each is not None)


def _text(fields: Fields, path: str, value: object) -> str:
    """Read a text, or a number as it is written."""
    if isinstance(value, Decimal) and abs(value.adjusted()) <= DIGITS_MAX:
        return f"{value:f}"
    # JSON may escape halves of characters that are none.
    if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value
    fields.wrong(path, "must be a text")
    return ""


def _whole(fields: Fields, path: str, value: object) -> int:
    """Read a whole number, which may be a text."""
    if isinstance(value, str) and WHOLE.fullmatch(value):
        value = Decimal(value)
    if _is_whole(value, INT32_MAX):
        return int(value)
    fields.wrong(path, "must be a whole number of 32 bits")
    return 0


def _is_whole(value: object, high: int) -> TypeGuard[Decimal]:
    """Tell whether a number is whole; its size is looked at before anything is computed with it."""
    if not isinstance(value, Decimal) or value.adjusted() > DIGITS_MAX:
        return False
    return value == value.to_integral_value() and abs(value) <= high


def _flag(fields: Fields, path: str, value: object) -> bool:
    """Read a boolean, which may be a text."""
    if value in (True, "true") or value in (False, "false"):
        return value in (True, "true")
    fields.wrong(path, "must be true or false")
    return False


def _plain(fields: Fields, path: str, value: object) -> Any:
    """Read a value that is set aside, whatever it is; a number that would be rounded becomes a text."""
    if isinstance(value, list):
        return [None if each is None else _plain_one(fields, path, each) for each in value]
    return _plain_one(fields, path, value)


def _plain_one(fields: Fields, path: str, value: object) -> Any:
    if _is_whole(value, EXACT_MAX):
        return int(value)
    return value if isinstance(value, bool) else _text(fields, path, value)


READERS: Mapping[int, Callable[[Fields, str, object], Any]] = {
    FieldDescriptor.TYPE_BOOL: _flag,
    FieldDescriptor.TYPE_INT32: _whole,
    FieldDescriptor.TYPE_STRING: _text,
}
"""How a field of each type is read."""
