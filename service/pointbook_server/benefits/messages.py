"""Translation between the messages of benefits.proto and the domain."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, date, datetime
from functools import partial
from typing import Any

from google.protobuf.json_format import MessageToDict, SerializeToJsonError
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from pointbook.v1 import benefits_pb2
from pointbook_server.benefits.applicability import (
    Applicability,
    Cart,
    Obstacle,
    ObstacleReason,
    Product,
    applicability_of,
    find_obstacles,
)
from pointbook_server.benefits.model import (
    ENUM_FIELDS,
    INSTRUCTION_MEASURES,
    LEVEL_PREFIX,
    REWARD_MEASURES,
    Benefit,
    BenefitFilter,
    CustomPrivilege,
    Measure,
    read_month_day,
)
from pointbook_server.benefits.relevance import RELEVANCE_RULES, describe_rule, irrelevant_fields
from pointbook_server.benefits.schedule import YEAR_MAX, Issue, Member, ScheduleState
from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.rpc.request_fields import (
    ID_LENGTH_MAX,
    PROGRAM_ID_MAX,
    STORES_MAX,
    YEAR_2000_MS,
    Fields,
    to_timestamp,
)

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
_LINE_BREAKS = str.maketrans("\r\n\t", "   ")
"""Line breaks and tabs, which a description may have, become spaces for its check."""
_FIELDS = benefits_pb2.Benefit.DESCRIPTOR.fields_by_name


def _names_of(field: str) -> dict[int, str]:
    """Return SHOPLINE's names of the values of an enum field, by number."""
    enum: Any = _FIELDS[field].enum_type
    first, *others = enum.values
    return {value.number: value.name.removeprefix(first.name.removesuffix("UNSPECIFIED")) for value in others}


ENUM_NAMES = {field: _names_of(field) for field in ENUM_FIELDS}
ENUM_NUMBERS = {field: {name: number for number, name in names.items()} for field, names in ENUM_NAMES.items()}
VALUE_FIELDS = tuple(
    name for name, field in _FIELDS.items() if field.number in range(7, 31) and name not in ENUM_FIELDS
)
"""The fields of BenefitsInfo that are not enums."""
ISSUE_TIME_MS = (YEAR_2000_MS, int(datetime(YEAR_MAX + 1, 1, 1, tzinfo=UTC).timestamp()) * 1_000 - 1)
"""The first and the last time for which issues are computed."""
BIRTHDAY_LENGTH = len("MM-DD")
PRODUCTS_MAX = 1_000
CATEGORIES_MAX = 100
QUANTITY_MAX = 1_000_000
USES_ITEMS_MAX = 1_000
SCHEDULE_STATES = {
    each: benefits_pb2.BenefitScheduleState.Value(f"BENEFIT_SCHEDULE_STATE_{each}") for each in ScheduleState
}
APPLICABILITIES = {
    each: benefits_pb2.BenefitApplicability.Value(f"BENEFIT_APPLICABILITY_{each}") for each in Applicability
}
OBSTACLE_REASONS = {
    each: benefits_pb2.BenefitObstacleReason.Value(f"BENEFIT_OBSTACLE_REASON_{each}") for each in ObstacleReason
}


def read_benefit(fields: Fields, message: benefits_pb2.Benefit) -> Benefit:
    """Read a benefit; violations are added to `fields`.

    An irrelevant value must be in irrelevant_values, and a relevant one in its own field.
    """
    present = _read_enums(fields, message) | _present(message)
    irrelevant_values = _read_irrelevant(fields, message.irrelevant_values)
    irrelevant_names = irrelevant_fields({**irrelevant_values, **present})
    _check_places(fields, present, irrelevant_values, irrelevant_names)
    relevant = {name: value for name, value in present.items() if name not in irrelevant_names}
    return Benefit(
        merchant_id=fields.identifier("benefit.merchant_id", message.merchant_id),
        benefit_id=fields.identifier("benefit.benefit_id", message.benefit_id),
        store_ids=fields.each("benefit.store_ids", message.store_ids, fields.identifier, count_max=STORES_MAX),
        level_code=read_level(fields, "benefit.level_code", message.level_code),
        irrelevant_values=irrelevant_values,
        **{name: _read_value(fields, name, relevant) for name in relevant},
    )


