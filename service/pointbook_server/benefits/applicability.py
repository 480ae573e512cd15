"""Whether benefits apply to a cart, and all that speaks against it: what nobody tells is uncertain, and not guessed."""

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

IDS_TOLD = 10


class Applicability(StrEnum):
    """Whether a benefit applies."""

    APPLIES = "APPLIES"
    DOES_NOT_APPLY = "DOES_NOT_APPLY"
    UNCERTAIN = "UNCERTAIN"


class ObstacleReason(StrEnum):
    """What speaks against using a benefit."""

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
    """What speaks against using a benefit: the field that says so, what it asks for, and what there is instead."""

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
    """What a member is about to buy, and how often they have used benefits; None is what the caller does not tell."""

    products: tuple[Product, ...] = ()
    amount: Decimal | None = None
    points: int | None = None
    automatic_discount_used: bool = False
    discount_code_used: bool = False
    uses: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def quantity(self) -> int:
        """How many items there are."""
        return sum(product.quantity for product in self.products)

    @cached_property
    def product_ids(self) -> dict[str, None]:
        """The products, in their order."""
        return dict.fromkeys(product.product_id for product in self.products)

    @cached_property
    def category_ids(self) -> dict[str, None]:
        """The categories of all products, in their order."""
        return dict.fromkeys(chain.from_iterable(product.category_ids for product in self.products))


def applicability_of(obstacles: Sequence[Obstacle]) -> Applicability:
    """Tell whether a benefit applies, by what speaks against it."""
    if any(obstacle.is_certain for obstacle in obstacles):
        return Applicability.DOES_NOT_APPLY
    return Applicability.UNCERTAIN if obstacles else Applicability.APPLIES


def obstacles_of(benefit: Benefit, cart: Cart) -> list[Obstacle]:
    """Tell all that speaks, or may speak, against using a benefit for a cart."""
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
    """Tell whether no product of the cart is in the range of the benefit; one that tells no range is for all."""
    reason = ObstacleReason.PRODUCT_SCOPE
    match benefit.products_applicable_type:
        case "":
            return
        case ProductsApplicableType.SPECIFIC_CATEGORY:
            name, wanted, there = "specific_category_list", benefit.specific_category_list, cart.category_ids
        case ProductsApplicableType.SPECIFIC_PRODUCT:
            name, wanted, there = "specific_product_ids", benefit.specific_product_ids, cart.product_ids
        case unlisted:
            yield _open(reason, "products_applicable_type", unlisted, _ids(cart.product_ids))
            return
    if there.keys().isdisjoint(wanted):
        yield Obstacle(reason, name, _ids(wanted), _ids(there), is_certain=bool(wanted))


def _condition(benefit: Benefit, cart: Cart) -> Iterator[Obstacle]:
    """Tell whether the condition of using the benefit fails: "the value corresponding to" its type."""
    name, text = benefit.benefits_usage_instruction_type, benefit.benefits_usage_instruction_value or ""
    if name in {"", BenefitsUsageInstructionType.NONE}:
        return
    measure = INSTRUCTION_MEASURES.get(name)
    limit = None if measure is None else measure.read(text)
    if limit is not None:
        yield from _measured(BenefitsUsageInstructionType(name), limit, text, cart)
    elif measure is not None:
        yield _open(ObstacleReason.USAGE_INSTRUCTION, "benefits_usage_instruction_value", text)
    else:
        yield _open(ObstacleReason.USAGE_INSTRUCTION, "benefits_usage_instruction_type", name)


def _measured(kind: BenefitsUsageInstructionType, limit: Decimal, text: str, cart: Cart) -> Iterator[Obstacle]:
    """Compare what a condition limits with what there is; what the caller does not tell may be anything."""
    is_maximum = kind is BenefitsUsageInstructionType.MAX_POINTS
    actual = {
        BenefitsUsageInstructionType.MAX_POINTS: cart.points,
        BenefitsUsageInstructionType.MIN_ITEM_QUANTITY: cart.quantity,
        BenefitsUsageInstructionType.MIN_PURCHASE_AMOUNT: cart.amount,
    }[kind]
    reason, name = ObstacleReason(kind.value), "benefits_usage_instruction_value"
    if actual is None:
        yield _open(reason, name, text)
    elif actual > limit if is_maximum else actual < limit:
        yield Obstacle(reason, name, text, f"{actual:f}" if isinstance(actual, Decimal) else str(actual))


def _stacking(benefit: Benefit, cart: Cart) -> Iterator[Obstacle]:
    """Tell whether a discount that is used already rules the benefit out: "if the rewards allow stacking"."""
    for reason, name, is_allowed, is_used in (
        (ObstacleReason.AUTOMATIC_DISCOUNT, "auto_stack_limit", benefit.auto_stack_limit, cart.automatic_discount_used),
        (ObstacleReason.DISCOUNT_CODE, "code_stack_limit", benefit.code_stack_limit, cart.discount_code_used),
    ):
        if is_used and not is_allowed:
            is_certain = is_allowed is not None
            yield Obstacle(reason, name, "false" if is_certain else "", "true", is_certain=is_certain)


def _uses(benefit: Benefit, cart: Cart) -> Iterator[Obstacle]:
    """Tell whether no uses are left."""
    reason, kind, limit = ObstacleReason.USAGE_LIMIT, benefit.usage_limits_type, benefit.usage_limits_times
    uses = cart.uses.get(benefit.benefit_id, 0)
    if kind in {"", UsageLimitsType.UNLIMITED}:
        return
    if kind != UsageLimitsType.LIMITS:
        yield _open(reason, "usage_limits_type", kind, str(uses))
    elif limit is None:
        yield _open(reason, "usage_limits_times", "", str(uses))
    elif uses >= limit:
        yield Obstacle(reason, "usage_limits_times", str(limit), str(uses))


def _open(reason: ObstacleReason, name: str, limit: str, actual: str = "") -> Obstacle:
    """Tell what may speak against a benefit, because something is not known."""
    return Obstacle(reason, name, limit, actual, is_certain=False)


def _ids(ids: Iterable[str]) -> str:
    return ", ".join(islice(ids, IDS_TOLD))
