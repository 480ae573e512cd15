"""Benefits: the fields of SHOPLINE's BenefitsInfo.

Enum values are stored by SHOPLINE's names, including names that are not listed here; an empty name is an absent value.

Source: docs/reference/shopline-benefits.md#fields
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.reasons import Reason

LEVEL_PREFIX = "gid://shopline/Membership/"
COUNT_MAX = Decimal(10**9)
DECIMAL_MIN = Decimal("0.000000000001")
AMOUNT_MAX = Decimal(10**12) - DECIMAL_MIN
MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_DECIMAL = re.compile(r"[0-9]{1,16}(\.[0-9]{1,12})?")
_MONTH_DAY = re.compile(r"([0-9]{2})-([0-9]{2})")


class BenefitsExpiryDateType(StrEnum):
    """How the expiry of an issued benefit is defined."""

    SPECIFIC_DATE = "SPECIFIC_DATE"
    FOLLOW_MEMBERSHIP = "FOLLOW_MEMBERSHIP"


class BenefitsIssuranceType(StrEnum):
    """When the benefits of a paid membership are issued; the spelling is SHOPLINE's."""

    AFTER_PURCHASE = "AFTER_PURCHASE"
    PERIODICALLY = "PERIODICALLY"
    SPECIFIC_DATE = "SPECIFIC_DATE"


class BenefitsStatus(StrEnum):
    """Whether a benefit is active."""

    ACTIVE = "ACTIVE"
    INACTIVE = "INACTIVE"


class BenefitsUsageInstructionType(StrEnum):
    """The condition of using a benefit."""

    MAX_POINTS = "MAX_POINTS"
    MIN_ITEM_QUANTITY = "MIN_ITEM_QUANTITY"
    MIN_PURCHASE_AMOUNT = "MIN_PURCHASE_AMOUNT"
    NONE = "NONE"


class BirthBenefitsReleaseType(StrEnum):
    """When a birthday benefit is issued."""

    EXACTLY_BIRTH = "EXACTLY_BIRTH"
    FIXED_BEFORE = "FIXED_BEFORE"
    FIXED_DATE = "FIXED_DATE"


class ProductsApplicableType(StrEnum):
    """The range of products that a benefit applies to: the documented values."""

    SPECIFIC_CATEGORY = "SPECIFIC_CATEGORY"
    SPECIFIC_PRODUCT = "SPECIFIC_PRODUCT"


class RewardType(StrEnum):
    """The kind of reward that a benefit gives."""

    PERCENTAGE_DISCOUNT = "PERCENTAGE_DISCOUNT"
    POINTS = "POINTS"
    CASHBACK = "CASHBACK"
    CASH_VOUCHER = "CASH_VOUCHER"
    FREE_PRODUCT = "FREE_PRODUCT"
    FREE_SHIPPING = "FREE_SHIPPING"


class UsageLimitsType(StrEnum):
    """Whether the uses of a benefit are limited."""

    LIMITS = "LIMITS"
    UNLIMITED = "UNLIMITED"


class RewardScene(StrEnum):
    """The occasion of a reward.

    Source: docs/reference/shopline-benefits.md#reward-scenes
    """

    BIRTH_BENEFITS = "BIRTH_BENEFITS"
    ENTERED_PHONE = "ENTERED_PHONE"
    FOLLOW_FB = "FOLLOW_FB"
    POINTS_REDEMPTION = "POINTS_REDEMPTION"
    SUCCESSFUL_BEING_REFERRED = "SUCCESSFUL_BEING_REFERRED"
    SUCCESSFUL_REFERRAL = "SUCCESSFUL_REFERRAL"
    EMAIL_SUBSCRIPTION = "EMAIL_SUBSCRIPTION"
    ENTERED_BIRTHDAY = "ENTERED_BIRTHDAY"
    FOLLOW_INS = "FOLLOW_INS"
    LEVEL_UPGRADE = "LEVEL_UPGRADE"
    MEMBERSHIP_BENEFITS = "MEMBERSHIP_BENEFITS"
    SHARE_FB = "SHARE_FB"
    SUCCESSFUL_ORDERS = "SUCCESSFUL_ORDERS"


class MembershipType(StrEnum):
    """The kind of membership.

    SHOPLINE's older reference has LEVEL and PAID, its newer one BASIC, DUAL and PAID.

    Source: docs/reference/shopline-benefits.md#membership-types
    """

    LEVEL = "LEVEL"
    PAID = "PAID"
    BASIC = "BASIC"
    DUAL = "DUAL"


ENUM_FIELDS: Mapping[str, type[StrEnum]] = {
    "membership_type": MembershipType,
    "reward_scene": RewardScene,
    "benefits_expiry_date_type": BenefitsExpiryDateType,
    "benefits_issurance_type": BenefitsIssuranceType,
    "benefits_status": BenefitsStatus,
    "benefits_usage_instruction_type": BenefitsUsageInstructionType,
    "birth_benefits_release_type": BirthBenefitsReleaseType,
    "products_applicable_type": ProductsApplicableType,
    "reward_type": RewardType,
    "usage_limits_type": UsageLimitsType,
}
"""The enum fields of a benefit, and their listed values."""
CONTEXT_FIELDS = frozenset({"membership_type", "reward_scene"})
"""Fields of relevance rules that BenefitsInfo does not contain. While they are unset, those rules are undecided."""


