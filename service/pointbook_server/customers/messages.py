"""Translation between the messages of customers.proto and the domain."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from pointbook.v1 import customers_pb2, identity_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.customers.model import (
    BUYERS_MAX,
    CARDS_MAX,
    CONTACTS,
    SOURCE_IDENTITIES_MAX,
    AppliedUpdate,
    Customer,
    CustomerKey,
    CustomerUpdate,
    GroupMember,
    Identifier,
    IdentifierKind,
    KeysTakenError,
    SkipCause,
    UpdateKind,
    UpdateOutcome,
    UserGroup,
    identifier_taken,
)
from pointbook_server.customers.rules import read_identifier
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.rpc.request_fields import (
    EVENT_ID_LENGTH_MAX,
    ID_LENGTH_MAX,
    LANGUAGE_LENGTH_MAX,
    YEAR_2000_MS,
    Fields,
    is_language,
)

MEMBERS_MAX = 100
DESCRIPTIONS = {
    IdentifierKind.MOBILE: "must be a mobile number in international form, such as +8613800000000",
    IdentifierKind.EMAIL: "must be an e-mail address",
}
OTHER_DESCRIPTION = f"must be 1 to {ID_LENGTH_MAX} visible ASCII characters without spaces"
OWN_FIELDS = {
    "mobile": IdentifierKind.MOBILE,
    "email": IdentifierKind.EMAIL,
    "external_id": IdentifierKind.EXTERNAL_ID,
    "card_number": IdentifierKind.CARD_NUMBER,
    "card_external_id": IdentifierKind.CARD_EXTERNAL_ID,
}
"""The fields of CustomerRef and MoveIdentifierRequest that hold a customer's own identifier."""
TYPE_PREFIX = "IDENTIFIER_TYPE_"
IDENTIFIER_TYPES: dict[int, IdentifierKind] = {
    identity_pb2.IdentifierType.Value(TYPE_PREFIX + kind): kind
    for kind in IdentifierKind
    if kind is not IdentifierKind.EXTERNAL_ID
}
IDENTIFIER_TYPE_NUMBERS = {
    kind: identity_pb2.IdentifierType.ValueType(number) for number, kind in IDENTIFIER_TYPES.items()
}
SOURCE_PREFIX = "USER_SOURCE_"
SOURCES = {
    number: name.removeprefix(SOURCE_PREFIX)
    for name, number in identity_pb2.UserSource.items()
    if number != identity_pb2.USER_SOURCE_UNSPECIFIED
}
SOURCE_NUMBERS = {name: number for number, name in SOURCES.items()}
ACCOUNT_SOURCES = {"WECHAT", "INSTORE"}
"""The sources whose identities require an account_id."""
UPDATE_KINDS = {customers_pb2.CustomerUpdateKind.Value(f"CUSTOMER_UPDATE_KIND_{kind}"): kind for kind in UpdateKind}
UPDATE_OUTCOMES = {
    outcome: customers_pb2.CustomerUpdateOutcome.Value(f"CUSTOMER_UPDATE_OUTCOME_{outcome}")
    for outcome in UpdateOutcome
}
SKIP_CAUSES = {
    cause: customers_pb2.SkippedIdentifierCause.Value(f"SKIPPED_IDENTIFIER_CAUSE_{cause}") for cause in SkipCause
}
KeyPaths = dict[CustomerKey, str]
"""The path of each key in the request, in the order of the request."""

T = TypeVar("T")


def keys_taken(error: KeysTakenError, paths: KeyPaths) -> PointbookError:
    """Return the error for the fields of a request whose keys other customers have."""
    return identifier_taken([path for key, path in paths.items() if key in error.keys])


def read_customer(fields: Fields, customer: customers_pb2.Customer, paths: KeyPaths) -> Customer:
    """Read a customer with sorted keys; violations and the paths of keys are added."""
    for name in ("mobile", "email", "external_id"):
        if value := getattr(customer, name):
            _add_key(fields, paths, f"customer.{name}", _read_own(fields, f"customer.{name}", OWN_FIELDS[name], value))
    for name, kind in (
        ("card_numbers", IdentifierKind.CARD_NUMBER),
        ("card_external_ids", IdentifierKind.CARD_EXTERNAL_ID),
    ):
        values = _bounded(fields, f"customer.{name}", getattr(customer, name), CARDS_MAX)
        for path, value in values:
            _add_key(fields, paths, path, _read_own(fields, path, kind, value))
    for path, identity in _bounded(
        fields, "customer.source_identities", customer.source_identities, SOURCE_IDENTITIES_MAX
    ):
        _add_key(fields, paths, path, _read_source_identity(fields, path, identity))
    for path, buyer in _bounded(fields, "customer.buyers", customer.buyers, BUYERS_MAX):
        _add_key(fields, paths, path, _read_buyer(fields, path, buyer))
    buyers = sorted(key for key in paths if isinstance(key, AccountKey))
    if len({buyer.store_id for buyer in buyers}) < len(buyers):
        fields.wrong("customer.buyers", "must have at most one buyer for each store")
    if customer.language and not is_language(customer.language):
        fields.wrong("customer.language", f"must be a BCP 47 tag of at most {LANGUAGE_LENGTH_MAX} characters")
    return Customer(
        merchant_id=fields.identifier("customer.merchant_id", customer.merchant_id),
        customer_id=fields.identifier("customer.customer_id", customer.customer_id),
        identifiers=tuple(sorted(key for key in paths if isinstance(key, Identifier))),
        buyers=tuple(buyers),
        language=customer.language,
        fraud_blocked=customer.fraud_blocked,
    )


