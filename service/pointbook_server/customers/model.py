"""Customers, their identifiers, customer webhooks and user groups.

Source: docs/reference/customers.md#identifiers
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import NamedTuple

from pointbook_server.errors import FieldViolation, PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.reasons import Reason

CARDS_MAX = 50
SOURCE_IDENTITIES_MAX = 50
BUYERS_MAX = 100


class IdentifierKind(StrEnum):
    """The kind of an identifier: a name of IdentifierType, or EXTERNAL_ID."""

    MOBILE = "MOBILE"
    EMAIL = "EMAIL"
    EXTERNAL_ID = "EXTERNAL_ID"
    CARD_NUMBER = "CARD_NUMBER"
    CARD_EXTERNAL_ID = "CARD_EXTERNAL_ID"
    CUSTOMER_ID = "CUSTOMER_ID"


CONTACTS = (IdentifierKind.MOBILE, IdentifierKind.EMAIL)
"""The identifiers that customer webhooks have."""
SINGLE_KINDS = (IdentifierKind.MOBILE, IdentifierKind.EMAIL, IdentifierKind.EXTERNAL_ID)
"""The identifiers of which a customer has at most one."""


@dataclass(frozen=True, slots=True, order=True)
class Identifier:
    """An identifier: a customer's own if `source` is empty, or an outside source's.

    A customer's own CUSTOMER_ID is the `customer_id` itself. `value` is compared and unique; `written` is the form for
    responses and sending, or empty if it equals `value`.
    """

    kind: IdentifierKind
    value: str
    source: str = ""
    account_id: str = ""
    written: str = field(default="", compare=False)

    @property
    def written_form(self) -> str:
        """The form for responses and sending."""
        return self.written or self.value

    @property
    def columns(self) -> dict[str, str]:
        """The columns of its primary key, except the merchant."""
        return {"kind": self.kind, "value": self.value, "source": self.source, "account_id": self.account_id}


CustomerKey = Identifier | AccountKey
"""A key belongs to at most one customer of a merchant: an identifier, or a buyer."""


def contacts_of(keys: Iterable[CustomerKey]) -> set[Identifier]:
    """Return the mobile numbers and e-mail addresses of customers among keys."""
    return {key for key in keys if isinstance(key, Identifier) and key.kind in CONTACTS and not key.source}


@dataclass(frozen=True, slots=True)
class Customer:
    """A person within a merchant.

    The revision counts the changes; 0 is not stored yet.
    """

    merchant_id: str
    customer_id: str
    identifiers: tuple[Identifier, ...] = ()
    buyers: tuple[AccountKey, ...] = ()
    language: str = ""
    fraud_blocked: bool = False
    revision: int = 0
    contacts_since_ms: Mapping[IdentifierKind, int] = field(default_factory=dict)
    """The time from which the customer has each contact; absent for contacts of a new customer."""

    @property
    def contacts(self) -> set[Identifier]:
        """The mobile number and the e-mail address, if any."""
        return contacts_of(self.identifiers)

    @property
    def keys(self) -> set[CustomerKey]:
        """All identifiers and buyers of the customer."""
        return {*self.identifiers, *self.buyers}

    def own_values(self, kind: IdentifierKind) -> list[str]:
        """Return the values of the customer's own identifiers of a kind."""
        return [own.value for own in self.identifiers if own.kind is kind and not own.source]

    def own_written_forms(self, kind: IdentifierKind) -> list[str]:
        """Return the written forms of the customer's own identifiers of a kind."""
        return [own.written_form for own in self.identifiers if own.kind is kind and not own.source]

    def rewritten(self, identifiers: Iterable[Identifier]) -> set[Identifier]:
        """Return those identifiers that the customer has in another written form."""
        forms = {own: own.written_form for own in self.identifiers}
        return {new for new in identifiers if new.written_form != forms.get(new, new.written_form)}

    def check_can_receive(self, key: CustomerKey) -> None:
        """Raise CannotReceiveError if the customer cannot receive a key."""
        if isinstance(key, AccountKey):
            if any(buyer.store_id == key.store_id for buyer in self.buyers):
                raise CannotReceiveError("must be of a store in which the receiver has no other buyer")
            count, count_max = len(self.buyers), BUYERS_MAX
        elif key.source:
            count, count_max = sum(bool(identifier.source) for identifier in self.identifiers), SOURCE_IDENTITIES_MAX
        else:
            count, count_max = len(self.own_values(key.kind)), CARDS_MAX
        if count >= count_max:
            raise CannotReceiveError(f"must not exceed the {count_max} that a receiver may have")

    def keys_replaced_by(self, key: CustomerKey) -> set[CustomerKey]:
        """Return the keys that a new key replaces, since of some kinds a customer has one."""
        if isinstance(key, AccountKey) or key.source or key.kind not in SINGLE_KINDS:
            return set()
        return {Identifier(key.kind, value) for value in self.own_values(key.kind)}


