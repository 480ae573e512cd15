"""Voiding and unvoiding entries: their accounts are folded again.

Source: docs/reference/ledger.md#voiding-entries.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.fold import LONG_FOLD_ENTRIES
from pointbook_server.ledger.journal import AccountChange, Journal
from pointbook_server.ledger.lots import OverflowLotsNeededError
from pointbook_server.ledger.model import Account, AccountKey, Event, Void
from pointbook_server.ledger.posting import AccountHistory


async def set_void(
    repository: AccountRepository, events: Sequence[Event], void: Void, *, is_void: bool
) -> dict[AccountKey, Account]:
    """Void or unvoid entries of locked accounts, and return the changed accounts."""
    since: dict[AccountKey, int] = {}
    for event in events:
        since[event.account_key] = min(since.get(event.account_key, event.updated_at_ms), event.updated_at_ms)
    histories = await repository.read_histories(since)
    event_ids = [event.event_id for event in events]
    repository.set_voids(event_ids, void if is_void else None)
    changes = {}
    for key, history in histories.items():
        changes[key] = await _refold(repository, key, history, event_ids, is_void=is_void)
    await repository.write([], changes)
    await repository.insert_voidings(event_ids, void, is_void=is_void)
    accounts = {key: replace(change.account, holds=repository.holds.get(key, ())) for key, change in changes.items()}
    return {key: await repository.load_lots(key, account, void.at_ms) for key, account in accounts.items()}


async def _refold(
    repository: AccountRepository,
    key: AccountKey,
    history: AccountHistory,
    event_ids: Sequence[str],
    *,
    is_void: bool,
) -> AccountChange:
    """Fold an account again, loading overflow lots until the fold has enough."""
    while True:
        journal = Journal(history.base, history.entries)
        (journal.void if is_void else journal.unvoid)(event_ids)
        try:
            if len(history.entries) < LONG_FOLD_ENTRIES:
                return journal.close()
            return await asyncio.to_thread(journal.close)
        except OverflowLotsNeededError:
            history = history._replace(base=await repository.load_more_lots(key, history.base))
