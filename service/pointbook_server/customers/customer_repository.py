"""A repository of one merchant's customers, inside the caller's transaction."""

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pointbook_server.customers import queries
from pointbook_server.customers.model import (
    BuyerState,
    Customer,
    CustomerKey,
    CustomerUpdate,
    GroupKey,
    Identifier,
    IdentifierKind,
    KeysTakenError,
    UserGroup,
    customer_not_found,
    format_stamp,
    identifier_taken,
)
from pointbook_server.db.database import Connection, Row, Statement
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import store_not_found
from pointbook_server.ledger.model import AccountKey


class CustomerRepository:
    """Reads, locks and changes a merchant's customers.

    `find` and `find_group` run one statement each.
    """

    def __init__(self, connection: Connection, merchant_id: str) -> None:
        self._connection = connection
        self._merchant_id = merchant_id

    async def find(self, key: CustomerKey) -> Customer | None:
        """Return the customer who has an identifier or a buyer, if any."""
        if isinstance(key, AccountKey):
            return await self._find(queries.FIND_BY_BUYER, key._asdict())
        if key.kind is IdentifierKind.CUSTOMER_ID and not key.source:
            return await self._find(queries.FIND_BY_ID, {"customer_id": key.value})
        return await self._find(queries.FIND_BY_IDENTIFIER, key.columns)

    async def find_all(self, keys: Collection[CustomerKey]) -> dict[CustomerKey, Customer]:
        """Return the customers who have keys, in one statement for each sort of key.

        The sorts are buyers, ids of customers, and other identifiers.
        """
        buyers, identifiers = _split(keys)
        ids = {key.value: key for key in identifiers if key.kind is IdentifierKind.CUSTOMER_ID and not key.source}
        identifiers = [key for key in identifiers if key.kind is not IdentifierKind.CUSTOMER_ID or key.source]
        found: dict[CustomerKey, Customer] = {}
        if buyers:
            rows = await self._fetch(queries.FIND_BY_BUYERS, _buyer_columns(buyers))
            found |= {AccountKey(row.store_id, row.buyer_id): queries.read_customer(row) for row in rows}
        if identifiers:
            rows = await self._fetch(queries.FIND_BY_IDENTIFIERS, _identifier_columns(identifiers))
            found |= {_identifier(row): queries.read_customer(row) for row in rows}
        if ids:
            rows = await self._fetch(queries.FIND_BY_IDS, {"customer_ids": sorted(ids)})
            found |= {ids[row.customer_id]: queries.read_customer(row) for row in rows}
        return found

    async def find_group(self, by: GroupKey, key: str) -> UserGroup | None:
        """Return a group with its members and their buyers."""
        row = await self._fetch_one(queries.FIND_GROUP[by], {"key": key})
        return None if row is None else queries.read_group(row)

    async def find_groups(self, group_ids: Collection[str]) -> dict[str, UserGroup]:
        """Return groups by their ids, with their members and their buyers."""
        rows = await self._fetch(queries.FIND_GROUPS, {"group_ids": sorted(group_ids)})
        return {row.group_id: queries.read_group(row) for row in rows}

    async def lock(self, customer_ids: Iterable[str], *, skip_locked: bool = False) -> set[str]:
        """Lock customers in sorted order, and return the ids of those that exist.

        With `skip_locked`, customers that another transaction has locked are left out.
        """
        statement = queries.LOCK_UNLOCKED_CUSTOMERS if skip_locked else queries.LOCK_CUSTOMERS
        rows = await self._fetch(statement, {"customer_ids": sorted(set(customer_ids))})
        return {row.customer_id for row in rows}

    async def read(self, customer_id: str) -> Customer | None:
        """Return a customer by id."""
        return await self._find(queries.FIND_BY_ID, {"customer_id": customer_id})

    async def read_all(self, customer_ids: Iterable[str]) -> list[Customer]:
        """Return customers by their ids, sorted by id."""
        rows = await self._fetch(queries.FIND_BY_IDS, {"customer_ids": sorted(customer_ids)})
        return sorted(map(queries.read_customer, rows), key=lambda customer: customer.customer_id)

    async def require(self, field: str, customer_id: str) -> Customer:
        """Return the customer that a field of the request names.

        Raises CUSTOMER_NOT_FOUND.
        """
        customer = await self.read(customer_id)
        if customer is None:
            raise customer_not_found(field)
        return customer

    async def register_store(self, store_id: str, now_ms: int) -> None:
        """Register a store unless it is registered."""
        await self._execute(queries.REGISTER_STORE, {"store_id": store_id, "now_ms": now_ms})

    async def check_stores(self, store_ids: Collection[str], *, is_update: bool = False) -> None:
        """Raise STORE_NOT_FOUND for the first store that the merchant does not have.

        The merchant's stores cannot be released before the transaction commits. For an update, the error says whether
        another merchant has the store, and no erasure of the stores runs concurrently.
        """
        statement = queries.SHARE_STORES if is_update else queries.LOCK_STORE_KEYS
        rows = await self._fetch(statement, {"store_ids": sorted(set(store_ids))})
        own = {row.store_id for row in rows}
        missing = next((store_id for store_id in store_ids if store_id not in own), None)
        if missing is not None:
            is_elsewhere = (
                is_update and await self._fetch_one(queries.READ_STORE_OWNER, {"store_id": missing}) is not None
            )
            raise store_not_found(missing, registered_elsewhere=is_elsewhere)

    async def insert(self, customer: Customer, now_ms: int) -> None:
        """Insert a new customer.

        If another call has just inserted them, the transaction runs again.
        """
        values = {"language": customer.language, "fraud_blocked": customer.fraud_blocked, "now_ms": now_ms}
        if not await self._count_written(queries.INSERT_CUSTOMER, {"customer_id": customer.customer_id, **values}):
            raise RetryTransactionError

    async def update(self, customer: Customer, now_ms: int) -> None:
        """Write a locked customer, except their keys, and increment the revision."""
        values = {"language": customer.language, "fraud_blocked": customer.fraud_blocked, "now_ms": now_ms}
        await self._execute(queries.UPDATE_CUSTOMER, {"customer_id": customer.customer_id, **values})

    async def increment_revisions(self, customer_ids: Iterable[str], now_ms: int) -> None:
        """Increment the revisions of locked customers."""
        await self._execute(
            queries.INCREMENT_CUSTOMER_REVISIONS, {"customer_ids": sorted(set(customer_ids)), "now_ms": now_ms}
        )

    async def check_not_taken(self, customer_id: str, keys: Collection[CustomerKey]) -> None:
        """Raise KeysTakenError for keys of other customers, before waiting for locks."""
        buyers, identifiers = _split(keys)
        taken: list[CustomerKey] = []
        if buyers:
            rows = await self._fetch(queries.READ_BUYER_OWNERS, _buyer_columns(buyers))
            taken += [AccountKey(row.store_id, row.buyer_id) for row in rows if row.customer_id != customer_id]
        if identifiers:
            rows = await self._fetch(queries.READ_IDENTIFIER_OWNERS, _identifier_columns(identifiers))
            taken += [_identifier(row) for row in rows if row.customer_id != customer_id]
        if taken:
            raise KeysTakenError(taken)

    async def lock_identifiers(self, identifiers: Collection[Identifier]) -> set[Identifier]:
        """Lock identifiers in sorted order, after customers, and return those that exist."""
        if not identifiers:
            return set()
        rows = await self._fetch(queries.LOCK_IDENTIFIERS, _identifier_columns(sorted(identifiers)))
        return {_identifier(row) for row in rows}

    async def assign(
        self, customer_id: str, keys: Collection[CustomerKey], since_ms: int | None = None
    ) -> set[CustomerKey]:
        """Assign free keys to a locked customer, and return those of other customers.

        `since_ms` is the time from which the customer has the identifiers; None for those of a new customer.
        """
        buyers, identifiers = _split(keys)
        assigned: set[CustomerKey] = set()
        if buyers:
            params = {"customer_id": customer_id, **_buyer_columns(buyers)}
            rows = await self._fetch(queries.ASSIGN_BUYERS, params)
            assigned |= {AccountKey(row.store_id, row.buyer_id) for row in rows}
        if identifiers:
            values: dict[str, Any] = {"customer_id": customer_id, "since_ms": since_ms}
            rows = await self._fetch(queries.ASSIGN_IDENTIFIERS, values | _identifier_columns(identifiers))
            assigned |= {_identifier(row) for row in rows}
        return set(keys) - assigned

    async def rewrite(self, customer_id: str, identifiers: Collection[Identifier]) -> None:
        """Change the written forms of identifiers of a locked customer."""
        if identifiers:
            values = {"customer_id": customer_id, **_identifier_columns(identifiers)}
            await self._execute(queries.REWRITE_IDENTIFIERS, values)

    async def release(self, customer_id: str, keys: Collection[CustomerKey]) -> None:
        """Release keys of the locked customer who owns them."""
        buyers, identifiers = _split(keys)
        if buyers:
            await self.lock_buyers(buyers)
            await self._execute(queries.RELEASE_BUYERS, {"customer_id": customer_id, **_buyer_columns(buyers)})
            await self.delete_claims_of_buyers(customer_id, buyers)
        if identifiers:
            await self._execute(
                queries.RELEASE_IDENTIFIERS, {"customer_id": customer_id, **_identifier_columns(identifiers)}
            )

    async def lock_buyers(self, buyers: Iterable[AccountKey]) -> dict[AccountKey, BuyerState]:
        """Lock buyers, after customers, and return the states of those that are stored."""
        return dict(map(queries.read_buyer, await self._fetch(queries.LOCK_BUYERS, _buyer_columns(buyers))))

    async def move(self, key: CustomerKey, from_customer_id: str, to_customer_id: str, now_ms: int) -> None:
        """Move a key from one locked customer to another."""
        params = {"customer_id": from_customer_id, "to_customer_id": to_customer_id, "now_ms": now_ms}
        if isinstance(key, AccountKey):
            await self.delete_claims_of_buyers(from_customer_id, [key])
            await self._execute(queries.MOVE_BUYER, params | key._asdict())
        else:
            await self._execute(queries.MOVE_IDENTIFIER, params | key.columns)

    async def insert_claims(self, customer_id: str, contacts: Collection[Identifier], update: CustomerUpdate) -> None:
        """Insert a locked customer's claims to locked contacts of other customers.

        The claims have the stamp of an update.
        """
        await self._execute(
            queries.INSERT_CLAIMS,
            {
                "customer_id": customer_id,
                **_identifier_columns(contacts),
                **update.buyer._asdict(),
                **update.stamp._asdict(),
            },
        )

    async def delete_claims(self, customer_id: str, kinds: Iterable[IdentifierKind]) -> None:
        """Delete a locked customer's claims to contacts of some kinds."""
        await self._execute(queries.DELETE_CLAIMS, {"customer_id": customer_id, "kinds": sorted(kinds)})

    async def delete_claims_until(self, buyers: Iterable[AccountKey], until_ms: int) -> None:
        """Delete the claims from webhooks of some buyer ids, in any store, up to a time."""
        buyer_ids = sorted({buyer.buyer_id for buyer in buyers})
        await self._execute(queries.DELETE_CLAIMS_UNTIL, {"buyer_ids": buyer_ids, "until_ms": until_ms})

    async def delete_claims_of_buyers(self, customer_id: str, buyers: Iterable[AccountKey]) -> None:
        """Delete the claims of a locked customer from webhooks of some buyers."""
        await self._execute(queries.DELETE_CLAIMS_OF_BUYERS, {"customer_id": customer_id, **_buyer_columns(buyers)})

    async def find_claimants(self, contacts: Collection[Identifier]) -> dict[Identifier, str]:
        """Return the customer with the newest claim to each contact that is claimed.

        The contacts have the written form of the claim.
        """
        if not contacts:
            return {}
        rows = await self._fetch(queries.READ_CLAIMANTS, _identifier_columns(contacts))
        return {replace(_identifier(row), written=row.written or ""): row.customer_id for row in rows}

    async def ensure_buyer(self, buyer: AccountKey) -> str | None:
        """Return the id of a buyer's owner, if any; insert the buyer if not stored."""
        row = await self._fetch_one(queries.READ_BUYER, buyer._asdict())
        if row is not None:
            return str(row.customer_id) if row.customer_id else None
        await self._execute(queries.INSERT_BUYER, buyer._asdict())
        return None

    async def write_stamps(self, buyer: AccountKey, state: BuyerState) -> None:
        """Write the stamps of a locked buyer's contacts."""
        as_of = {f"{kind.lower()}_as_of": format_stamp(stamp) for kind, stamp in state.as_of.items()}
        await self._execute(queries.STAMP_BUYER, {**as_of, **buyer._asdict()})

    async def delete_empty_buyer(self, buyer: AccountKey) -> None:
        """Delete a locked buyer without owner and stamps."""
        await self._execute(queries.DELETE_EMPTY_BUYER, buyer._asdict())

    async def read_update_digest(self, event_id: str) -> bytes | None:
        """Return the digest of the stored update with an event_id, if any."""
        row = await self._fetch_one(queries.READ_UPDATE, {"event_id": event_id})
        return None if row is None else bytes(row.content_digest)

    async def insert_update(self, update: CustomerUpdate) -> None:
        """Insert an update, so that it is applied once.

        If another call has just inserted it, the transaction runs again.
        """
        values = {
            "event_id": update.event_id,
            "content_digest": update.digest,
            "updated_at_ms": update.updated_at_ms,
            "is_deletion": update.is_deletion,
            **update.buyer._asdict(),
        }
        if not await self._count_written(queries.INSERT_UPDATE, values):
            raise RetryTransactionError

    async def has_contradiction(self, update: CustomerUpdate) -> bool:
        """Return whether a stored update of the same buyer and time contradicts one."""
        values = {"updated_at_ms": update.updated_at_ms, "is_deletion": update.is_deletion, **update.buyer._asdict()}
        return await self._fetch_one(queries.READ_CONTRADICTION, values) is not None

    async def read_newest_update_ms(self, buyers: Iterable[AccountKey]) -> int:
        """Return the time of the newest update of some buyers; 0 without updates."""
        row = await self._fetch_one(queries.READ_NEWEST_UPDATE, _buyer_columns(buyers))
        return 0 if row is None else row.updated_at_ms or 0

    async def delete_updates(self, buyers: Iterable[AccountKey], redacted_at_ms: int) -> None:
        """Delete the updates of some buyers up to a time."""
        await self._execute(queries.DELETE_UPDATES, {"redacted_at_ms": redacted_at_ms, **_buyer_columns(buyers)})

    async def list_store_buyers(self, store_id: str, after: str, limit: int) -> dict[AccountKey, str | None]:
        """Return a store's next buyers that have personal data, and their customers."""
        values = {"store_id": store_id, "after": after, "limit": limit}
        rows = await self._fetch(queries.READ_STORE_BUYERS, values)
        return {AccountKey(row.store_id, row.buyer_id): row.customer_id for row in rows}

    async def count_store_buyers(self, store_id: str, after: str) -> int:
        """Return how many of a store's buyers after a buyer_id have personal data."""
        row = await self._fetch_one(queries.COUNT_STORE_BUYERS, {"store_id": store_id, "after": after})
        return 0 if row is None else int(row.buyers)

    async def read_tombstone_ms(self, store_id: str, digests: Sequence[bytes]) -> int:
        """Return when a buyer was last redacted, alone or with the store; 0 for never."""
        row = await self._fetch_one(queries.READ_TOMBSTONE, {"store_id": store_id, "digests": list(digests)})
        return 0 if row is None else row.redacted_at_ms or 0

    async def write_tombstones(self, digests: Sequence[bytes], redacted_at_ms: int) -> None:
        """Write when the buyers with some digests were redacted."""
        await self._execute(queries.WRITE_TOMBSTONES, {"digests": list(digests), "redacted_at_ms": redacted_at_ms})

    async def insert_audit(
        self,
        action: str,
        customer_id: str,
        reason: str,
        at_ms: int,
        *,
        key: CustomerKey | None = None,
        to_customer_id: str = "",
        store_id: str = "",
    ) -> None:
        """Audit a moved key, a redacted customer or an erased store.

        The audit never has the value of an identifier.
        """
        values: dict[str, Any] = {"kind": None, "store_id": store_id or None, "buyer_id": None}
        if isinstance(key, AccountKey):
            values |= {"kind": "BUYER", **key._asdict()}
        elif key is not None:
            values |= {"kind": f"{key.source} {key.kind}".strip()}
        values |= {"action": action, "customer_id": customer_id, "to_customer_id": to_customer_id or None}
        values |= {"audit_id": secrets.token_hex(12), "reason": reason, "at_ms": at_ms}
        await self._execute(queries.INSERT_AUDIT, values)

    async def check_group_conflicts(self, group: UserGroup) -> None:
        """Raise IDENTIFIER_TAKEN if another group has the external id or primary member."""
        values = {
            "group_id": group.group_id,
            "external_id": group.external_id or None,
            "primary_customer_id": group.primary_customer_id,
        }
        conflicting = await self._fetch(queries.READ_CONFLICTING_GROUPS, values)
        taken = [
            f"user_group.{name}"
            for name in ("external_id", "primary_customer_id")
            if values[name] is not None and any(group[name] == values[name] for group in conflicting)
        ]
        if taken:
            raise identifier_taken(taken)

    async def insert_group(self, group: UserGroup, now_ms: int) -> None:
        """Insert a group of locked members.

        If a group of another call conflicts with it, the transaction runs again.
        """
        values = {
            "group_id": group.group_id,
            "external_id": group.external_id or None,
            "primary_customer_id": group.primary_customer_id,
            "revision": group.revision,
            "now_ms": now_ms,
        }
        if not await self._count_written(queries.INSERT_GROUP, values):
            raise RetryTransactionError
        await self._clear_other_defaults(group, now_ms)
        columns = {
            "customer_ids": [member.customer_id for member in group.members],
            "can_redeem": [member.can_redeem for member in group.members],
            "blocked": [member.blocked for member in group.members],
            "is_default": [member.is_default for member in group.members],
        }
        await self._execute(queries.INSERT_MEMBERS, {"group_id": group.group_id, **columns})

    async def delete_group(self, group_id: str) -> None:
        """Delete a group and its memberships."""
        await self._execute(queries.DELETE_GROUP, {"group_id": group_id})

    async def _clear_other_defaults(self, group: UserGroup, now_ms: int) -> None:
        """Clear the default mark of other groups for members whose default is this group."""
        customer_ids = [member.customer_id for member in group.members if member.is_default]
        values = {"group_id": group.group_id, "customer_ids": customer_ids}
        cleared = await self._fetch(queries.CLEAR_OTHER_DEFAULTS, values)
        group_ids = sorted({row.group_id for row in cleared})
        if group_ids:
            await self._fetch(queries.LOCK_GROUPS, {"group_ids": group_ids})
            await self._execute(queries.INCREMENT_GROUP_REVISIONS, {"group_ids": group_ids, "now_ms": now_ms})

    async def _fetch(self, statement: Statement, values: dict[str, Any]) -> list[Row]:
        return await self._connection.fetch(statement, self._params(values))

    async def _fetch_one(self, statement: Statement, values: dict[str, Any]) -> Row | None:
        return await self._connection.fetch_one(statement, self._params(values))

    async def _execute(self, statement: Statement, values: dict[str, Any]) -> None:
        await self._connection.execute(statement, self._params(values))

    async def _count_written(self, statement: Statement, values: dict[str, Any]) -> int:
        return await self._connection.count_written(statement, self._params(values))

    async def _find(self, statement: Statement, values: dict[str, Any]) -> Customer | None:
        row = await self._fetch_one(statement, values)
        return None if row is None else queries.read_customer(row)

    def _params(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"merchant_id": self._merchant_id, **values}


def _split(keys: Iterable[CustomerKey]) -> tuple[list[AccountKey], list[Identifier]]:
    """Return the buyers and the identifiers among keys, each sorted."""
    buyers: list[AccountKey] = []
    identifiers: list[Identifier] = []
    for key in keys:
        if isinstance(key, AccountKey):
            buyers.append(key)
        else:
            identifiers.append(key)
    return sorted(buyers), sorted(identifiers)


def _buyer_columns(buyers: Iterable[AccountKey]) -> dict[str, list[str]]:
    pairs = sorted(buyers)
    return {"store_ids": [key.store_id for key in pairs], "buyer_ids": [key.buyer_id for key in pairs]}


def _identifier_columns(identifiers: Iterable[Identifier]) -> dict[str, list[str]]:
    rows = list(identifiers)
    return {
        "kinds": [row.kind for row in rows],
        "values": [row.value for row in rows],
        "sources": [row.source for row in rows],
        "account_ids": [row.account_id for row in rows],
        "written": [row.written for row in rows],
    }


def _identifier(row: Any) -> Identifier:
    return Identifier(IdentifierKind(row.kind), row.value, row.source, row.account_id)