@dataclass(frozen=True, slots=True)
class Benefit:
    """A benefit: its context and the 24 fields of BenefitsInfo, in their order.

    None or an empty value is an absent one.
    """

    merchant_id: str
    benefit_id: str
    store_ids: tuple[str, ...] = ()
    level_code: str = ""
    membership_type: str = ""
    reward_scene: str = ""
    auto_stack_limit: bool | None = None
    benefits_description: str | None = None
    benefits_details: str | None = None
    benefits_expiry_date_type: str = ""
    benefits_expiry_date_value: int | None = None
    benefits_icon: str | None = None
    benefits_issurance_type: str = ""
    benefits_name: str | None = None
    benefits_status: str = ""
    benefits_usage_instruction_type: str = ""
    benefits_usage_instruction_value: str | None = None
    birth_benefits_release_type: str = ""
    code_stack_limit: bool | None = None
    days_before: int | None = None
    fixed_date: int | None = None
    periodically_days: int | None = None
    periodically_months: int | None = None
    products_applicable_type: str = ""
    reward_type: str = ""
    specific_category_list: tuple[str, ...] = ()
    specific_date: str | None = None
    specific_product_ids: tuple[str, ...] = ()
    usage_limits_times: int | None = None
    usage_limits_type: str = ""
    irrelevant_values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CustomPrivilege:
    """A privilege of a membership level, described by the shop.

    The spelling of `previlege_status` is SHOPLINE's. Source: docs/reference/shopline-benefits.md#custom-privileges
    """

    merchant_id: str
    privilege_id: str
    level_code: str = ""
    privilege_name: str | None = None
    privilege_description: str | None = None
    benefits_icon: str | None = None
    previlege_status: str | None = None


@dataclass(frozen=True, slots=True)
class BenefitFilter:
    """The benefits of a merchant to list; an empty value matches all.

    With `matches_unset`, a benefit whose own value is empty matches any value.
    """

    store_id: str = ""
    program_id: int = 0
    level_code: str = ""
    membership_type: str = ""
    reward_scene: str = ""
    reward_type: str = ""
    benefits_status: str = ""
    matches_unset: bool = False


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity: its bounds, and their description in error messages."""

    description: str
    low: Decimal
    high: Decimal
    is_whole: bool = False

    def read(self, text: str) -> Decimal | None:
        """Return a decimal exactly; None if the text is not one or out of bounds."""
        if not _DECIMAL.fullmatch(text):
            return None
        value = Decimal(text)
        is_valid = self.low <= value <= self.high and (not self.is_whole or value == value.to_integral_value())
        return value if is_valid else None


_DIGITS = "with at most 12 digits before and 12 after the point"
PERCENTAGE = Measure(
    "a percentage, a decimal above 0 and up to 100 with at most 12 digits after the point", DECIMAL_MIN, Decimal(100)
)
AMOUNT = Measure(f"an amount, a decimal above 0 {_DIGITS}", DECIMAL_MIN, AMOUNT_MAX)
AMOUNT_OR_ZERO = Measure(f"an amount, a decimal of at least 0 {_DIGITS}", Decimal(0), AMOUNT_MAX)
POINTS = Measure("whole points, 1 to 10^15", Decimal(1), Decimal(POINTS_MAX), is_whole=True)
QUANTITY = Measure("a whole number, 1 to 1,000,000,000", Decimal(1), COUNT_MAX, is_whole=True)
REWARD_MEASURES: Mapping[str, Measure] = {
    RewardType.PERCENTAGE_DISCOUNT: PERCENTAGE,
    RewardType.CASH_VOUCHER: AMOUNT,
    RewardType.FREE_SHIPPING: AMOUNT_OR_ZERO,
    RewardType.POINTS: POINTS,
}
"""The quantity in benefits_details, by reward_type. Source: docs/reference/shopline-benefits.md#amounts."""
INSTRUCTION_MEASURES: Mapping[str, Measure] = {
    BenefitsUsageInstructionType.MAX_POINTS: POINTS,
    BenefitsUsageInstructionType.MIN_ITEM_QUANTITY: QUANTITY,
    BenefitsUsageInstructionType.MIN_PURCHASE_AMOUNT: AMOUNT,
}
"""The quantity in benefits_usage_instruction_value, by benefits_usage_instruction_type."""


def read_month_day(text: str) -> tuple[int, int] | None:
    """Return month and day of a text MM-DD, including 02-29; None if it is not one."""
    form = _MONTH_DAY.fullmatch(text)
    if not form:
        return None
    month, day = int(form[1]), int(form[2])
    return (month, day) if 1 <= month <= len(MONTH_DAYS) and 1 <= day <= MONTH_DAYS[month - 1] else None


def benefit_not_found(benefit_id: str) -> PointbookError:
    """Return the error for a benefit that the merchant does not have."""
    return PointbookError(
        Reason.BENEFIT_NOT_FOUND, "The merchant has no such benefit.", metadata={"benefit_id": benefit_id}
    )


def custom_privilege_not_found(privilege_id: str) -> PointbookError:
    """Return the error for a custom privilege that the merchant does not have."""
    return PointbookError(
        Reason.CUSTOM_PRIVILEGE_NOT_FOUND,
        "The merchant has no such custom privilege.",
        metadata={"privilege_id": privilege_id},
    )
