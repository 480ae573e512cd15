"""Stores and loyalty programs.

Source: docs/reference/redemption.md#merchants-stores-and-programs
"""

from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

from pointbook_common.durations import HOUR_MS, SECOND_MS
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason

DEFAULT_SETTLEMENT_WINDOW_MS = 72 * HOUR_MS
DEFAULT_CODE_LIFE_SECONDS = 300
DEFAULT_CODE_LENGTH = 6
DEFAULT_TIME_ZONE = "UTC"


class Channel(StrEnum):
    """How customers receive or confirm a validation code."""

    SMS = "SMS"
    EMAIL = "EMAIL"
    MISSED_CALL = "MISSED_CALL"


class PhoneNumberType(StrEnum):
    """The type of a phone number, by the names of the phonenumbers library."""

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
    """The limits of redemptions in points; None is no limit.

    Source: docs/reference/redemption.md#criteria
    """

    multiples_of: int | None = None
    min_points_per_redemption: int | None = None
    max_points_per_redemption: int | None = None
    min_balance_required: int | None = None
    min_lifetime_points: int | None = None
    max_points_per_day: int | None = None
    max_points_per_week: int | None = None
    max_points_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """How customers prove their identity.

    Zero and empty values mean the defaults that programs.proto states.
    """

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
        """The channels, in order of preference."""
        return self.channels or DEFAULT_CHANNELS

    @property
    def sms_number_types_or_default(self) -> tuple[PhoneNumberType, ...]:
        """The types of phone numbers to which codes are sent by SMS."""
        return self.sms_number_types or DEFAULT_SMS_NUMBER_TYPES

    @property
    def code_length_or_default(self) -> int:
        """The number of characters of a code."""
        return self.code_length or DEFAULT_CODE_LENGTH

    @property
    def code_life_ms(self) -> int:
        """How long a code is valid, in milliseconds."""
        return (self.code_life_seconds or DEFAULT_CODE_LIFE_SECONDS) * SECOND_MS


@dataclass(frozen=True, slots=True)
class Program:
    """A loyalty program: its stores and its rules of redemption."""

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
    validation: ValidationSettings = ValidationSettings()


def language_key(tag: str) -> str:
    """Return the form in which language tags are compared: zh-tw for zh_TW."""
    return tag.lower().replace("_", "-")


def program_not_found(program_id: int) -> PointbookError:
    """Return the error for a program that the merchant does not have."""
    return PointbookError(
        Reason.PROGRAM_NOT_FOUND, "The merchant has no such program.", metadata={"program_id": str(program_id)}
    )
