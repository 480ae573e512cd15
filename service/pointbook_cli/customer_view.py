"""`pointbook customer show`: a customer, read from a server."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import customers_pb2, identity_pb2, points_pb2, redemption_pb2
from pointbook_cli.points_import.points_file import parse_time_ms
from pointbook_cli.server_access import open_client
from pointbook_cli.token_text import parse_duration_ms
from pointbook_client import reasons
from pointbook_client.sync import PointbookClient
from pointbook_common.text import phone_text
from pointbook_server.rpc.request_fields import TIME_MS_MAX, TIME_MS_MIN
from shopline_shim.settings import ShimSettings

PAGE_SIZE_MAX = 500
KINDS = {
    "mobile": "mobile",
    "email": "email",
    "external-id": "external_id",
    "card-number": "card_number",
    "card-external-id": "card_external_id",
    "customer-id": "customer_id",
    "buyer": "buyer",
}
"""The kinds of identifiers, and the API's field of each."""
_MOBILE = re.compile(r"(\+|00)[\s()./-]*[0-9](?:[\s()./-]*[0-9]){5,}")
_GENERATED_CUSTOMER_ID = re.compile(r"c-[0-9a-f]{24}")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True, slots=True)
class CustomerQuery:
    """The customer to show, and the parts to show."""

    merchant_id: str
    kind: str
    identifier: str
    program_id: int | None = None
    since_ms: int | None = None
    limit: int = 100
    contacts: bool = False


@dataclass(frozen=True, slots=True)
class CustomerView:
    """A customer as read from a server. Parts that the token may not read are None."""

    customer: redemption_pb2.TimelineCustomer
    entries: Sequence[redemption_pb2.TimelineEntry]
    is_truncated: bool
    accounts: Sequence[points_pb2.PointsAccount] | None
    program_points: redemption_pb2.GetCustomerPointsResponse | None = None
    record: customers_pb2.Customer | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def guess_kind(identifier: str) -> str:
    """Return the kind of an identifier by its form; empty if it is ambiguous."""
    if "@" in identifier:
        return "email"
    if _MOBILE.fullmatch(phone_text(identifier)):
        return "mobile"
    if _GENERATED_CUSTOMER_ID.fullmatch(identifier):
        return "customer-id"
    return "buyer" if is_buyer(identifier) else ""


def is_buyer(identifier: str) -> bool:
    """Return whether an identifier has the form STORE/BUYER."""
    store_id, _, buyer_id = identifier.partition("/")
    return bool(store_id and buyer_id)


def parse_since_ms(text: str, now_ms: int, time_zone: tzinfo) -> int | None:
    """Parse a duration ago (30d), a day in the time zone, or RFC 3339.

    Return None if the text is none of these.
    """
    since_ms = _parse_since_ms(text, now_ms, time_zone)
    return since_ms if since_ms is not None and TIME_MS_MIN <= since_ms <= TIME_MS_MAX else None


def _parse_since_ms(text: str, now_ms: int, time_zone: tzinfo) -> int | None:
    duration_ms = parse_duration_ms(text)
    if duration_ms is not None:
        return now_ms - duration_ms
    if not _DATE.fullmatch(text):
        return parse_time_ms(text)
    try:
        return int(datetime.fromisoformat(text).replace(tzinfo=time_zone).timestamp() * 1_000)
    except (ValueError, OverflowError):
        return None


def read_view(settings: ShimSettings, query: CustomerQuery) -> CustomerView | None:
    """Read a customer from the server in the settings.

    Returns None if the merchant has no such customer. Raises OSError with the server's error.
    """
    with open_client(settings) as client:
        try:
            return _CustomerReader(client, query).read()
        except reasons.CustomerNotFoundError:
            return None


