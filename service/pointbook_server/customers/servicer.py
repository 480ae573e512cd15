"""The gRPC face of customers and user groups."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import structlog

from pointbook.v1 import customers_pb2, customers_pb2_grpc, identity_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.clock import Clock
from pointbook_server.customers.groups import UserGroupTransactions, group_not_found
from pointbook_server.customers.model import (
    BUYERS_MAX,
    CARDS_MAX,
    CONTACTS,
    SOURCE_IDENTITIES_MAX,
    Applied,
    Customer,
    CustomerUpdate,
    GroupKey,
    Identifier,
    Key,
    KeysTakenError,
    Kind,
    Member,
    NoRoomError,
    SkipCause,
    UpdateKind,
    UpdateOutcome,
    UserGroup,
    customer_not_found,
    identifier_taken,
    read_identifier,
)
from pointbook_server.customers.transactions import CustomerTransactions
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.rpc.request_fields import (
    ID_LENGTH_MAX,
    LANGUAGE_LENGTH_MAX,
    YEAR_2000_MS,
    Fields,
    is_language,
    read_etag,
    to_timestamp,
)

EVENT_ID_LENGTH_MAX = 128
REASON_LENGTH_MAX = 500
MEMBERS_MAX = 100
FORMS = {
    Kind.MOBILE: "must be a mobile number in international form, such as +8613800000000",
    Kind.EMAIL: "must be an e-mail address",
}
OTHER_FORM = f"must be 1 to {ID_LENGTH_MAX} visible ASCII characters without spaces"
OWN = {
    "mobile": Kind.MOBILE,
    "email": Kind.EMAIL,
    "external_id": Kind.EXTERNAL_ID,
    "card_number": Kind.CARD_NUMBER,
    "card_external_id": Kind.CARD_EXTERNAL_ID,
}
"""The fields of CustomerRef and MoveIdentifierRequest that are a customer's own identifiers."""
TYPE_PREFIX = "IDENTIFIER_TYPE_"
TYPES: dict[int, Kind] = {
    identity_pb2.IdentifierType.Value(TYPE_PREFIX + kind): kind for kind in Kind if kind is not Kind.EXTERNAL_ID
}
TYPE_NUMBERS = {kind: identity_pb2.IdentifierType.ValueType(number) for number, kind in TYPES.items()}
SOURCE_PREFIX = "USER_SOURCE_"
SOURCES = {
    number: name.removeprefix(SOURCE_PREFIX)
    for name, number in identity_pb2.UserSource.items()
    if number != identity_pb2.USER_SOURCE_UNSPECIFIED
}
SOURCE_NUMBERS = {name: number for number, name in SOURCES.items()}
ACCOUNT_SOURCES = {"WECHAT", "INSTORE"}
"""The sources whose identities need an account id."""
KINDS = {customers_pb2.CustomerUpdateKind.Value(f"CUSTOMER_UPDATE_KIND_{kind}"): kind for kind in UpdateKind}
OUTCOMES = {
    outcome: customers_pb2.CustomerUpdateOutcome.Value(f"CUSTOMER_UPDATE_OUTCOME_{outcome}")
    for outcome in UpdateOutcome
}
CAUSES = {cause: customers_pb2.SkippedIdentifierCause.Value(f"SKIPPED_IDENTIFIER_CAUSE_{cause}") for cause in SkipCause}
Paths = dict[Key, str]
"""Where in the request each key stands."""

log = structlog.get_logger()

T = TypeVar("T")