def _bounded(fields: Fields, path: str, items: Iterable[T], count_max: int) -> list[tuple[str, T]]:
    """Return the items of a list with their paths; none if there are too many."""
    found = [(f"{path}[{index}]", item) for index, item in enumerate(items)]
    if len(found) > count_max:
        fields.wrong(path, f"must have at most {count_max} items")
        return []
    return found


def _add_key(fields: Fields, paths: KeyPaths, path: str, key: CustomerKey | None) -> None:
    """Add the path of a key, unless the key is invalid; a repeated key is a violation."""
    if key is None:
        return
    if key in paths:
        fields.wrong(path, "must name each item once")
    paths.setdefault(key, path)


def _read_own(fields: Fields, path: str, kind: IdentifierKind, value: str) -> Identifier | None:
    """Read an identifier; a violation does not quote the value."""
    found = read_identifier(kind, value)
    if found is None:
        fields.wrong(path, DESCRIPTIONS.get(kind, OTHER_DESCRIPTION))
    return found


def _read_source_identity(fields: Fields, path: str, identity: identity_pb2.SourceIdentity) -> Identifier | None:
    source = SOURCES.get(identity.source)
    kind = IDENTIFIER_TYPES.get(identity.identifier_type)
    account_id = fields.ascii(f"{path}.account_id", identity.account_id, length_max=ID_LENGTH_MAX)
    if source is None:
        fields.wrong(f"{path}.source", "must be a source of UserSource")
    elif source in ACCOUNT_SOURCES and not account_id:
        fields.wrong(f"{path}.account_id", f"is required for {source}")
    if kind is None:
        fields.wrong(f"{path}.identifier_type", "must be a type of IdentifierType")
        return None
    found = _read_own(fields, f"{path}.value", kind, identity.value)
    return None if source is None or found is None else replace(found, source=source, account_id=account_id)


def _read_buyer(fields: Fields, path: str, buyer: identity_pb2.Buyer) -> AccountKey:
    return AccountKey(
        fields.identifier(f"{path}.store_id", buyer.store_id), fields.identifier(f"{path}.buyer_id", buyer.buyer_id)
    )


def read_customer_key(fields: Fields, request: customers_pb2.GetCustomerRequest) -> CustomerKey | None:
    """Read the key of the customer that GetCustomer returns; None if it is invalid."""
    key = request.WhichOneof("key")
    if key == "customer_id":
        return Identifier(IdentifierKind.CUSTOMER_ID, fields.identifier("customer_id", request.customer_id))
    if not fields.present("key", is_present=key is not None):
        return None
    customer = request.customer
    if customer.merchant_id not in {"", request.merchant_id}:
        fields.wrong("customer.merchant_id", "must be the merchant_id of the request, or empty")
    name = customer.WhichOneof("identifier")
    if name is None:
        fields.wrong("customer.identifier", "is required")
        return None
    if name == "buyer":
        return _read_buyer(fields, "customer.buyer", customer.buyer)
    return _read_own(fields, f"customer.{name}", OWN_FIELDS[name], getattr(customer, name))


@dataclass(frozen=True, slots=True)
class Move:
    """A request to move a key between two customers; `path` is the field of the key."""

    giver_id: str
    receiver_id: str
    key: CustomerKey
    path: str
    reason: str


def read_move(request: customers_pb2.MoveIdentifierRequest) -> Move:
    """Read a request to move a key. Raises INVALID_FIELDS."""
    fields = Fields()
    fields.identifier("merchant_id", request.merchant_id)
    giver_id = fields.identifier("from_customer_id", request.from_customer_id)
    receiver_id = fields.identifier("to_customer_id", request.to_customer_id)
    if giver_id == receiver_id:
        fields.wrong("to_customer_id", "must not be from_customer_id")
    reason = fields.reason("reason", request.reason)
    key = _read_moved_key(fields, request)
    fields.check()
    assert key is not None, "an invalid key is a violation"  # noqa: S101 - narrows the type
    return Move(giver_id, receiver_id, key, request.WhichOneof("identifier") or "identifier", reason)


def _read_moved_key(fields: Fields, request: customers_pb2.MoveIdentifierRequest) -> CustomerKey | None:
    name = request.WhichOneof("identifier")
    if name is None:
        fields.wrong("identifier", "is required")
        return None
    if name == "buyer":
        return _read_buyer(fields, name, request.buyer)
    if name == "source_identity":
        return _read_source_identity(fields, name, request.source_identity)
    return _read_own(fields, name, OWN_FIELDS[name], getattr(request, name))


