"""Benefits: the fields of SHOPLINE's BenefitsInfo, and which of them mean something beside which others.

Values of enums are kept by SHOPLINE's names, so that one that is not listed here is kept as well; an empty name is an
absent value. What the seed says of a field is cited where the field's rule stands.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import POINTS_MAX

LEVEL_PREFIX = "gid://shopline/Membership/"
COUNT_MAX = Decimal(10**9)
LEAST_DECIMAL = Decimal("0.000000000001")
AMOUNT_MAX = Decimal(10**12) - LEAST_DECIMAL
MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_DECIMAL = re.compile(r"[0-9]{1,16}(\.[0-9]{1,12})?")
_MONTH_DAY = re.compile(r"([0-9]{2})-([0-9]{2})")


class BenefitsExpiryDateType(StrEnum):
    """How the expiry of an issued benefit is told."""

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
    """The range of products that a benefit applies to, as far as it is documented."""

    SPECIFIC_CATEGORY = "SPECIFIC_CATEGORY"
    SPECIFIC_PRODUCT = "SPECIFIC_PRODUCT"


class RewardType(StrEnum):
    """What a benefit gives."""

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
    """What a benefit rewards."""

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
    """The kind of membership: SHOPLINE's older reference has LEVEL and PAID, its newer one BASIC, DUAL and PAID."""

    LEVEL = "LEVEL"
    PAID = "PAID"
    BASIC = "BASIC"
    DUAL = "DUAL"