class KeysTakenError(Exception):
    """Some keys belong to another customer."""

    def __init__(self, keys: Iterable[CustomerKey]) -> None:
        super().__init__("keys of another customer")
        self.keys = frozenset(keys)


class CannotReceiveError(Exception):
    """A customer cannot receive a key; the message says what the key must be."""


class UpdateKind(StrEnum):
    """The event of a customer webhook; at the same time, the later one is newer."""

    CREATED = "CREATED"
    UPDATED = "UPDATED"
    DELETED = "DELETED"
    REDACTED = "REDACTED"


_RANKS = {kind: rank for rank, kind in enumerate(UpdateKind)}
DECIDED_RANK = 10
"""Added to the rank of an update that an operator has decided for; more than the number of kinds."""


class Stamp(NamedTuple):
    """The position of an update in the order of updates.

    SHOPLINE's times are whole seconds, so kind and id order updates of the same time.
    """

    at_ms: int
    rank: int
    event_id: str

    @property
    def is_deletion(self) -> bool:
        """Whether the update was a deletion."""
        return self.rank % DECIDED_RANK == _RANKS[UpdateKind.DELETED]


NEVER = Stamp(0, 0, "")


def parse_stamp(text: str | None) -> Stamp:
    """Return a stamp from its stored text; None is before all others."""
    if text is None:
        return NEVER
    at_ms, rank, event_id = text.split(" ")
    return Stamp(int(at_ms), int(rank), event_id)


def format_stamp(stamp: Stamp) -> str | None:
    """Return the text in which a stamp is stored."""
    return None if stamp == NEVER else f"{stamp.at_ms} {stamp.rank} {stamp.event_id}"


@dataclass(frozen=True, slots=True)
class BuyerState:
    """The stored state of a buyer: the owner, and the update that set each contact."""

    customer_id: str | None
    as_of: Mapping[IdentifierKind, Stamp]

    def without_stamps_until(self, until_ms: int) -> "BuyerState":
        """Return the state without stamps up to and including a time."""
        newer = {kind: stamp if stamp.at_ms > until_ms else NEVER for kind, stamp in self.as_of.items()}
        return BuyerState(self.customer_id, newer)


@dataclass(frozen=True, slots=True)
class CustomerUpdate:
    """A customer webhook; a contact is None if absent, and empty if removed."""

    event_id: str
    merchant_id: str
    buyer: AccountKey
    kind: UpdateKind
    mobile: str | None
    email: str | None
    updated_at_ms: int
    is_decided: bool = False
    """Whether an operator has decided for it, and against an update of another kind and the same time."""

    @property
    def stamp(self) -> Stamp:
        """The position of the update in the order of updates."""
        rank = _RANKS[self.kind] + (DECIDED_RANK if self.is_decided else 0)
        return Stamp(self.updated_at_ms, rank, self.event_id)

    @property
    def is_deletion(self) -> bool | None:
        """Whether it is a deletion; None for a redaction, whose body differs."""
        return None if self.kind is UpdateKind.REDACTED else self.kind is UpdateKind.DELETED

    def contradicts(self, state: "BuyerState") -> bool:
        """Return whether the buyer's newest update contradicts this one.

        They have the same time, and one of them is a deletion, so they may be one body under two topics. Only an
        operator can decide which topic is right.
        """
        return self.is_deletion is not None and any(
            stamp.at_ms == self.updated_at_ms and stamp.is_deletion != self.is_deletion
            for stamp in state.as_of.values()
        )

    @property
    def digest(self) -> bytes:
        """The digest of the content, by which a reused event_id is recognized."""
        content = [*self.buyer, self.kind, self.mobile, self.email, self.updated_at_ms]
        return sha256(json.dumps(content).encode()).digest()