def read_custom_privilege(fields: Fields, message: benefits_pb2.CustomPrivilege) -> CustomPrivilege:
    """Read a custom privilege; violations are added to `fields`."""
    present = {field.name: value for field, value in message.ListFields() if field.name in PRIVILEGE_READERS}
    return CustomPrivilege(
        merchant_id=fields.identifier("custom_privilege.merchant_id", message.merchant_id),
        privilege_id=fields.identifier("custom_privilege.privilege_id", message.privilege_id),
        level_code=read_level(fields, "custom_privilege.level_code", message.level_code),
        **{name: PRIVILEGE_READERS[name](fields, f"custom_privilege.{name}", value) for name, value in present.items()},
    )


def write_custom_privilege(privilege: CustomPrivilege) -> benefits_pb2.CustomPrivilege:
    """Return the message of a custom privilege."""
    return benefits_pb2.CustomPrivilege(**asdict(privilege))


def read_level(fields: Fields, path: str, level_code: str) -> str:
    """Read a level_code, and drop the prefix that all of SHOPLINE's levels have."""
    return fields.ascii(path, level_code.removeprefix(LEVEL_PREFIX), length_max=LEVEL_LENGTH_MAX)


def read_enum(fields: Fields, path: str, field: str, number: int) -> str:
    """Return the name of an enum field's value; empty for UNSPECIFIED."""
    if number and number not in ENUM_NAMES[field]:
        fields.wrong(path, "must be a listed value")
    return ENUM_NAMES[field].get(number, str(number or ""))


def write_benefit(benefit: Benefit) -> benefits_pb2.Benefit:
    """Return the message of a benefit; unlisted enum names are in unrecognized_values."""
    names = {field: name for field in ENUM_FIELDS if (name := getattr(benefit, field))}
    values: dict[str, Any] = {name: value for name in VALUE_FIELDS if (value := getattr(benefit, name)) is not None}
    if benefit.periodically_months is not None:
        values["periodically_months"] = str(benefit.periodically_months)
    values |= {field: ENUM_NUMBERS[field][name] for field, name in names.items() if name in ENUM_NUMBERS[field]}
    message = benefits_pb2.Benefit(
        merchant_id=benefit.merchant_id,
        benefit_id=benefit.benefit_id,
        store_ids=benefit.store_ids,
        level_code=benefit.level_code,
        unrecognized_values={field: name for field, name in names.items() if name not in ENUM_NUMBERS[field]},
        **values,
    )
    if benefit.irrelevant_values:
        message.irrelevant_values.update(dict(benefit.irrelevant_values))
    return message


def _read_enums(fields: Fields, message: benefits_pb2.Benefit) -> dict[str, str]:
    """Return the names of the enum fields that are set.

    Names that are not listed are in unrecognized_values.
    """
    unrecognized = dict(message.unrecognized_values)
    names = {}
    for field in ENUM_FIELDS:
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
    """Return the fields that are set and are not enums."""
    return {field.name: value for field, value in message.ListFields() if field.name in VALUE_FIELDS}


def _read_irrelevant(fields: Fields, values: Struct) -> dict[str, Any]:
    """Read irrelevant_values: any JSON that the database accepts, by field.

    Only fields that have a relevance rule may be in it.
    """
    path = "benefit.irrelevant_values"
    try:
        irrelevant_values = MessageToDict(values)
    except (SerializeToJsonError, ValueError):
        fields.wrong(path, "must not hold NaN or Infinity")
        return {}
    if len(json.dumps(irrelevant_values)) > IRRELEVANT_BYTES_MAX or _has_nul(irrelevant_values):
        fields.wrong(path, f"must be at most {IRRELEVANT_BYTES_MAX:,} bytes as JSON, without NUL characters")
    if not irrelevant_values.keys() <= RELEVANCE_RULES.keys():
        fields.wrong(path, "must have as keys only fields of a benefit that have a relevance rule")
    return {name: value for name, value in irrelevant_values.items() if name in RELEVANCE_RULES}


def _has_nul(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nul, (*value.keys(), *value.values())))
    return any(map(_has_nul, value)) if isinstance(value, list) else isinstance(value, str) and "\0" in value


