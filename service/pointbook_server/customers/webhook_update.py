"""One customer webhook inside its transaction.

Source: docs/reference/customers.md#updates-from-webhooks
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pointbook_server.customers.model import (
    AppliedUpdate,
    BuyerState,
    Customer,
    CustomerUpdate,
    Identifier,
    IdentifierKind,
    SkipCause,
    UpdateKind,
    UpdateOutcome,
    contacts_of,
    new_customer_id,
)
from pointbook_server.customers.ownership import Ownership
from pointbook_server.customers.rules import newest_stamps, read_identifier, stated_contacts
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.reasons import Reason


@dataclass(frozen=True, slots=True)
class WebhookUpdate:
    """A webhook, its customer, and the states of the customer's buyers, all locked.

    The newest webhook of any of the customer's buyers that has a contact's field decides that contact, so the order of
    arrival does not matter. It detaches the old value even if its own value is invalid or belongs to another customer;
    in the latter case the customer claims the value until its owner loses it.
    """

    ownership: Ownership
    update: CustomerUpdate
    now_ms: int
    customer: Customer | None
    buyers: Mapping[AccountKey, BuyerState]

    @classmethod
    async def begin(cls, ownership: Ownership, update: CustomerUpdate, now_ms: int) -> "WebhookUpdate":
        """Insert the buyer if new, and lock the customer, if any, and then their buyers."""
        customers = ownership.customers
        owner = await customers.ensure_buyer(update.buyer)
        customer = None if owner is None else await ownership.lock_and_read(owner)
        buyers = await customers.lock_buyers({update.buyer, *(customer.buyers if customer else ())})
        if update.buyer not in buyers or buyers[update.buyer].customer_id != owner:
            raise RetryTransactionError  # Another call assigned the buyer to another customer before the locks.
        return cls(ownership, update, now_ms, customer, buyers)

    @property
    def customer_id(self) -> str:
        """The id of the buyer's customer; empty without one."""
        return "" if self.customer is None else self.customer.customer_id

    async def is_duplicate(self) -> bool:
        """Return whether the update is stored. Raises EVENT_ID_REUSED for other content."""
        digest = await self.ownership.customers.read_update_digest(self.update.event_id)
        if digest is not None and digest != self.update.digest:
            raise PointbookError(
                Reason.EVENT_ID_REUSED,
                "Another update has this event_id.",
                metadata={"event_id": self.update.event_id},
            )
        return digest is not None

    async def check_contradiction(self) -> None:
        """Raise EVENT_ID_REUSED if a deletion and an update may be one webhook.

        The topic is not signed, so either may be a copy of the other. The first one stays until an operator decides; an
        update that an operator has decided for is not checked.
        """
        update = self.update
        if update.is_decided or update.is_deletion is None:
            return
        customers = self.ownership.customers
        if update.contradicts(self.buyers[update.buyer]) or await customers.has_contradiction(update):
            raise PointbookError(
                Reason.EVENT_ID_REUSED,
                "A deletion and an update of the same time may be one webhook under two topics; the first one stays.",
                metadata={"event_id": update.event_id},
            )

    async def record(self) -> None:
        """Store the update, so that it is applied once."""
        await self.ownership.customers.insert_update(self.update)

    async def apply(self) -> AppliedUpdate:
        """Store the update, and apply its contacts unless newer updates have decided them."""
        await self.record()
        stated = stated_contacts(self.update)
        skipped = {kind: SkipCause.INVALID for kind, form in stated.items() if form is None}
        stamps = newest_stamps(self.buyers.values())
        changes = {kind: form or "" for kind, form in stated.items() if self.update.stamp > stamps[kind]}
        if stated and not changes:
            return AppliedUpdate(UpdateOutcome.OUTDATED, self.customer_id, skipped)
        customer = await self._ensure_customer()
        if customer is not None:
            owned = await self._replace_contacts(customer, changes)
            skipped |= {contact.kind: SkipCause.TAKEN for contact in owned}
        await self._write_stamps(changes)
        return AppliedUpdate(UpdateOutcome.APPLIED, customer.customer_id if customer else "", skipped)

    async def _ensure_customer(self) -> Customer | None:
        """Return the buyer's customer, or a new one; a deletion creates none."""
        if self.customer is not None or self.update.kind is UpdateKind.DELETED:
            return self.customer
        customer = Customer(self.update.merchant_id, new_customer_id(), buyers=(self.update.buyer,))
        await self.ownership.customers.insert(customer, self.now_ms)
        await self.ownership.customers.assign(customer.customer_id, customer.buyers)
        return customer

    async def _replace_contacts(self, customer: Customer, changes: Mapping[IdentifierKind, str]) -> set[Identifier]:
        """Replace contacts of the customer, and return those that another customer owns."""
        customers = self.ownership.customers
        identifiers = (read_identifier(kind, form) for kind, form in changes.items() if form)
        stated = {identifier for identifier in identifiers if identifier is not None}
        old = {contact for contact in customer.contacts if contact.kind in changes}
        new, released, rewritten = stated - old, old - stated, customer.rewritten(stated)
        is_existing = self.customer is not None
        if is_existing and changes:
            await customers.delete_claims(customer.customer_id, changes)
        owned = contacts_of(
            await self.ownership.replace(
                customer.customer_id,
                new=new,
                released=released,
                rewritten=rewritten,
                since_ms=self.now_ms if is_existing else None,
            )
        )
        if owned:
            claims = [contact for contact in stated if contact in owned]
            await customers.insert_claims(customer.customer_id, claims, self.update)
        if released or new - owned or rewritten:
            await customers.update(customer, self.now_ms)
        return owned

    async def _write_stamps(self, kinds: Iterable[IdentifierKind]) -> None:
        """Write that the update decided some contacts."""
        state = self.buyers[self.update.buyer]
        as_of = {**state.as_of, **dict.fromkeys(kinds, self.update.stamp)}
        await self.ownership.customers.write_stamps(self.update.buyer, replace(state, as_of=as_of))
