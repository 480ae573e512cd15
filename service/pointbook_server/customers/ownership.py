"""All changes to the ownership of keys, inside one transaction."""

from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.model import Customer, CustomerKey, Identifier, contacts_of
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.ledger.model import AccountKey


class Ownership:
    """Changes the owners of keys, and gives a released contact to its claimant.

    If several customers claim it, the newest claim counts.

    The claimant is only known under the contact's lock. Locking the claimant then breaks the lock order, so it never
    waits: if another transaction has locked them, this one runs again, and locks the `claimants` of its earlier
    attempts together with its own customers.

    Source: docs/reference/customers.md#updates-from-webhooks
    """

    def __init__(self, customers: CustomerRepository, claimants: set[str], now_ms: int) -> None:
        self.customers = customers
        self.contacts_changed: set[str] = set()
        """The customers whose open one-time codes end, since one of their contacts has changed."""
        self._now_ms = now_ms
        self._claimants = claimants
        self._locked: set[str] = set()

    async def lock(self, customer_ids: Iterable[str]) -> set[str]:
        """Lock customers in sorted order, and return the ids of those that exist."""
        self._locked = await self.customers.lock({*customer_ids, *self._claimants})
        return self._locked

    async def lock_and_read(self, customer_id: str) -> Customer | None:
        """Lock a customer, and return them as of then."""
        return await self.customers.read(customer_id) if customer_id in await self.lock([customer_id]) else None

    async def replace(
        self,
        customer_id: str,
        *,
        new: AbstractSet[CustomerKey],
        released: AbstractSet[CustomerKey],
        rewritten: AbstractSet[Identifier] = frozenset(),
        since_ms: int | None = None,
    ) -> set[CustomerKey]:
        """Replace keys of a locked customer, and return the new keys that others own.

        `rewritten` are identifiers that stay with the customer in another written form. `since_ms` is the time from
        which the customer has the new contacts; None for those of a new customer.
        """
        contacts, buyers = contacts_of(new), {key for key in new if isinstance(key, AccountKey)}
        taken = await self.customers.assign(customer_id, buyers)
        owned = await self.customers.lock_identifiers(contacts | contacts_of([*released, *rewritten])) & contacts
        taken |= await self.customers.assign(customer_id, new - buyers - owned, since_ms)
        if contacts & taken:
            raise RetryTransactionError  # Another call took the contact after its owner was read.
        await self.customers.rewrite(customer_id, rewritten)
        await self._release(customer_id, released)
        if contacts_of(released) or (since_ms is not None and contacts - owned):
            self.contacts_changed.add(customer_id)
        return owned | taken

    async def move(self, key: CustomerKey, giver: Customer, receiver: Customer) -> None:
        """Move a key between two locked customers; it replaces the receiver's single one."""
        replaced = receiver.keys_replaced_by(key)
        contacts = contacts_of([key])
        await self.customers.lock_identifiers(contacts | contacts_of(replaced))
        await self._release(receiver.customer_id, replaced)
        await self.customers.move(key, giver.customer_id, receiver.customer_id, self._now_ms)
        if contacts:
            await self.customers.delete_claims(receiver.customer_id, [contact.kind for contact in contacts])
            self.contacts_changed |= {giver.customer_id, receiver.customer_id}

    async def _release(self, customer_id: str, keys: AbstractSet[CustomerKey]) -> None:
        """Release keys of a locked customer, and pass claimed contacts to their claimants."""
        claimants = await self._lock_claimants(contacts_of(keys))
        await self.customers.release(customer_id, keys - claimants.keys())
        for contact, claimant in claimants.items():
            await self.customers.move(contact, customer_id, claimant, self._now_ms)
            await self.customers.rewrite(claimant, [contact])
            await self.customers.delete_claims(claimant, [contact.kind])
        if claimants:
            await self.customers.increment_revisions(claimants.values(), self._now_ms)
            self.contacts_changed |= set(claimants.values())

    async def _lock_claimants(self, contacts: Collection[Identifier]) -> dict[Identifier, str]:
        """Return the newest claimant of each claimed contact, all of them locked."""
        claimants = await self.customers.find_claimants(contacts)
        unlocked = set(claimants.values()) - self._locked
        if not unlocked:
            return claimants
        self._claimants |= unlocked
        self._locked |= await self.customers.lock(unlocked, skip_locked=True)
        # A claim may have ended before its customer was locked.
        if unlocked - self._locked or await self.customers.find_claimants(contacts) != claimants:
            raise RetryTransactionError
        return claimants
