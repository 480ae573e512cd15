"""The events posted to an account in a batch: checked at once, folded at the end."""

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from pointbook_server.ledger.fold import Fold, clamp
from pointbook_server.ledger.model import Account, ApplyOutcome, ApplyResult, Entry, Event
from pointbook_server.ledger.running_balances import RunningBalances


class PostedEvent(NamedTuple):
    """The outcome of posting an event, before the fold.

    `event_id` is that of the entry to return.
    """

    outcome: ApplyOutcome
    event_id: str
    entry: Entry | None = None


class AccountChange(NamedTuple):
    """The result of folding a journal.

    `results` has one result for each post, in order; `changed_entries` are the earlier entries whose derived values
    changed. `checkpoints` are the states to store; stored checkpoints later than `checkpoints_valid_to_ms` are stale.
    """

    account: Account
    results: list[ApplyResult]
    changed_entries: list[Entry]
    checkpoints: list[Account]
    checkpoints_valid_to_ms: int | None


class Journal:
    """One account, and the events posted to it in order of arrival.

    `base` is a state before all of them, `history` the entries since then; without a history, all events must be later
    than the base. Events without a balance are checked on arrival against running balances. Events with a balance are
    always accepted, so one fold at the end handles any number of them, in any order.
    """

    def __init__(self, base: Account, history: Sequence[Entry] = ()) -> None:
        self._base = base
        self._history = history
        self._void_ids: set[str] = set()
        self._ids_by_content: dict[tuple[object, ...], str] = {}
        self._events: list[Event] = []
        if history:
            self._void_ids = {entry.event.event_id for entry in history if entry.is_void}
            self._ids_by_content = {entry.event.content: entry.event.event_id for entry in history}
            self._events = [entry.event for entry in history]
        self._arrivals: dict[str, int] = {}
        self._posts: list[PostedEvent] = []
        self._fold = Fold(base)
        self._folded_count = 0
        self._balances: RunningBalances | None = None

    def __len__(self) -> int:
        """Return the number of posts."""
        return len(self._posts)

    def post(self, event: Event) -> PostedEvent:
        """Post an event with a new event_id. Raises OverflowLotsNeededError.

        Two events with the same content are the same event if they carry SHOPLINE's balance. An event without a
        balance is refused if it would make the account's balance negative, at its position or after it.
        Source: docs/reference/ledger.md#event-identity; docs/reference/ledger.md#events-without-a-balance.
        """
        if event.balance is None:
            refused = self._find_refused_entry(event)
            if refused is not None:
                return self._record(PostedEvent(ApplyOutcome.REFUSED, event.event_id, refused))
        else:
            known_id = self._ids_by_content.setdefault(event.content, event.event_id)
            if known_id != event.event_id:
                return self._record(PostedEvent(ApplyOutcome.DUPLICATE, known_id))
        self._arrivals[event.event_id] = len(self._arrivals)
        self._events.append(event)
        if self._balances is not None and not self._balances.add(event):
            self._balances = None
        return self._record(PostedEvent(ApplyOutcome.APPLIED, event.event_id))

    def repeat(self, post: PostedEvent) -> PostedEvent:
        """Post an event with a known event_id; the outcome stays the same."""
        outcome = ApplyOutcome.REFUSED if post.outcome is ApplyOutcome.REFUSED else ApplyOutcome.DUPLICATE
        return self._record(PostedEvent(outcome, post.event_id, post.entry))

    def void(self, event_ids: Iterable[str]) -> None:
        """Void entries of the history."""
        self._restart(self._void_ids.union(event_ids))

    def unvoid(self, event_ids: Iterable[str]) -> None:
        """Undo the voiding of entries of the history."""
        self._restart(self._void_ids.difference(event_ids))

    def close(self) -> AccountChange:
        """Fold all events, and return the change and the result of each post.

        Raises OverflowLotsNeededError.
        """
        self._fold_pending()
        return AccountChange(
            account=self._fold.stored_account(),
            results=self._results(self._fold.entries),
            changed_entries=self._changed_entries(),
            checkpoints=self._fold.checkpoints,
            checkpoints_valid_to_ms=(self._base.newest_at_ms or 0) if self._history else None,
        )

    def _record(self, post: PostedEvent) -> PostedEvent:
        self._posts.append(post)
        return post

    def _find_refused_entry(self, event: Event) -> Entry | None:
        """Return the entry that a refused event would have made; None if accepted."""
        if self._balances is None:
            self._fold_pending()
            self._balances = RunningBalances(self._base.balance, self._fold.entries)
        if self._balances.covers(event):
            return None
        before = self._balances.balance_before(event)
        return Entry(event, 0, before, clamp(before + event.delta), 0, 0, ())

    def _fold_pending(self) -> None:
        """Fold the events that are not folded yet, or all if one is not the latest."""
        pending = self._events[self._folded_count :]
        if pending and self._folded_count and not self._fold.is_before(min(event.updated_at_ms for event in pending)):
            self._fold = Fold(self._base)
            pending = self._events
        self._fold.apply(pending, self._void_ids, self._snapshot_ids(), is_refold=bool(self._history))
        self._folded_count = len(self._events)

    def _restart(self, void_ids: set[str]) -> None:
        self._void_ids = void_ids
        self._fold = Fold(self._base)
        self._folded_count = 0

    def _snapshot_ids(self) -> Collection[str]:
        """Return the entries after which a result may need the account.

        They are the new ones, and those of the last millisecond of the history.
        """
        if not self._history:
            return self._arrivals
        last_at_ms = self._history[-1].event.updated_at_ms
        from_the_end = takewhile(lambda entry: entry.event.updated_at_ms == last_at_ms, reversed(self._history))
        return {*self._arrivals, *(entry.event.event_id for entry in from_the_end)}

    def _changed_entries(self) -> list[Entry]:
        if not self._history:
            return []
        before = {entry.event.event_id: entry for entry in self._history}
        return [entry for entry in self._fold.entries if before.get(entry.event.event_id, entry) != entry]

    def _results(self, entries: Sequence[Entry]) -> list[ApplyResult]:
        """Return a result for each post.

        Its account is that after the newest entry at the arrival of the event.
        """
        if not self._history and len(entries) == len(self._posts) == 1:
            # Fast path: most batches have one event for each account.
            return [ApplyResult(ApplyOutcome.APPLIED, self._fold.snapshots[entries[0].event.event_id], entries[0])]
        positions = {entry.event.event_id: position for position, entry in enumerate(entries)}
        newest = max((positions[entry.event.event_id] for entry in self._history), default=-1)
        late_ids = self._late_ids(entries)
        results = []
        for post in self._posts:
            outcome = post.outcome
            if outcome is ApplyOutcome.APPLIED:
                newest = max(newest, positions[post.event_id])
                outcome = ApplyOutcome.LATE if post.event_id in late_ids else ApplyOutcome.APPLIED
            account = self._base if newest < 0 else self._fold.snapshots[entries[newest].event.event_id]
            position = positions.get(post.event_id)
            entry = post.entry if position is None else entries[position]
            if entry is None:
                raise LookupError("a posted event has no entry")
            results.append(ApplyResult(outcome, account, entry))
        return results

    def _late_ids(self, entries: Sequence[Entry]) -> set[str]:
        """Return the event_ids of new entries that precede an entry which arrived earlier."""
        late_ids = set()
        earliest = len(self._arrivals)
        for entry in reversed(entries):
            arrival = self._arrivals.get(entry.event.event_id, -1)
            if arrival > earliest:
                late_ids.add(entry.event.event_id)
            earliest = min(earliest, arrival)
        return late_ids
