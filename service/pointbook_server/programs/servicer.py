"""The gRPC face of stores and programs."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from decimal import Decimal
from string import Template
from typing import Any, TypeVar

import structlog
from google.protobuf.duration_pb2 import Duration
from iso4217 import Currency
from phonenumbers import SUPPORTED_REGIONS

from pointbook.v1 import programs_pb2, programs_pb2_grpc, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import current_principal
from pointbook_server.clock import Clock
from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.programs.erasures import FIRST_PLACE, StoreErasures, place_of
from pointbook_server.programs.model import (
    Channel,
    Criteria,
    ErasureOutcome,
    PhoneNumberType,
    Program,
    Store,
    StoreErasure,
    Validation,
    language_key,
    new_erasure,
    program_not_found,
)
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.rpc import pagination
from pointbook_server.rpc.request_fields import (
    ID_LENGTH_MAX,
    YEAR_2000_MS,
    Fields,
    is_language,
    read_etag,
    to_decimal_text,
    to_timestamp,
)

EVENT_ID_LENGTH_MAX = 128
REASON_LENGTH_MAX = 500
PROGRAM_ID_MAX = 2**63 - 1
STORES_MAX = 1_000
REGIONS_MAX = 300
SCENES_MAX = 100
SCENE_LENGTH_MAX = 64
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
MAXIMA = ("max_points_per_redemption", "max_points_per_day", "max_points_per_week", "max_points_per_month")
"""The criteria that must leave room for the fewest points that multiples_of and min_points_per_redemption allow."""
CHANNELS = {
    redemption_pb2.VALIDATION_TYPE_SMS: Channel.SMS,
    redemption_pb2.VALIDATION_TYPE_EMAIL: Channel.EMAIL,
    redemption_pb2.VALIDATION_TYPE_MISSED_CALL: Channel.MISSED_CALL,
}
CURRENCIES = frozenset(currency.code for currency in Currency)
ERASURE_OUTCOMES = {
    outcome: programs_pb2.StoreErasureOutcome.Value(f"STORE_ERASURE_OUTCOME_{outcome}") for outcome in ErasureOutcome
}
CHANNEL_NUMBERS = {channel: number for number, channel in CHANNELS.items()}
NUMBER_TYPES = {
    programs_pb2.PhoneNumberType.Value(f"PHONE_NUMBER_TYPE_{number_type}"): number_type
    for number_type in PhoneNumberType
}
NUMBERS_OF_TYPES = {number_type: number for number, number_type in NUMBER_TYPES.items()}
N = TypeVar("N", bound=int)
T = TypeVar("T")

log = structlog.get_logger()

_E164 = re.compile(r"\+[1-9][0-9]{6,14}")


class ProgramsServicer(programs_pb2_grpc.ProgramsServiceServicer):
    """ProgramsService: each method reads its request, asks the store, and writes the answer."""

    def __init__(self, store: ProgramTransactions, erasures: StoreErasures, clock: Clock) -> None:
        self._store = store
        self._erasures = erasures
        self._clock = clock

    async def PutStore(self, request: programs_pb2.PutStoreRequest, _context: object) -> programs_pb2.PutStoreResponse:
        """Register or replace a store."""
        fields = Fields()
        fields.present("store", is_present=request.HasField("store"))
        store = Store(
            merchant_id=fields.identifier("store.merchant_id", request.store.merchant_id),
            store_id=fields.identifier("store.store_id", request.store.store_id),
            shop_domain=fields.ascii("store.shop_domain", request.store.shop_domain, length_max=DOMAIN_LENGTH_MAX),
            display_name=fields.text("store.display_name", request.store.display_name, length_max=NAME_LENGTH_MAX),
        )
        fields.check()
        may_register = current_principal.get().may_register_stores
        revision = await self._store.put_store(store, read_etag(request.etag), self._clock(), may_register=may_register)
        return programs_pb2.PutStoreResponse(store=_write_store(store), etag=str(revision))

    async def ReleaseStore(
        self, request: programs_pb2.ReleaseStoreRequest, _context: object
    ) -> programs_pb2.ReleaseStoreResponse:
        """Release a store of a merchant, and write it into the audit log."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        store_id = fields.identifier("store_id", request.store_id)
        fields.present("reason", is_present=bool(request.reason.strip()))
        reason = fields.text("reason", request.reason, length_max=REASON_LENGTH_MAX)
        fields.check()
        await self._store.release_store(merchant_id, store_id)
        token_id = current_principal.get().token_id
        log.warning(
            "audit: store released", merchant_id=merchant_id, store_id=store_id, reason=reason, token_id=token_id
        )
        return programs_pb2.ReleaseStoreResponse()

    async def GetStore(self, request: programs_pb2.GetStoreRequest, _context: object) -> programs_pb2.GetStoreResponse:
        """Answer one store."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("store_id", request.store_id)
        fields.check()
        store, revision = await self._store.store(request.merchant_id, request.store_id)
        return programs_pb2.GetStoreResponse(store=_write_store(store), etag=str(revision))

    async def ListStores(
        self, request: programs_pb2.ListStoresRequest, _context: object
    ) -> programs_pb2.ListStoresResponse:
        """Answer a page of a merchant's stores."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        size = fields.page_size("page_size", request.page_size)
        scope = ("stores", request.merchant_id)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (str,))
        fields.check()
        after = "" if place is None else str(place[0])
        found = await self._store.stores(request.merchant_id, after=after, limit=size + 1)
        page = pagination.fit(map(_write_store, found), size)
        response = programs_pb2.ListStoresResponse(stores=page)
        if len(found) > len(page):
            response.next_page_token = pagination.write_token(scope, (page[-1].store_id,))
        return response

    async def RequestStoreErasure(
        self, request: programs_pb2.RequestStoreErasureRequest, _context: object
    ) -> programs_pb2.RequestStoreErasureResponse:
        """Keep a request to erase a store, and write a new one into the audit log."""
        fields = Fields()
        fields.present("request_time", is_present=request.HasField("request_time"))
        high_ms = self._clock() + DAY_MS
        wanted = new_erasure(
            fields.identifier("event_id", request.event_id, length_max=EVENT_ID_LENGTH_MAX),
            fields.identifier("merchant_id", request.merchant_id),
            fields.identifier("store_id", request.store_id),
            fields.time_ms("request_time", request.request_time, low=YEAR_2000_MS, high=high_ms),
        )
        fields.check()
        outcome, erasure = await self._erasures.request(wanted)
        if outcome is ErasureOutcome.REQUESTED:
            due = to_timestamp(erasure.due_at_ms).ToJsonString()
            _log_of(erasure).warning("audit: store erasure requested", due=due)
        return programs_pb2.RequestStoreErasureResponse(
            outcome=ERASURE_OUTCOMES[outcome], erasure=_write_erasure(erasure)
        )

    async def ListStoreErasures(
        self, request: programs_pb2.ListStoreErasuresRequest, _context: object
    ) -> programs_pb2.ListStoreErasuresResponse:
        """Return a page of the requests to erase stores, of a merchant or of all."""
        fields = Fields()
        merchant_id = fields.ascii("merchant_id", request.merchant_id, length_max=ID_LENGTH_MAX)
        size = fields.page_size("page_size", request.page_size)
        scope = ("store erasures", merchant_id)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (int, int, str))
        fields.check()
        after = FIRST_PLACE if place is None else (int(place[0]), int(place[1]), str(place[2]))
        found = await self._erasures.erasures(merchant_id, after=after, limit=size + 1)
        page = pagination.fit(map(_write_erasure, found), size)
        response = programs_pb2.ListStoreErasuresResponse(erasures=page)
        if len(found) > len(page):
            response.next_page_token = pagination.write_token(scope, place_of(found[len(page) - 1]))
        return response

    async def EraseStore(
        self, request: programs_pb2.EraseStoreRequest, _context: object
    ) -> programs_pb2.EraseStoreResponse:
        """Erase a part of the personal data of a store's customers, and write it into the audit log."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        store_id = fields.identifier("store_id", request.store_id)
        fields.present("reason", is_present=bool(request.reason.strip()))
        reason = fields.text("reason", request.reason, length_max=REASON_LENGTH_MAX)
        fields.check()
        progress = await self._erasures.erase(request.merchant_id, store_id, reason)
        _log_of(progress.erasure).warning(
            "audit: store erased", reason=reason, erased=progress.erased, remaining=progress.remaining
        )
        return programs_pb2.EraseStoreResponse(
            erased=progress.erased, remaining=progress.remaining, erasure=_write_erasure(progress.erasure)
        )

    async def PutProgram(
        self, request: programs_pb2.PutProgramRequest, _context: object
    ) -> programs_pb2.PutProgramResponse:
        """Create or replace a program."""
        fields = Fields()
        fields.present("program", is_present=request.HasField("program"))
        program = _read_program(fields, request.program)
        fields.check()
        revision = await self._store.put_program(program, read_etag(request.etag), self._clock())
        return programs_pb2.PutProgramResponse(program=_write_program(program), etag=str(revision))

    async def GetProgram(
        self, request: programs_pb2.GetProgramRequest, _context: object
    ) -> programs_pb2.GetProgramResponse:
        """Answer one program."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.integer("program_id", request.program_id, low=1, high=PROGRAM_ID_MAX)
        fields.check()
        found = await self._store.program(request.merchant_id, request.program_id)
        if found is None:
            raise program_not_found(request.program_id)
        program, revision = found
        return programs_pb2.GetProgramResponse(program=_write_program(program), etag=str(revision))

    async def ListPrograms(
        self, request: programs_pb2.ListProgramsRequest, _context: object
    ) -> programs_pb2.ListProgramsResponse:
        """Answer a page of a merchant's programs."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        size = fields.page_size("page_size", request.page_size)
        scope = ("programs", request.merchant_id)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (int,))
        fields.check()
        after = 0 if place is None else int(place[0])
        found = await self._store.programs(request.merchant_id, after=after, limit=size + 1)
        page = pagination.fit(map(_write_program, found), size)
        response = programs_pb2.ListProgramsResponse(programs=page)
        if len(found) > len(page):
            response.next_page_token = pagination.write_token(scope, (page[-1].program_id,))
        return response


def _log_of(erasure: StoreErasure) -> Any:
    return log.bind(merchant_id=erasure.merchant_id, store_id=erasure.store_id)


def _write_erasure(erasure: StoreErasure) -> programs_pb2.StoreErasure:
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


def _read_program(fields: Fields, program: programs_pb2.Program) -> Program:
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


def _read_criteria(fields: Fields, criteria: programs_pb2.RedemptionCriteria) -> Criteria:
    limits = {
        descriptor.name: fields.integer(f"program.criteria.{descriptor.name}", points, low=1, high=POINTS_MAX)
        for descriptor, points in criteria.ListFields()
    }
    step = max(limits.get("multiples_of", 1), 1)
    fewest = -(-limits.get("min_points_per_redemption", 1) // step) * step
    for name in MAXIMA:
        if limits.get(name, fewest) < fewest:
            message = f"must be at least {fewest:,}, the fewest points that may be redeemed at all"
            fields.wrong(f"program.criteria.{name}", message)
    return Criteria(**limits)


def _read_validation(fields: Fields, validation: programs_pb2.ValidationSettings) -> Validation:
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
    return Validation(
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
            NUMBER_TYPES,
            "must be a type of phone numbers such as MOBILE, each once",
        ),
    )


def _read_values(
    fields: Fields, path: str, numbers: Sequence[N], known: Mapping[N, T], description: str
) -> tuple[T, ...]:
    """Read a list of values of an enum, each a known one that stands in it once."""
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
        # The key is named only when it is harmless to show.
        known = not language or is_language(language)
        item = f"{path}[{language!r}]" if known else path
        if not known:
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
    """Read a region of phone numbers: under any other name than its own, UK say, there is no number."""
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
        fields.wrong("program.local_currency_rate", "is required where the local currency is another one")
    if rate is not None and not differs:
        fields.wrong("program.local_currency_rate", "must be empty unless the local currency is another one")
    return rate


def _read_decimals(fields: Fields, program: programs_pb2.Program) -> int | None:
    """Return the decimals of local values, of which 0 is one; None where the currency's own hold."""
    if not program.HasField("local_currency_decimals"):
        return None
    low, high = LOCAL_CURRENCY_DECIMALS
    return fields.integer("program.local_currency_decimals", program.local_currency_decimals, low=low, high=high)