class CustomersServicer(customers_pb2_grpc.CustomersServiceServicer):
    """CustomersService: each method reads its request, asks a store, and writes the answer."""

    def __init__(self, store: CustomerTransactions, groups: UserGroupTransactions, clock: Clock) -> None:
        self._store = store
        self._groups = groups
        self._clock = clock

    async def PutCustomer(
        self, request: customers_pb2.PutCustomerRequest, _context: object
    ) -> customers_pb2.PutCustomerResponse:
        """Create or replace a customer."""
        fields = Fields()
        fields.present("customer", is_present=request.HasField("customer"))
        paths: Paths = {}
        customer = _read_customer(fields, request.customer, paths)
        fields.check()
        try:
            kept = await self._store.put(customer, read_etag(request.etag), self._clock())
        except KeysTakenError as error:
            raise _taken(error, paths) from None
        return customers_pb2.PutCustomerResponse(customer=_write_customer(kept), etag=str(kept.revision))

    async def GetCustomer(
        self, request: customers_pb2.GetCustomerRequest, _context: object
    ) -> customers_pb2.GetCustomerResponse:
        """Answer one customer."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        key = _read_wanted(fields, request)
        fields.check()
        customer = None if key is None else await self._store.find(request.merchant_id, key)
        if customer is None:
            raise customer_not_found("")
        return customers_pb2.GetCustomerResponse(customer=_write_customer(customer), etag=str(customer.revision))

    async def ApplyCustomerUpdate(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, _context: object
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply a customer webhook."""
        return await self._apply(request, is_decided=False)

    async def decide(
        self, request: customers_pb2.ApplyCustomerUpdateRequest
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply a customer webhook for which an operator has decided, against another kind of the same moment."""
        return await self._apply(request, is_decided=True)

    async def _apply(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, *, is_decided: bool
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        now_ms = self._clock()
        update = replace(_read_update(request, now_ms), is_decided=is_decided)
        applied = await self._store.apply(update, now_ms)
        told = log.bind(merchant_id=update.merchant_id, customer_id=applied.customer_id)
        for kind, cause in applied.skipped.items():
            told.info("identifier of a customer webhook left out", identifier=kind.value, cause=cause.value)
        if update.kind is UpdateKind.REDACTED and applied.outcome is UpdateOutcome.APPLIED:
            told.warning("audit: customer redacted", reason="customers/redact")
        return _write_applied(applied)

    async def MoveIdentifier(
        self, request: customers_pb2.MoveIdentifierRequest, _context: object
    ) -> customers_pb2.MoveIdentifierResponse:
        """Move an identifier to another customer."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        giver = fields.identifier("from_customer_id", request.from_customer_id)
        receiver = fields.identifier("to_customer_id", request.to_customer_id)
        if giver == receiver:
            fields.wrong("to_customer_id", "must not be from_customer_id")
        reason = _read_reason(fields, request.reason)
        path = request.WhichOneof("identifier") or "identifier"
        key = _read_moved(fields, request)
        fields.check()
        assert key is not None, "without one the fields are wrong"  # noqa: S101 - narrows
        try:
            revisions = await self._store.move(
                request.merchant_id, key, giver, receiver, reason=reason, now_ms=self._clock()
            )
        except KeysTakenError as error:
            raise _taken(error, {key: path}) from None
        except NoRoomError as error:
            fields.wrong(path, str(error))
            fields.check()
            raise
        log.warning(
            "audit: identifier moved",
            merchant_id=request.merchant_id,
            customer_id=giver,
            to_customer_id=receiver,
            reason=reason,
        )
        return customers_pb2.MoveIdentifierResponse(from_etag=str(revisions[0]), to_etag=str(revisions[1]))

    async def RedactCustomer(
        self, request: customers_pb2.RedactCustomerRequest, _context: object
    ) -> customers_pb2.RedactCustomerResponse:
        """Erase a customer's personal data."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        customer_id = fields.identifier("customer_id", request.customer_id)
        reason = _read_reason(fields, request.reason)
        fields.check()
        redacted_at_ms = await self._store.redact(request.merchant_id, customer_id, reason, self._clock())
        log.warning("audit: customer redacted", merchant_id=request.merchant_id, customer_id=customer_id, reason=reason)
        return customers_pb2.RedactCustomerResponse(redact_time=to_timestamp(redacted_at_ms))

    async def PutUserGroup(
        self, request: customers_pb2.PutUserGroupRequest, _context: object
    ) -> customers_pb2.PutUserGroupResponse:
        """Create or replace a user group."""
        fields = Fields()
        fields.present("user_group", is_present=request.HasField("user_group"))
        group = _read_group(fields, request.user_group)
        fields.check()
        kept = await self._groups.put(group, read_etag(request.etag), self._clock())
        return customers_pb2.PutUserGroupResponse(user_group=_write_group(kept), etag=str(kept.revision))

    async def GetUserGroup(
        self, request: customers_pb2.GetUserGroupRequest, _context: object
    ) -> customers_pb2.GetUserGroupResponse:
        """Answer one user group."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        group_id = fields.identifier("group_id", request.group_id)
        fields.check()
        group = await self._store.group(request.merchant_id, GroupKey.ID, group_id)
        if group is None:
            raise group_not_found(group_id)
        return customers_pb2.GetUserGroupResponse(user_group=_write_group(group), etag=str(group.revision))

    async def DeleteUserGroup(
        self, request: customers_pb2.DeleteUserGroupRequest, _context: object
    ) -> customers_pb2.DeleteUserGroupResponse:
        """Delete a user group."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        group_id = fields.identifier("group_id", request.group_id)
        fields.check()
        await self._groups.delete(request.merchant_id, group_id, read_etag(request.etag))
        return customers_pb2.DeleteUserGroupResponse()


def _taken(error: KeysTakenError, paths: Paths) -> PointbookError:
    """Tell where in the request the keys stand that somebody else has, in the order of the request."""
    return identifier_taken([path for key, path in paths.items() if key in error.keys])


def _read_customer(fields: Fields, customer: customers_pb2.Customer, paths: Paths) -> Customer:
    """Read a customer, whose identifiers are kept in one order always."""
    for name in ("mobile", "email", "external_id"):
        if value := getattr(customer, name):
            _note(fields, paths, f"customer.{name}", _read_own(fields, f"customer.{name}", OWN[name], value))
    for name, kind in (("card_numbers", Kind.CARD_NUMBER), ("card_external_ids", Kind.CARD_EXTERNAL_ID)):
        values = _bounded(fields, f"customer.{name}", getattr(customer, name), CARDS_MAX)
        for path, value in values:
            _note(fields, paths, path, _read_own(fields, path, kind, value))
    for path, identity in _bounded(
        fields, "customer.source_identities", customer.source_identities, SOURCE_IDENTITIES_MAX
    ):
        _note(fields, paths, path, _read_source_identity(fields, path, identity))
    for path, buyer in _bounded(fields, "customer.buyers", customer.buyers, BUYERS_MAX):
        _note(fields, paths, path, _read_buyer(fields, path, buyer))
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
    """Read a list's items with their paths, unless there are too many."""
    found = [(f"{path}[{index}]", item) for index, item in enumerate(items)]
    if len(found) > count_max:
        fields.wrong(path, f"must have at most {count_max} items")
        return []
    return found


def _note(fields: Fields, paths: Paths, path: str, key: Key | None) -> None:
    """Note where a key stands, which may be at one place only; a wrong one is none."""
    if key is None:
        return
    if key in paths:
        fields.wrong(path, "must name each item once")
    paths.setdefault(key, path)


def _read_own(fields: Fields, path: str, kind: Kind, value: str) -> Identifier | None:
    """Read an identifier; the error says what form it must have, and no value."""
    found = read_identifier(kind, value)
    if found is None:
        fields.wrong(path, FORMS.get(kind, OTHER_FORM))
    return found


def _read_source_identity(fields: Fields, path: str, identity: identity_pb2.SourceIdentity) -> Identifier | None:
    source = SOURCES.get(identity.source)
    kind = TYPES.get(identity.identifier_type)
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


def _read_wanted(fields: Fields, request: customers_pb2.GetCustomerRequest) -> Key | None:
    """Read whom GetCustomer asks for."""
    key = request.WhichOneof("key")
    if key == "customer_id":
        return Identifier(Kind.CUSTOMER_ID, fields.identifier("customer_id", request.customer_id))
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
    return _read_own(fields, f"customer.{name}", OWN[name], getattr(customer, name))


def _read_moved(fields: Fields, request: customers_pb2.MoveIdentifierRequest) -> Key | None:
    """Read what MoveIdentifier moves."""
    name = request.WhichOneof("identifier")
    if name is None:
        fields.wrong("identifier", "is required")
        return None
    if name == "buyer":
        return _read_buyer(fields, name, request.buyer)
    if name == "source_identity":
        return _read_source_identity(fields, name, request.source_identity)
    return _read_own(fields, name, OWN[name], getattr(request, name))


def _read_reason(fields: Fields, reason: str) -> str:
    fields.present("reason", is_present=bool(reason.strip()))
    return fields.text("reason", reason, length_max=REASON_LENGTH_MAX)


def _read_update(request: customers_pb2.ApplyCustomerUpdateRequest, now_ms: int) -> CustomerUpdate:
    fields = Fields()
    kind = KINDS.get(request.kind)
    if kind is None:
        fields.wrong("kind", "must be a kind of CustomerUpdateKind")
    # What is ignored is no content: not even its digest shall outlive a redaction.
    tells = kind not in {UpdateKind.DELETED, UpdateKind.REDACTED}
    fields.present("updated_at", is_present=request.HasField("updated_at"))
    update = CustomerUpdate(
        event_id=fields.identifier("event_id", request.event_id, length_max=EVENT_ID_LENGTH_MAX),
        merchant_id=fields.identifier("merchant_id", request.merchant_id),
        buyer=AccountKey(
            fields.identifier("store_id", request.store_id), fields.identifier("buyer_id", request.buyer_id)
        ),
        kind=kind or UpdateKind.UPDATED,
        mobile=request.mobile if tells and request.HasField("mobile") else None,
        email=request.email if tells and request.HasField("email") else None,
        updated_at_ms=fields.time_ms("updated_at", request.updated_at, low=YEAR_2000_MS, high=now_ms + DAY_MS),
    )
    fields.check()
    return update


def _read_group(fields: Fields, group: customers_pb2.UserGroup) -> UserGroup:
    members = _bounded(fields, "user_group.members", group.members, MEMBERS_MAX)
    for path, member in members:
        fields.identifier(f"{path}.customer_id", member.customer_id)
    customer_ids = [member.customer_id for member in group.members]
    if len(set(customer_ids)) < len(customer_ids):
        fields.wrong("user_group.members", "must name each customer once")
    primary = fields.identifier("user_group.primary_customer_id", group.primary_customer_id)
    if primary not in customer_ids:
        fields.wrong("user_group.members", "must have the primary member among them")
    return UserGroup(
        merchant_id=fields.identifier("user_group.merchant_id", group.merchant_id),
        group_id=fields.identifier("user_group.group_id", group.group_id),
        external_id=fields.ascii("user_group.external_id", group.external_id, length_max=ID_LENGTH_MAX),
        primary_customer_id=primary,
        members=tuple(
            Member(member.customer_id, member.can_redeem, member.blocked, member.is_default) for _, member in members
        ),
    )


def _write_customer(customer: Customer) -> customers_pb2.Customer:
    def single(kind: Kind) -> str:
        return next(iter(customer.own_forms(kind)), "")

    return customers_pb2.Customer(
        merchant_id=customer.merchant_id,
        customer_id=customer.customer_id,
        mobile=single(Kind.MOBILE),
        email=single(Kind.EMAIL),
        external_id=single(Kind.EXTERNAL_ID),
        card_numbers=customer.own(Kind.CARD_NUMBER),
        card_external_ids=customer.own(Kind.CARD_EXTERNAL_ID),
        buyers=[identity_pb2.Buyer(store_id=buyer.store_id, buyer_id=buyer.buyer_id) for buyer in customer.buyers],
        source_identities=[_write_source_identity(known) for known in customer.identifiers if known.source],
        language=customer.language,
        fraud_blocked=customer.fraud_blocked,
    )


def _write_source_identity(identifier: Identifier) -> identity_pb2.SourceIdentity:
    return identity_pb2.SourceIdentity(
        source=SOURCE_NUMBERS[identifier.source],
        account_id=identifier.account_id,
        identifier_type=TYPE_NUMBERS[identifier.kind],
        value=identifier.form,
    )


def _write_applied(applied: Applied) -> customers_pb2.ApplyCustomerUpdateResponse:
    return customers_pb2.ApplyCustomerUpdateResponse(
        outcome=OUTCOMES[applied.outcome],
        customer_id=applied.customer_id,
        skipped_identifiers=[
            customers_pb2.SkippedIdentifier(identifier_type=TYPE_NUMBERS[kind], cause=CAUSES[applied.skipped[kind]])
            for kind in CONTACTS
            if kind in applied.skipped
        ],
    )


def _write_group(group: UserGroup) -> customers_pb2.UserGroup:
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