class _CustomerReader:
    """A reader of one customer from one server."""

    def __init__(self, client: PointbookClient, query: CustomerQuery) -> None:
        self._client = client
        self._query = query

    def read(self) -> CustomerView:
        query = self._query
        customer, entries, is_truncated = self._timeline()
        notes = []
        accounts, program_points = None, None
        try:
            accounts = [self._account(buyer) for buyer in customer.buyers]
            if query.program_id is not None and customer.buyers:
                program_points = self._program_points(customer.buyers[0], query.program_id)
        except reasons.ScopeMissingError:
            accounts = None
            notes.append("the token lacks the scope points.read, which shows points")
        record = self._record(customer) if query.contacts else None
        return CustomerView(customer, entries, is_truncated, accounts, program_points, record, notes)

    def _timeline(self) -> tuple[redemption_pb2.TimelineCustomer, list[redemption_pb2.TimelineEntry], bool]:
        """Return the customer, and the newest entries up to the limit."""
        limit = self._query.limit
        entries: list[redemption_pb2.TimelineEntry] = []
        for page in self._pages():
            entries += page.entries
            if len(entries) >= limit or not page.next_page_token:
                return page.customer, entries[:limit], bool(page.next_page_token) or len(entries) > limit
        raise AssertionError("a timeline has a last page")

    def _pages(self) -> Iterator[redemption_pb2.ListCustomerTimelineResponse]:
        query = self._query
        request = redemption_pb2.ListCustomerTimelineRequest(
            merchant_id=query.merchant_id, page_size=min(query.limit, PAGE_SIZE_MAX)
        )
        if query.kind == "customer-id":
            request.customer_id = query.identifier
        elif query.kind == "buyer":
            store_id, _, buyer_id = query.identifier.partition("/")
            request.customer.buyer.store_id, request.customer.buyer.buyer_id = store_id, buyer_id
        else:
            value = _international(query.identifier) if query.kind == "mobile" else query.identifier
            setattr(request.customer, KINDS[query.kind], value)
        if query.since_ms is not None:
            request.start_time.FromMilliseconds(query.since_ms)
        return self._client.pages(self._client.redemptions.ListCustomerTimeline, request)

    def _account(self, buyer: identity_pb2.Buyer) -> points_pb2.PointsAccount:
        request = points_pb2.GetPointsAccountRequest(
            merchant_id=self._query.merchant_id, store_id=buyer.store_id, buyer_id=buyer.buyer_id
        )
        return self._client.points.GetPointsAccount(request).account

    def _program_points(self, buyer: identity_pb2.Buyer, program_id: int) -> redemption_pb2.GetCustomerPointsResponse:
        customer = identity_pb2.CustomerRef(merchant_id=self._query.merchant_id, buyer=buyer)
        request = redemption_pb2.GetCustomerPointsRequest(customer=customer, program_id=program_id)
        return self._client.redemptions.GetCustomerPoints(request)

    def _record(self, customer: redemption_pb2.TimelineCustomer) -> customers_pb2.Customer | None:
        """Return the customer with their contacts; None for a buyer that no customer owns."""
        if not customer.customer.customer_id:
            return None
        request = customers_pb2.GetCustomerRequest(
            merchant_id=self._query.merchant_id, customer_id=customer.customer.customer_id
        )
        return self._client.customers.GetCustomer(request).customer


def _international(number: str) -> str:
    """Return a phone number with + instead of a leading 00."""
    typed = phone_text(number)
    return f"+{typed.removeprefix('00')}" if typed.startswith("00") else typed


def to_json(view: CustomerView, query: CustomerQuery, *, is_guessed: bool) -> str:
    """Return a view as one JSON document.

    Fields have the API's names, whole numbers are numbers. Characters that could move a terminal's cursor, hide text or
    turn its direction are escaped.
    """
    document = json.dumps(
        {
            "merchant_id": query.merchant_id,
            "identifier": {"kind": query.kind, "guessed": is_guessed},
            "customer": to_plain(view.customer),
            "contacts": None if view.record is None else to_plain(view.record),
            "accounts": None if view.accounts is None else [_account_to_plain(account) for account in view.accounts],
            "program": None
            if view.program_points is None
            else {"program_id": query.program_id, **to_plain(view.program_points)},
            "timeline": [_entry_to_plain(entry) for entry in view.entries],
            "truncated": view.is_truncated,
            "notes": list(view.notes),
        },
        indent=2,
        ensure_ascii=False,
    )
    return "\n".join(map(_escape, document.split("\n")))


def _escape(line: str) -> str:
    """Return a line of JSON with unprintable characters escaped."""
    if line.isprintable():
        return line
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in line)


def _account_to_plain(account: points_pb2.PointsAccount) -> dict[str, Any]:
    names = ("store_id", "buyer_id", "points_balance", "active_points", "held_points", "expired_points", "drift")
    expiry = to_plain(account.next_expiry) if account.HasField("next_expiry") else None
    return {name: getattr(account, name) for name in names} | {"next_expiry": expiry}


def _entry_to_plain(entry: redemption_pb2.TimelineEntry) -> dict[str, Any]:
    kind = str(entry.WhichOneof("entry"))
    return {"time": entry.time.ToJsonString(), "kind": kind, kind: to_plain(getattr(entry, kind))}


def to_plain(message: Message) -> Any:
    """Convert a message to JSON values.

    Times are in RFC 3339, enum values are names, and unset fields are omitted.
    """
    if isinstance(message, Timestamp):
        return message.ToJsonString()
    values: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            values[descriptor.name] = dict(value)
        elif descriptor.is_repeated:
            values[descriptor.name] = [_value_to_plain(descriptor, each) for each in value]
        else:
            values[descriptor.name] = _value_to_plain(descriptor, value)
    return values


def _value_to_plain(descriptor: Any, value: Any) -> Any:
    if descriptor.message_type is not None:
        return to_plain(value)
    if descriptor.enum_type is not None:
        known = descriptor.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    return value


def format_time(time: Timestamp, time_zone: tzinfo) -> str:
    """Return a time in a time zone, to the second.

    It is in UTC if the local time would be after year 9999.
    """
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time.ToMilliseconds())
    try:
        return moment.astimezone(time_zone).strftime(TIME_FORMAT)
    except OverflowError:
        return f"{moment.strftime(TIME_FORMAT)} UTC"