def _read_lead(fields: Fields, program: programs_pb2.Program) -> int | None:
    """Return the settlement lead in milliseconds, of which 0 is one; None where the default holds."""
    if not program.HasField("settlement_lead"):
        return None
    return 1_000 * _read_seconds(fields, "program.settlement_lead", program.settlement_lead, *SETTLEMENT_LEAD_SECONDS)


def _read_seconds(fields: Fields, path: str, duration: Duration | None, low: int, high: int) -> int:
    """Read a duration of whole seconds; 0 where it is absent, which stands for the default."""
    if duration is None:
        return 0
    if duration.nanos:
        fields.wrong(path, "must be whole seconds")
    if not low <= duration.seconds <= high:
        fields.wrong(path, f"must be {low:,} to {high:,} seconds")
    return duration.seconds


def _write_store(store: Store) -> programs_pb2.Store:
    return programs_pb2.Store(**asdict(store))


def _write_program(program: Program) -> programs_pb2.Program:
    """Write a program as it was put: defaults stay unsaid."""
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


def _write_validation(validation: Validation) -> programs_pb2.ValidationSettings:
    message = programs_pb2.ValidationSettings(
        required=validation.required,
        allow_skip=validation.allow_skip,
        channels=[CHANNEL_NUMBERS[channel] for channel in validation.channels],
        code_length=validation.code_length,
        alphanumeric=validation.alphanumeric,
        missed_call_number=validation.missed_call_number,
        max_points_missed_call=validation.max_points_missed_call,
        message_templates=validation.message_templates,
        sms_number_types=[NUMBERS_OF_TYPES[number_type] for number_type in validation.sms_number_types],
    )
    if validation.code_life_seconds:
        message.code_life.FromSeconds(validation.code_life_seconds)
    return message
