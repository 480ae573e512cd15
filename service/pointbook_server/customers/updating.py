"""One customer webhook inside its transaction."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from pointbook_server.customers.book import CustomersBook
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
    new_customer_id,
    newest,
)
from pointbook_server.database import RetryTransactionError
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import AccountKey


@dataclass(frozen=True, slots=True)
class Updating:
    """A webhook, and what is kept of the customer of its buyer, all of it locked.

    What a customer's contacts are is decided by the newest webhook that told each of them, whichever of the customer's
    buyers it was of, so that the order in which webhooks arrive decides nothing.
    """

    book: CustomersBook
    update: CustomerUpdate
    now_ms: int
    customer: Customer | None
    buyers: Mapping[AccountKey, KnownBuyer]
    end_codes: Callable[[str], Awaitable[None]]
    """Ends the open one-time codes of a customer."""

    @classmethod
    async def begin(
        cls, book: CustomersBook, update: CustomerUpdate, now_ms: int, end_codes: Callable[[str], Awaitable[None]]
    ) -> "Updating":
        """Lock the customer, if the buyer has one, and then the buyers, of whom ours is opened before."""
        owner = await book.open_buyer(update.buyer)
        customer = None if owner is None else await book.locked(owner)
        buyers = await book.lock_buyers({update.buyer, *(customer.buyers if customer else ())})
        if update.buyer not in buyers or buyers[update.buyer].customer_id != owner:
            raise RetryTransactionError  # Another call gave the buyer to somebody else before the locks.
        return cls(book, update, now_ms, customer, buyers, end_codes)

    @property
    def customer_id(self) -> str:
        """Who owns the buyer; empty for nobody."""
        return "" if self.customer is None else self.customer.customer_id

    async def was_seen(self) -> bool:
        """Tell whether the update was seen before. Raises EVENT_ID_REUSED for another one under its id."""
        digest = await self.book.update_digest(self.update.event_id)
        if digest is not None and digest != self.update.digest:
            raise PointbookError(
                Reason.EVENT_ID_REUSED,
                "The event_id is known with other content.",
                metadata={"event_id": self.update.event_id},
            )
        return digest is not None

    async def remember(self) -> None:
        """Remember that the update was seen."""
        await self.book.remember_update(self.update)

    async def write(self) -> Applied:
        """Write what the update tells that no newer one has told."""
        await self.remember()
        says = self.update.says()
        skipped = {kind: SkipCause.INVALID for kind, value in says.items() if value is None}
        told = {kind: value for kind, value in says.items() if value is not None}
        known = newest(self.buyers.values())
        news = {kind: value for kind, value in told.items() if self.update.stamp > known[kind]}
        if told and not news:
            return Applied(UpdateOutcome.OUTDATED, self.customer_id, skipped)
        customer = await self._customer()
        if customer is not None:
            taken = await self._replace(customer, news)
            skipped |= dict.fromkeys(taken, SkipCause.TAKEN)
            news = {kind: value for kind, value in news.items() if kind not in taken}
        await self._stamp(news)
        return Applied(UpdateOutcome.APPLIED, customer.customer_id if customer else "", skipped)

    async def _customer(self) -> Customer | None:
        """Give the customer of the buyer, a new one where there is none; for a deletion there need not be any."""
        if self.customer is not None or self.update.kind is UpdateKind.DELETED:
            return self.customer
        customer = Customer(self.update.merchant_id, new_customer_id(), buyers=(self.update.buyer,))
        await self.book.create(customer, self.now_ms)
        await self.book.take(customer.customer_id, customer.buyers)
        return customer

    async def _replace(self, customer: Customer, news: Mapping[Kind, str]) -> set[Kind]:
        """Give the customer their new contacts in place of the old ones; tells those that somebody else has."""
        wanted = {Identifier(kind, value) for kind, value in news.items() if value}
        since_ms = None if self.customer is None else self.now_ms
        new = wanted - customer.keys
        left_out = await self.book.take(customer.customer_id, new, since_ms)
        taken = {identifier.kind for identifier in wanted & left_out}
        replaced = {Identifier(kind, value) for kind in news.keys() - taken for value in customer.own(kind)} - wanted
        await self.book.free(customer.customer_id, replaced)
        if news.keys() - taken:
            await self.book.update(customer, self.now_ms)
        if replaced or new - left_out:
            await self.end_codes(customer.customer_id)
        return taken

    async def _stamp(self, kinds: Iterable[Kind]) -> None:
        """Note that the update told some contacts."""
        known = self.buyers[self.update.buyer]
        as_of = {**known.as_of, **dict.fromkeys(kinds, self.update.stamp)}
        await self.book.stamp(self.update.buyer, replace(known, as_of=as_of))
