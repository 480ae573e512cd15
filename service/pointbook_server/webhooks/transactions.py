"""Transactions of the quarantine."""

from collections.abc import Iterable
from typing import NamedTuple

from pointbook_server.db.database import JOIN_BY_INDEX, Connection, Database, Row, Statement
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.metrics import Metrics
from pointbook_server.reasons import Reason
from pointbook_server.webhooks import queries
from pointbook_server.webhooks.encryption import EncryptedPayload, PayloadCipher
from pointbook_server.webhooks.model import (
    NO_TOPIC,
    RECOUNT_MS,
    SHARED,
    Capacity,
    QuarantinedWebhook,
    QuarantineFilter,
    QuarantineLimits,
    QuarantineReason,
    QuarantineState,
    ReplayClaim,
    Visibility,
    Webhook,
    WebhookContent,
    new_quarantine_id,
)
from pointbook_server.webhooks.payload import read_buyer_id, read_customer_store_id, read_signed_store_id
from pointbook_server.webhooks.quota import TotalQuota
from pointbook_server.webhooks.report import QuarantineUsage, ReasonCount, read_usage, read_waiting


class StoredWebhook(NamedTuple):
    """The id of a stored webhook, and whether its body was in the quarantine before."""

    quarantine_id: str
    is_repetition: bool


