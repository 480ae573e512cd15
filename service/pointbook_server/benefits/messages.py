"""Benefits as messages: read with every wrong field named at once, and written as they are kept."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from google.protobuf.json_format import MessageToDict, SerializeToJsonError
from google.protobuf.struct_pb2 import Struct

from pointbook.v1 import benefits_pb2
from pointbook_server.benefits.model import (
    ENUMS,
    INSTRUCTION_MEASURES,
    LEVEL_PREFIX,
    REWARD_MEASURES,
    RULES,
    Benefit,
    CustomPrivilege,
    Measure,
    irrelevant_fields,
    read_month_day,
    rule_of,
)
from pointbook_server.rpc.request_fields import ID_LENGTH_MAX, Fields

STORES_MAX = 1_000
IDS_MAX = 1_000
LEVEL_LENGTH_MAX = 128
DETAILS_LENGTH_MAX = 500
INSTRUCTION_LENGTH_MAX = 64
DAYS_MAX = 36_500
MONTHS_MAX = 1_200
USES_MAX = 1_000_000_000
ICON_LENGTH_MAX = 2_048
IRRELEVANT_BYTES_MAX = 64 * 1024
_MONTHS = re.compile(r"[1-9][0-9]{0,3}")
_LINES = str.maketrans("\r\n\t", "   ")
"""What breaks and moves the lines of a description."""
_FIELDS = benefits_pb2.Benefit.DESCRIPTOR.fields_by_name


def _names_of(field: str) -> dict[int, str]:
    """Tell the values of an enum field by SHOPLINE's names."""
    enum: Any = _FIELDS[field].enum_type
    first, *others = enum.values
    return {value.number: value.name.removeprefix(first.name.removesuffix("UNSPECIFIED")) for value in others}


NAMES = {field: _names_of(field) for field in ENUMS}
NUMBERS = {field: {name: number for number, name in names.items()} for field, names in NAMES.items()}
VALUES = tuple(name for name, field in _FIELDS.items() if field.number in range(7, 31) and name not in ENUMS)
"""The fields of BenefitsInfo that are no enums."""


def read_benefit(fields: Fields, message: benefits_pb2.Benefit) -> Benefit:
    """Read a benefit strictly: a value that its rule makes irrelevant is wrong, and so is one that is set aside."""
    present = _read_enums(fields, message) | _present(message)
    aside = _read_irrelevant(fields, message.irrelevant_values)
    irrelevant = irrelevant_fields({**aside, **present})
    _check_places(fields, present, aside, irrelevant)
    relevant = {name: value for name, value in present.items() if name not in irrelevant}
    return Benefit(
        merchant_id=fields.identifier("benefit.merchant_id", message.merchant_id),
        benefit_id=fields.identifier("benefit.benefit_id", message.benefit_id),
        store_ids=fields.each("benefit.store_ids", message.store_ids, fields.identifier, count_max=STORES_MAX),
        level_code=read_level(fields, "benefit.level_code", message.level_code),
        irrelevant_values=aside,
        **{name: _read_value(fields, name, relevant) for name in relevant},
    )


def read_custom_privilege(fields: Fields, message: benefits_pb2.CustomPrivilege) -> CustomPrivilege:
    """Read a custom privilege, and note every wrong field."""
    present = {field.name: value for field, value in message.ListFields() if field.name in PRIVILEGE_READERS}
    return CustomPrivilege(
        merchant_id=fields.identifier("custom_privilege.merchant_id", message.merchant_id),
        privilege_id=fields.identifier("custom_privilege.privilege_id", message.privilege_id),
        level_code=read_level(fields, "custom_privilege.level_code", message.level_code),
        **{name: PRIVILEGE_READERS[name](fields, f"custom_privilege.{name}", value) for name, value in present.items()},
    )


def write_custom_privilege(privilege: CustomPrivilege) -> benefits_pb2.CustomPrivilege:
    """Write a custom privilege as it is kept."""
    return benefits_pb2.CustomPrivilege(**asdict(privilege))


def read_level(fields: Fields, path: str, level_code: str) -> str:
    """Read a level as SHOPLINE writes it: a prefix that is every level's is not kept."""
    return fields.ascii(path, level_code.removeprefix(LEVEL_PREFIX), length_max=LEVEL_LENGTH_MAX)


def read_enum(fields: Fields, path: str, field: str, number: int) -> str:
    """Read a value of an enum field by its name; empty where it is unspecified."""
    if number and number not in NAMES[field]:
        fields.wrong(path, "must be a listed value")
    return NAMES[field].get(number, str(number or ""))


def write_benefit(benefit: Benefit) -> benefits_pb2.Benefit:
    """Write a benefit as it is kept: names that are not listed beside the fields that they belong to."""
    names = {field: name for field in ENUMS if (name := getattr(benefit, field))}
    values: dict[str, Any] = {name: value for name in VALUES if (value := getattr(benefit, name)) is not None}
    if benefit.periodically_months is not None:
        values["periodically_months"] = str(benefit.periodically_months)
    values |= {field: NUMBERS[field][name] for field, name in names.items() if name in NUMBERS[field]}
    message = benefits_pb2.Benefit(
        merchant_id=benefit.merchant_id,
        benefit_id=benefit.benefit_id,
        store_ids=benefit.store_ids,
        level_code=benefit.level_code,
        unrecognized_values={field: name for field, name in names.items() if name not in NUMBERS[field]},
        **values,
    )
    if benefit.irrelevant_values:
        message.irrelevant_values.update(dict(benefit.irrelevant_values))
    return message


