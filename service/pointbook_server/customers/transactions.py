"""The transactions of customers: each of its own, on the book of a merchant's customers."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.model import (
    Applied,
    Customer,
    CustomerUpdate,
    GroupKey,
    Identifier,
    Key,
    KeysTakenError,
    KnownBuyer,
    Tombstones,
    UpdateKind,
    UpdateOutcome,
    UserGroup,
    contacts_from_store,
    contacts_of,
    customer_name,
    customer_not_found,
    newest,
)
from pointbook_server.customers.ownership import Ownership
from pointbook_server.customers.webhook_update import WebhookUpdate
from pointbook_server.db.database import Connection, Database, RetryTransactionError
from pointbook_server.errors import next_revision
from pointbook_server.ledger.model import AccountKey

CONTACT_CHANGED = "a contact has changed"
REDACT_WEBHOOK = "customers/redact"
"""The reason of a redaction that a webhook asked for."""

T = TypeVar("T")


class Quarantine(Protocol):
    """Where webhooks with a customer's personal data may lie."""

    async def erase(self, connection: Connection, merchant_id: str, buyer_ids: Collection[str]) -> None:
        """Erase the bodies that tell of some buyers."""


class Codes(Protocol):
    """Where one-time codes of customers are."""

    async def end(self, connection: Connection, merchant_id: str, customer: str, reason: str, now_ms: int) -> None:
        """End a customer's open code."""


