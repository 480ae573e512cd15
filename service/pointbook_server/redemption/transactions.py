"""The transactions of redemption.

Each one locks in the same order: customers, accounts, challenges, redemptions.
Source: docs/reference/redemption.md#lock-order
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pointbook_server.clock import Clock, time_ordered_id
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.holds import Hold, release_overdue, without_redemption
from pointbook_server.ledger.model import AccountKey, Expiry
from pointbook_server.ledger.posting import Settlement
from pointbook_server.redemption import queries
from pointbook_server.redemption.assessment import Assessment, RedemptionContext, RedemptionRequest, assess
from pointbook_server.redemption.commands import PendingRedemption, RedemptionFilter, Reversal
from pointbook_server.redemption.context_loader import (
    AccountRepository,
    AccountsNotLockedError,
    ContextLoader,
    OpenCustomers,
    OpenLedger,
    Programs,
)
from pointbook_server.redemption.details import DetailsLoader, sum_active_points
from pointbook_server.redemption.model import (
    HoldState,
    Redemption,
    RedemptionDetails,
    already_reversed,
    redemption_not_found,
    reference_reused,
)
from pointbook_server.redemption.redeem_batch import CodeTransactions, RedeemBatch, update_redemption

RELEASE_COUNT = 100
"""The most redemptions that one transaction releases."""


class RedemptionTransactions:
    """The transactions that read and write redemptions, and their holds on accounts."""

    def __init__(
        self,
        database: Database,
        programs: Programs,
        open_ledger: OpenLedger,
        open_customers: OpenCustomers,
        codes: CodeTransactions,
    ) -> None:
        self._database = database
        self._codes = codes
        self._open_ledger = open_ledger
        self._open_customers = open_customers
        self._context_loader = ContextLoader(programs, open_customers)
        self._details_loader = DetailsLoader(programs, open_customers, open_ledger)

    async def assess(self, requests: Sequence[RedemptionRequest], now_ms: int) -> list[Assessment]:
        """Assess requests of one merchant without locks."""
        async with self._database.autocommit() as connection:
            ledger = self._open_ledger(connection, requests[0].merchant_id)
            contexts = await self._context_loader.load(connection, ledger, requests, now_ms)
        return [assess(request, context) for request, context in zip(requests, contexts, strict=True)]

    async def next_expiry(self, merchant_id: str, context: RedemptionContext) -> Expiry | None:
        """Return the soonest expiry in the accounts that may be drawn on."""
        accounts = {key: context.accounts[key] for key, _ in context.sources if key in context.accounts}
        found = [account.next_expiry(context.now_ms) for account in accounts.values() if account.overflow is None]
        if overflowing := [key for key, account in accounts.items() if account.overflow is not None]:
            async with self._database.autocommit() as connection:
                ledger = self._open_ledger(connection, merchant_id)
                found += [await ledger.next_expiry(key, accounts[key], context.now_ms) for key in overflowing]
        expiries = [expiry for expiry in found if expiry is not None]
        if not expiries:
            return None
        soonest_ms = min(expiry.at_ms for expiry in expiries)
        return Expiry(soonest_ms, sum(expiry.points for expiry in expiries if expiry.at_ms == soonest_ms))

    async def redeem(
        self, merchant_id: str, batch: Sequence[PendingRedemption], clock: Clock
    ) -> list[Redemption | PointbookError]:
        """Redeem in one transaction; return the redemption or the error of each command.

        Each command of the merchant is assessed again under the locks. Its redemption is the one stored under its
        reference; its error is REFERENCE_REUSED, the refusal of its violations, or REDEMPTION_FAILED if its content has
        changed since the first assessment.
        """
        requests = [pending.command.request for pending in batch]
        customers = [pending.assessment.context.customer for pending in batch]
        customer_ids = {customer.customer_id for customer in customers if customer is not None}
        challenged = {pending.challenge.purpose.customer for pending in batch if pending.challenge is not None}
        account_keys = {key for pending in batch for key in pending.assessment.context.account_keys}

        async def work(connection: Connection) -> list[Redemption | PointbookError]:
            if customer_ids:
                await self._open_customers(connection, merchant_id).lock(customer_ids)
            ledger = self._open_ledger(connection, merchant_id)
            await ledger.lock(account_keys)
            try:
                contexts = await self._context_loader.load(connection, ledger, requests, clock(), locked=account_keys)
            except AccountsNotLockedError as error:
                account_keys.update(error.keys)
                raise RetryTransactionError from None
            stored = await _find_by_references(
                connection, merchant_id, (pending.command.reference for pending in batch)
            )
            live = await self._codes.lock(connection, merchant_id, challenged) if challenged else []
            redeem_batch = RedeemBatch(connection, ledger, self._codes, contexts[0].accounts, stored=stored, live=live)
            results = [
                await redeem_batch.redeem(pending, context) for pending, context in zip(batch, contexts, strict=True)
            ]
            await redeem_batch.write(merchant_id, contexts[0].now_ms)
            return results

        return await self._database.transaction(work, planned_once=True)

    async def find_by_references(self, merchant_id: str, references: Sequence[str]) -> list[Redemption | None]:
        """Return the redemption of each reference; None if there is none."""
        async with self._database.autocommit() as connection:
            redemptions = await _find_by_references(connection, merchant_id, references)
        stored = {redemption.reference: redemption for redemption in redemptions}
        return [stored.get(reference) for reference in references]

    async def get_redemption(
        self, merchant_id: str, redemption_id: str, reference: str, now_ms: int
    ) -> RedemptionDetails:
        """Return a redemption by its id, or by its reference if the id is empty.

        Raises REDEMPTION_NOT_FOUND.
        """
        async with self._database.autocommit() as connection:
            if redemption_id:
                params = {"merchant_id": merchant_id, "redemption_id": redemption_id}
                rows = await connection.fetch(queries.READ_BY_ID, params)
                redemptions = list(map(queries.read_redemption, rows))
            else:
                redemptions = await _find_by_references(connection, merchant_id, [reference])
            if not redemptions:
                raise redemption_not_found(redemption_id)
            (details,) = await self._details_loader.load(connection, merchant_id, redemptions, now_ms)
        return details

    async def list_redemptions(
        self, merchant_id: str, filters: RedemptionFilter, now_ms: int, *, before: tuple[int, str], limit: int
    ) -> list[RedemptionDetails]:
        """Return a page of a merchant's redemptions, the newest first.

        `before` is a position (time in ms, id): only older redemptions are returned.
        """
        before_ms, before_id = before
        params = {
            "merchant_id": merchant_id,
            "redeemers": list(filters.redeemers or ()),
            "state": "" if filters.state is None else filters.state.value,
            "start_ms": filters.start_ms,
            "end_ms": filters.end_ms,
            "before_ms": before_ms,
            "before_id": before_id,
            "now_ms": now_ms,
            "limit": limit,
        }
        statement = queries.LIST_BY_MERCHANT if filters.redeemers is None else queries.LIST_BY_REDEEMERS
        async with self._database.autocommit() as connection:
            redemptions = list(map(queries.read_redemption, await connection.fetch(statement, params)))
            return await self._details_loader.load(connection, merchant_id, redemptions, now_ms)

    async def reverse(self, reversal: Reversal) -> tuple[Redemption, int]:
        """Reverse points once per reference.

        Return the redemption after that, and the points that its customer could redeem then in the same way. Raises
        REDEMPTION_NOT_FOUND, REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
        """
        merchant_id, redemption_id = reversal.merchant_id, reversal.redemption_id

        async def work(connection: Connection) -> tuple[Redemption, int]:
            redemption = await _read_redemption(connection, merchant_id, redemption_id)
            # Before the locks, which then are not held for longer.
            sources = await self._details_loader.load_sources(connection, merchant_id, [redemption.content])
            redemption, ledger = await self._lock_redemption(connection, redemption)
            redemption = await _reverse_once(connection, ledger, redemption, reversal)
            active_points = await sum_active_points(ledger, sources, reversal.at_ms)
            return redemption, active_points[redemption.content]

        return await self._database.transaction(work, planned_once=True)

    async def settle_by_hand(
        self, merchant_id: str, redemption_id: str, reason: str, actor: str, now_ms: int
    ) -> Redemption:
        """Settle the open and released holds of a redemption, as webhooks would.

        Raises REDEMPTION_NOT_FOUND, and ALREADY_REVERSED if nothing is left to settle.
        """

        async def work(connection: Connection) -> Redemption:
            redemption, ledger = await self._lock_redemption(
                connection, await _read_redemption(connection, merchant_id, redemption_id)
            )
            if redemption.reversed_points == redemption.content.points:
                raise already_reversed(redemption)
            keys = [hold.key for hold in redemption.holds]
            settled = redemption.with_settled(keys)
            if settled == redemption:
                return redemption
            await update_redemption(connection, settled)
            points = redemption.held_points(HoldState.OPEN, HoldState.RELEASED)
            await _insert_audit(connection, redemption, "SETTLE", reason, now_ms, points=points, actor=actor)
            await ledger.write_holds(
                {key: without_redemption(holds, redemption_id) for key, holds in ledger.holds.items() if key in keys}
            )
            return settled

        return await self._database.transaction(work, planned_once=True)

    async def settle(self, connection: Connection, merchant_id: str, settlements: Sequence[Settlement]) -> None:
        """Settle holds of locked accounts, in the transaction that writes the events."""
        keys: defaultdict[str, list[AccountKey]] = defaultdict(list)
        for settlement in settlements:
            keys[settlement.hold.redemption_id].append(settlement.account_key)
        params = {"merchant_id": merchant_id, "redemption_ids": sorted(keys)}
        for redemption in map(queries.read_redemption, await connection.fetch(queries.LOCK, params)):
            await update_redemption(connection, redemption.with_settled(keys[redemption.redemption_id]))

    async def overdue_merchants(self, now_ms: int) -> list[str]:
        """Return merchants with overdue redemptions, without locks."""
        async with self._database.autocommit() as connection:
            params = {"now_ms": now_ms, "limit": RELEASE_COUNT}
            return [row.merchant_id for row in await connection.fetch(queries.LIST_OVERDUE_MERCHANTS, params)]

    async def count_held(self, now_ms: int) -> tuple[int, int]:
        """Return how many redemptions hold points, and how many of them are overdue."""
        (row,) = await self._database.read_planned(queries.COUNT_HELD, {"now_ms": now_ms})
        return row.held, row.overdue

    async def release_overdue(self, merchant_id: str, now_ms: int) -> int:
        """Release a merchant's overdue redemptions, and return how many.

        Redemptions with locked accounts are skipped, so that servers do not wait for each other.
        """

        async def work(connection: Connection) -> int:
            params = {"merchant_id": merchant_id, "now_ms": now_ms, "limit": RELEASE_COUNT}
            overdue = [queries.read_redemption(row) for row in await connection.fetch(queries.FIND_OVERDUE, params)]
            ledger = self._open_ledger(connection, merchant_id)
            await ledger.lock({hold.key for redemption in overdue for hold in redemption.holds}, skip_locked=True)
            lockable = [
                redemption.redemption_id
                for redemption in overdue
                if all(hold.key in ledger.accounts for hold in redemption.holds)
            ]
            ids = {"merchant_id": merchant_id, "redemption_ids": sorted(lockable)}
            count = 0
            for redemption in map(queries.read_redemption, await connection.fetch(queries.LOCK_AVAILABLE, ids)):
                if points := redemption.held_points(HoldState.OPEN):
                    await update_redemption(connection, redemption.with_open_released())
                    await _insert_audit(connection, redemption, "RELEASE", "not booked in time", now_ms, points=points)
                    count += 1
            await ledger.write_holds({key: release_overdue(holds, now_ms) for key, holds in ledger.holds.items()})
            return count

        return await self._database.transaction(work, planned_once=True)

    async def _lock_redemption(
        self, connection: Connection, redemption: Redemption
    ) -> tuple[Redemption, AccountRepository]:
        """Lock a redemption, after the accounts on which it has holds, which never change.

        Return it as it is under the lock.
        """
        ledger = self._open_ledger(connection, redemption.merchant_id)
        await ledger.lock({hold.key for hold in redemption.holds})
        params = {"merchant_id": redemption.merchant_id, "redemption_ids": [redemption.redemption_id]}
        (row,) = await connection.fetch(queries.LOCK, params)
        return queries.read_redemption(row), ledger


async def _read_redemption(connection: Connection, merchant_id: str, redemption_id: str) -> Redemption:
    """Return a redemption without locking it. Raises REDEMPTION_NOT_FOUND."""
    params = {"merchant_id": merchant_id, "redemption_id": redemption_id}
    row = await connection.fetch_one(queries.READ_BY_ID, params)
    if row is None:
        raise redemption_not_found(redemption_id)
    return queries.read_redemption(row)


async def _reverse_once(
    connection: Connection, ledger: AccountRepository, redemption: Redemption, reversal: Reversal
) -> Redemption:
    """Reverse points of a locked redemption, and return it after that.

    Only return it if the reversal was made before. Raises REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
    """
    key = {"merchant_id": reversal.merchant_id, "reference": reversal.reference}
    if row := await connection.fetch_one(queries.READ_REVERSAL, key):
        if (row.redemption_id, row.points) != (reversal.redemption_id, reversal.points):
            raise reference_reused(reversal.reference)
        return redemption
    reversed_redemption = redemption.reverse(reversal.points)
    params = key | {
        "redemption_id": reversal.redemption_id,
        "points": reversal.points,
        "notes": reversal.notes,
        "now_ms": reversal.at_ms,
        "redeemer": redemption.content.redeemer,
        "reversed_points": reversed_redemption.reversed_points - redemption.reversed_points,
        "actor": reversal.actor,
    }
    if not await connection.count_written(queries.INSERT_REVERSAL, params):
        raise RetryTransactionError  # A concurrent call has inserted the reference.
    await update_redemption(connection, reversed_redemption)
    await ledger.write_holds(_holds_after_reversal(ledger, reversed_redemption))
    return reversed_redemption


async def _find_by_references(connection: Connection, merchant_id: str, references: Iterable[str]) -> list[Redemption]:
    params = {"merchant_id": merchant_id, "references": sorted(set(references))}
    return [queries.read_redemption(row) for row in await connection.fetch(queries.READ_BY_REFERENCES, params)]


def _holds_after_reversal(ledger: AccountRepository, redemption: Redemption) -> dict[AccountKey, tuple[Hold, ...]]:
    """Return the holds of a redemption's accounts after its reversal."""
    points = {hold.key: hold.points for hold in redemption.holds}
    return {
        key: tuple(
            hold._replace(points=points[key]) if hold.redemption_id == redemption.redemption_id else hold
            for hold in holds
            if hold.redemption_id != redemption.redemption_id or points[key]
        )
        for key, holds in ledger.holds.items()
    }


async def _insert_audit(
    connection: Connection,
    redemption: Redemption,
    action: str,
    reason: str,
    now_ms: int,
    *,
    points: int,
    actor: str = "",
) -> None:
    params = {
        "audit_id": time_ordered_id(),
        "merchant_id": redemption.merchant_id,
        "redemption_id": redemption.redemption_id,
        "action": action,
        "reason": reason,
        "now_ms": now_ms,
        "redeemer": redemption.content.redeemer,
        "points": points,
        "actor": actor,
    }
    await connection.execute(queries.INSERT_AUDIT, params)
