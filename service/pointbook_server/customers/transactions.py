"""Transactions of customers."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.model import (
    AppliedUpdate,
    BuyerState,
    Customer,
    CustomerKey,
    CustomerUpdate,
    GroupKey,
    Identifier,
    KeysTakenError,
    UpdateKind,
    UpdateOutcome,
    UserGroup,
    contacts_of,
    customer_not_found,
    customer_ref,
)
from pointbook_server.customers.ownership import Ownership
from pointbook_server.customers.rules import contacts_from_store, newest_stamps
from pointbook_server.customers.tombstones import Tombstones
from pointbook_server.customers.webhook_update import WebhookUpdate
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import next_revision
from pointbook_server.ledger.model import AccountKey

CONTACT_CHANGED = "a contact has changed"
REDACT_WEBHOOK = "customers/redact"
"""The audited reason of a redaction by webhook."""

T = TypeVar("T")


class Quarantine(Protocol):
    """Quarantined webhooks, which may hold a customer's personal data."""

    async def erase(self, connection: Connection, merchant_id: str, buyer_ids: Collection[str]) -> None:
        """Erase the bodies of webhooks of some buyers."""


class OneTimeCodes(Protocol):
    """The one-time codes of customers."""

    async def end(self, connection: Connection, merchant_id: str, customer: str, reason: str, now_ms: int) -> None:
        """End a customer's live challenges."""


