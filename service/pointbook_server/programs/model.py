"""Stores and programs: by which rules a merchant's points are redeemed."""

from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

from pointbook_server.errors import PointbookError, Reason

DEFAULT_SETTLEMENT_WINDOW_MS = 72 * 60 * 60 * 1_000
ERASURE_DUE_MS = 30 * 24 * 60 * 60 * 1_000
DEFAULT_CODE_LIFE_SECONDS = 300
DEFAULT_CODE_LENGTH = 6
DEFAULT_TIME_ZONE = "UTC"


class Channel(StrEnum):
    """How a customer proves that it is them."""

    SMS = "SMS"
    EMAIL = "EMAIL"
    MISSED_CALL = "MISSED_CALL"


class PhoneNumberType(StrEnum):
    """What a phone number is for, by the names that phonenumbers gives its types."""

    FIXED_LINE = "FIXED_LINE"
    MOBILE = "MOBILE"
    FIXED_LINE_OR_MOBILE = "FIXED_LINE_OR_MOBILE"
    TOLL_FREE = "TOLL_FREE"
    PREMIUM_RATE = "PREMIUM_RATE"
    SHARED_COST = "SHARED_COST"
    VOIP = "VOIP"
    PERSONAL_NUMBER = "PERSONAL_NUMBER"
    PAGER = "PAGER"
    UAN = "UAN"
    VOICEMAIL = "VOICEMAIL"
    UNKNOWN = "UNKNOWN"


DEFAULT_CHANNELS = (Channel.SMS, Channel.EMAIL)
DEFAULT_SMS_NUMBER_TYPES = (PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE_OR_MOBILE)


@dataclass(frozen=True, slots=True)
class Store:
    """A SHOPLINE store of a merchant."""

    merchant_id: str
    store_id: str
    shop_domain: str = ""
    display_name: str = ""


@dataclass(frozen=True, slots=True)
class Criteria:
    """The limits of redemptions in points; None does not limit."""

    multiples_of: int | None = None
    min_points_per_redemption: int | None = None
    max_points_per_redemption: int | None = None
    min_balance_required: int | None = None
    min_lifetime_points: int | None = None
    max_points_per_day: int | None = None
    max_points_per_week: int | None = None
    max_points_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """How customers prove that it is them. Zero and empty values stand for the defaults that `Program` gives."""

    required: bool = False
    allow_skip: bool = False
    channels: tuple[Channel, ...] = ()
    code_length: int = 0
    alphanumeric: bool = False
    code_life_seconds: int = 0
    missed_call_number: str = ""
    max_points_missed_call: int = 0
    message_templates: dict[str, str] = field(default_factory=dict)
    sms_number_types: tuple[PhoneNumberType, ...] = ()

    @property
    def enabled_channels(self) -> tuple[Channel, ...]:
        """The channels, the preferred one first."""
        return self.channels or DEFAULT_CHANNELS

    @property
    def sms_number_types_or_default(self) -> tuple[PhoneNumberType, ...]:
        """The types of numbers that codes are sent to by SMS."""
        return self.sms_number_types or DEFAULT_SMS_NUMBER_TYPES

    @property
    def code_length_or_default(self) -> int:
        """How many characters a code has."""
        return self.code_length or DEFAULT_CODE_LENGTH

    @property
    def code_life_ms(self) -> int:
        """How long a code is valid, in milliseconds."""
        return (self.code_life_seconds or DEFAULT_CODE_LIFE_SECONDS) * 1_000


@dataclass(frozen=True, slots=True)
class Program:
    """A loyalty program: the stores that it covers, and its rules."""

    merchant_id: str
    program_id: int
    store_ids: tuple[str, ...]
    display_name: str = ""
    redemption_enabled: bool = False
    time_zone: str = ""
    default_region: str = ""
    allowed_regions: tuple[str, ...] = ()
    criteria: Criteria = Criteria()
    point_value: Decimal | None = None
    currency_code: str = ""
    local_currency_code: str = ""
    local_currency_rate: Decimal | None = None
    local_currency_decimals: int | None = None
    allow_group_redemption: bool = False
    allow_cross_program_redemption: bool = False
    settlement_window_ms: int = 0
    settlement_lead_ms: int | None = None
    settlement_scenes: tuple[str, ...] = ()
    validation: Validation = Validation()


def language_key(tag: str) -> str:
    """Return a language tag in the form that is compared: in lower case, with - for _."""
    return tag.lower().replace("_", "-")


class ErasureOutcome(StrEnum):
    """What became of a request to erase a store: the names of programs.proto."""

    REQUESTED = "REQUESTED"
    ALREADY_REQUESTED = "ALREADY_REQUESTED"
    ALREADY_ERASED = "ALREADY_ERASED"


@dataclass(frozen=True, slots=True)
class StoreErasure:
    """A request to erase the personal data of a store's customers."""

    event_id: str
    merchant_id: str
    store_id: str
    requested_at_ms: int
    due_at_ms: int
    begun_at_ms: int | None = None
    erased_to: str = ""
    closed_at_ms: int | None = None
    reason: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the erasure has not been completed."""
        return self.closed_at_ms is None

    def begun_before(self, request: "StoreErasure") -> bool:
        """Return whether the erasure began before another request, whose newer data it may have passed."""
        return self.begun_at_ms is not None and self.begun_at_ms < request.requested_at_ms

    def covers(self, request: "StoreErasure") -> bool:
        """Return whether another request needs no erasure of its own.

        An open one will answer it, and a closed one has if the erasure began after the request, or was the same.
        """
        return self.is_open or self.event_id == request.event_id or (self.begun_at_ms or 0) >= request.requested_at_ms


@dataclass(frozen=True, slots=True)
class ErasureProgress:
    """How far an erasure has come: how many buyers it has erased, and how much is left to look at."""

    erasure: StoreErasure
    erased: int
    remaining: int


def new_erasure(event_id: str, merchant_id: str, store_id: str, requested_at_ms: int) -> StoreErasure:
    """Build a request, which is due 30 days later. Source: SHOPLINE facts, Customer topics."""
    return StoreErasure(event_id, merchant_id, store_id, requested_at_ms, requested_at_ms + ERASURE_DUE_MS)


def program_not_found(program_id: int) -> PointbookError:
    """Tell that the merchant has no such program."""
    return PointbookError(
        Reason.PROGRAM_NOT_FOUND, "The merchant has no such program.", metadata={"program_id": str(program_id)}
    )
