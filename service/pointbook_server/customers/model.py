"""Customers: what they are found by, what a webhook says of one, and the groups in which they pool points."""

import hmac
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import NamedTuple

from pointbook_common.text import ascii_digits, pasted
from pointbook_server.customers import emails, phones
from pointbook_server.errors import FieldViolation, PointbookError, Reason, key_not_configured
from pointbook_server.ledger.model import AccountKey

PASTED_LENGTH_MAX = 1_000
"""How long an identifier may be with the invisible characters and blanks that are dropped."""
CARDS_MAX = 50
SOURCE_IDENTITIES_MAX = 50
BUYERS_MAX = 100
TOMBSTONE_DOMAIN = "pointbook.tombstone.v1"
_VALUE = re.compile(r"[!-~]{1,64}")


class Kind(StrEnum):
    """What kind of identifier a value is."""

    MOBILE = "MOBILE"
    EMAIL = "EMAIL"
    EXTERNAL_ID = "EXTERNAL_ID"
    CARD_NUMBER = "CARD_NUMBER"
    CARD_EXTERNAL_ID = "CARD_EXTERNAL_ID"
    CUSTOMER_ID = "CUSTOMER_ID"


CONTACTS = (Kind.MOBILE, Kind.EMAIL)
"""What customer webhooks tell of a customer."""
SINGLE_KINDS = (Kind.MOBILE, Kind.EMAIL, Kind.EXTERNAL_ID)
"""Of which a customer has only one."""


@dataclass(frozen=True, slots=True, order=True)
class Identifier:
    """What a customer is found by: one of their own where `source` is empty, or one that an outside source knows.

    A customer's own CUSTOMER_ID is the `customer_id` itself. `value` is what is compared and unique; `written` is how
    the identifier is answered and sent to, empty where that is the same text.
    """

    kind: Kind
    value: str
    source: str = ""
    account_id: str = ""
    written: str = field(default="", compare=False)

    @property
    def form(self) -> str:
        """The identifier as it is answered and sent to."""
        return self.written or self.value

    @property
    def names(self) -> dict[str, str]:
        """The columns that name it."""
        return {"kind": self.kind, "value": self.value, "source": self.source, "account_id": self.account_id}


Key = Identifier | AccountKey
"""What belongs to one customer of a merchant at most: an identifier, or a buyer."""


def contacts_of(keys: Iterable[Key]) -> set[Identifier]:
    """Return the customers' own mobile numbers and e-mail addresses among keys."""
    return {key for key in keys if isinstance(key, Identifier) and key.kind in CONTACTS and not key.source}


@dataclass(frozen=True, slots=True)
class Customer:
    """A person inside a merchant. The revision counts the changes; 0 is a customer that is not kept yet."""

    merchant_id: str
    customer_id: str
    identifiers: tuple[Identifier, ...] = ()
    buyers: tuple[AccountKey, ...] = ()
    language: str = ""
    fraud_blocked: bool = False
    revision: int = 0
    contacts_since_ms: Mapping[Kind, int] = field(default_factory=dict)
    """Since when each contact is theirs, of those that did not come with the customer."""

    @property
    def contacts(self) -> set[Identifier]:
        """The mobile number and the e-mail address."""
        return contacts_of(self.identifiers)

    @property
    def keys(self) -> set[Key]:
        """All that belongs to the customer."""
        return {*self.identifiers, *self.buyers}

    def own(self, kind: Kind) -> list[str]:
        """Tell the customer's own identifiers of a kind."""
        return [own.value for own in self.identifiers if own.kind is kind and not own.source]

    def own_forms(self, kind: Kind) -> list[str]:
        """Return the customer's own identifiers of a kind as they are answered and sent to."""
        return [own.form for own in self.identifiers if own.kind is kind and not own.source]

    def respelled(self, identifiers: Iterable[Identifier]) -> set[Identifier]:
        """Return those of the customer's identifiers that are given in another form than before."""
        forms = {own: own.form for own in self.identifiers}
        return {given for given in identifiers if given.form != forms.get(given, given.form)}

    def check_room(self, key: Key) -> None:
        """Raise NoRoomError where the customer cannot receive a key."""
        if isinstance(key, AccountKey):
            if any(buyer.store_id == key.store_id for buyer in self.buyers):
                raise NoRoomError("must be of a store in which the receiver has no other buyer")
            count, most = len(self.buyers), BUYERS_MAX
        elif key.source:
            count, most = sum(bool(identifier.source) for identifier in self.identifiers), SOURCE_IDENTITIES_MAX
        else:
            count, most = len(self.own(key.kind)), CARDS_MAX
        if count >= most:
            raise NoRoomError(f"must not be one more than the {most} that a receiver may have")

    def replaced_by(self, key: Key) -> set[Key]:
        """Tell what a key takes the place of: of some kinds a customer has only one."""
        if isinstance(key, AccountKey) or key.source or key.kind not in SINGLE_KINDS:
            return set()
        return {Identifier(key.kind, value) for value in self.own(key.kind)}