def _check_places(
    fields: Fields, present: Mapping[str, object], irrelevant_values: Mapping[str, object], irrelevant_names: set[str]
) -> None:
    """Add a violation for every value that its relevance rule forbids in its place."""
    for name in RELEVANCE_RULES:
        if name in present and name in irrelevant_names:
            fields.wrong(f"benefit.{name}", f"must be absent: it is {describe_rule(name)}")
        if name in irrelevant_values and name in present:
            fields.wrong(f"benefit.irrelevant_values.{name}", "must be absent where the field itself has a value")
        elif name in irrelevant_values and name not in irrelevant_names:
            fields.wrong(f"benefit.irrelevant_values.{name}", "is or may be relevant, so it must be in its own field")


def _read_value(fields: Fields, name: str, relevant: Mapping[str, Any]) -> Any:
    """Read a relevant value."""
    path, value = f"benefit.{name}", relevant[name]
    if name in MEASURED:
        measured_by, measures, length_max = MEASURED[name]
        return _read_measured(fields, path, value, measures.get(relevant.get(measured_by, "")), length_max)
    return READERS[name](fields, path, value) if name in READERS else value


def _read_measured(fields: Fields, path: str, text: str, measure: Measure | None, length_max: int) -> str:
    """Check a text that holds a quantity, and return it unchanged.

    Without a measure, any text is valid.
    """
    if measure is None:
        return fields.text(path, text, length_max=length_max)
    if measure.read(text) is None:
        fields.wrong(path, f"must be {measure.description}")
    return text


def _read_description(fields: Fields, path: str, text: str, *, length_max: int = 500) -> str:
    fields.text(path, text.translate(_LINE_BREAKS), length_max=length_max)
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


def read_cart(fields: Fields, request: benefits_pb2.ListApplicableBenefitsRequest) -> Cart:
    """Read a cart; violations are added to `fields`."""
    cart = request.cart
    if len(cart.products) > PRODUCTS_MAX:
        fields.wrong("cart.products", f"must have at most {PRODUCTS_MAX:,} items")
    products = [
        _read_product(fields, f"cart.products[{index}]", product)
        for index, product in enumerate(cart.products[:PRODUCTS_MAX])
    ]
    if len({product.product_id for product in products}) < len(products):
        fields.wrong("cart.products", "must name each product once")
    return Cart(
        products=tuple(products),
        amount=fields.decimal("cart.amount", cart.amount, zero_allowed=True),
        points=fields.integer("cart.points", cart.points, low=0, high=POINTS_MAX) if cart.HasField("points") else None,
        automatic_discount_used=cart.automatic_discount_used,
        discount_code_used=cart.discount_code_used,
        uses=_read_uses(fields, dict(request.uses)),
    )


def _read_product(fields: Fields, path: str, product: benefits_pb2.BenefitCartProduct) -> Product:
    categories = fields.each(f"{path}.category_ids", product.category_ids, fields.identifier, count_max=CATEGORIES_MAX)
    return Product(
        product_id=fields.identifier(f"{path}.product_id", product.product_id),
        category_ids=categories,
        quantity=fields.integer(f"{path}.quantity", product.quantity, low=1, high=QUANTITY_MAX),
    )


def _read_uses(fields: Fields, uses: dict[str, int]) -> dict[str, int]:
    if len(uses) > USES_ITEMS_MAX:
        fields.wrong("uses", f"must have at most {USES_ITEMS_MAX:,} items")
        return {}
    if not all(0 <= count <= USES_MAX for count in uses.values()):
        fields.wrong("uses", f"must be 0 to {USES_MAX:,} each")
    return dict(sorted(uses.items()))


def read_member(fields: Fields, member: benefits_pb2.BenefitMember) -> Member:
    """Read a member; violations are added to `fields`."""
    joined_ms = read_optional_time(fields, "member.joined_time", member, "joined_time")
    start_ms = read_optional_time(fields, "member.membership_start_time", member, "membership_start_time")
    end_ms = read_optional_time(fields, "member.membership_end_time", member, "membership_end_time")
    if end_ms is not None and any(ms is not None and ms >= end_ms for ms in (joined_ms, start_ms)):
        fields.wrong("member.membership_end_time", "must be after joined_time and membership_start_time")
    return Member(
        time_zone=fields.time_zone("member.time_zone", member.time_zone) or "UTC",
        birthday=_read_birthday(fields, "member.birthday", member.birthday),
        joined_ms=joined_ms,
        membership_start_ms=start_ms,
        membership_end_ms=end_ms,
    )