def _read_enums(fields: Fields, message: benefits_pb2.Benefit) -> dict[str, str]:
    """Read the enum fields by their names, those that are not listed from beside them."""
    unrecognized = dict(message.unrecognized_values)
    names = {}
    for field in ENUMS:
        name = read_enum(fields, f"benefit.{field}", field, getattr(message, field))
        if field in unrecognized:
            path = f"benefit.unrecognized_values[{field!r}]"
            other = fields.identifier(path, unrecognized.pop(field))
            if name:
                fields.wrong(path, "must be absent where the field itself has a value")
            name = name or other
        if name:
            names[field] = name
    if unrecognized:
        fields.wrong("benefit.unrecognized_values", "must have enum fields of a benefit as keys")
    return names


def _present(message: benefits_pb2.Benefit) -> dict[str, Any]:
    """Tell the values that are there."""
    return {field.name: value for field, value in message.ListFields() if field.name in VALUES}


def _read_irrelevant(fields: Fields, values: Struct) -> dict[str, Any]:
    """Read what is set aside: anything that JSON and the database can hold, by fields that have a rule."""
    path = "benefit.irrelevant_values"
    try:
        aside = MessageToDict(values)
    except (SerializeToJsonError, ValueError):
        fields.wrong(path, "must not hold NaN or Infinity")
        return {}
    if len(json.dumps(aside)) > IRRELEVANT_BYTES_MAX or _has_nul(aside):
        fields.wrong(path, f"must be at most {IRRELEVANT_BYTES_MAX:,} bytes as JSON, without NUL characters")
    if not aside.keys() <= RULES.keys():
        fields.wrong(path, "must have fields of a benefit as keys that are only relevant beside other fields")
    return {name: value for name, value in aside.items() if name in RULES}


def _has_nul(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nul, (*value.keys(), *value.values())))
    return any(map(_has_nul, value)) if isinstance(value, list) else isinstance(value, str) and "\0" in value


def _check_places(
    fields: Fields, present: Mapping[str, object], aside: Mapping[str, object], irrelevant: set[str]
) -> None:
    """Note every value that stands where its rule does not want it."""
    for name in RULES:
        if name in present and name in irrelevant:
            fields.wrong(f"benefit.{name}", f"must be absent: it is {rule_of(name)}")
        if name in aside and name in present:
            fields.wrong(f"benefit.irrelevant_values.{name}", "must be absent where the field itself has a value")
        elif name in aside and name not in irrelevant:
            fields.wrong(f"benefit.irrelevant_values.{name}", "is relevant, or may be: it belongs into its own field")


def _read_value(fields: Fields, name: str, relevant: Mapping[str, Any]) -> Any:
    """Read a value that is relevant."""
    path, value = f"benefit.{name}", relevant[name]
    if name in MEASURED:
        measured_by, measures, length_max = MEASURED[name]
        return _read_measured(fields, path, value, measures.get(relevant.get(measured_by, "")), length_max)
    return READERS[name](fields, path, value) if name in READERS else value


def _read_measured(fields: Fields, path: str, text: str, measure: Measure | None, length_max: int) -> str:
    """Read a number in a text, which is kept as it is written; a text that measures nothing may be any."""
    if measure is None:
        return fields.text(path, text, length_max=length_max)
    if measure.read(text) is None:
        fields.wrong(path, f"must be {measure.told}")
    return text


def _read_description(fields: Fields, path: str, text: str, *, length_max: int = 500) -> str:
    fields.text(path, text.translate(_LINES), length_max=length_max)
    return text


def _read_ids(fields: Fields, path: str, ids: Any) -> tuple[str, ...]:
    return fields.each(path, ids, fields.identifier, count_max=IDS_MAX)


def _read_months(fields: Fields, path: str, text: str) -> int:
    if not _MONTHS.fullmatch(text) or int(text) > MONTHS_MAX:
        fields.wrong(path, f'must be a whole number from "1" to "{MONTHS_MAX}"')
        return 1
    return int(text)


def _read_specific_date(fields: Fields, path: str, text: str) -> str:
    if read_month_day(text) is None:
        fields.wrong(path, "must be a day of the year as MM-DD, such as 02-29")
    return text


MEASURED: Mapping[str, tuple[str, Mapping[str, Measure], int]] = {
    "benefits_details": ("reward_type", REWARD_MEASURES, DETAILS_LENGTH_MAX),
    "benefits_usage_instruction_value": (
        "benefits_usage_instruction_type",
        INSTRUCTION_MEASURES,
        INSTRUCTION_LENGTH_MAX,
    ),
}
"""The fields that hold a number in a text: which field tells what of, and how long a text may be that is none."""
READERS: Mapping[str, Callable[[Fields, str, Any], Any]] = {
    "benefits_description": _read_description,
    "benefits_expiry_date_value": partial(Fields.integer, low=1, high=DAYS_MAX),
    "benefits_icon": partial(Fields.text, length_max=ICON_LENGTH_MAX),
    "benefits_name": partial(Fields.text, length_max=25),
    "days_before": partial(Fields.integer, low=1, high=366),
    "fixed_date": partial(Fields.integer, low=1, high=31),
    "periodically_days": partial(Fields.integer, low=1, high=DAYS_MAX),
    "periodically_months": _read_months,
    "specific_category_list": _read_ids,
    "specific_date": _read_specific_date,
    "specific_product_ids": _read_ids,
    "usage_limits_times": partial(Fields.integer, low=1, high=USES_MAX),
}
"""How each further field is read, within the limits that its comment states."""
PRIVILEGE_READERS: Mapping[str, Callable[[Fields, str, Any], Any]] = {
    "privilege_name": partial(Fields.text, length_max=255),
    "privilege_description": partial(_read_description, length_max=2_000),
    "benefits_icon": partial(Fields.text, length_max=ICON_LENGTH_MAX),
    "previlege_status": partial(Fields.ascii, length_max=ID_LENGTH_MAX),
}
"""How each field of a custom privilege is read that may be absent."""
