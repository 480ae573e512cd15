"""Conversion between the ledger's entities and the rows and parameters of SQL."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pointbook_server.db.database import Row
from pointbook_server.ledger import queries
from pointbook_server.ledger.holds import Hold
from pointbook_server.ledger.lots import Draw, Lot, OverflowLots
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    ApplyOutcome,
    Entry,
    Event,
    StoredEntry,
    UpdateType,
    Void,
    WebhookOrigin,
)

_string_to_json = json.JSONEncoder().encode
_parse_json = json.JSONDecoder().raw_decode


def to_columns(columns: dict[str, str], rows: Sequence[Sequence[Any]], prefix: str = "") -> dict[str, Any]:
    """Convert rows to array parameters, one for each column."""
    arrays = map(list, zip(*rows, strict=True)) if rows else ([] for _ in columns)
    return dict(zip((f"{prefix}{name}" for name in columns), arrays, strict=True))


def keys_to_columns(keys: Iterable[AccountKey]) -> dict[str, Any]:
    """Convert account keys to one array of stores and one of buyers."""
    pairs = [(key.store_id, key.buyer_id) for key in keys]
    return to_columns(queries.KEY_COLUMNS, pairs)


def account_to_row(
    merchant_id: str, key: AccountKey, account: Account, holds: Sequence[Hold], revision: int
) -> tuple[Any, ...]:
    """Convert an account and its holds to a points_account_row.

    The holds come separately, because a fold has none.
    """
    return (*checkpoint_to_row(merchant_id, key, account), account.uncheckpointed, holds_to_json(holds), revision)


def holds_to_json(holds: Sequence[Hold]) -> str | None:
    """Convert the holds of an account to JSON."""
    return json.dumps(holds) if holds else None


def checkpoint_to_row(merchant_id: str, key: AccountKey, account: Account) -> tuple[Any, ...]:
    """Convert an account's state to a points_checkpoint_row."""
    return (
        merchant_id,
        key.store_id,
        key.buyer_id,
        account.opening,
        account.balance,
        account.drift,
        account.silently_expired,
        account.lifetime_points,
        account.newest_at_ms,
        _lots_to_json(account.lots),
        None if account.overflow is None else json.dumps(account.overflow),
        account.drawn_to_ms,
    )


def _lots_to_json(lots: Sequence[Lot]) -> str:
    """Convert lots to JSON, several times faster than `json.dumps`."""
    parts = [
        f"[{remaining},{original},{'null' if expires_at_ms is None else expires_at_ms},{_string_to_json(event_id)}]"
        for remaining, original, expires_at_ms, event_id in lots
    ]
    return f"[{','.join(parts)}]"


def _draws_to_json(draws: Sequence[Draw]) -> str:
    """Convert draws to JSON, like `_lots_to_json`."""
    parts = [
        f"[{points},{'null' if expires_at_ms is None else expires_at_ms},{_string_to_json(event_id)}]"
        for points, expires_at_ms, event_id in draws
    ]
    return f"[{','.join(parts)}]"


def account_from_row(row: Row) -> tuple[AccountKey, Account]:
    """Build an account from a row of ACCOUNT_COLUMNS or CHECKPOINT_COLUMNS."""
    store_id, buyer_id, opening, balance, drift, silent, lifetime, newest, lots, overflow, drawn_to, *more = row
    uncheckpointed, holds = more[:2] if more else (0, None)
    return AccountKey(store_id, buyer_id), Account(
        opening,
        balance,
        drift,
        silent,
        lifetime,
        newest,
        tuple(map(Lot._make, _from_json(lots))),
        None if overflow is None else OverflowLots._make(_from_json(overflow)),
        drawn_to,
        uncheckpointed,
        () if holds is None else tuple(map(_hold_from_json, _from_json(holds))),
    )


def _from_json(text: str) -> Any:
    """Parse JSON from PostgreSQL.

    It has no spaces around it, which `json.loads` takes most of its time to look for.
    """
    return _parse_json(text)[0]


def _hold_from_json(values: list[Any]) -> Hold:
    redemption_id, points, opened_at_ms, settle_by_ms, scenes, is_released, *lead_ms = values
    return Hold(redemption_id, points, opened_at_ms, settle_by_ms, tuple(scenes), is_released, *lead_ms)


def entry_to_row(merchant_id: str, stored: StoredEntry) -> tuple[Any, ...]:
    """Convert a new entry to a points_entry_row."""
    event, webhook = stored.entry.event, stored.webhook
    return (
        merchant_id,
        event.event_id,
        event.account_key.store_id,
        event.account_key.buyer_id,
        event.update_type,
        event.scene,
        event.value,
        event.balance,
        event.expires_at_ms,
        event.updated_at_ms,
        webhook.webhook_id,
        webhook.shop_domain,
        webhook.api_version,
        stored.received_at_ms,
        stored.outcome,
        *_fold_to_row(stored.entry),
        stored.settled_redemption_id,
    )


def derived_to_row(entry: Entry, void: Void | None) -> tuple[Any, ...]:
    """Convert the values of an entry that may change to DERIVED_COLUMNS."""
    return (*_fold_to_row(entry), None if void is None else void.at_ms, None if void is None else void.reason)


def _fold_to_row(entry: Entry) -> tuple[Any, ...]:
    """Convert the values that the fold derives to FOLD_COLUMNS."""
    return (
        entry.ordinal,
        entry.balance_before,
        entry.balance_after,
        entry.drift,
        entry.silently_expired,
        _draws_to_json(entry.draws),
    )


def entry_from_row(row: Row) -> StoredEntry:
    """Build an entry from a row of ENTRY_COLUMNS, in their order."""
    (
        event_id,
        store_id,
        buyer_id,
        update_type,
        scene,
        value,
        balance,
        expires_at_ms,
        updated_at_ms,
        webhook_id,
        shop_domain,
        api_version,
        received_at_ms,
        outcome,
        ordinal,
        balance_before,
        balance_after,
        drift,
        silently_expired,
        draws,
        voided_at_ms,
        void_reason,
        settled_redemption_id,
    ) = row
    return StoredEntry(
        entry=Entry(
            event=Event(
                event_id=event_id,
                account_key=AccountKey(store_id, buyer_id),
                update_type=UpdateType(update_type),
                scene=scene,
                value=value,
                balance=balance,
                expires_at_ms=expires_at_ms,
                updated_at_ms=updated_at_ms,
            ),
            ordinal=ordinal,
            balance_before=balance_before,
            balance_after=balance_after,
            drift=drift,
            silently_expired=silently_expired,
            draws=tuple(map(Draw._make, _from_json(draws))),
            is_void=voided_at_ms is not None,
        ),
        webhook=WebhookOrigin(webhook_id, shop_domain, api_version),
        received_at_ms=received_at_ms,
        outcome=ApplyOutcome(outcome),
        void=None if voided_at_ms is None else Void(voided_at_ms, void_reason),
        settled_redemption_id=settled_redemption_id,
    )