class SkipCause(StrEnum):
    """Why an identifier of an update was skipped."""

    INVALID = "INVALID"
    TAKEN = "TAKEN"


class UpdateOutcome(StrEnum):
    """The effect of an update."""

    APPLIED = "APPLIED"
    DUPLICATE = "DUPLICATE"
    OUTDATED = "OUTDATED"
    REDACTED = "REDACTED"


@dataclass(frozen=True, slots=True)
class AppliedUpdate:
    """The effect of an update, its customer, if any, and the skipped identifiers."""

    outcome: UpdateOutcome
    customer_id: str = ""
    skipped: Mapping[IdentifierKind, SkipCause] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A member of a user group, with the buyers whose points the group pools."""

    customer_id: str
    can_redeem: bool = False
    blocked: bool = False
    is_default: bool = False
    fraud_blocked: bool = False
    buyers: tuple[AccountKey, ...] = ()


@dataclass(frozen=True, slots=True)
class UserGroup:
    """Customers who pool their points.

    The revision counts the changes; 0 is not stored yet.
    """

    merchant_id: str
    group_id: str
    external_id: str
    primary_customer_id: str
    members: tuple[GroupMember, ...]
    revision: int = 0


class GroupKey(StrEnum):
    """The key that a group is found by.

    Source: docs/reference/customers.md#selecting-a-group
    """

    ID = "ID"
    EXTERNAL_ID = "EXTERNAL_ID"
    PRIMARY_CUSTOMER = "PRIMARY_CUSTOMER"
    DEFAULT_OF_CUSTOMER = "DEFAULT_OF_CUSTOMER"


def customer_not_found(field: str) -> PointbookError:
    """Return the error for a field of the request that names no customer."""
    return PointbookError(
        Reason.CUSTOMER_NOT_FOUND, "The merchant has no such customer.", metadata={"field": field} if field else {}
    )


def group_not_found(group_id: str) -> PointbookError:
    """Return the error for a user group that the merchant does not have."""
    return PointbookError(
        Reason.GROUP_NOT_FOUND, "The merchant has no such user group.", metadata={"group_id": group_id}
    )


def identifier_taken(paths: Sequence[str]) -> PointbookError:
    """Return the error for fields whose values another customer or group has."""
    return PointbookError(
        Reason.IDENTIFIER_TAKEN,
        "An identifier in the request belongs to another customer or group.",
        metadata={"identifier": paths[0]},
        violations=[FieldViolation(path, "belongs to another customer or group") for path in paths],
    )


def customer_ref(customer_id: str) -> str:
    """Return the stored reference to a customer; ids have no spaces."""
    return f"customer {customer_id}"


def buyer_ref(key: AccountKey) -> str:
    """Return the stored reference to a buyer who belongs to no customer."""
    return f"buyer {key.store_id} {key.buyer_id}"


def key_of_ref(ref: str) -> CustomerKey:
    """Return the key of a stored reference to a customer or a buyer."""
    kind, *ids = ref.split(" ")
    return Identifier(IdentifierKind.CUSTOMER_ID, *ids) if kind == "customer" else AccountKey(*ids)


def new_customer_id() -> str:
    """Return a random id for a customer that a webhook creates."""
    return f"c-{secrets.token_hex(12)}"
