"""Whether a benefit applies to a cart.

An unknown fact makes the result uncertain; it is never guessed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

from pointbook_server.benefits.model import (
    INSTRUCTION_MEASURES,
    Benefit,
    BenefitsStatus,
    BenefitsUsageInstructionType,
    ProductsApplicableType,
    UsageLimitsType,
)

IDS_SHOWN_MAX = 10


class Applicability(StrEnum):
    """Whether a benefit applies."""

    APPLIES = "APPLIES"
    DOES_NOT_APPLY = "DOES_NOT_APPLY"
    UNCERTAIN = "UNCERTAIN"


class ObstacleReason(StrEnum):
    """Why a benefit does not apply, or may not."""

    INACTIVE = "INACTIVE"
    PRODUCT_SCOPE = "PRODUCT_SCOPE"
    MIN_PURCHASE_AMOUNT = "MIN_PURCHASE_AMOUNT"
    MIN_ITEM_QUANTITY = "MIN_ITEM_QUANTITY"
    MAX_POINTS = "MAX_POINTS"
    USAGE_INSTRUCTION = "USAGE_INSTRUCTION"
    AUTOMATIC_DISCOUNT = "AUTOMATIC_DISCOUNT"
    DISCOUNT_CODE = "DISCOUNT_CODE"
    USAGE_LIMIT = "USAGE_LIMIT"


class Obstacle(NamedTuple):
    """A reason against a benefit: a field, the required value and the actual one."""

    reason: ObstacleReason
    field: str
    limit: str
    actual: str
    is_certain: bool = True


class Product(NamedTuple):
    """A product of a cart."""

    product_id: str
    category_ids: tuple[str, ...]
    quantity: int


@dataclass(frozen=True)
class Cart:
    """A member's purchase, and how often they have used benefits; None is unknown."""

    products: tuple[Product, ...] = ()
    amount: Decimal | None = None
    points: int | None = None
    automatic_discount_used: bool = False
    discount_code_used: bool = False
    uses: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def quantity(self) -> int:
        """The number of items."""
        return sum(product.quantity for product in self.products)

    @cached_property
    def product_ids(self) -> dict[str, None]:
        """The ids of the products, in order."""
        return dict.fromkeys(product.product_id for product in self.products)

    @cached_property
    def category_ids(self) -> dict[str, None]:
        """The ids of the categories of all products, in order."""
        return dict.fromkeys(chain.from_iterable(product.category_ids for product in self.products))


def applicability_of(obstacles: Sequence[Obstacle]) -> Applicability:
    """Return whether a benefit with these obstacles applies."""
    if any(obstacle.is_certain for obstacle in obstacles):
        return Applicability.DOES_NOT_APPLY
    return Applicability.UNCERTAIN if obstacles else Applicability.APPLIES


def find_obstacles(benefit: Benefit, cart: Cart) -> list[Obstacle]:
    """Return all obstacles to using a benefit for a cart, certain and uncertain ones."""
    return [
        *_status(benefit),
        *_scope(benefit, cart),
        *_condition(benefit, cart),
        *_stacking(benefit, cart),
        *_uses(benefit, cart),
    ]


def _status(benefit: Benefit) -> Iterator[Obstacle]:
    status = benefit.benefits_status
    if status != BenefitsStatus.ACTIVE:
        is_certain = status == BenefitsStatus.INACTIVE
        yield Obstacle(ObstacleReason.INACTIVE, "benefits_status", "ACTIVE", status, is_certain)


def _scope(benefit: Benefit, cart: Cart) -> Iterator[Obstacle]:
    """Yield an obstacle if no product is in the benefit's range.

    A benefit without a range is for all products.
    """
    reason = ObstacleReason.PRODUCT_SCOPE
    match benefit.products_applicable_type:
        case "":
            return
        case ProductsApplicableType.SPECIFIC_CATEGORY:
            name, applicable, actual = "specific_category_list", benefit.specific_category_list, cart.category_ids
        case ProductsApplicableType.SPECIFIC_PRODUCT:
            name, applicable, actual = "specific_product_ids", benefit.specific_product_ids, cart.product_ids
        case unlisted:
            yield _uncertain(reason, "products_applicable_type", unlisted, _join_ids(cart.product_ids))
            return
    if actual.keys().isdisjoint(applicable):
        yield Obstacle(reason, name, _join_ids(applicable), _join_ids(actual), is_certain=bool(applicable))