def read_update(request: customers_pb2.ApplyCustomerUpdateRequest, now_ms: int, *, is_decided: bool) -> CustomerUpdate:
    """Read a customer webhook. Raises INVALID_FIELDS."""
    fields = Fields()
    kind = UPDATE_KINDS.get(request.kind)
    if kind is None:
        fields.wrong("kind", "must be a kind of CustomerUpdateKind")
    # An ignored contact is not part of the content: not even its digest may outlive a redaction.
    has_contacts = kind not in {UpdateKind.DELETED, UpdateKind.REDACTED}
    fields.present("updated_at", is_present=request.HasField("updated_at"))
    update = CustomerUpdate(
        event_id=fields.identifier("event_id", request.event_id, length_max=EVENT_ID_LENGTH_MAX),
        merchant_id=fields.identifier("merchant_id", request.merchant_id),
        buyer=AccountKey(
            fields.identifier("store_id", request.store_id), fields.identifier("buyer_id", request.buyer_id)
        ),
        kind=kind or UpdateKind.UPDATED,
        mobile=request.mobile if has_contacts and request.HasField("mobile") else None,
        email=request.email if has_contacts and request.HasField("email") else None,
        updated_at_ms=fields.time_ms("updated_at", request.updated_at, low=YEAR_2000_MS, high=now_ms + DAY_MS),
        is_decided=is_decided,
    )
    fields.check()
    return update


def read_group(fields: Fields, group: customers_pb2.UserGroup) -> UserGroup:
    """Read a user group; violations are added to `fields`."""
    members = _bounded(fields, "user_group.members", group.members, MEMBERS_MAX)
    for path, member in members:
        fields.identifier(f"{path}.customer_id", member.customer_id)
    customer_ids = [member.customer_id for member in group.members]
    if len(set(customer_ids)) < len(customer_ids):
        fields.wrong("user_group.members", "must name each customer once")
    primary = fields.identifier("user_group.primary_customer_id", group.primary_customer_id)
    if primary not in customer_ids:
        fields.wrong("user_group.members", "must include the primary member")
    return UserGroup(
        merchant_id=fields.identifier("user_group.merchant_id", group.merchant_id),
        group_id=fields.identifier("user_group.group_id", group.group_id),
        external_id=fields.ascii("user_group.external_id", group.external_id, length_max=ID_LENGTH_MAX),
        primary_customer_id=primary,
        members=tuple(
            GroupMember(member.customer_id, member.can_redeem, member.blocked, member.is_default)
            for _, member in members
        ),
    )


def write_customer(customer: Customer) -> customers_pb2.Customer:
    """Return the message of a customer."""

    def single(kind: IdentifierKind) -> str:
        return next(iter(customer.own_written_forms(kind)), "")

    return customers_pb2.Customer(
        merchant_id=customer.merchant_id,
        customer_id=customer.customer_id,
        mobile=single(IdentifierKind.MOBILE),
        email=single(IdentifierKind.EMAIL),
        external_id=single(IdentifierKind.EXTERNAL_ID),
        card_numbers=customer.own_values(IdentifierKind.CARD_NUMBER),
        card_external_ids=customer.own_values(IdentifierKind.CARD_EXTERNAL_ID),
        buyers=[identity_pb2.Buyer(store_id=buyer.store_id, buyer_id=buyer.buyer_id) for buyer in customer.buyers],
        source_identities=[
            _write_source_identity(identifier) for identifier in customer.identifiers if identifier.source
        ],
        language=customer.language,
        fraud_blocked=customer.fraud_blocked,
    )


def _write_source_identity(identifier: Identifier) -> identity_pb2.SourceIdentity:
    return identity_pb2.SourceIdentity(
        source=SOURCE_NUMBERS[identifier.source],
        account_id=identifier.account_id,
        identifier_type=IDENTIFIER_TYPE_NUMBERS[identifier.kind],
        value=identifier.written_form,
    )


def write_applied(applied: AppliedUpdate) -> customers_pb2.ApplyCustomerUpdateResponse:
    """Return the response to a customer webhook."""
    return customers_pb2.ApplyCustomerUpdateResponse(
        outcome=UPDATE_OUTCOMES[applied.outcome],
        customer_id=applied.customer_id,
        skipped_identifiers=[
            customers_pb2.SkippedIdentifier(
                identifier_type=IDENTIFIER_TYPE_NUMBERS[kind], cause=SKIP_CAUSES[applied.skipped[kind]]
            )
            for kind in CONTACTS
            if kind in applied.skipped
        ],
    )


def write_group(group: UserGroup) -> customers_pb2.UserGroup:
    """Return the message of a user group, with members sorted by id."""
    members = sorted(group.members, key=lambda member: member.customer_id)
    return customers_pb2.UserGroup(
        merchant_id=group.merchant_id,
        group_id=group.group_id,
        external_id=group.external_id,
        primary_customer_id=group.primary_customer_id,
        members=[
            customers_pb2.UserGroup.Member(
                customer_id=member.customer_id,
                can_redeem=member.can_redeem,
                blocked=member.blocked,
                is_default=member.is_default,
            )
            for member in members
        ],
    )
