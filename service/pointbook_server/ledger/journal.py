"""One account while events are posted to it: who is judged when, and what a fold at the end makes of all of them."""

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from pointbook_server.ledger.balances import Balances
from pointbook_server.ledger.model import Account, ApplyOutcome, ApplyResult, Entry, Event, Fold, bounded


class PostedEvent(NamedTuple):
    """What is known of an event when it has just been posted. `event_id` is the one whose entry answers it."""

    outcome: ApplyOutcome
    event_id: str
    entry: Entry | None = None


class AccountChange(NamedTuple):
    """What a journal makes of everything that was posted to it.

    `verdicts` answer the posts in turn. `moved` are the earlier entries whose derived values changed. `checkpoints`
    are the states to keep; those kept before that are later than `checkpoints_valid_to_ms` no longer hold.
    """

    account: Account
    verdicts: list[ApplyResult]
    moved: list[Entry]
    checkpoints: list[Account]
    checkpoints_valid_to_ms: int | None


class Journal:
    """One account while events are posted to it in the order in which they came.

    `base` is a state before all of them, `history` the entries since then: none where all events are later than the
    base, which is the direct way. Events without a balance are judged as they come, by running balances. The others
    are accepted anyway, so that one fold at the end serves them all, however many there are and in whatever order they
    came.
    """

    def __init__(self, base: Account, history: Sequence[Entry] = ()) -> None:
        self._base = base
        self._history = history
        self._void = {entry.event.event_id for entry in history if entry.is_void}
        self._contents = {entry.event.content: entry.event.event_id for entry in history}
        self._events = [entry.event for entry in history]
        self._arrivals: dict[str, int] = {}
        self._posts: list[PostedEvent] = []
        self._fold = Fold(base)
        self._folded = 0
        self._balances: Balances | None = None

    def __len__(self) -> int:
        """How many posts there are."""
        return len(self._posts)

    def post(self, event: Event) -> PostedEvent:
        """Post an event whose event_id is new.

        Another event with the same content is the same event when both carry SHOPLINE's balance. An event without a
        balance is refused where it would take the account below zero, at its place or after it. Raises
        FarLotsNeededError.
        """
        known = None if event.balance is None else self._contents.get(event.content)
        if known is not None:
            return self._note(PostedEvent(ApplyOutcome.DUPLICATE, known))
        refused = self._refusal(event) if event.balance is None else None
        if refused is not None:
            return self._note(PostedEvent(ApplyOutcome.REFUSED, event.event_id, refused))
        self._arrivals[event.event_id] = len(self._arrivals)
        self._contents[event.content] = event.event_id
        self._events.append(event)
        if self._balances is not None and not self._balances.add(event):
            self._balances = None
        return self._note(PostedEvent(ApplyOutcome.APPLIED, event.event_id))

    def repeat(self, post: PostedEvent) -> PostedEvent:
        """Post an event again whose event_id is known: the answer stays, told with the account as it is by now."""
        outcome = ApplyOutcome.REFUSED if post.outcome is ApplyOutcome.REFUSED else ApplyOutcome.DUPLICATE
        return self._note(PostedEvent(outcome, post.event_id, post.entry))

    def void(self, event_ids: Iterable[str]) -> None:
        """Let entries of the history count for nothing."""
        self._refold(self._void.union(event_ids))

    def unvoid(self, event_ids: Iterable[str]) -> None:
        """Let entries of the history count again."""
        self._refold(self._void.difference(event_ids))

    def close(self) -> AccountChange:
        """Fold everything, and tell what became of each post. Raises FarLotsNeededError."""
        self._settle()
        return AccountChange(
            account=self._fold.kept_account(),
            verdicts=self._verdicts(self._fold.entries),
            moved=self._moved(),
            checkpoints=self._fold.checkpoints,
            checkpoints_valid_to_ms=(self._base.newest_at_ms or 0) if self._history else None,
        )

    def _note(self, post: PostedEvent) -> PostedEvent:
        self._posts.append(post)
        return post

    def _refusal(self, event: Event) -> Entry | None:
        """Judge an event without a balance: the entry that it would have made where it is refused, else None."""
        if self._balances is None:
            self._settle()
            self._balances = Balances(self._base.balance, self._fold.entries)
        if self._balances.cover(event):
            return None
        before = self._balances.before(event)
        return Entry(event, 0, before, bounded(before + event.delta), 0, 0, ())

    def _settle(self) -> None:
        """Fold what has not been folded yet: on top where all of it is later, else everything again."""
        fresh = self._events[self._folded :]
        if fresh and self._folded and not self._fold.is_before(min(event.updated_at_ms for event in fresh)):
            self._fold = Fold(self._base)
            fresh = self._events
        self._fold.run(fresh, self._void, self._remembered())
        self._folded = len(self._events)

    def _refold(self, void: set[str]) -> None:
        self._void = void
        self._fold = Fold(self._base)
        self._folded = 0

    def _remembered(self) -> Collection[str]:
        """Name the entries after which somebody may have to be told the account: the new ones, and the last old."""
        if not self._history:
            return self._arrivals
        last_at_ms = self._history[-1].event.updated_at_ms
        from_the_end = takewhile(lambda entry: entry.event.updated_at_ms == last_at_ms, reversed(self._history))
        return {*self._arrivals, *(entry.event.event_id for entry in from_the_end)}

    def _moved(self) -> list[Entry]:
        if not self._history:
            return []
        before = {entry.event.event_id: entry for entry in self._history}
        return [entry for entry in self._fold.entries if before.get(entry.event.event_id, entry) != entry]

    def _verdicts(self, entries: Sequence[Entry]) -> list[ApplyResult]:
        """Answer every post with the account after the newest entry that was there when it came."""
        if not self._history and len(entries) == len(self._posts) == 1:
            # Most batches bring an account one event, whose answer takes no searching.
            return [ApplyResult(ApplyOutcome.APPLIED, self._fold.snapshots[entries[0].event.event_id], entries[0])]
        places = {entry.event.event_id: place for place, entry in enumerate(entries)}
        newest = max((places[entry.event.event_id] for entry in self._history), default=-1)
        late = self._late(entries)
        verdicts = []
        for post in self._posts:
            outcome = post.outcome
            if outcome is ApplyOutcome.APPLIED:
                newest = max(newest, places[post.event_id])
                outcome = ApplyOutcome.LATE if post.event_id in late else ApplyOutcome.APPLIED
            account = self._base if newest < 0 else self._fold.snapshots[entries[newest].event.event_id]
            place = places.get(post.event_id)
            entry = post.entry if place is None else entries[place]
            if entry is None:
                raise LookupError("an event that was posted has no entry")
            verdicts.append(ApplyResult(outcome, account, entry))
        return verdicts

    def _late(self, entries: Sequence[Entry]) -> set[str]:
        """Name the new entries that stand before one that was there earlier."""
        late = set()
        earliest = len(self._arrivals)
        for entry in reversed(entries):
            arrival = self._arrivals.get(entry.event.event_id, -1)
            if arrival > earliest:
                late.add(entry.event.event_id)
            earliest = min(earliest, arrival)
        return late