class KeysTakenError(Exception):
    """Some keys belong to another customer, and stay there."""

    def __init__(self, keys: Iterable[Key]) -> None:
        super().__init__("keys of another customer")
        self.keys = frozenset(keys)


class NoRoomError(Exception):
    """A customer cannot receive a key; the message says what they must not have to receive it."""


class UpdateKind(StrEnum):
    """What happened to SHOPLINE's customer. Of two updates of one moment the later one here is the newer."""

    CREATED = "CREATED"
    UPDATED = "UPDATED"
    DELETED = "DELETED"
    REDACTED = "REDACTED"


_RANKS = {kind: rank for rank, kind in enumerate(UpdateKind)}
DECIDED_RANK = 10
"""How much higher an update ranks for which an operator has decided; more than there are kinds."""


class Stamp(NamedTuple):
    """How new an update is. SHOPLINE's times are whole seconds, so that kind and id order those of one moment."""

    at_ms: int
    rank: int
    event_id: str

    @property
    def is_deletion(self) -> bool:
        """Whether the update was a deletion."""
        return self.rank % DECIDED_RANK == _RANKS[UpdateKind.DELETED]


NEVER = Stamp(0, 0, "")


def read_stamp(text: str | None) -> Stamp:
    """Read a stamp that was written down; None is before all others."""
    if text is None:
        return NEVER
    at_ms, rank, event_id = text.split(" ")
    return Stamp(int(at_ms), int(rank), event_id)


def write_stamp(stamp: Stamp) -> str | None:
    """Write a stamp down."""
    return None if stamp == NEVER else f"{stamp.at_ms} {stamp.rank} {stamp.event_id}"


@dataclass(frozen=True, slots=True)
class KnownBuyer:
    """What is kept of a buyer: who owns them, if anybody, and as of which update each contact is known."""

    customer_id: str | None
    as_of: Mapping[Kind, Stamp]

    def since(self, moment_ms: int) -> "KnownBuyer":
        """Forget what is known as of a moment or before it."""
        newer = {kind: stamp if stamp.at_ms > moment_ms else NEVER for kind, stamp in self.as_of.items()}
        return KnownBuyer(self.customer_id, newer)


def newest(buyers: Iterable[KnownBuyer]) -> dict[Kind, Stamp]:
    """Tell as of which update each contact is known: the newest that told it, whichever buyer it was of."""
    found = dict.fromkeys(CONTACTS, NEVER)
    for buyer in buyers:
        found = {kind: max(stamp, buyer.as_of[kind]) for kind, stamp in found.items()}
    return found


def contacts_from_store(buyers: Mapping[AccountKey, KnownBuyer], store_id: str) -> set[Kind]:
    """Return the contacts whose newest webhook, of all a customer's buyers, was of a store."""
    of_store = newest(known for buyer, known in buyers.items() if buyer.store_id == store_id)
    return {kind for kind, stamp in newest(buyers.values()).items() if NEVER != stamp == of_store[kind]}


@dataclass(frozen=True, slots=True)
class CustomerUpdate:
    """A customer webhook. A mobile number or e-mail address of None is not told, and an empty one taken away."""

    event_id: str
    merchant_id: str
    buyer: AccountKey
    kind: UpdateKind
    mobile: str | None
    email: str | None
    updated_at_ms: int
    is_decided: bool = False
    """Whether an operator has decided for it, and against another kind of the same moment."""

    @property
    def stamp(self) -> Stamp:
        """How new the update is."""
        rank = _RANKS[self.kind] + (DECIDED_RANK if self.is_decided else 0)
        return Stamp(self.updated_at_ms, rank, self.event_id)

    @property
    def is_deletion(self) -> bool | None:
        """Whether it is a deletion, which has the body of an update; None for a redaction, whose body is its own."""
        return None if self.kind is UpdateKind.REDACTED else self.kind is UpdateKind.DELETED

    def contradicts(self, known: "KnownBuyer") -> bool:
        """Return whether the newest update of the same buyer is of the same moment, and a deletion where this is not.

        Only a decision of an operator tells which of the two is true: they may be one body under two topics.
        """
        return self.is_deletion is not None and any(
            stamp.at_ms == self.updated_at_ms and stamp.is_deletion != self.is_deletion
            for stamp in known.as_of.values()
        )

    @property
    def digest(self) -> bytes:
        """Digest the content, by which a known event_id with other content is found out."""
        content = [*self.buyer, self.kind, self.mobile, self.email, self.updated_at_ms]
        return sha256(json.dumps(content).encode()).digest()

    def says(self) -> dict[Kind, str | None]:
        """Return the contacts as they are sent to: empty for none, None for an invalid one."""
        if self.kind is UpdateKind.REDACTED:
            return {}
        if self.kind is UpdateKind.DELETED:
            return dict.fromkeys(CONTACTS, "")
        told = {Kind.MOBILE: self.mobile, Kind.EMAIL: self.email}
        return {kind: value and _form(kind, value) for kind, value in told.items() if value is not None}


class SkipCause(StrEnum):
    """Why an identifier of an update was left out."""

    INVALID = "INVALID"
    TAKEN = "TAKEN"


