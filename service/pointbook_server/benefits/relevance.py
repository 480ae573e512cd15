"""Which fields of a benefit are relevant, given the values of others.

Source: docs/reference/shopline-benefits.md#relevance
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pointbook_server.benefits.model import (
    CONTEXT_FIELDS,
    ENUM_FIELDS,
    BenefitsExpiryDateType,
    BenefitsIssuranceType,
    BirthBenefitsReleaseType,
    MembershipType,
    ProductsApplicableType,
    RewardScene,
    RewardType,
    UsageLimitsType,
)


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition: a field has one of several values."""

    field: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        *others, last = self.values
        return f"{self.field} = {', '.join(others)} or {last}" if others else f"{self.field} = {last}"


IS_PAID = Condition("membership_type", (MembershipType.PAID,))
IS_BIRTHDAY = Condition("reward_scene", (RewardScene.BIRTH_BENEFITS,))
IS_PERIODICAL = Condition("benefits_issurance_type", (BenefitsIssuranceType.PERIODICALLY,))
IS_DISCOUNT = Condition(
    "reward_type", (RewardType.PERCENTAGE_DISCOUNT, RewardType.CASH_VOUCHER, RewardType.FREE_SHIPPING)
)
RELEVANCE_RULES: Mapping[str, tuple[Condition, ...]] = {
    "benefits_description": (IS_PAID,),
    "benefits_name": (IS_PAID,),
    "benefits_issurance_type": (IS_PAID,),
    "benefits_expiry_date_type": (IS_PAID,),
    "benefits_expiry_date_value": (Condition("benefits_expiry_date_type", (BenefitsExpiryDateType.SPECIFIC_DATE,)),),
    "periodically_days": (IS_PERIODICAL,),
    "periodically_months": (IS_PERIODICAL,),
    "specific_date": (Condition("benefits_issurance_type", (BenefitsIssuranceType.SPECIFIC_DATE,)),),
    "birth_benefits_release_type": (IS_BIRTHDAY,),
    "days_before": (Condition("birth_benefits_release_type", (BirthBenefitsReleaseType.FIXED_BEFORE,)),),
    "fixed_date": (Condition("birth_benefits_release_type", (BirthBenefitsReleaseType.FIXED_DATE,)),),
    "benefits_usage_instruction_value": (IS_DISCOUNT,),
    "products_applicable_type": (IS_BIRTHDAY, IS_DISCOUNT),
    "specific_category_list": (Condition("products_applicable_type", (ProductsApplicableType.SPECIFIC_CATEGORY,)),),
    "specific_product_ids": (Condition("products_applicable_type", (ProductsApplicableType.SPECIFIC_PRODUCT,)),),
    "usage_limits_times": (Condition("usage_limits_type", (UsageLimitsType.LIMITS,)),),
}
"""A field is relevant if one of its conditions holds. Fields follow those that their conditions refer to."""


def describe_rule(name: str) -> str:
    """Return the rule of a field in words."""
    return f"only relevant when {', or '.join(map(str, RELEVANCE_RULES[name]))}"


def irrelevant_fields(values: Mapping[str, object]) -> set[str]:
    """Return which of a benefit's fields are irrelevant; enum values are names.

    The value of an irrelevant field makes no other field relevant. A condition that cannot be decided, since the
    context is unset or a name is not listed, may hold, so its field is not irrelevant.
    """
    irrelevant: set[str] = set()
    for name, conditions in RELEVANCE_RULES.items():
        if name in values and not any(_may_hold(condition, values, irrelevant) for condition in conditions):
            irrelevant.add(name)
    return irrelevant


def _may_hold(condition: Condition, values: Mapping[str, object], irrelevant: set[str]) -> bool:
    value = None if condition.field in irrelevant else values.get(condition.field)
    if not isinstance(value, str) or not value:
        return condition.field in CONTEXT_FIELDS
    return value in condition.values or not is_listed(condition.field, value)


def is_listed(name: str, value: str) -> bool:
    """Return whether a value of an enum field is a listed one."""
    return value in ENUM_FIELDS[name].__members__