def _read_birthday(fields: Fields, path: str, text: str) -> tuple[int, int] | None:
    """Read a birthday; its year is optional and unused, but must have the day."""
    month_day = read_month_day(text[-BIRTHDAY_LENGTH:])
    if text and (month_day is None or (len(text) != BIRTHDAY_LENGTH and not _is_date(text))):
        fields.wrong(path, "must be a day as MM-DD or YYYY-MM-DD, such as 02-29 or 2000-02-29")
    return month_day


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def read_optional_time(fields: Fields, path: str, message: Message, name: str) -> int | None:
    """Read a time in milliseconds; None if it is absent."""
    low, high = ISSUE_TIME_MS
    return fields.time_ms(path, getattr(message, name), low=low, high=high) if message.HasField(name) else None


def write_issue(issue: Issue) -> benefits_pb2.BenefitIssue:
    """Return the message of an issue."""
    return benefits_pb2.BenefitIssue(
        issue_time=to_timestamp(issue.issue_ms),
        expiry_time=None if issue.expiry_ms is None else to_timestamp(issue.expiry_ms),
    )


def write_applicable(benefit: Benefit, cart: Cart) -> benefits_pb2.ApplicableBenefit:
    """Return a benefit with the obstacles to using it for a cart."""
    obstacles = find_obstacles(benefit, cart)
    return benefits_pb2.ApplicableBenefit(
        benefit=write_benefit(benefit),
        applicability=APPLICABILITIES[applicability_of(obstacles)],
        obstacles=[_write_obstacle(obstacle) for obstacle in obstacles if obstacle.is_certain],
        uncertainties=[_write_obstacle(obstacle) for obstacle in obstacles if not obstacle.is_certain],
    )


def _write_obstacle(obstacle: Obstacle) -> benefits_pb2.BenefitObstacle:
    return benefits_pb2.BenefitObstacle(
        reason=OBSTACLE_REASONS[obstacle.reason], field=obstacle.field, limit=obstacle.limit, actual=obstacle.actual
    )


def read_filter(
    fields: Fields,
    request: benefits_pb2.ListBenefitsRequest | benefits_pb2.ListApplicableBenefitsRequest,
    *,
    reward_type: str = "",
    benefits_status: str = "",
    matches_unset: bool = False,
) -> BenefitFilter:
    """Read a filter of benefits; violations are added to `fields`."""
    return BenefitFilter(
        store_id=fields.ascii("store_id", request.store_id, length_max=ID_LENGTH_MAX),
        program_id=fields.integer("program_id", request.program_id, low=0, high=PROGRAM_ID_MAX),
        level_code=read_level(fields, "level_code", request.level_code),
        membership_type=read_enum(fields, "membership_type", "membership_type", request.membership_type),
        reward_scene=read_enum(fields, "reward_scene", "reward_scene", request.reward_scene),
        reward_type=reward_type,
        benefits_status=benefits_status,
        matches_unset=matches_unset,
    )


MEASURED: Mapping[str, tuple[str, Mapping[str, Measure], int]] = {
    "benefits_details": ("reward_type", REWARD_MEASURES, DETAILS_LENGTH_MAX),
    "benefits_usage_instruction_value": (
        "benefits_usage_instruction_type",
        INSTRUCTION_MEASURES,
        INSTRUCTION_LENGTH_MAX,
    ),
}
"""The fields with a quantity: the field that selects its measure, the measures, and the length of other texts."""
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
"""The readers of the other fields, with the limits that benefits.proto states."""
PRIVILEGE_READERS: Mapping[str, Callable[[Fields, str, Any], Any]] = {
    "privilege_name": partial(Fields.text, length_max=255),
    "privilege_description": partial(_read_description, length_max=2_000),
    "benefits_icon": partial(Fields.text, length_max=ICON_LENGTH_MAX),
    "previlege_status": partial(Fields.ascii, length_max=ID_LENGTH_MAX),
}
"""The readers of the optional fields of a custom privilege."""
