"""A plain ApplyPointsUpdate: the same rows, one SQLAlchemy transaction per call.

The real service is compared with it. It does not check fields, late events or access; the fold of the account is the
real one.
"""

import time
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_server.db.tables import points_accounts, points_entries
from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.lots import Lot
from pointbook_server.ledger.model import Account, AccountKey, Entry, Event, UpdateType


class PlainPointsServicer(points_pb2_grpc.PointsServiceServicer):
    """A PointsService with only the compared method."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def ApplyPointsUpdate(  # noqa: N802 - gRPC names the methods
        self, request: points_pb2.ApplyPointsUpdateRequest, _context: object
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Lock the account, insert the entry, and update the account."""
        merchant_id, event = request.update.merchant_id, _read_event(request.update)
        async with self._engine.begin() as connection:
            account = await _lock_account(connection, merchant_id, event.account_key)
            after, entries = fold(account, [event])
            if not await _insert_entry(connection, merchant_id, entries[0]):
                return points_pb2.ApplyPointsUpdateResponse(outcome=points_pb2.APPLY_OUTCOME_DUPLICATE)
            await _update_account(connection, merchant_id, event.account_key, after)
        return points_pb2.ApplyPointsUpdateResponse(
            outcome=points_pb2.APPLY_OUTCOME_APPLIED,
            account=points_pb2.PointsAccount(
                merchant_id=merchant_id,
                store_id=event.account_key.store_id,
                buyer_id=event.account_key.buyer_id,
                points_balance=after.balance,
            ),
            drift=entries[0].drift,
        )


def _read_event(message: points_pb2.PointsUpdate) -> Event:
    is_increase = message.update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE
    return Event(
        event_id=message.event_id,
        account_key=AccountKey(message.store_id, message.buyer_id),
        update_type=UpdateType.INCREASE if is_increase else UpdateType.DECREASE,
        scene=points_pb2.PointsUpdateScene.Name(message.updated_scene).removeprefix("POINTS_UPDATE_SCENE_"),
        value=message.updated_value,
        balance=message.points_balance,
        expires_at_ms=message.points_expiry_time.ToMilliseconds() if is_increase else None,
        updated_at_ms=message.updated_at.ToMilliseconds(),
    )


async def _lock_account(connection: AsyncConnection, merchant_id: str, key: AccountKey) -> Account:
    query = select(points_accounts).where(_is_account(merchant_id, key)).with_for_update()
    row = (await connection.execute(query)).one()
    return Account(
        opening=row.opening,
        balance=row.balance,
        drift=row.drift,
        silently_expired=row.silently_expired,
        lifetime_points=row.lifetime_points,
        newest_at_ms=row.newest_at_ms,
        lots=tuple(Lot(*lot) for lot in row.lots),
    )


async def _insert_entry(connection: AsyncConnection, merchant_id: str, entry: Entry) -> bool:
    """Insert the entry; return False if its event_id exists."""
    event = entry.event
    statement = (
        insert(points_entries)
        .values(
            event_id=event.event_id,
            merchant_id=merchant_id,
            store_id=event.account_key.store_id,
            buyer_id=event.account_key.buyer_id,
            update_type=event.update_type.value,
            scene=event.scene,
            updated_value=event.value,
            points_balance=event.balance,
            expires_at_ms=event.expires_at_ms,
            updated_at_ms=event.updated_at_ms,
            webhook_id="",
            shop_domain="",
            api_version="",
            received_at_ms=time.time_ns() // 1_000_000,
            outcome="APPLIED",
            ordinal=entry.ordinal,
            balance_before=entry.balance_before,
            balance_after=entry.balance_after,
            drift=entry.drift,
            silently_expired=entry.silently_expired,
            draws=[[draw.points, draw.expires_at_ms, draw.event_id] for draw in entry.draws],
        )
        .on_conflict_do_nothing()
        .returning(points_entries.c.event_id)
    )
    return (await connection.execute(statement)).one_or_none() is not None


async def _update_account(connection: AsyncConnection, merchant_id: str, key: AccountKey, account: Account) -> None:
    await connection.execute(
        update(points_accounts)
        .where(_is_account(merchant_id, key))
        .values(
            opening=account.opening,
            balance=account.balance,
            drift=account.drift,
            silently_expired=account.silently_expired,
            lifetime_points=account.lifetime_points,
            newest_at_ms=account.newest_at_ms,
            lots=[[lot.remaining, lot.original, lot.expires_at_ms, lot.event_id] for lot in account.lots],
        )
    )


def _is_account(merchant_id: str, key: AccountKey) -> Any:
    columns = points_accounts.c
    return (
        (columns.buyer_id == key.buyer_id) & (columns.store_id == key.store_id) & (columns.merchant_id == merchant_id)
    )
