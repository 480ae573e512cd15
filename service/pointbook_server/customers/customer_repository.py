"""The customers of one merchant on one connection, inside whatever transaction it is in."""

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pointbook_server.customers import queries
from pointbook_server.customers.model import (
    Customer,
    CustomerUpdate,
    GroupKey,
    Identifier,
    Key,
    KeysTakenError,
    Kind,
    KnownBuyer,
    UserGroup,
    customer_not_found,
    identifier_taken,
    write_stamp,
)
from pointbook_server.db.database import Connection, RetryTransactionError, Row, Statement
from pointbook_server.errors import store_not_found
from pointbook_server.ledger.model import AccountKey


class CustomerRepository:
    """Reads, locks and changes a merchant's customers.

    `find` and `group` take one statement each, and see what was committed, or locked, before they begin.
    """

    def __init__(self, connection: Connection, merchant_id: str) -> None:
        self._connection = connection
        self._merchant_id = merchant_id

    async def find(self, key: Key) -> Customer | None:
        """Read the customer whom an identifier or a buyer belongs to."""
        if isinstance(key, AccountKey):
            return await self._find(queries.FIND_BY_BUYER, key._asdict())
        if key.kind is Kind.CUSTOMER_ID and not key.source:
            return await self._find(queries.FIND_BY_ID, {"customer_id": key.value})
        return await self._find(queries.FIND_BY_IDENTIFIER, key.names)

    async def find_all(self, keys: Collection[Key]) -> dict[Key, Customer]:
        """Read the customers whom keys belong to, in three statements at most however many they are."""
        buyers, identifiers = _split(keys)
        owners: dict[Key, str] = {
            key: key.value for key in identifiers if key.kind is Kind.CUSTOMER_ID and not key.source
        }
        identifiers = [key for key in identifiers if key not in owners]
        if buyers:
            rows = await self._fetch(queries.READ_BUYER_OWNERS, _buyer_columns(buyers))
            owners |= {AccountKey(row.store_id, row.buyer_id): row.customer_id for row in rows}
        if identifiers:
            rows = await self._fetch(queries.READ_IDENTIFIER_OWNERS, _identifier_columns(identifiers))
            owners |= {_identifier(row): row.customer_id for row in rows}
        if not owners:
            return {}
        rows = await self._fetch(queries.FIND_BY_IDS, {"customer_ids": sorted(set(owners.values()))})
        found = {row.customer_id: queries.read_customer(row) for row in rows}
        return {key: found[customer_id] for key, customer_id in owners.items() if customer_id in found}

    async def group(self, by: GroupKey, key: str) -> UserGroup | None:
        """Read a group with its members and their buyers."""
        row = await self._fetch_one(queries.FIND_GROUP[by], {"key": key})
        return None if row is None else queries.read_group(row)

    async def groups(self, group_ids: Collection[str]) -> dict[str, UserGroup]:
        """Return groups by their ids, with their members and their buyers."""
        rows = await self._fetch(queries.FIND_GROUPS, {"group_ids": sorted(group_ids)})
        return {row.group_id: queries.read_group(row) for row in rows}

    async def lock(self, customer_ids: Iterable[str], *, skip_locked: bool = False) -> set[str]:
        """Lock customers in sorted order, and return those that exist; others' locks may be skipped."""
        statement = queries.LOCK_FREE_CUSTOMERS if skip_locked else queries.LOCK_CUSTOMERS
        rows = await self._fetch(statement, {"customer_ids": sorted(set(customer_ids))})
        return {row.customer_id for row in rows}

    async def read(self, customer_id: str) -> Customer | None:
        """Read a customer by their id."""
        return await self._find(queries.FIND_BY_ID, {"customer_id": customer_id})

    async def read_all(self, customer_ids: Iterable[str]) -> list[Customer]:
        """Read customers by their ids, sorted by them."""
        rows = await self._fetch(queries.FIND_BY_IDS, {"customer_ids": sorted(customer_ids)})
        return sorted(map(queries.read_customer, rows), key=lambda customer: customer.customer_id)

    async def named(self, field: str, customer_id: str) -> Customer:
        """Read the customer whom a field of the request names. Raises CUSTOMER_NOT_FOUND."""
        customer = await self.read(customer_id)
        if customer is None:
            raise customer_not_found(field)
        return customer

    async def register_store(self, store_id: str, now_ms: int) -> None:
        """Register a store if nobody has."""
        await self._execute(queries.REGISTER_STORE, {"store_id": store_id, "now_ms": now_ms})

    async def check_stores(self, store_ids: Collection[str], *, is_update: bool = False) -> None:
        """Raise STORE_NOT_FOUND for the first store that is not the merchant's; the others are not released meanwhile.

        For an update the error says whether it is another merchant's, and no erasure of the store runs beside it.
        """
        named = {"store_ids": sorted(set(store_ids))}
        own = {
            row.store_id for row in await self._fetch(queries.SHARE_STORES if is_update else queries.KEEP_STORES, named)
        }
        missing = next((store_id for store_id in store_ids if store_id not in own), None)
        if missing is not None:
            is_others = is_update and await self._fetch_one(queries.READ_STORE_OWNER, {"store_id": missing}) is not None
            raise store_not_found(missing, registered_elsewhere=is_others)

    async def create(self, customer: Customer, now_ms: int) -> None:
        """Keep a new customer; where another call has just done so, the transaction runs again."""
        values = {"language": customer.language, "fraud_blocked": customer.fraud_blocked, "now_ms": now_ms}
        if not await self._execute(queries.INSERT_CUSTOMER, {"customer_id": customer.customer_id, **values}):
            raise RetryTransactionError

    async def update(self, customer: Customer, now_ms: int) -> None:
        """Count a change of a locked customer, and write what stands beside their keys."""
        values = {"language": customer.language, "fraud_blocked": customer.fraud_blocked, "now_ms": now_ms}
        await self._execute(queries.UPDATE_CUSTOMER, {"customer_id": customer.customer_id, **values})

    async def count_changes(self, customer_ids: Iterable[str], now_ms: int) -> None:
        """Count a change of locked customers whose language and fraud_blocked stay."""
        await self._execute(
            queries.COUNT_CUSTOMER_CHANGES, {"customer_ids": sorted(set(customer_ids)), "now_ms": now_ms}
        )

    async def check_free(self, customer_id: str, keys: Collection[Key]) -> None:
        """Raise KeysTakenError for keys of other customers, before anything waits for those who hold them."""
        buyers, identifiers = _split(keys)
        taken: list[Key] = []
        if buyers:
            rows = await self._fetch(queries.READ_BUYER_OWNERS, _buyer_columns(buyers))
            taken += [AccountKey(row.store_id, row.buyer_id) for row in rows if row.customer_id != customer_id]
        if identifiers:
            rows = await self._fetch(queries.READ_IDENTIFIER_OWNERS, _identifier_columns(identifiers))
            taken += [_identifier(row) for row in rows if row.customer_id != customer_id]
        if taken:
            raise KeysTakenError(taken)

    async def lock_identifiers(self, identifiers: Collection[Identifier]) -> set[Identifier]:
        """Lock identifiers in sorted order, behind the customers' locks, and return those that a customer owns."""
        if not identifiers:
            return set()
        rows = await self._fetch(queries.LOCK_IDENTIFIERS, _identifier_columns(sorted(identifiers)))
        return {_identifier(row) for row in rows}

    async def take(self, customer_id: str, keys: Collection[Key], since_ms: int | None = None) -> set[Key]:
        """Give a locked customer keys that nobody owns, and tell which somebody owns after all.

        Those that do not come with the customer are theirs since a moment.
        """
        buyers, identifiers = _split(keys)
        took: set[Key] = set()
        if buyers:
            named = {"customer_id": customer_id, **_buyer_columns(buyers)}
            rows = await self._fetch(queries.TAKE_BUYERS, named)
            took |= {AccountKey(row.store_id, row.buyer_id) for row in rows}
        if identifiers:
            values: dict[str, Any] = {"customer_id": customer_id, "since_ms": since_ms}
            rows = await self._fetch(queries.TAKE_IDENTIFIERS, values | _identifier_columns(identifiers))
            took |= {_identifier(row) for row in rows}
        return set(keys) - took

    async def respell(self, customer_id: str, identifiers: Collection[Identifier]) -> None:
        """Write the new forms of identifiers of a locked customer, who keeps them as they are otherwise."""
        if identifiers:
            values = {"customer_id": customer_id, **_identifier_columns(identifiers)}
            await self._execute(queries.RESPELL_IDENTIFIERS, values)

    async def free(self, customer_id: str, keys: Collection[Key]) -> None:
        """Take keys from the locked customer who owns them."""
        buyers, identifiers = _split(keys)
        if buyers:
            await self.lock_buyers(buyers)
            await self._execute(queries.FREE_BUYERS, {"customer_id": customer_id, **_buyer_columns(buyers)})
            await self.end_claims_of(customer_id, buyers)
        if identifiers:
            await self._execute(
                queries.FREE_IDENTIFIERS, {"customer_id": customer_id, **_identifier_columns(identifiers)}
            )

    async def lock_buyers(self, buyers: Iterable[AccountKey]) -> dict[AccountKey, KnownBuyer]:
        """Lock the buyers of whom something is kept, behind the customers' locks, and read it."""
        return dict(map(queries.read_buyer, await self._fetch(queries.LOCK_BUYERS, _buyer_columns(buyers))))

    async def move(self, key: Key, from_customer_id: str, to_customer_id: str, now_ms: int) -> None:
        """Give a key of one locked customer to another one."""
        named = {"customer_id": from_customer_id, "to_customer_id": to_customer_id, "now_ms": now_ms}
        if isinstance(key, AccountKey):
            await self.end_claims_of(from_customer_id, [key])
            await self._execute(queries.MOVE_BUYER, named | key._asdict())
        else:
            await self._execute(queries.MOVE_IDENTIFIER, named | key.names)

    async def claim(self, customer_id: str, contacts: Collection[Identifier], update: CustomerUpdate) -> None:
        """Record a locked customer's claims to locked contacts that others own, as of an update."""
        await self._execute(
            queries.INSERT_CLAIMS,
            {
                "customer_id": customer_id,
                **_identifier_columns(contacts),
                **update.buyer._asdict(),
                **update.stamp._asdict(),
            },
        )

    async def end_claims(self, customer_id: str, kinds: Iterable[Kind]) -> None:
        """Delete a locked customer's claims to contacts of some kinds."""
        await self._execute(queries.DELETE_CLAIMS, {"customer_id": customer_id, "kinds": sorted(kinds)})

    async def end_claims_until(self, buyers: Iterable[AccountKey], until_ms: int) -> None:
        """Delete the claims that webhooks of some buyer ids, in any store, made at a moment and before it."""
        buyer_ids = sorted({buyer.buyer_id for buyer in buyers})
        await self._execute(queries.DELETE_CLAIMS_UNTIL, {"buyer_ids": buyer_ids, "until_ms": until_ms})

    async def end_claims_of(self, customer_id: str, buyers: Iterable[AccountKey]) -> None:
        """Delete the claims that webhooks of some buyers made for a locked customer."""
        await self._execute(queries.DELETE_CLAIMS_OF_BUYERS, {"customer_id": customer_id, **_buyer_columns(buyers)})

    async def heirs(self, contacts: Collection[Identifier]) -> dict[Identifier, str]:
        """Read which customer has the newest claim to each contact, as it is written there, of those claimed."""
        if not contacts:
            return {}
        rows = await self._fetch(queries.READ_HEIRS, _identifier_columns(contacts))
        return {replace(_identifier(row), written=row.written or ""): row.customer_id for row in rows}

    async def open_buyer(self, buyer: AccountKey) -> str | None:
        """Tell who owns a buyer, of whom something is kept from now on."""
        row = await self._fetch_one(queries.READ_BUYER, buyer._asdict())
        if row is not None:
            return str(row.customer_id) if row.customer_id else None
        await self._execute(queries.OPEN_BUYER, buyer._asdict())
        return None

    async def stamp(self, buyer: AccountKey, known: KnownBuyer) -> None:
        """Write as of which updates a locked buyer's contacts are known."""
        as_of = {f"{kind.lower()}_as_of": write_stamp(stamp) for kind, stamp in known.as_of.items()}
        await self._execute(queries.STAMP_BUYER, {**as_of, **buyer._asdict()})

    async def close_buyer(self, buyer: AccountKey) -> None:
        """Forget a locked buyer if there is nothing to say of them."""
        await self._execute(queries.CLOSE_BUYER, buyer._asdict())

    async def update_digest(self, event_id: str) -> bytes | None:
        """Read the digest of an update that was seen before."""
        row = await self._fetch_one(queries.READ_UPDATE, {"event_id": event_id})
        return None if row is None else bytes(row.content_digest)

    async def remember_update(self, update: CustomerUpdate) -> None:
        """Remember that an update was seen; where another call has just done so, the transaction runs again."""
        values = {
            "event_id": update.event_id,
            "content_digest": update.digest,
            "updated_at_ms": update.updated_at_ms,
            "is_deletion": update.is_deletion,
            **update.buyer._asdict(),
        }
        if not await self._execute(queries.INSERT_UPDATE, values):
            raise RetryTransactionError

    async def contradicts(self, update: CustomerUpdate) -> bool:
        """Return whether a deletion and an update of one buyer and moment would both be applied."""
        values = {"updated_at_ms": update.updated_at_ms, "is_deletion": update.is_deletion, **update.buyer._asdict()}
        return await self._fetch_one(queries.READ_CONTRADICTION, values) is not None

    async def newest_update_ms(self, buyers: Iterable[AccountKey]) -> int:
        """Tell as of when the newest update of buyers is, whatever it told; 0 for none."""
        row = await self._fetch_one(queries.READ_NEWEST_UPDATE, _buyer_columns(buyers))
        return 0 if row is None else row.updated_at_ms or 0

    async def forget_updates(self, buyers: Iterable[AccountKey], redacted_at_ms: int) -> None:
        """Forget the updates of buyers from before a moment."""
        await self._execute(queries.DELETE_UPDATES, {"redacted_at_ms": redacted_at_ms, **_buyer_columns(buyers)})

    async def store_buyers(self, store_id: str, after: str, limit: int) -> dict[AccountKey, str | None]:
        """Read a store's buyers with personal data behind one in their order, and the customer of each."""
        values = {"store_id": store_id, "after": after, "limit": limit}
        rows = await self._fetch(queries.READ_STORE_BUYERS, values)
        return {AccountKey(row.store_id, row.buyer_id): row.customer_id for row in rows}

    async def count_store_buyers(self, store_id: str, after: str) -> int:
        """Count a store's buyers with personal data behind one in their order."""
        row = await self._fetch_one(queries.COUNT_STORE_BUYERS, {"store_id": store_id, "after": after})
        return 0 if row is None else int(row.buyers)

    async def tombstone(self, store_id: str, digests: Sequence[bytes]) -> int:
        """Return when the buyer of the digests was last redacted, alone or with their store; 0 for never."""
        row = await self._fetch_one(queries.READ_TOMBSTONE, {"store_id": store_id, "digests": list(digests)})
        return 0 if row is None else row.redacted_at_ms or 0

    async def leave_tombstones(self, digests: Sequence[bytes], redacted_at_ms: int) -> None:
        """Remember when whom the digests name was redacted."""
        await self._execute(queries.LEAVE_TOMBSTONES, {"digests": list(digests), "redacted_at_ms": redacted_at_ms})

    async def audit(
        self,
        action: str,
        customer_id: str,
        reason: str,
        at_ms: int,
        *,
        key: Key | None = None,
        to_customer_id: str = "",
        store_id: str = "",
    ) -> None:
        """Write into the audit that a key was moved, a customer redacted, or a store erased: never an identifier."""
        values: dict[str, Any] = {"kind": None, "store_id": store_id or None, "buyer_id": None}
        if isinstance(key, AccountKey):
            values |= {"kind": "BUYER", **key._asdict()}
        elif key is not None:
            values |= {"kind": f"{key.source} {key.kind}".strip()}
        values |= {"action": action, "customer_id": customer_id, "to_customer_id": to_customer_id or None}
        values |= {"audit_id": secrets.token_hex(12), "reason": reason, "at_ms": at_ms}
        await self._execute(queries.INSERT_AUDIT, values)

    async def check_rival_groups(self, group: UserGroup) -> None:
        """Raise IDENTIFIER_TAKEN for an external id or a primary member of another group."""
        values = {
            "group_id": group.group_id,
            "external_id": group.external_id or None,
            "primary_customer_id": group.primary_customer_id,
        }
        rivals = await self._fetch(queries.READ_RIVAL_GROUPS, values)
        taken = [
            f"user_group.{name}"
            for name in ("external_id", "primary_customer_id")
            if values[name] is not None and any(rival[name] == values[name] for rival in rivals)
        ]
        if taken:
            raise identifier_taken(taken)

    async def create_group(self, group: UserGroup, now_ms: int) -> None:
        """Keep a new group of locked members; where another call's group is in the way, the transaction runs again."""
        values = {
            "group_id": group.group_id,
            "external_id": group.external_id or None,
            "primary_customer_id": group.primary_customer_id,
            "revision": group.revision,
            "now_ms": now_ms,
        }
        if not await self._execute(queries.INSERT_GROUP, values):
            raise RetryTransactionError
        await self._take_default_marks(group, now_ms)
        columns = {
            "customer_ids": [member.customer_id for member in group.members],
            "can_redeem": [member.can_redeem for member in group.members],
            "blocked": [member.blocked for member in group.members],
            "is_default": [member.is_default for member in group.members],
        }
        await self._execute(queries.INSERT_MEMBERS, {"group_id": group.group_id, **columns})

    async def delete_group(self, group_id: str) -> None:
        """Delete a group, its memberships with it."""
        await self._execute(queries.DELETE_GROUP, {"group_id": group_id})

    async def _take_default_marks(self, group: UserGroup, now_ms: int) -> None:
        """Let no other group be the default one of those whose default group this is."""
        customer_ids = [member.customer_id for member in group.members if member.is_default]
        values = {"group_id": group.group_id, "customer_ids": customer_ids}
        marked = await self._fetch(queries.TAKE_DEFAULT_MARKS, values)
        group_ids = sorted({row.group_id for row in marked})
        if group_ids:
            await self._fetch(queries.LOCK_GROUPS, {"group_ids": group_ids})
            await self._execute(queries.COUNT_GROUP_CHANGES, {"group_ids": group_ids, "now_ms": now_ms})

    async def _fetch(self, statement: Statement, values: dict[str, Any]) -> list[Row]:
        return await self._connection.fetch(statement, self._named(values))

    async def _fetch_one(self, statement: Statement, values: dict[str, Any]) -> Row | None:
        return await self._connection.fetch_one(statement, self._named(values))

    async def _execute(self, statement: Statement, values: dict[str, Any]) -> int:
        return await self._connection.execute(statement, self._named(values))

    async def _find(self, statement: Statement, values: dict[str, Any]) -> Customer | None:
        row = await self._fetch_one(statement, values)
        return None if row is None else queries.read_customer(row)

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"merchant_id": self._merchant_id, **values}


def _split(keys: Iterable[Key]) -> tuple[list[AccountKey], list[Identifier]]:
    """Part buyers from identifiers, each sorted."""
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
    return Identifier(Kind(row.kind), row.value, row.source, row.account_id)