class QuarantineTransactions:
    """Reads and writes the quarantine."""

    def __init__(self, database: Database, cipher: PayloadCipher, limits: QuarantineLimits, metrics: Metrics) -> None:
        self._database = database
        self._cipher = cipher
        self._limits = limits
        self._metrics = metrics
        self._quota = TotalQuota(database, limits.total, metrics)

    async def add(self, webhook: Webhook) -> StoredWebhook | None:
        """Store a webhook, or count its repetition; return None if the quarantine is full.

        Raises KEY_NOT_CONFIGURED for a webhook with a customer topic, or with no topic, if there is no key.
        """
        digests = self._cipher.body_digests(webhook)
        async with self._database.autocommit() as connection:
            owner_id, capacity = await self._choose_owner(connection, webhook)
            params = {"digests": digests, "claimed": webhook.merchant_id, "owner": owner_id}
            if found := await connection.fetch_one(queries.FIND_BODY, params):
                await _count_repetition(connection, found, webhook)
                return StoredWebhook(found.quarantine_id, is_repetition=True)
        quarantine_id = new_quarantine_id()
        payload = self._cipher.encrypt(webhook, owner_id, quarantine_id)
        row = queries.to_row(webhook, owner_id, quarantine_id, digests[0], payload) | self._lookup_digests(webhook)

        async def insert(connection: Connection) -> StoredWebhook | None:
            has_space = await _reserve_space(connection, owner_id, payload.size, capacity)
            # Search again: another call may just have stored this body, and used up the last space.
            if found := await connection.fetch_one(queries.FIND_BODY, params):
                if has_space:
                    await connection.execute(queries.RELEASE_SPACE, {"owner": owner_id, "size": payload.size})
                await _count_repetition(connection, found, webhook)
                return StoredWebhook(found.quarantine_id, is_repetition=True)
            if not has_space:
                return None
            if not await connection.count_written(queries.INSERT_WEBHOOK, row):
                # A server with other keys, or of an earlier release, has just stored this body.
                raise RetryTransactionError
            return StoredWebhook(quarantine_id, is_repetition=False)

        if not await self._quota.reserve(payload.size):
            return None
        # If the call is cancelled or the database goes away, the webhook may have been committed.
        may_be_stored = True
        try:
            stored = await self._database.transaction(insert)
            may_be_stored = stored is not None and not stored.is_repetition
        finally:
            self._quota.settle(payload.size, may_be_stored=may_be_stored)
        return stored

    async def refresh_metrics(self, _now_ms: int) -> None:
        """Read the usage of all quarantines, and what waits there, into the metrics."""

        async def read(connection: Connection) -> tuple[list[QuarantineUsage], list[ReasonCount]]:
            return await read_usage(connection), await read_waiting(connection)

        limits = self._limits
        used_ratio = limits.total.used_ratio(*await self._quota.refresh())
        usage, waiting = await self._database.snapshot(read)
        for each in usage:
            limit = limits.shared if each.owner_id == SHARED else limits.merchant
            used_ratio = max(used_ratio, limit.used_ratio(each.webhooks, each.bytes))
        self._metrics.quarantine_fullest_ratio.set(used_ratio)
        self._metrics.quarantine_reasons.replace({(each.reason,): each.webhooks for each in waiting})
        self._metrics.quarantine_oldest.set(min((each.oldest_at_ms for each in waiting), default=0) / 1_000)

    async def proves(self, connection: Connection, merchant_id: str, store_id: str) -> bool:
        """Return whether webhooks prove that an unregistered store is this merchant's.

        A webhook proves it if its signed body names the store and its header names the merchant. Headers are not
        signed, so only the shared quarantine counts, which only tokens for all merchants, such as the shim's, can fill.
        There, no copy of the webhook and no other webhook of the store may name another merchant.
        """
        digests = self._cipher.subject_digests(store_id)
        row = await connection.fetch_one(queries.COUNT_PROOFS, {"digests": digests, "claimed": merchant_id})
        return row is not None and row.proofs > 0 and row.contests == 0

    async def list_webhooks(
        self, visibility: Visibility, webhook_filter: QuarantineFilter, *, after: tuple[int, str], limit: int
    ) -> list[QuarantinedWebhook]:
        """Return the next webhooks after a position (time in ms, id), the oldest first."""
        after_ms, after_id = after
        params = {
            **_visibility_params(visibility),
            "filter_state": webhook_filter.state.value,
            "filter_reason": webhook_filter.reason and webhook_filter.reason.value,
            "filter_topic": webhook_filter.topic,
            "after_ms": after_ms,
            "after_id": after_id,
            "end_ms": webhook_filter.end_ms,
            "limit": limit,
        }
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(queries.LIST_WEBHOOKS, params)
        return [queries.to_quarantined_webhook(row) for row in rows]

    async def get(self, visibility: Visibility, quarantine_id: str) -> tuple[QuarantinedWebhook, WebhookContent]:
        """Return a webhook with its content.

        Raises WEBHOOK_NOT_FOUND and CODE_KEY_UNKNOWN.
        """
        async with self._database.autocommit() as connection:
            params = _visibility_params(visibility) | {"id": quarantine_id}
            row = await connection.fetch_one(queries.READ_WEBHOOK, params)
        if row is None:
            raise _webhook_not_found(quarantine_id)
        payload = EncryptedPayload(row.key_id, row.headers, row.body)
        return queries.to_quarantined_webhook(row), self._cipher.decrypt(payload, row.owner_id, quarantine_id)

    async def claim(
        self, visibility: Visibility, quarantine_id: str, event_id: str, now_ms: int, until_ms: int
    ) -> ReplayClaim:
        """Claim a webhook for a replay as one event that has ended by `until_ms`.

        Any number of replays may claim the same event, because the event is applied once. They are counted, so that a
        refused replay releases the webhook only if no other one may be running. A replay that never reports its end
        counts until its time is over.

        Raises WEBHOOK_NOT_FOUND, and EVENT_ID_REUSED if the webhook is claimed for another event.
        """

        async def claim_once(connection: Connection) -> ReplayClaim:
            key = await _find_key(connection, visibility, quarantine_id)
            row = await connection.fetch_one(queries.LOCK_WEBHOOK, key)
            if row is None:
                raise _webhook_not_found(quarantine_id)
            if row.replay_event_id not in {None, event_id}:
                raise _replayed_as_other_event(event_id)
            running = 1 if row.replay_until_ms <= now_ms else row.replays_running + 1
            params = key | {"event": event_id, "running": running, "until": until_ms}
            await connection.execute(queries.CLAIM_WEBHOOK, params)
            return ReplayClaim(key["owner"], quarantine_id, event_id, row.topic)

        return await self._database.transaction(claim_once)

    async def release(self, claim: ReplayClaim) -> None:
        """Release a claim whose event was refused.

        The webhook stays claimed while another replay may apply the event.
        """
        async with self._database.autocommit() as connection:
            await connection.execute(queries.RELEASE_WEBHOOK, _claim_params(claim))

    async def mark_replayed(self, claim: ReplayClaim, now_ms: int) -> int:
        """Mark a claimed webhook as replayed, and return the time of its first replay.

        A webhook that was dropped meanwhile is not an error.
        """
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.MARK_REPLAYED, _claim_params(claim) | {"now": now_ms})
        return now_ms if row is None else int(row.replayed_at_ms)

    async def drop(self, visibility: Visibility, quarantine_id: str) -> QuarantineReason:
        """Delete a webhook, release its space, and return its reason.

        Raises WEBHOOK_NOT_FOUND.
        """

        async def delete(connection: Connection) -> QuarantineReason:
            key = await _find_key(connection, visibility, quarantine_id)
            await connection.fetch_one(queries.LOCK_USAGE, {"owner": key["owner"]})
            row = await connection.fetch_one(queries.DELETE_WEBHOOK, key)
            if row is None:
                raise _webhook_not_found(quarantine_id)
            await connection.execute(queries.RELEASE_SPACE, {"owner": key["owner"], "size": row.kept_bytes})
            return QuarantineReason(row.reason)

        reason = await self._database.transaction(delete)
        self._quota.expire()
        return reason

    async def delete_finished(self, owner_id: str, from_ms: int, until_ms: int) -> int:
        """Delete some finished webhooks of an owner from a period, and return how many.

        Nothing is deleted while another transaction stores or deletes webhooks of the owner.
        """

        async def delete(connection: Connection) -> int:
            if await connection.fetch_one(queries.LOCK_FREE_USAGE, {"owner": owner_id}) is None:
                return 0
            await connection.execute(JOIN_BY_INDEX)
            params = {"merchant_id": owner_id, "from_ms": from_ms, "until_ms": until_ms}
            rows = await connection.fetch(queries.DELETE_FINISHED, params)
            usage = {"owner": owner_id, "webhooks": len(rows), "size": sum(row.kept_bytes for row in rows)}
            await connection.execute(queries.RELEASE_SPACE, usage)
            return len(rows)

        count = await self._database.transaction(delete)
        if count:
            self._quota.expire()
        return count

    async def erase(self, connection: Connection, merchant_id: str, buyer_ids: Iterable[str]) -> None:
        """Erase the bodies about some buyers, in the transaction that redacts the buyers."""
        digests = [digest for buyer_id in buyer_ids for digest in self._cipher.subject_digests(buyer_id)]
        await _erase_bodies(
            connection, merchant_id, digests, find=queries.FIND_BUYERS_BODY, lock=queries.LOCK_BUYERS_BODIES
        )

    async def erase_store(self, connection: Connection, merchant_id: str, store_id: str, limit: int) -> int:
        """Erase up to `limit` bodies of a store's customer webhooks, and return how many.

        Runs in the transaction that erases the store.
        """
        digests = self._cipher.subject_digests(store_id)
        return await _erase_bodies(
            connection,
            merchant_id,
            digests,
            find=queries.FIND_STORES_BODY,
            lock=queries.LOCK_STORES_BODIES,
            limit=limit,
        )

    async def count_store(self, connection: Connection, merchant_id: str, store_id: str) -> int:
        """Count a store's customer webhooks whose body is not erased."""
        digests, count = self._cipher.subject_digests(store_id), 0
        for owner_id in (SHARED, merchant_id):
            params = {"owner": owner_id, "claimed": merchant_id, "digests": digests}
            row = await connection.fetch_one(queries.COUNT_STORES_BODIES, params)
            count += 0 if row is None else int(row.webhooks)
        return count

    async def _choose_owner(self, connection: Connection, webhook: Webhook) -> tuple[str, Capacity]:
        """Return the owner of a new webhook, and the capacity that it may use.

        Webhooks that name a merchant without stores, which anyone can invent, use half of the shared capacity at most.
        A token that is limited to some merchants uses no shared space; it can neither fill it nor read it.
        """
        if webhook.is_merchant_proven:
            return webhook.merchant_id, self._limits.merchant
        params = {"merchant": webhook.merchant_id, "store": read_signed_store_id(webhook.body)}
        row = await connection.fetch_one(queries.READ_STORES, params)
        if row is not None and row.has_this_store:
            return webhook.merchant_id, self._limits.merchant
        has_stores = row is not None and row.has_stores
        return SHARED, self._limits.shared if has_stores else self._limits.shared.half()

    def _lookup_digests(self, webhook: Webhook) -> dict[str, bytes | None]:
        """Return the digests by which a webhook is found.

        They are of its customer, the customer's store, and its signed store.
        """
        subjects = {
            "subject_digest": read_buyer_id(webhook.body),
            "store_digest": read_customer_store_id(webhook),
            "signed_store_digest": read_signed_store_id(webhook.body),
        }
        return {
            column: self._cipher.subject_digests(subject)[0] if subject else None
            for column, subject in subjects.items()
        }