ENUMS: Mapping[str, type[StrEnum]] = {
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
"""The enum fields of a benefit, and the names that are listed."""
CONTEXT = frozenset({"membership_type", "reward_scene"})
"""What the seed's rules cite and BenefitsInfo does not contain: while it is not known, those rules are open."""


@dataclass(frozen=True, slots=True)
class Benefit:
    """A benefit: its context, and the 24 fields of BenefitsInfo in their order, absent where None or empty."""

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
    """A privilege of a membership level in the shop's own words; the last field is spelled as SHOPLINE spells it."""

    merchant_id: str
    privilege_id: str
    level_code: str = ""
    privilege_name: str | None = None
    privilege_description: str | None = None
    benefits_icon: str | None = None
    previlege_status: str | None = None


@dataclass(frozen=True, slots=True)
class When:
    """A condition: a field has one of some values."""

    field: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        *others, last = self.values
        return f"{self.field} = {', '.join(others)} or {last}" if others else f"{self.field} = {last}"


IS_PAID = When("membership_type", (MembershipType.PAID,))
IS_BIRTHDAY = When("reward_scene", (RewardScene.BIRTH_BENEFITS,))
IS_PERIODICAL = When("benefits_issurance_type", (BenefitsIssuranceType.PERIODICALLY,))
IS_DISCOUNT = When("reward_type", (RewardType.PERCENTAGE_DISCOUNT, RewardType.CASH_VOUCHER, RewardType.FREE_SHIPPING))
RULES: Mapping[str, tuple[When, ...]] = {
    # The seed: only relevant when membershipType is PAID.
    "benefits_description": (IS_PAID,),
    "benefits_name": (IS_PAID,),
    "benefits_issurance_type": (IS_PAID,),
    # The seed: only valid when membershipType is PAID.
    "benefits_expiry_date_type": (IS_PAID,),
    # The seed: only relevant when benefitsExpiryDateType is SPECIFIC_DATE.
    "benefits_expiry_date_value": (When("benefits_expiry_date_type", (BenefitsExpiryDateType.SPECIFIC_DATE,)),),
    # The seed: only relevant when benefitsIssuranceType is PERIODICALLY.
    "periodically_days": (IS_PERIODICAL,),
    "periodically_months": (IS_PERIODICAL,),
    # The seed: only relevant when benefitsIssuranceType is SPECIFIC_DATE.
    "specific_date": (When("benefits_issurance_type", (BenefitsIssuranceType.SPECIFIC_DATE,)),),
    # The seed: relevant when rewardScene is BIRTH_BENEFITS.
    "birth_benefits_release_type": (IS_BIRTHDAY,),
    # The seed: only relevant when birthBenefitsReleaseType is FIXED_BEFORE.
    "days_before": (When("birth_benefits_release_type", (BirthBenefitsReleaseType.FIXED_BEFORE,)),),
    # The seed: only relevant if birthBenefitsReleaseType is FIXED_DATE.
    "fixed_date": (When("birth_benefits_release_type", (BirthBenefitsReleaseType.FIXED_DATE,)),),
    # The seed: relevant only when rewardType is PERCENTAGE_DISCOUNT or CASH_VOUCHER or FREE_SHIPPING.
    "benefits_usage_instruction_value": (IS_DISCOUNT,),
    # The seed: relevant when rewardScene is BIRTH_BENEFITS, or rewardType is PERCENTAGE_DISCOUNT or CASH_VOUCHER or
    # FREE_SHIPPING.
    "products_applicable_type": (IS_BIRTHDAY, IS_DISCOUNT),
    # The seed: only relevant when productsApplicableType is SPECIFIC_CATEGORY.
    "specific_category_list": (When("products_applicable_type", (ProductsApplicableType.SPECIFIC_CATEGORY,)),),
    # The seed: only relevant when productsApplicableType is SPECIFIC_PRODUCT.
    "specific_product_ids": (When("products_applicable_type", (ProductsApplicableType.SPECIFIC_PRODUCT,)),),
    # The seed: relevant only when usageLimitsType is LIMITS.
    "usage_limits_times": (When("usage_limits_type", (UsageLimitsType.LIMITS,)),),
}
"""When a field is relevant: one of its conditions must hold. Each field stands behind those that its rule cites."""


def rule_of(name: str) -> str:
    """Tell the rule of a field in words."""
    return f"only relevant when {', or '.join(map(str, RULES[name]))}"


def irrelevant_fields(values: Mapping[str, object]) -> set[str]:
    """Tell which of the values that a benefit has are irrelevant, enums being given by their names.

    What an irrelevant field says makes nothing relevant. A condition that cannot be decided, because the context is not
    known or a name is not listed, may hold.
    """
    irrelevant: set[str] = set()
    for name, conditions in RULES.items():
        if name in values and not any(_may_hold(condition, values, irrelevant) for condition in conditions):
            irrelevant.add(name)
    return irrelevant


def _may_hold(condition: When, values: Mapping[str, object], irrelevant: set[str]) -> bool:
    value = None if condition.field in irrelevant else values.get(condition.field)
    if not isinstance(value, str) or not value:
        return condition.field in CONTEXT
    return value in condition.values or not is_listed(condition.field, value)


def is_listed(name: str, value: str) -> bool:
    """Tell whether an enum field lists a value."""
    return value in ENUMS[name].__members__


@dataclass(frozen=True, slots=True)
class Measure:
    """What a number counts: its bounds, and how they are told."""

    told: str
    low: Decimal
    high: Decimal
    is_whole: bool = False

    def read(self, text: str) -> Decimal | None:
        """Read a decimal exactly; None where it is none or out of bounds."""
        if not _DECIMAL.fullmatch(text):
            return None
        value = Decimal(text)
        is_right = self.low <= value <= self.high and (not self.is_whole or value == value.to_integral_value())
        return value if is_right else None


_DIGITS = "with at most 12 digits before and 12 after the point"
PERCENTAGE = Measure(
    "a percentage, a decimal above 0 and up to 100 with at most 12 digits after the point", LEAST_DECIMAL, Decimal(100)
)
AMOUNT = Measure(f"an amount, a decimal above 0 {_DIGITS}", LEAST_DECIMAL, AMOUNT_MAX)
AMOUNT_OR_ZERO = Measure(f"an amount, a decimal of at least 0 {_DIGITS}", Decimal(0), AMOUNT_MAX)
POINTS = Measure("whole points, 1 to 10^15", Decimal(1), Decimal(POINTS_MAX), is_whole=True)
QUANTITY = Measure("a whole number, 1 to 1,000,000,000", Decimal(1), COUNT_MAX, is_whole=True)
REWARD_MEASURES: Mapping[str, Measure] = {
    RewardType.PERCENTAGE_DISCOUNT: PERCENTAGE,
    RewardType.CASH_VOUCHER: AMOUNT,
    RewardType.FREE_SHIPPING: AMOUNT_OR_ZERO,
    RewardType.POINTS: POINTS,
}
"""What benefits_details is a number of: "When rewardType is ..., it represents the discount value"."""
INSTRUCTION_MEASURES: Mapping[str, Measure] = {
    BenefitsUsageInstructionType.MAX_POINTS: POINTS,
    BenefitsUsageInstructionType.MIN_ITEM_QUANTITY: QUANTITY,
    BenefitsUsageInstructionType.MIN_PURCHASE_AMOUNT: AMOUNT,
}
"""What benefits_usage_instruction_value is: "the value corresponding to the benefitsUsageInstructionType"."""


def read_month_day(text: str) -> tuple[int, int] | None:
    """Read a day of the year, MM-DD, 02-29 included; None where it is none."""
    form = _MONTH_DAY.fullmatch(text)
    if not form:
        return None
    month, day = int(form[1]), int(form[2])
    return (month, day) if 1 <= month <= len(MONTH_DAYS) and 1 <= day <= MONTH_DAYS[month - 1] else None


def benefit_not_found(benefit_id: str) -> PointbookError:
    """Tell that the merchant has no such benefit."""
    return PointbookError(
        Reason.BENEFIT_NOT_FOUND, "The merchant has no such benefit.", metadata={"benefit_id": benefit_id}
    )


def custom_privilege_not_found(privilege_id: str) -> PointbookError:
    """Build the error for a custom privilege that the merchant does not have."""
    return PointbookError(
        Reason.CUSTOM_PRIVILEGE_NOT_FOUND,
        "The merchant has no such custom privilege.",
        metadata={"privilege_id": privilege_id},
    )
