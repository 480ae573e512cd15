"""A ledger of one account in memory, on the real code for posting."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

from pointbook_server.errors import PointbookError
from pointbook_server.ledger import fold as fold_module
from pointbook_server.ledger import lots
from pointbook_server.ledger.journal import AccountChange, Journal, PostedEvent
from pointbook_server.ledger.lots import Lot, OverflowLots, OverflowLotsNeededError
from pointbook_server.ledger.model import Account, ApplyOutcome, ApplyResult, Entry, Event, UpdateType
from pointbook_server.ledger.posting import AccountHistory, KnownEvent, LotsMissingError, post_batch
from support.ledger_events import ACCOUNT

READ_AT_MS = 1_006
"""The accounts in results must have the lots to compute the active points at this time."""


@dataclass(frozen=True)
class Limits:
    """The limits of checkpoints, of lots in a row, and of overflow lots to load."""

    checkpoint_entries: int = fold_module.CHECKPOINT_ENTRIES
    recent_entries: int = fold_module.RECENT_ENTRIES
    stored_lots_max: int = lots.STORED_LOTS_MAX
    stored_lots_after_trim: int = lots.STORED_LOTS_AFTER_TRIM
    overflow_lots_read_min: int = 1_000

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Apply these limits to the ledger."""
        with (
            patch.object(fold_module, "CHECKPOINT_ENTRIES", self.checkpoint_entries),
            patch.object(fold_module, "RECENT_ENTRIES", self.recent_entries),
            patch.object(lots, "STORED_LOTS_MAX", self.stored_lots_max),
            patch.object(lots, "STORED_LOTS_AFTER_TRIM", self.stored_lots_after_trim),
        ):
            yield


