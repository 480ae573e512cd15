"""One customer webhook inside its transaction."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pointbook_server.customers.model import (
    Applied,
    Customer,
    CustomerUpdate,
    Identifier,
    Kind,
    KnownBuyer,
    SkipCause,
    UpdateKind,
    UpdateOutcome,
    contacts_of,
    new_customer_id,
    newest,
    read_identifier,
)
from pointbook_server.customers.ownership import Ownership
from pointbook_server.db.database import RetryTransactionError
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import AccountKey


@dataclass(frozen=True, slots=True)
class WebhookUpdate:
    """A webhook, and what is kept of the customer of its buyer, all of it locked.

    The newest webhook of any of the customer's buyers that has a contact's field decides that contact, so that the
    order in which webhooks arrive decides nothing. It detaches the old value even where its own is unreadable or
    another customer's; in the latter case the customer claims the value until its owner loses it.
    """

    ownership: Ownership
    update: CustomerUpdate
    now_ms: int
    customer: Customer | None
    buyers: Mapping[AccountKey, KnownBuyer]

    @classmethod
    async def begin(cls, ownership: Ownership, update: CustomerUpdate, now_ms: int) -> "WebhookUpdate":
        """Lock the customer, if the buyer has one, and then the buyers, of whom ours is opened before."""
        book = ownership.book
        owner = await book.open_buyer(update.buyer)
        customer = None if owner is None else await ownership.locked(owner)
        buyers = await book.lock_buyers({update.buyer, *(customer.buyers if customer else ())})
        if update.buyer not in buyers or buyers[update.buyer].customer_id != owner:
            raise RetryTransactionError  # Another call gave the buyer to somebody else before the locks.
        return cls(ownership, update, now_ms, customer, buyers)

    @property
    def customer_id(self) -> str:
        """Who owns the buyer; empty for nobody."""
        return "" if self.customer is None else self.customer.customer_id

    async def was_seen(self) -> bool:
        """Tell whether the update was seen before. Raises EVENT_ID_REUSED for another one under its id."""
        digest = await self.ownership.book.update_digest(self.update.event_id)
        if digest is not None and digest != self.update.digest:
            raise PointbookError(
                Reason.EVENT_ID_REUSED,
                "The event_id is known with other content.",
                metadata={"event_id": self.update.event_id},
            )
        return digest is not None

    async def check_contradiction(self) -> None:
        """Raise EVENT_ID_REUSED for a deletion and an update of one buyer and moment, which may be one body.

        The topic is not signed, so that either may be a copy of the other. The first that came stays until an operator
        decides; an update that an operator has decided for is not checked.
        """
        update = self.update
        if update.is_decided or update.is_deletion is None:
            return
        if update.contradicts(self.buyers[update.buyer]) or await self.ownership.book.contradicts(update):
            raise PointbookError(
                Reason.EVENT_ID_REUSED,
                "A deletion and an update of the same moment may be one webhook under two topics; the first one stays.",
                metadata={"event_id": update.event_id},
            )

    async def remember(self) -> None:
        """Remember that the update was seen."""
        await self.ownership.book.remember_update(self.update)

    async def write(self) -> Applied:
        """Write what the update has of contacts that no newer one has decided."""
        await self.remember()
        says = self.update.says()
        skipped = {kind: SkipCause.INVALID for kind, value in says.items() if value is None}
        known = newest(self.buyers.values())
        news = {kind: value or "" for kind, value in says.items() if self.update.stamp > known[kind]}
        if says and not news:
            return Applied(UpdateOutcome.OUTDATED, self.customer_id, skipped)
        customer = await self._customer()
        if customer is not None:
            owned = await self._replace(customer, news)
            skipped |= {contact.kind: SkipCause.TAKEN for contact in owned}
        await self._stamp(news)
        return Applied(UpdateOutcome.APPLIED, customer.customer_id if customer else "", skipped)

    async def _customer(self) -> Customer | None:
        """Give the customer of the buyer, a new one where there is none; for a deletion there need not be any."""
        if self.customer is not None or self.update.kind is UpdateKind.DELETED:
            return self.customer
        customer = Customer(self.update.merchant_id, new_customer_id(), buyers=(self.update.buyer,))
        await self.ownership.book.create(customer, self.now_ms)
        await self.ownership.book.take(customer.customer_id, customer.buyers)
        return customer

    async def _replace(self, customer: Customer, news: Mapping[Kind, str]) -> set[Identifier]:
        """Replace the customer's contacts by the news, and return those that another customer owns."""
        book = self.ownership.book
        read = (read_identifier(kind, value) for kind, value in news.items() if value)
        wanted = {identifier for identifier in read if identifier is not None}
        old = {contact for contact in customer.contacts if contact.kind in news}
        new, freed, respelled = wanted - old, old - wanted, customer.respelled(wanted)
        is_known = self.customer is not None
        if is_known and news:
            await book.end_claims(customer.customer_id, news)
        owned = contacts_of(
            await self.ownership.replace(
                customer.customer_id,
                new=new,
                freed=freed,
                respelled=respelled,
                since_ms=self.now_ms if is_known else None,
            )
        )
        if owned:
            await book.claim(customer.customer_id, [contact for contact in wanted if contact in owned], self.update)
        if freed or new - owned or respelled:
            await book.update(customer, self.now_ms)
        return owned

    async def _stamp(self, kinds: Iterable[Kind]) -> None:
        """Record that the update decided some contacts."""
        known = self.buyers[self.update.buyer]
        as_of = {**known.as_of, **dict.fromkeys(kinds, self.update.stamp)}
        await self.ownership.book.stamp(self.update.buyer, replace(known, as_of=as_of))
