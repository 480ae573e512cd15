"""Translation between the messages of programs.proto and the domain."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from decimal import Decimal
from string import Template
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from iso4217 import Currency
from phonenumbers import SUPPORTED_REGIONS

from pointbook.v1 import programs_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.programs.erasures.model import ErasureOutcome, StoreErasure, new_erasure
from pointbook_server.programs.model import (
    Channel,
    Criteria,
    PhoneNumberType,
    Program,
    Store,
    ValidationSettings,
    language_key,
)
from pointbook_server.rpc.request_fields import (
    EVENT_ID_LENGTH_MAX,
    PROGRAM_ID_MAX,
    SCENE_LENGTH_MAX,
    SCENES_MAX,
    STORES_MAX,
    YEAR_2000_MS,
    Fields,
    is_language,
    to_decimal_text,
    to_timestamp,
)

REGIONS_MAX = 300
NAME_LENGTH_MAX = 200
DOMAIN_LENGTH_MAX = 255
TEMPLATES_MAX = 50
TEMPLATE_LENGTH_MAX = 500
SETTLEMENT_WINDOW_SECONDS = (60, 30 * 24 * 60 * 60)
SETTLEMENT_LEAD_SECONDS = (0, 24 * 60 * 60)
LOCAL_CURRENCY_DECIMALS = (0, 4)
CODE_LIFE_SECONDS = (60, 600)
CODE_LENGTH = (6, 10)
TEMPLATE_NAMES = {"code", "points", "program", "minutes"}
POINTS_MAXIMA = ("max_points_per_redemption", "max_points_per_day", "max_points_per_week", "max_points_per_month")
"""The criteria that must allow at least the fewest points of one redemption."""
CURRENCIES = frozenset(currency.code for currency in Currency)
CHANNELS = {
    redemption_pb2.VALIDATION_TYPE_SMS: Channel.SMS,
    redemption_pb2.VALIDATION_TYPE_EMAIL: Channel.EMAIL,
    redemption_pb2.VALIDATION_TYPE_MISSED_CALL: Channel.MISSED_CALL,
}
CHANNEL_NUMBERS = {channel: number for number, channel in CHANNELS.items()}
PHONE_NUMBER_TYPES = {
    programs_pb2.PhoneNumberType.Value(f"PHONE_NUMBER_TYPE_{number_type}"): number_type
    for number_type in PhoneNumberType
}
PHONE_NUMBER_TYPE_NUMBERS = {number_type: number for number, number_type in PHONE_NUMBER_TYPES.items()}
ERASURE_OUTCOMES = {
    outcome: programs_pb2.StoreErasureOutcome.Value(f"STORE_ERASURE_OUTCOME_{outcome}") for outcome in ErasureOutcome
}
N = TypeVar("N", bound=int)
T = TypeVar("T")

_E164 = re.compile(r"\+[1-9][0-9]{6,14}")


def read_store(fields: Fields, store: programs_pb2.Store) -> Store:
    """Read a store; violations are added to `fields`."""
    return Store(
        merchant_id=fields.identifier("store.merchant_id", store.merchant_id),
        store_id=fields.identifier("store.store_id", store.store_id),
        shop_domain=fields.ascii("store.shop_domain", store.shop_domain, length_max=DOMAIN_LENGTH_MAX),
        display_name=fields.text("store.display_name", store.display_name, length_max=NAME_LENGTH_MAX),
    )


def write_store(store: Store) -> programs_pb2.Store:
    """Return the message of a store."""
    return programs_pb2.Store(**asdict(store))


def read_erasure_request(fields: Fields, request: programs_pb2.RequestStoreErasureRequest, now_ms: int) -> StoreErasure:
    """Read a request to erase a store; violations are added to `fields`."""
    fields.present("request_time", is_present=request.HasField("request_time"))
    return new_erasure(
        fields.identifier("event_id", request.event_id, length_max=EVENT_ID_LENGTH_MAX),
        fields.identifier("merchant_id", request.merchant_id),
        fields.identifier("store_id", request.store_id),
        fields.time_ms("request_time", request.request_time, low=YEAR_2000_MS, high=now_ms + DAY_MS),
    )


def write_erasure(erasure: StoreErasure) -> programs_pb2.StoreErasure:
    """Return the message of a request to erase a store."""
    message = programs_pb2.StoreErasure(
        merchant_id=erasure.merchant_id,
        store_id=erasure.store_id,
        request_time=to_timestamp(erasure.requested_at_ms),
        due_time=to_timestamp(erasure.due_at_ms),
        reason=erasure.reason,
    )
    if erasure.begun_at_ms is not None:
        message.begin_time.CopyFrom(to_timestamp(erasure.begun_at_ms))
    if erasure.closed_at_ms is not None:
        message.close_time.CopyFrom(to_timestamp(erasure.closed_at_ms))
    return message


def read_program(fields: Fields, program: programs_pb2.Program) -> Program:
    """Read a program; violations are added to `fields`."""
    point_value = fields.decimal("program.point_value", program.point_value)
    return Program(
        merchant_id=fields.identifier("program.merchant_id", program.merchant_id),
        program_id=fields.integer("program.program_id", program.program_id, low=1, high=PROGRAM_ID_MAX),
        store_ids=fields.each(
            "program.store_ids", program.store_ids, fields.identifier, count_min=1, count_max=STORES_MAX
        ),
        display_name=fields.text("program.display_name", program.display_name, length_max=NAME_LENGTH_MAX),
        redemption_enabled=program.redemption_enabled,
        time_zone=fields.time_zone("program.time_zone", program.time_zone),
        default_region=_read_region(fields, "program.default_region", program.default_region)
        if program.default_region
        else "",
        allowed_regions=fields.each(
            "program.allowed_regions",
            program.allowed_regions,
            lambda path, region: _read_region(fields, path, region),
            count_max=REGIONS_MAX,
        ),
        criteria=_read_criteria(fields, program.criteria),
        point_value=point_value,
        currency_code=_read_currency(
            fields, "program.currency_code", program.currency_code, required=point_value is not None
        ),
        local_currency_code=_read_currency(
            fields, "program.local_currency_code", program.local_currency_code, required=False
        ),
        local_currency_rate=_read_rate(fields, program),
        local_currency_decimals=_read_decimals(fields, program),
        allow_group_redemption=program.allow_group_redemption,
        allow_cross_program_redemption=program.allow_cross_program_redemption,
        settlement_window_ms=1_000
        * _read_seconds(
            fields,
            "program.settlement_window",
            program.settlement_window if program.HasField("settlement_window") else None,
            *SETTLEMENT_WINDOW_SECONDS,
        ),
        settlement_lead_ms=_read_lead(fields, program),
        settlement_scenes=fields.each(
            "program.settlement_scenes",
            program.settlement_scenes,
            lambda path, name: fields.identifier(path, name, length_max=SCENE_LENGTH_MAX),
            count_max=SCENES_MAX,
        ),
        validation=_read_validation(fields, program.validation),
    )


def write_program(program: Program) -> programs_pb2.Program:
    """Return the message of a program, in which defaults stay unset."""
    message = programs_pb2.Program(
        merchant_id=program.merchant_id,
        program_id=program.program_id,
        display_name=program.display_name,
        store_ids=program.store_ids,
        redemption_enabled=program.redemption_enabled,
        time_zone=program.time_zone,
        default_region=program.default_region,
        allowed_regions=program.allowed_regions,
        criteria=programs_pb2.RedemptionCriteria(**asdict(program.criteria)),
        point_value=to_decimal_text(program.point_value),
        currency_code=program.currency_code,
        local_currency_code=program.local_currency_code,
        local_currency_rate=to_decimal_text(program.local_currency_rate),
        local_currency_decimals=program.local_currency_decimals,
        allow_group_redemption=program.allow_group_redemption,
        allow_cross_program_redemption=program.allow_cross_program_redemption,
        settlement_scenes=program.settlement_scenes,
        validation=_write_validation(program.validation),
    )
    if program.settlement_window_ms:
        message.settlement_window.FromMilliseconds(program.settlement_window_ms)
    if program.settlement_lead_ms is not None:
        message.settlement_lead.FromMilliseconds(program.settlement_lead_ms)
    return message


def _read_criteria(fields: Fields, criteria: programs_pb2.RedemptionCriteria) -> Criteria:
    limits = {
        descriptor.name: fields.integer(f"program.criteria.{descriptor.name}", points, low=1, high=POINTS_MAX)
        for descriptor, points in criteria.ListFields()
    }
    step = max(limits.get("multiples_of", 1), 1)
    fewest = -(-limits.get("min_points_per_redemption", 1) // step) * step
    for name in POINTS_MAXIMA:
        if limits.get(name, fewest) < fewest:
            message = f"must be at least {fewest:,}, the fewest points that a redemption may have"
            fields.wrong(f"program.criteria.{name}", message)
    return Criteria(**limits)


def _read_validation(fields: Fields, validation: programs_pb2.ValidationSettings) -> ValidationSettings:
    path = "program.validation"
    channels = _read_values(
        fields, f"{path}.channels", validation.channels, CHANNELS, "must be SMS, EMAIL or MISSED_CALL, each once"
    )
    number = validation.missed_call_number
    if (number or Channel.MISSED_CALL in channels) and not _E164.fullmatch(number):
        fields.wrong(f"{path}.missed_call_number", "must be a number in E.164 form, such as +8613800000000")
    length = validation.code_length
    if length and not CODE_LENGTH[0] <= length <= CODE_LENGTH[1]:
        fields.wrong(f"{path}.code_length", f"must be {CODE_LENGTH[0]} to {CODE_LENGTH[1]}, or 0 for the default")
    return ValidationSettings(
        required=validation.required,
        allow_skip=validation.allow_skip,
        channels=channels,
        code_length=length,
        alphanumeric=validation.alphanumeric,
        code_life_seconds=_read_seconds(
            fields,
            f"{path}.code_life",
            validation.code_life if validation.HasField("code_life") else None,
            *CODE_LIFE_SECONDS,
        ),
        missed_call_number=number,
        max_points_missed_call=fields.integer(
            f"{path}.max_points_missed_call", validation.max_points_missed_call, low=0, high=POINTS_MAX
        ),
        message_templates=_read_templates(fields, f"{path}.message_templates", dict(validation.message_templates)),
        sms_number_types=_read_values(
            fields,
            f"{path}.sms_number_types",
            validation.sms_number_types,
            PHONE_NUMBER_TYPES,
            "must be a type of phone numbers such as MOBILE, each once",
        ),
    )


def _read_values(
    fields: Fields, path: str, numbers: Sequence[N], known: Mapping[N, T], description: str
) -> tuple[T, ...]:
    """Read a list of distinct known values of an enum."""
    values: list[T] = []
    if len(numbers) > len(known):
        fields.wrong(path, f"must have at most {len(known)} items")
    for index, number in enumerate(numbers[: len(known)]):
        value = known.get(number)
        if value is None or value in values:
            fields.wrong(f"{path}[{index}]", description)
        else:
            values.append(value)
    return tuple(values)


def _read_templates(fields: Fields, path: str, templates: dict[str, str]) -> dict[str, str]:
    if len(templates) > TEMPLATES_MAX:
        fields.wrong(path, f"must have at most {TEMPLATES_MAX} items")
        return {}
    keys = Counter(map(language_key, templates))
    for language, template in templates.items():
        # An invalid key is not quoted: it may be any text.
        is_valid = not language or is_language(language)
        item = f"{path}[{language!r}]" if is_valid else path
        if not is_valid:
            fields.wrong(item, "must have language tags such as en or zh-TW, or an empty one, as keys")
        elif keys[language_key(language)] > 1:
            fields.wrong(item, "must differ from the other keys by more than its case, and - or _")
        names = Template(template).get_identifiers() if Template(template).is_valid() else []
        if len(template) > TEMPLATE_LENGTH_MAX or "code" not in names or not set(names) <= TEMPLATE_NAMES:
            fields.wrong(
                item,
                f"must be at most {TEMPLATE_LENGTH_MAX} characters with $code, and of other names only $points, "
                "$program and $minutes",
            )
        fields.text(item, template.replace("\n", " "), length_max=TEMPLATE_LENGTH_MAX)
    return templates


def _read_region(fields: Fields, path: str, region: str) -> str:
    """Read a region of phone numbers, such as GB; an alias, such as UK, is invalid."""
    if region not in SUPPORTED_REGIONS:
        fields.wrong(path, "must be a two-letter region with mobile numbers, such as CN")
    return region


def _read_currency(fields: Fields, path: str, code: str, *, required: bool) -> str:
    if required and not code:
        fields.wrong(path, "is required with point_value")
    elif code and code not in CURRENCIES:
        fields.wrong(path, "must be an ISO 4217 currency code such as USD")
    return code


def _read_rate(fields: Fields, program: programs_pb2.Program) -> Decimal | None:
    rate = fields.decimal("program.local_currency_rate", program.local_currency_rate)
    differs = program.local_currency_code not in {"", program.currency_code}
    if differs and not program.local_currency_rate:
        fields.wrong("program.local_currency_rate", "is required if local_currency_code is another currency")
    if rate is not None and not differs:
        fields.wrong("program.local_currency_rate", "must be empty unless local_currency_code is another currency")
    return rate


def _read_decimals(fields: Fields, program: programs_pb2.Program) -> int | None:
    """Return the decimals of local values; None for those of the currency."""
    if not program.HasField("local_currency_decimals"):
        return None
    low, high = LOCAL_CURRENCY_DECIMALS
    return fields.integer("program.local_currency_decimals", program.local_currency_decimals, low=low, high=high)


def _read_lead(fields: Fields, program: programs_pb2.Program) -> int | None:
    """Return the settlement lead in milliseconds; None for the default."""
    if not program.HasField("settlement_lead"):
        return None
    return 1_000 * _read_seconds(fields, "program.settlement_lead", program.settlement_lead, *SETTLEMENT_LEAD_SECONDS)


def _read_seconds(fields: Fields, path: str, duration: Duration | None, low: int, high: int) -> int:
    """Read a duration of whole seconds; 0, which means the default, if it is absent."""
    if duration is None:
        return 0
    if duration.nanos:
        fields.wrong(path, "must be whole seconds")
    if not low <= duration.seconds <= high:
        fields.wrong(path, f"must be {low:,} to {high:,} seconds")
    return duration.seconds


def _write_validation(validation: ValidationSettings) -> programs_pb2.ValidationSettings:
    message = programs_pb2.ValidationSettings(
        required=validation.required,
        allow_skip=validation.allow_skip,
        channels=[CHANNEL_NUMBERS[channel] for channel in validation.channels],
        code_length=validation.code_length,
        alphanumeric=validation.alphanumeric,
        missed_call_number=validation.missed_call_number,
        max_points_missed_call=validation.max_points_missed_call,
        message_templates=validation.message_templates,
        sms_number_types=[PHONE_NUMBER_TYPE_NUMBERS[number_type] for number_type in validation.sms_number_types],
    )
    if validation.code_life_seconds:
        message.code_life.FromSeconds(validation.code_life_seconds)
    return message
