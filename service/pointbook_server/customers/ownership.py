"""The ownership of keys: every change of it, inside one transaction of a merchant's customers."""

from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet

from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.model import Customer, Identifier, Key, contacts_of
from pointbook_server.db.database import RetryTransactionError
from pointbook_server.ledger.model import AccountKey


class Ownership:
    """Changes who owns which keys, and passes a contact that becomes free to the newest claim to it.

    The customer with the newest claim, the heir, is only known under the contact's lock. The heir's lock is then out of
    order, so it is not waited for: if another transaction holds it, this one runs again, and locks the `heirs` of its
    earlier attempts together with its own customers.
    """

    def __init__(self, book: CustomerRepository, heirs: set[str], now_ms: int) -> None:
        self.book = book
        self.changed: set[str] = set()
        """The customers whose open one-time codes end, because a contact of theirs has changed."""
        self._now_ms = now_ms
        self._heirs = heirs
        self._locked: set[str] = set()

    async def lock(self, customer_ids: Iterable[str]) -> set[str]:
        """Lock customers in sorted order, and return those that exist."""
        self._locked = await self.book.lock({*customer_ids, *self._heirs})
        return self._locked

    async def locked(self, customer_id: str) -> Customer | None:
        """Lock a customer and read them under the lock."""
        return await self.book.read(customer_id) if customer_id in await self.lock([customer_id]) else None

    async def replace(
        self,
        customer_id: str,
        *,
        new: AbstractSet[Key],
        freed: AbstractSet[Key],
        respelled: AbstractSet[Identifier] = frozenset(),
        since_ms: int | None = None,
    ) -> set[Key]:
        """Replace keys of a locked customer, and return the new ones that another customer owns.

        `respelled` are identifiers that the customer keeps, in another form. `since_ms` is when the customer gets the
        new contacts; None where they come with the customer.
        """
        contacts, buyers = contacts_of(new), {key for key in new if isinstance(key, AccountKey)}
        left_out = await self.book.take(customer_id, buyers)
        owned = await self.book.lock_identifiers(contacts | contacts_of([*freed, *respelled])) & contacts
        left_out |= await self.book.take(customer_id, new - buyers - owned, since_ms)
        if contacts & left_out:
            raise RetryTransactionError  # Another call took the contact after we looked for its owner.
        await self.book.respell(customer_id, respelled)
        await self._free(customer_id, freed)
        if contacts_of(freed) or (since_ms is not None and contacts - owned):
            self.changed.add(customer_id)
        return owned | left_out

    async def move(self, key: Key, giver: Customer, receiver: Customer) -> None:
        """Move a key between two locked customers, in place of the receiver's own of that kind."""
        replaced = receiver.replaced_by(key)
        contacts = contacts_of([key])
        await self.book.lock_identifiers(contacts | contacts_of(replaced))
        await self._free(receiver.customer_id, replaced)
        await self.book.move(key, giver.customer_id, receiver.customer_id, self._now_ms)
        if contacts:
            await self.book.end_claims(receiver.customer_id, [contact.kind for contact in contacts])
            self.changed |= {giver.customer_id, receiver.customer_id}

    async def _free(self, customer_id: str, keys: AbstractSet[Key]) -> None:
        """Free keys of the locked customer who owns them, and pass on the contacts that others claim."""
        heirs = await self._lock_heirs(contacts_of(keys))
        await self.book.free(customer_id, keys - heirs.keys())
        for contact, heir in heirs.items():
            await self.book.move(contact, customer_id, heir, self._now_ms)
            await self.book.respell(heir, [contact])
            await self.book.end_claims(heir, [contact.kind])
        if heirs:
            await self.book.count_changes(heirs.values(), self._now_ms)
            self.changed |= set(heirs.values())

    async def _lock_heirs(self, contacts: Collection[Identifier]) -> dict[Identifier, str]:
        """Return which customer gets each contact that becomes free, each of them locked."""
        heirs = await self.book.heirs(contacts)
        unlocked = set(heirs.values()) - self._locked
        if not unlocked:
            return heirs
        self._heirs |= unlocked
        self._locked |= await self.book.lock(unlocked, skip_locked=True)
        # A claim may have ended before its customer was locked.
        if unlocked - self._locked or await self.book.heirs(contacts) != heirs:
            raise RetryTransactionError
        return heirs