class CustomerTransactions:
    """Reads and writes customers.

    Every change increments the revision, which is the etag.

    With `register_stores`, a webhook registers its store if no merchant has it: for `pointbook dev` only.
    """

    def __init__(
        self,
        database: Database,
        quarantine: Quarantine,
        codes: OneTimeCodes,
        tombstones: Tombstones,
        *,
        register_stores: bool = False,
    ) -> None:
        self._database = database
        self._quarantine = quarantine
        self._codes = codes
        self._tombstones = tombstones
        self._register_stores = register_stores

    async def find(self, merchant_id: str, key: CustomerKey) -> Customer | None:
        """Return the customer who has an identifier or a buyer, if any."""
        async with self._database.autocommit() as connection:
            return await CustomerRepository(connection, merchant_id).find(key)

    async def find_group(self, merchant_id: str, by: GroupKey, key: str) -> UserGroup | None:
        """Return a group with its members and their buyers, if it exists."""
        async with self._database.autocommit() as connection:
            return await CustomerRepository(connection, merchant_id).find_group(by, key)

    async def put(self, customer: Customer, expected_revision: int | None, now_ms: int) -> Customer:
        """Create or replace a customer, and return them with their revision.

        Raises STORE_NOT_FOUND for a buyer of a store that the merchant does not have, STALE_ETAG, and KeysTakenError
        for keys of other customers.
        """

        async def work(_connection: Connection, ownership: Ownership) -> Customer:
            customers = ownership.customers
            await customers.check_stores([buyer.store_id for buyer in customer.buyers])
            stored = await ownership.lock_and_read(customer.customer_id)
            revision = next_revision(0 if stored is None else stored.revision, expected_revision)
            await customers.check_not_taken(customer.customer_id, customer.keys)
            await (customers.insert if stored is None else customers.update)(customer, now_ms)
            owned = set() if stored is None else stored.keys
            new, released = customer.keys - owned, owned - customer.keys
            rewritten = set() if stored is None else stored.rewritten(customer.identifiers)
            if taken := await ownership.replace(
                customer.customer_id,
                new=new,
                released=released,
                rewritten=rewritten,
                since_ms=None if stored is None else now_ms,
            ):
                raise KeysTakenError(taken)
            if stored is not None and (contacts := contacts_of(new)):
                await customers.delete_claims(customer.customer_id, [contact.kind for contact in contacts])
            return replace(customer, revision=revision)

        return await self._transaction(customer.merchant_id, work, now_ms)

    async def move(
        self,
        merchant_id: str,
        key: CustomerKey,
        from_customer_id: str,
        to_customer_id: str,
        *,
        reason: str,
        now_ms: int,
    ) -> tuple[int, int]:
        """Move a key from its owner to another customer, and return both revisions.

        Raises CUSTOMER_NOT_FOUND, KeysTakenError if a third customer owns the key, and CannotReceiveError.
        """

        async def work(_connection: Connection, ownership: Ownership) -> tuple[int, int]:
            customers = ownership.customers
            await ownership.lock([from_customer_id, to_customer_id])
            giver = await customers.require("from_customer_id", from_customer_id)
            receiver = await customers.require("to_customer_id", to_customer_id)
            if key in receiver.keys:
                return giver.revision, receiver.revision
            if key not in giver.keys:
                raise customer_not_found("identifier") if await customers.find(key) is None else KeysTakenError([key])
            if not receiver.keys_replaced_by(key):
                receiver.check_can_receive(key)
            await ownership.move(key, giver, receiver)
            await customers.update(giver, now_ms)
            await customers.update(receiver, now_ms)
            await customers.insert_audit(
                "MOVE", from_customer_id, reason, now_ms, key=key, to_customer_id=to_customer_id
            )
            return giver.revision + 1, receiver.revision + 1

        return await self._transaction(merchant_id, work, now_ms)

    async def redact(self, merchant_id: str, customer_id: str, reason: str, now_ms: int) -> int:
        """Erase a customer's personal data, and return up to which time.

        The time covers all stored updates, even of a clock that is ahead. Raises CUSTOMER_NOT_FOUND and
        KEY_NOT_CONFIGURED.
        """

        async def work(connection: Connection, ownership: Ownership) -> int:
            customers = ownership.customers
            await ownership.lock([customer_id])
            customer = await customers.require("customer_id", customer_id)
            buyers = await customers.lock_buyers(customer.buyers)
            redacted_at_ms = max(now_ms, await customers.read_newest_update_ms(buyers))
            await self._erase(connection, merchant_id, buyers, redacted_at_ms)
            await _redact(ownership, customer, buyers, redacted_at_ms, reason=reason, now_ms=now_ms)
            return redacted_at_ms

        return await self._transaction(merchant_id, work, now_ms)

    def check_key(self) -> None:
        """Raise KEY_NOT_CONFIGURED if this server has no key for tombstones."""
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
        claimants: set[str],
    ) -> list[str]:
        """Erase the personal data of a store's next buyers, and return their ids.

        It runs inside the caller's transaction. Fewer than `limit` ids are returned if there are no more. The caller
        passes the same `claimants` to each attempt of the transaction.

        Source: docs/reference/customers.md#erasing-a-store
        """
        async with self._ownership(connection, merchant_id, claimants, now_ms) as ownership:
            repository = ownership.customers
            owners = await repository.list_store_buyers(store_id, after, limit)
            customer_ids = {owner for owner in owners.values() if owner is not None}
            await ownership.lock(customer_ids)
            customers = await repository.read_all(customer_ids)
            states = await repository.lock_buyers(
                {*owners, *(buyer for customer in customers for buyer in customer.buyers)}
            )
            if any(buyer not in states or states[buyer].customer_id != owner for buyer, owner in owners.items()):
                raise RetryTransactionError  # Another call assigned a buyer to another customer before the locks.
            erased_at_ms = max(now_ms, await repository.read_newest_update_ms(owners))
            await self._erase(connection, merchant_id, {buyer: states[buyer] for buyer in owners}, erased_at_ms)
            await repository.lock_identifiers({contact for customer in customers for contact in customer.contacts})
            for customer in customers:  # Before contacts are released, or a claim could pass one to these customers.
                await repository.delete_claims_of_buyers(customer.customer_id, owners)
            for customer in customers:
                buyers = {buyer: states[buyer] for buyer in customer.buyers}
                if any(buyer.store_id != store_id for buyer in buyers):
                    await _leave_store(ownership, customer, store_id, buyers, reason=reason, now_ms=now_ms)
                else:
                    await _redact(ownership, customer, buyers, erased_at_ms, reason=reason, now_ms=now_ms)
            for buyer in owners:
                await repository.delete_empty_buyer(buyer)
        return [buyer.buyer_id for buyer in owners]

    async def count_store_buyers(self, connection: Connection, merchant_id: str, store_id: str, after: str) -> int:
        """Return how many of a store's buyers after a buyer_id have personal data."""
        return await CustomerRepository(connection, merchant_id).count_store_buyers(store_id, after)

    async def audit_store(
        self, connection: Connection, merchant_id: str, store_id: str, reason: str, now_ms: int
    ) -> None:
        """Write into the audit that a store was erased."""
        customers = CustomerRepository(connection, merchant_id)
        await customers.insert_audit("ERASE_STORE", "", reason, now_ms, store_id=store_id)

    async def apply(self, update: CustomerUpdate, now_ms: int) -> AppliedUpdate:
        """Apply a customer webhook once, in any order of arrival.

        Raises STORE_NOT_FOUND, EVENT_ID_REUSED, and KEY_NOT_CONFIGURED for a redaction.
        """

        async def work(connection: Connection, ownership: Ownership) -> AppliedUpdate:
            customers = ownership.customers
            if self._register_stores:
                await customers.register_store(update.buyer.store_id, now_ms)
            await customers.check_stores([update.buyer.store_id], is_update=True)
            webhook = await WebhookUpdate.begin(ownership, update, now_ms)
            if await webhook.is_duplicate():
                await customers.delete_empty_buyer(update.buyer)
                return AppliedUpdate(UpdateOutcome.DUPLICATE, webhook.customer_id)
            if update.updated_at_ms <= await self._redacted_at_ms(customers, update):
                await customers.delete_empty_buyer(update.buyer)
                return AppliedUpdate(UpdateOutcome.REDACTED, webhook.customer_id)
            if update.kind is not UpdateKind.REDACTED:
                await webhook.check_contradiction()
                return await webhook.apply()
            await self._erase(connection, update.merchant_id, webhook.buyers, update.updated_at_ms)
            if webhook.customer is not None:
                await _redact(
                    ownership,
                    webhook.customer,
                    webhook.buyers,
                    update.updated_at_ms,
                    reason=REDACT_WEBHOOK,
                    now_ms=now_ms,
                )
            await customers.delete_empty_buyer(update.buyer)
            await webhook.record()
            return AppliedUpdate(UpdateOutcome.APPLIED, webhook.customer_id)

        return await self._transaction(update.merchant_id, work, now_ms)

    async def _transaction(
        self, merchant_id: str, work: Callable[[Connection, Ownership], Awaitable[T]], now_ms: int
    ) -> T:
        """Run `work` in one transaction, with the ownership of keys."""
        claimants: set[str] = set()

        async def run(connection: Connection) -> T:
            async with self._ownership(connection, merchant_id, claimants, now_ms) as ownership:
                return await work(connection, ownership)

        return await self._database.transaction(run)

    @asynccontextmanager
    async def _ownership(
        self, connection: Connection, merchant_id: str, claimants: set[str], now_ms: int
    ) -> AsyncIterator[Ownership]:
        """Yield the ownership of keys, then end codes of customers with changed contacts.

        Source: docs/reference/validation-codes.md#changed-contacts
        """
        ownership = Ownership(CustomerRepository(connection, merchant_id), claimants, now_ms)
        yield ownership
        for customer_id in sorted(ownership.contacts_changed):
            await self._codes.end(connection, merchant_id, customer_ref(customer_id), CONTACT_CHANGED, now_ms)

    async def _redacted_at_ms(self, customers: CustomerRepository, update: CustomerUpdate) -> int:
        """Return when the update's buyer was last redacted; 0 for never."""
        digests = self._tombstones.digests(update.merchant_id, update.buyer)
        return await customers.read_tombstone_ms(update.buyer.store_id, digests)

    async def _erase(
        self,
        connection: Connection,
        merchant_id: str,
        buyers: Mapping[AccountKey, BuyerState],
        redacted_at_ms: int,
    ) -> None:
        """Erase what webhooks of buyers stored up to a time, and write tombstones."""
        customers = CustomerRepository(connection, merchant_id)
        digests = [self._tombstones.digest(merchant_id, buyer) for buyer in buyers]
        await customers.write_tombstones(digests, redacted_at_ms)
        await customers.delete_updates(buyers, redacted_at_ms)
        await customers.delete_claims_until(buyers, redacted_at_ms)
        for buyer, state in buyers.items():
            await customers.write_stamps(buyer, state.without_stamps_until(redacted_at_ms))
        await self._quarantine.erase(connection, merchant_id, {buyer.buyer_id for buyer in buyers})