async def _erase_bodies(
    connection: Connection,
    merchant_id: str,
    digests: list[bytes],
    *,
    find: Statement,
    lock: Statement,
    limit: int | None = None,
) -> int:
    """Erase the bodies of SHARED and of a merchant that `lock` returns; count them.

    The shared quarantine is locked only if `find` returns a body there, so that merchants do not wait for each other.
    """
    erased = 0
    for owner_id in (SHARED, merchant_id):
        params = {"owner": owner_id, "claimed": merchant_id, "digests": digests}
        if owner_id == SHARED and await connection.fetch_one(find, params) is None:
            continue
        # Without a usage row to lock, the merchant's first webhook could be inserted after `lock` has run.
        await connection.execute(queries.INSERT_USAGE, {"owner": owner_id})
        await connection.fetch_one(queries.LOCK_USAGE, {"owner": owner_id})
        rows = await connection.fetch(lock, params | {"limit": None if limit is None else limit - erased})
        ids = [row.quarantine_id for row in rows]
        await connection.execute(queries.ERASE_BODIES, {"owner": owner_id, "ids": ids})
        await connection.execute(queries.RELEASE_BYTES, {"owner": owner_id, "size": sum(row.size for row in rows)})
        erased += len(ids)
    return erased


async def _reserve_space(connection: Connection, owner_id: str, size: int, capacity: Capacity) -> bool:
    """Add a new webhook to its owner's usage; return False if it exceeds the capacity."""
    params = {
        "owner": owner_id,
        "size": size,
        "webhooks_max": capacity.webhooks_max,
        "bytes_max": capacity.bytes_max,
    }
    if await connection.count_written(queries.RESERVE_SPACE, params):
        return True
    # The owner may have no usage row yet.
    await connection.execute(queries.INSERT_USAGE, {"owner": owner_id})
    return bool(await connection.count_written(queries.RESERVE_SPACE, params))