class CustomerTransactions:
    """Reads and writes customers. A revision counts up with every change of a customer, and is the etag.

    With `register_stores` an unknown store is registered for the merchant whose webhook first names it: for
    `pointbook dev` only.
    """

    def __init__(
        self,
        database: Database,
        quarantine: Quarantine,
        codes: Codes,
        tombstones: Tombstones,
        *,
        register_stores: bool = False,
    ) -> None:
        self._database = database
        self._quarantine = quarantine
        self._codes = codes
        self._tombstones = tombstones
        self._register_stores = register_stores

    async def find(self, merchant_id: str, key: Key) -> Customer | None:
        """Read the customer whom an identifier or a buyer belongs to, in one statement."""
        async with self._database.autocommit() as connection:
            return await CustomerRepository(connection, merchant_id).find(key)

    async def group(self, merchant_id: str, by: GroupKey, key: str) -> UserGroup | None:
        """Read a group with its members and their buyers, in one statement."""
        async with self._database.autocommit() as connection:
            return await CustomerRepository(connection, merchant_id).group(by, key)

    async def put(self, customer: Customer, expected_revision: int | None, now_ms: int) -> Customer:
        """Create or replace a customer, and answer them as they are kept.

        Raises STORE_NOT_FOUND for a buyer of another merchant's store, STALE_ETAG where another revision was expected,
        and KeysTakenError for keys of other customers.
        """

        async def work(_connection: Connection, ownership: Ownership) -> Customer:
            book = ownership.book
            await book.check_stores([buyer.store_id for buyer in customer.buyers])
            kept = await ownership.locked(customer.customer_id)
            revision = next_revision(0 if kept is None else kept.revision, expected_revision)
            await book.check_free(customer.customer_id, customer.keys)
            await (book.create if kept is None else book.update)(customer, now_ms)
            owned = set() if kept is None else kept.keys
            since_ms = None if kept is None else now_ms
            new, freed = customer.keys - owned, owned - customer.keys
            respelled = set() if kept is None else kept.respelled(customer.identifiers)
            if taken := await ownership.replace(
                customer.customer_id, new=new, freed=freed, respelled=respelled, since_ms=since_ms
            ):
                raise KeysTakenError(taken)
            if kept is not None and (contacts := contacts_of(new)):
                await book.end_claims(customer.customer_id, [contact.kind for contact in contacts])
            return replace(customer, revision=revision)

        return await self._transaction(customer.merchant_id, work, now_ms)

    async def move(
        self, merchant_id: str, key: Key, from_customer_id: str, to_customer_id: str, *, reason: str, now_ms: int
    ) -> tuple[int, int]:
        """Move a key from its owner to another customer, and answer both revisions.

        Raises CUSTOMER_NOT_FOUND, KeysTakenError where a third customer owns the key, and NoRoomError.
        """

        async def work(_connection: Connection, ownership: Ownership) -> tuple[int, int]:
            book = ownership.book
            await ownership.lock([from_customer_id, to_customer_id])
            giver = await book.named("from_customer_id", from_customer_id)
            receiver = await book.named("to_customer_id", to_customer_id)
            if key in receiver.keys:
                return giver.revision, receiver.revision
            if key not in giver.keys:
                raise customer_not_found("identifier") if await book.find(key) is None else KeysTakenError([key])
            if not receiver.replaced_by(key):
                receiver.check_room(key)
            await ownership.move(key, giver, receiver)
            await book.update(giver, now_ms)
            await book.update(receiver, now_ms)
            await book.audit("MOVE", from_customer_id, reason, now_ms, key=key, to_customer_id=to_customer_id)
            return giver.revision + 1, receiver.revision + 1

        return await self._transaction(merchant_id, work, now_ms)

    async def redact(self, merchant_id: str, customer_id: str, reason: str, now_ms: int) -> int:
        """Erase a customer's personal data, whatever the newest of it is as of, and answer up to when.

        Raises CUSTOMER_NOT_FOUND, and KEY_NOT_CONFIGURED where there is no key for tombstones.
        """

        async def work(connection: Connection, ownership: Ownership) -> int:
            book = ownership.book
            await ownership.lock([customer_id])
            customer = await book.named("customer_id", customer_id)
            buyers = await book.lock_buyers(customer.buyers)
            redacted_at_ms = max(now_ms, await book.newest_update_ms(buyers))
            await self._erase(connection, merchant_id, buyers, redacted_at_ms)
            await _redact(ownership, customer, buyers, redacted_at_ms, reason=reason, now_ms=now_ms)
            return redacted_at_ms

        return await self._transaction(merchant_id, work, now_ms)

    def check_key(self) -> None:
        """Raise KEY_NOT_CONFIGURED where there is no key for tombstones."""
        self._tombstones.check_key()

    async def erase_store_buyers(
        self,
        connection: Connection,
        merchant_id: str,
        store_id: str,
        *,
        after: str,
        limit: int,
        reason: str,
        now_ms: int,
        heirs: set[str],
    ) -> list[str]:
        """Erase the personal data of a store's buyers, as ProgramsService.EraseStore has it, in a transaction.

        Returns the ids of those that were erased: the first ones behind a buyer in their order, or fewer than the
        limit where there are no more. The caller keeps the `heirs` while it runs the transaction again.
        """
        async with self._ownership(connection, merchant_id, heirs, now_ms) as ownership:
            book = ownership.book
            owners = await book.store_buyers(store_id, after, limit)
            customer_ids = {owner for owner in owners.values() if owner is not None}
            await ownership.lock(customer_ids)
            customers = await book.read_all(customer_ids)
            known = await book.lock_buyers({*owners, *(buyer for customer in customers for buyer in customer.buyers)})
            if any(buyer not in known or known[buyer].customer_id != owner for buyer, owner in owners.items()):
                raise RetryTransactionError  # Another call gave a buyer to another customer before the locks.
            erased_at_ms = max(now_ms, await book.newest_update_ms(owners))
            await self._erase(connection, merchant_id, {buyer: known[buyer] for buyer in owners}, erased_at_ms)
            await book.lock_identifiers({contact for customer in customers for contact in customer.contacts})
            for customer in customers:  # Before contacts are freed, which would pass to one of them by a claim.
                await book.end_claims_of(customer.customer_id, owners)
            for customer in customers:
                buyers = {buyer: known[buyer] for buyer in customer.buyers}
                if any(buyer.store_id != store_id for buyer in buyers):
                    await _leave_store(ownership, customer, store_id, buyers, reason=reason, now_ms=now_ms)
                else:
                    await _redact(ownership, customer, buyers, erased_at_ms, reason=reason, now_ms=now_ms)
            for buyer in owners:
                await book.close_buyer(buyer)
        return [buyer.buyer_id for buyer in owners]

    async def count_store_buyers(self, connection: Connection, merchant_id: str, store_id: str, after: str) -> int:
        """Count a store's buyers with personal data behind one in their order."""
        return await CustomerRepository(connection, merchant_id).count_store_buyers(store_id, after)

    async def audit_store(
        self, connection: Connection, merchant_id: str, store_id: str, reason: str, now_ms: int
    ) -> None:
        """Audit that a store was erased."""
        await CustomerRepository(connection, merchant_id).audit("ERASE_STORE", "", reason, now_ms, store_id=store_id)

    async def apply(self, update: CustomerUpdate, now_ms: int) -> Applied:
        """Apply a customer webhook once, in whatever order webhooks come.

        Raises STORE_NOT_FOUND, EVENT_ID_REUSED, and KEY_NOT_CONFIGURED for a redaction without a key for tombstones.
        """

        async def work(connection: Connection, ownership: Ownership) -> Applied:
            book = ownership.book
            if self._register_stores:
                await book.register_store(update.buyer.store_id, now_ms)
            await book.check_stores([update.buyer.store_id], is_update=True)
            updating = await WebhookUpdate.begin(ownership, update, now_ms)
            if await updating.was_seen():
                await book.close_buyer(update.buyer)
                return Applied(UpdateOutcome.DUPLICATE, updating.customer_id)
            if update.updated_at_ms <= await self._redacted_at_ms(book, update):
                await book.close_buyer(update.buyer)
                return Applied(UpdateOutcome.REDACTED, updating.customer_id)
            if update.kind is not UpdateKind.REDACTED:
                await updating.check_contradiction()
                return await updating.write()
            await self._erase(connection, update.merchant_id, updating.buyers, update.updated_at_ms)
            if updating.customer is not None:
                await _redact(
                    ownership,
                    updating.customer,
                    updating.buyers,
                    update.updated_at_ms,
                    reason=REDACT_WEBHOOK,
                    now_ms=now_ms,
                )
            await book.close_buyer(update.buyer)
            await updating.remember()
            return Applied(UpdateOutcome.APPLIED, updating.customer_id)

        return await self._transaction(update.merchant_id, work, now_ms)

    async def _transaction(
        self, merchant_id: str, work: Callable[[Connection, Ownership], Awaitable[T]], now_ms: int
    ) -> T:
        """Run `work` in one transaction, and end the open codes of the customers whose contacts it changes."""
        heirs: set[str] = set()

        async def run(connection: Connection) -> T:
            async with self._ownership(connection, merchant_id, heirs, now_ms) as ownership:
                return await work(connection, ownership)

        return await self._database.transaction(run)

    @asynccontextmanager
    async def _ownership(
        self, connection: Connection, merchant_id: str, heirs: set[str], now_ms: int
    ) -> AsyncIterator[Ownership]:
        """Yield the ownership of keys, and end the open codes of the customers whose contacts change.

        Source: validation-codes.md.
        """
        ownership = Ownership(CustomerRepository(connection, merchant_id), heirs, now_ms)
        yield ownership
        for customer_id in sorted(ownership.changed):
            await self._codes.end(connection, merchant_id, customer_name(customer_id), CONTACT_CHANGED, now_ms)

    async def _redacted_at_ms(self, book: CustomerRepository, update: CustomerUpdate) -> int:
        """Tell when a buyer was last redacted, as far as our keys can; 0 for never."""
        digests = self._tombstones.digests(update.merchant_id, update.buyer)
        return await book.tombstone(update.buyer.store_id, digests)

    async def _erase(
        self,
        connection: Connection,
        merchant_id: str,
        buyers: Mapping[AccountKey, KnownBuyer],
        redacted_at_ms: int,
    ) -> None:
        """Erase what webhooks left of buyers as of a moment and before it, and remember the moment."""
        book = CustomerRepository(connection, merchant_id)
        digests = [self._tombstones.signed(merchant_id, buyer) for buyer in buyers]
        await book.leave_tombstones(digests, redacted_at_ms)
        await book.forget_updates(buyers, redacted_at_ms)
        await book.end_claims_until(buyers, redacted_at_ms)
        for buyer, known in buyers.items():
            await book.stamp(buyer, known.since(redacted_at_ms))
        await self._quarantine.erase(connection, merchant_id, {buyer.buyer_id for buyer in buyers})