async def _redact(
    ownership: Ownership,
    customer: Customer,
    buyers: Mapping[AccountKey, BuyerState],
    redacted_at_ms: int,
    *,
    reason: str,
    now_ms: int,
) -> None:
    """Erase a customer's personal data, except contacts from newer webhooks.

    A newer webhook may arrive before the redaction.
    """
    newer = {
        Identifier(kind, value)
        for kind, stamp in newest_stamps(buyers.values()).items()
        if stamp.at_ms > redacted_at_ms
        for value in customer.own_values(kind)
    }
    customers = ownership.customers
    await ownership.replace(customer.customer_id, new=set(), released=set(customer.identifiers) - newer)
    ownership.contacts_changed.add(customer.customer_id)
    await customers.update(replace(customer, language=""), now_ms)
    await customers.insert_audit("REDACT", customer.customer_id, reason, now_ms)


async def _leave_store(
    ownership: Ownership,
    customer: Customer,
    store_id: str,
    buyers: Mapping[AccountKey, BuyerState],
    *,
    reason: str,
    now_ms: int,
) -> None:
    """Release a customer's buyer of a store, and the contacts that the store set last."""
    contacts = {
        Identifier(kind, value) for kind in contacts_from_store(buyers, store_id) for value in customer.own_values(kind)
    }
    of_store = {buyer for buyer in buyers if buyer.store_id == store_id}
    customers = ownership.customers
    await ownership.replace(customer.customer_id, new=set(), released=contacts | of_store)
    await customers.update(customer, now_ms)
    await customers.insert_audit("REDACT", customer.customer_id, reason, now_ms, store_id=store_id)