async def _count_repetition(connection: Connection, found: Row, webhook: Webhook) -> None:
    """Write what a copy adds to a stored webhook.

    It adds a count, another topic or another merchant.
    """
    is_counted = webhook.received_at_ms >= found.last_received_at_ms + RECOUNT_MS
    has_other_topic = found.state == QuarantineState.QUARANTINED and found.topic not in {NO_TOPIC, webhook.topic}
    has_other_merchant = found.claimed != webhook.merchant_id and not found.is_contested
    if is_counted or has_other_topic or has_other_merchant:
        params = {
            "owner": found.merchant_id,
            "id": found.quarantine_id,
            "count": int(is_counted),
            "received": webhook.received_at_ms if is_counted else found.last_received_at_ms,
            "topic": webhook.topic,
            "claimed": webhook.merchant_id,
        }
        await connection.execute(queries.COUNT_REPETITION, params)


def _visibility_params(visibility: Visibility) -> dict[str, object]:
    """Return the parameters of IS_VISIBLE."""
    return {"claimed": visibility.merchant_id, "sees_contested": visibility.sees_contested}


def _claim_params(claim: ReplayClaim) -> dict[str, object]:
    return {"owner": claim.owner_id, "id": claim.quarantine_id, "event": claim.event_id}


async def _find_key(connection: Connection, visibility: Visibility, quarantine_id: str) -> dict[str, str]:
    """Return the parameters of IS_WEBHOOK for a visible webhook.

    Raises WEBHOOK_NOT_FOUND.
    """
    params = _visibility_params(visibility) | {"id": quarantine_id}
    row = await connection.fetch_one(queries.FIND_OWNER, params)
    if row is None:
        raise _webhook_not_found(quarantine_id)
    return {"owner": row.merchant_id, "id": quarantine_id}


def _webhook_not_found(quarantine_id: str) -> PointbookError:
    """Return the error for an id that is not in a merchant's quarantine."""
    return PointbookError(
        Reason.WEBHOOK_NOT_FOUND,
        "No such webhook is in the merchant's quarantine.",
        metadata={"quarantine_id": quarantine_id},
    )


def _replayed_as_other_event(event_id: str) -> PointbookError:
    return PointbookError(
        Reason.EVENT_ID_REUSED,
        "The webhook was replayed, or is being replayed, as another update.",
        metadata={"event_id": event_id},
    )