async def _redact(
    ownership: Ownership,
    customer: Customer,
    buyers: Mapping[AccountKey, KnownBuyer],
    redacted_at_ms: int,
    *,
    reason: str,
    now_ms: int,
) -> None:
    """Erase a customer's personal data, but for what a newer webhook told: it may have come first."""
    told_since = {
        Identifier(kind, value)
        for kind, stamp in newest(buyers.values()).items()
        if stamp.at_ms > redacted_at_ms
        for value in customer.own(kind)
    }
    book = ownership.book
    await ownership.replace(customer.customer_id, new=set(), freed=set(customer.identifiers) - told_since)
    ownership.changed.add(customer.customer_id)
    await book.update(replace(customer, language=""), now_ms)
    await book.audit("REDACT", customer.customer_id, reason, now_ms)


async def _leave_store(
    ownership: Ownership,
    customer: Customer,
    store_id: str,
    buyers: Mapping[AccountKey, KnownBuyer],
    *,
    reason: str,
    now_ms: int,
) -> None:
    """Free the buyer of a store of a customer who has others, and the contacts that came from that store."""
    contacts = {
        Identifier(kind, value) for kind in contacts_from_store(buyers, store_id) for value in customer.own(kind)
    }
    of_store = {buyer for buyer in buyers if buyer.store_id == store_id}
    await ownership.replace(customer.customer_id, new=set(), freed=contacts | of_store)
    await ownership.book.update(customer, now_ms)
    await ownership.book.audit("REDACT", customer.customer_id, reason, now_ms, store_id=store_id)