class UpdateOutcome(StrEnum):
    """What became of an update."""

    APPLIED = "APPLIED"
    DUPLICATE = "DUPLICATE"
    OUTDATED = "OUTDATED"
    REDACTED = "REDACTED"


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of an update, which customer it is about, if any, and what was left out."""

    outcome: UpdateOutcome
    customer_id: str = ""
    skipped: Mapping[Kind, SkipCause] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member:
    """A customer in a group, with what the group's pool takes of them."""

    customer_id: str
    can_redeem: bool = False
    blocked: bool = False
    is_default: bool = False
    fraud_blocked: bool = False
    buyers: tuple[AccountKey, ...] = ()


@dataclass(frozen=True, slots=True)
class UserGroup:
    """Customers who pool their points. The revision counts the changes; 0 is a group that is not kept yet."""

    merchant_id: str
    group_id: str
    external_id: str
    primary_customer_id: str
    members: tuple[Member, ...]
    revision: int = 0


class GroupKey(StrEnum):
    """What a group is found by: its id, its external id, its primary member, or whose default group it is."""

    ID = "ID"
    EXTERNAL_ID = "EXTERNAL_ID"
    PRIMARY_CUSTOMER = "PRIMARY_CUSTOMER"
    DEFAULT_OF_CUSTOMER = "DEFAULT_OF_CUSTOMER"


class Tombstones:
    """Names of redacted buyers that tell nobody who they were, by keys of which the first signs and all verify."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)

    def digests(self, merchant_id: str, buyer: AccountKey) -> list[bytes]:
        """Digest a buyer under every key, the signing one first, each field prefixed by its length."""
        encoded = [part.encode() for part in (TOMBSTONE_DOMAIN, merchant_id, buyer.store_id, buyer.buyer_id)]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
        return [hmac.digest(key, message, "sha256") for key in self._keys]

    def signed(self, merchant_id: str, buyer: AccountKey) -> bytes:
        """Digest a buyer under the signing key. Raises KEY_NOT_CONFIGURED where there is none."""
        self.check_key()
        return self.digests(merchant_id, buyer)[0]

    def check_key(self) -> None:
        """Raise KEY_NOT_CONFIGURED where there is no key to sign with."""
        if not self._keys:
            raise key_not_configured("POINTBOOK_CODE_KEYS", "to remember a redaction by")


def customer_not_found(field: str) -> PointbookError:
    """Tell that nobody is there by a field of the request."""
    return PointbookError(
        Reason.CUSTOMER_NOT_FOUND, "The merchant has no such customer.", metadata={"field": field} if field else {}
    )


def identifier_taken(paths: Sequence[str]) -> PointbookError:
    """Tell by their paths which fields of the request name what somebody else has."""
    return PointbookError(
        Reason.IDENTIFIER_TAKEN,
        "Something that the request gives belongs to another one already.",
        metadata={"identifier": paths[0]},
        violations=[FieldViolation(path, "belongs to another one already") for path in paths],
    )


def customer_name(customer_id: str) -> str:
    """Name a customer where a buyer whom nobody has registered may stand, too: ids have no spaces."""
    return f"customer {customer_id}"


def buyer_name(key: AccountKey) -> str:
    """Name a buyer whom nobody has registered."""
    return f"buyer {key.store_id} {key.buyer_id}"


def key_of_name(name: str) -> Key:
    """Return the key that a customer's or a buyer's name was made of."""
    kind, *ids = name.split(" ")
    return Identifier(Kind.CUSTOMER_ID, *ids) if kind == "customer" else AccountKey(*ids)


def new_customer_id() -> str:
    """Make an id that no other server makes, for a customer that a webhook creates."""
    return f"c-{secrets.token_hex(12)}"


def read_identifier(kind: Kind, text: str, default_region: str = "") -> Identifier | None:
    """Return an identifier as it was given, or None where it has no valid form.

    Invisible characters and surrounding blanks are dropped, and digits of every script are read, except in e-mail
    addresses, where they make different mailboxes. Without a default region only the international form of a mobile
    number ("+86…") is read.
    """
    if len(text) > PASTED_LENGTH_MAX:
        return None
    if kind is Kind.MOBILE:
        phone = phones.read(text, default_region)
        return None if phone is None else _identifier(kind, phone.key, phone.e164)
    if kind is Kind.EMAIL:
        address = emails.read(text)
        return None if address is None else _identifier(kind, address.key, address.written)
    value = ascii_digits(pasted(text))
    return Identifier(kind, value) if _VALUE.fullmatch(value) else None


def normalised(kind: Kind, text: str, default_region: str = "") -> str | None:
    """Return what an identifier is compared by, or None where it has no valid form."""
    found = read_identifier(kind, text, default_region)
    return None if found is None else found.value


def _identifier(kind: Kind, value: str, form: str) -> Identifier:
    return Identifier(kind, value, written="" if form == value else form)


def _form(kind: Kind, text: str) -> str | None:
    found = read_identifier(kind, text)
    return None if found is None else found.form