@dataclass
class Ledger:
    """A ledger of one account in memory that posts events with the real code."""

    limits: Limits = field(default_factory=Limits)
    account: Account = field(default_factory=Account)
    checkpoints: dict[int, Account] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, Entry] = field(default_factory=dict)

    @property
    def history(self) -> list[Entry]:
        """The entries in ledger order."""
        return sorted(self.entries.values(), key=_position)

    def apply(self, event: Event) -> ApplyOutcome:
        """Apply one event, as a single call does."""
        (result,) = self.post([event])
        return ApplyOutcome.REFUSED if isinstance(result, PointbookError) else result.outcome

    def post(self, events: Sequence[Event]) -> list[ApplyResult | PointbookError]:
        """Apply a batch, as one transaction does."""
        ids = {event.event_id for event in events}
        found = [(ApplyOutcome.APPLIED, self.entries[name]) for name in ids & self.entries.keys()]
        found += [(ApplyOutcome.REFUSED, self.refused[name]) for name in ids & self.refused.keys()]
        known = {
            entry.event.event_id: KnownEvent(entry.event, PostedEvent(outcome, entry.event.event_id, entry))
            for outcome, entry in found
        }
        since = [
            event.updated_at_ms
            for event in events
            if not self.account.is_before(event.updated_at_ms) and event.event_id not in known
        ]
        history = self._read_history(min(since)) if since else AccountHistory(self.account)
        with self.limits.patched():
            while True:
                try:
                    batch_result = post_batch(events, {ACCOUNT: history}, known, {}, READ_AT_MS)
                    break
                except LotsMissingError:
                    history = history._replace(base=self.load_more_lots(history.base))
        for result in batch_result.new_rows.values():
            target = self.refused if result.outcome is ApplyOutcome.REFUSED else self.entries
            assert result.entry.event.event_id not in {**self.entries, **self.refused}
            target[result.entry.event.event_id] = result.entry
        change = batch_result.changes[ACCOUNT]
        if change.changed_entries or any(
            result.outcome is not ApplyOutcome.REFUSED for result in batch_result.new_rows.values()
        ):
            self._write(change)
        return batch_result.results

    def set_void(self, event_ids: Collection[str], *, is_void: bool) -> None:
        """Void or unvoid entries."""
        changing = [entry.event for name, entry in self.entries.items() if name in event_ids]
        changing = [event for event in changing if self.entries[event.event_id].is_void is not is_void]
        if not changing:
            return
        history = self._read_history(min(event.updated_at_ms for event in changing))
        with self.limits.patched():
            while True:
                journal = Journal(history.base, history.entries)
                (journal.void if is_void else journal.unvoid)([event.event_id for event in changing])
                try:
                    change = journal.close()
                    break
                except OverflowLotsNeededError:
                    history = history._replace(base=self.load_more_lots(history.base))
        self._write(change)

    def load_more_lots(self, account: Account) -> Account:
        """Load some of the overflow lots from the entries that made them."""
        overflow = account.overflow
        assert overflow is not None, "lots are only missing if there is an overflow"
        entries = [entry for entry in self.history if entry.event.updated_at_ms <= (account.newest_at_ms or 0)]
        made = sorted(_made_lots(entries), key=lambda position_and_lot: position_and_lot[0])
        first = (overflow.first_expiry_or_never_ms, *_position(self.entries[overflow.first_event_id]))
        count = max(self.limits.overflow_lots_read_min, 3 * len(account.lots))
        loaded = [lot for position, lot in made if position[:3] >= first][: count + 1]
        if len(loaded) <= count:
            return replace(account, lots=(*account.lots, *loaded), overflow=None)
        end = count - (loaded[count].event_id == loaded[count - 1].event_id)
        points = overflow.points - sum(lot.remaining for lot in loaded[:end])
        rest = OverflowLots(points, loaded[end].expires_at_ms, loaded[end].event_id)
        return replace(account, lots=(*account.lots, *loaded[:end]), overflow=rest)

    def load_all_lots(self, account: Account | None = None) -> Account:
        """Return an account, by default the current one, with all its lots."""
        account = self.account if account is None else account
        while account.overflow is not None:
            account = self.load_more_lots(account)
        return account

    def _read_history(self, since_ms: int) -> AccountHistory:
        earlier = [at_ms for at_ms in self.checkpoints if at_ms < since_ms]
        base = self.checkpoints[max(earlier)] if earlier else Account()
        after_ms = base.newest_at_ms or 0
        return AccountHistory(base, [entry for entry in self.history if entry.event.updated_at_ms > after_ms])

    def _write(self, change: AccountChange) -> None:
        self.entries |= {entry.event.event_id: entry for entry in change.changed_entries}
        self.account = change.account
        valid_to_ms = change.checkpoints_valid_to_ms
        if valid_to_ms is not None:
            self.checkpoints = {ms: account for ms, account in self.checkpoints.items() if ms <= valid_to_ms}
        for account in change.checkpoints:
            assert account.newest_at_ms is not None
            assert account.newest_at_ms not in self.checkpoints, "the primary key of the table"
            self.checkpoints[account.newest_at_ms] = replace(account, uncheckpointed=0)


def _position(entry: Entry) -> tuple[int, int]:
    return entry.event.updated_at_ms, entry.ordinal


def _made_lots(entries: Sequence[Entry]) -> Iterator[tuple[tuple[int, int, int, int], Lot]]:
    """Return the lots that entries made with their sort keys.

    They are sorted by expiry, then in the order in which they were made.
    """
    counting = [entry for entry in entries if not entry.is_void]
    for entry in counting:
        event = entry.event
        opening = entry.balance_before if entry is counting[0] else 0
        added = event.value if event.update_type is UpdateType.INCREASE else 0
        parts = ((opening, None), (entry.drift, None), (added, event.expires_at_ms))
        for part, (points, expires_at_ms) in enumerate(parts):
            if points > 0:
                lot = Lot(points, points, expires_at_ms, event.event_id)
                yield (lot.expiry_or_never_ms, *_position(entry), part), lot