def _condition(benefit: Benefit, cart: Cart) -> Iterator[Obstacle]:
    """Yield an obstacle if the condition of using the benefit is not met."""
    name, text = benefit.benefits_usage_instruction_type, benefit.benefits_usage_instruction_value or ""
    if name in {"", BenefitsUsageInstructionType.NONE}:
        return
    measure = INSTRUCTION_MEASURES.get(name)
    limit = None if measure is None else measure.read(text)
    if limit is not None:
        yield from _measured(BenefitsUsageInstructionType(name), limit, text, cart)
    elif measure is not None:
        yield _uncertain(ObstacleReason.USAGE_INSTRUCTION, "benefits_usage_instruction_value", text)
    else:
        yield _uncertain(ObstacleReason.USAGE_INSTRUCTION, "benefits_usage_instruction_type", name)


def _measured(kind: BenefitsUsageInstructionType, limit: Decimal, text: str, cart: Cart) -> Iterator[Obstacle]:
    """Yield an obstacle if the cart is beyond a limit, or its actual value is unknown."""
    is_maximum = kind is BenefitsUsageInstructionType.MAX_POINTS
    actual = {
        BenefitsUsageInstructionType.MAX_POINTS: cart.points,
        BenefitsUsageInstructionType.MIN_ITEM_QUANTITY: cart.quantity,
        BenefitsUsageInstructionType.MIN_PURCHASE_AMOUNT: cart.amount,
    }[kind]
    reason, name = ObstacleReason(kind.value), "benefits_usage_instruction_value"
    if actual is None:
        yield _uncertain(reason, name, text)
    elif actual > limit if is_maximum else actual < limit:
        yield Obstacle(reason, name, text, f"{actual:f}" if isinstance(actual, Decimal) else str(actual))


def _stacking(benefit: Benefit, cart: Cart) -> Iterator[Obstacle]:
    """Yield an obstacle for each discount in use that the benefit does not stack with."""
    for reason, name, is_allowed, is_used in (
        (ObstacleReason.AUTOMATIC_DISCOUNT, "auto_stack_limit", benefit.auto_stack_limit, cart.automatic_discount_used),
        (ObstacleReason.DISCOUNT_CODE, "code_stack_limit", benefit.code_stack_limit, cart.discount_code_used),
    ):
        if is_used and not is_allowed:
            is_certain = is_allowed is not None
            yield Obstacle(reason, name, "false" if is_certain else "", "true", is_certain=is_certain)


def _uses(benefit: Benefit, cart: Cart) -> Iterator[Obstacle]:
    """Yield an obstacle if no uses are left."""
    reason, kind, limit = ObstacleReason.USAGE_LIMIT, benefit.usage_limits_type, benefit.usage_limits_times
    uses = cart.uses.get(benefit.benefit_id, 0)
    if kind in {"", UsageLimitsType.UNLIMITED}:
        return
    if kind != UsageLimitsType.LIMITS:
        yield _uncertain(reason, "usage_limits_type", kind, str(uses))
    elif limit is None:
        yield _uncertain(reason, "usage_limits_times", "", str(uses))
    elif uses >= limit:
        yield Obstacle(reason, "usage_limits_times", str(limit), str(uses))


def _uncertain(reason: ObstacleReason, name: str, limit: str, actual: str = "") -> Obstacle:
    """Return an obstacle that is uncertain, because a fact is unknown."""
    return Obstacle(reason, name, limit, actual, is_certain=False)


def _join_ids(ids: Iterable[str]) -> str:
    return ", ".join(islice(ids, IDS_SHOWN_MAX))
