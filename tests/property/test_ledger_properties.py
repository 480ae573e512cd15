"""The ledger's promise on the pure domain: the account is a function of the set of events, whatever way they come.

True histories come from a small model of SHOPLINE that knows its own points by their expiry and books every change;
the ledger must find the same points again from nothing but the events.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise, permutations, takewhile
from unittest.mock import patch

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pointbook_server.errors import PointbookError
from pointbook_server.ledger import lots, model
from pointbook_server.ledger.journal import AccountChange, Journal, PostedEvent
from pointbook_server.ledger.lots import Lot, OverflowLots, OverflowLotsNeededError
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, ApplyResult, Entry, Event, UpdateType, fold
from pointbook_server.ledger.posting import AccountHistory, KnownEvent, LotsMissingError, post_batch
from support.examples import examples

ACCOUNT = AccountKey("store", "buyer")
READ_AT_MS = 1_006
"""What the answers' accounts must be able to tell: what is active at this moment."""
POINTS_EXPIRED = "POINTS_EXPIRED"
NEVER = float("inf")


@dataclass(frozen=True)
class Limits:
    """After how many entries a state is kept, how many lots stand in an account's row, and how many are read."""

    checkpoint_entries: int = model.CHECKPOINT_ENTRIES
    near_lots_max: int = lots.NEAR_LOTS_MAX
    near_lots_kept: int = lots.NEAR_LOTS_KEPT
    far_lots_read: int = 1_000

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let the ledger keep to these limits."""
        with (
            patch.object(model, "CHECKPOINT_ENTRIES", self.checkpoint_entries),
            patch.object(lots, "NEAR_LOTS_MAX", self.near_lots_max),
            patch.object(lots, "NEAR_LOTS_KEPT", self.near_lots_kept),
        ):
            yield


tiny_limits = st.builds(
    lambda checkpoint_entries, near_lots_max, fewer, far_lots_read: Limits(
        checkpoint_entries, near_lots_max, max(near_lots_max - fewer, 1), far_lots_read
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(2, 4),
)
limits_of_any_size = st.one_of(st.just(Limits()), tiny_limits, tiny_limits)


@dataclass
class Book:
    """A book in memory: what the store keeps, reads and writes of one account, through the same posting."""

    limits: Limits = field(default_factory=Limits)
    account: Account = field(default_factory=Account)
    checkpoints: dict[int, Account] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, Entry] = field(default_factory=dict)

    @property
    def history(self) -> list[Entry]:
        """The entries in the order of the book."""
        return sorted(self.entries.values(), key=_place)

    def apply(self, event: Event) -> ApplyOutcome:
        """Write one event into the book, as a call by itself does."""
        return outcome_of(self.post([event])[0])

    def post(self, events: Sequence[Event]) -> list[ApplyResult | PointbookError]:
        """Write a batch into the book, as one transaction of the store does."""
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
        page = self._page(min(since)) if since else AccountHistory(self.account)
        with self.limits.hold():
            while True:
                try:
                    result = post_batch(events, {ACCOUNT: page}, known, {}, READ_AT_MS)
                    break
                except LotsMissingError:
                    page = page._replace(base=self.with_more_lots(page.base))
        for verdict in result.entries.values():
            kind = self.refused if verdict.outcome is ApplyOutcome.REFUSED else self.entries
            assert verdict.entry.event.event_id not in {**self.entries, **self.refused}
            kind[verdict.entry.event.event_id] = verdict.entry
        posting = result.postings[ACCOUNT]
        if posting.moved or any(verdict.outcome is not ApplyOutcome.REFUSED for verdict in result.entries.values()):
            self._write(posting)
        return result.answers

    def set_void(self, event_ids: Collection[str], *, is_void: bool) -> None:
        """Let entries count for nothing, or count again."""
        changing = [entry.event for name, entry in self.entries.items() if name in event_ids]
        changing = [event for event in changing if self.entries[event.event_id].is_void is not is_void]
        if not changing:
            return
        page = self._page(min(event.updated_at_ms for event in changing))
        with self.limits.hold():
            while True:
                journal = Journal(page.base, page.history)
                (journal.void if is_void else journal.unvoid)([event.event_id for event in changing])
                try:
                    posting = journal.close()
                    break
                except OverflowLotsNeededError:
                    page = page._replace(base=self.with_more_lots(page.base))
        self._write(posting)

    def with_more_lots(self, account: Account) -> Account:
        """Read some of the far lots from the entries that made them."""
        far_lots = account.far_lots
        assert far_lots is not None, "lots are only missing where there are far ones"
        entries = [entry for entry in self.history if entry.event.updated_at_ms <= (account.newest_at_ms or 0)]
        made = sorted(_lots_made(entries), key=lambda place_and_lot: place_and_lot[0])
        first = (far_lots.order_ms, *_place(self.entries[far_lots.event_id]))
        count = max(self.limits.far_lots_read, 3 * len(account.lots))
        far = [lot for place, lot in made if place[:3] >= first][: count + 1]
        if len(far) <= count:
            return replace(account, lots=(*account.lots, *far), far_lots=None)
        end = count - (far[count].event_id == far[count - 1].event_id)
        points = far_lots.points - sum(lot.remaining for lot in far[:end])
        beyond = OverflowLots(points, far[end].expires_at_ms, far[end].event_id)
        return replace(account, lots=(*account.lots, *far[:end]), far_lots=beyond)

    def complete(self, account: Account | None = None) -> Account:
        """An account, or the one that is kept, with all its lots."""
        account = self.account if account is None else account
        while account.far_lots is not None:
            account = self.with_more_lots(account)
        return account

    def _page(self, since_ms: int) -> AccountHistory:
        kept = [at_ms for at_ms in self.checkpoints if at_ms < since_ms]
        base = self.checkpoints[max(kept)] if kept else Account()
        after_ms = base.newest_at_ms or 0
        return AccountHistory(base, [entry for entry in self.history if entry.event.updated_at_ms > after_ms])

    def _write(self, posting: AccountChange) -> None:
        self.entries |= {entry.event.event_id: entry for entry in posting.moved}
        self.account = posting.account
        valid_to_ms = posting.checkpoints_valid_to_ms
        if valid_to_ms is not None:
            self.checkpoints = {ms: account for ms, account in self.checkpoints.items() if ms <= valid_to_ms}
        for account in posting.checkpoints:
            assert account.newest_at_ms is not None
            assert account.newest_at_ms not in self.checkpoints, "the key of the table"
            self.checkpoints[account.newest_at_ms] = replace(account, uncheckpointed=0)


def _place(entry: Entry) -> tuple[int, int]:
    return entry.event.updated_at_ms, entry.ordinal


def _lots_made(entries: Sequence[Entry]) -> Iterator[tuple[tuple[int, int, int, int], Lot]]:
    """The lots that entries made, with where they stand: by expiry, then in the order in which they were made."""
    counting = [entry for entry in entries if not entry.is_void]
    for entry in counting:
        event = entry.event
        opening = entry.balance_before if entry is counting[0] else 0
        brought = event.value if event.update_type is UpdateType.INCREASE else 0
        parts = ((opening, None), (entry.drift, None), (brought, event.expires_at_ms))
        for part, (points, expires_at_ms) in enumerate(parts):
            if points > 0:
                lot = Lot(points, points, expires_at_ms, event.event_id)
                yield (lot.order_ms, *_place(entry), part), lot


def outcome_of(answer: ApplyResult | PointbookError) -> ApplyOutcome:
    """What became of an event; an error is a refusal."""
    return ApplyOutcome.REFUSED if isinstance(answer, PointbookError) else answer.outcome


def kind_of(answer: ApplyResult | PointbookError) -> str:
    """What was answered, whatever place the event has in time."""
    if isinstance(answer, PointbookError):
        return answer.reason.value
    return "DUPLICATE" if answer.outcome is ApplyOutcome.DUPLICATE else "ACCEPTED"


@dataclass
class Shopline:
    """Who owns the points: what it holds by expiry, and the events that it has sent."""

    balance: int
    points: Counter[float]
    events: list[Event]
    silently_expired: int = 0
    lifetime_points: int = 0

    @classmethod
    def opened(cls, opening: int) -> "Shopline":
        """An account with points from before the first event."""
        held = max(opening, 0)
        return cls(opening, Counter({NEVER: held}), [], lifetime_points=held)

    def expired_points(self, at_ms: int) -> int:
        """Points that have expired by then and are still in the balance."""
        return sum(points for expiry, points in self.points.items() if expiry <= at_ms)

    def expire_silently(self, by_ms: int) -> None:
        """Take what has expired, without telling anybody."""
        expired = self.expired_points(by_ms)
        self.points = Counter({expiry: points for expiry, points in self.points.items() if expiry > by_ms})
        self.balance -= expired
        self.silently_expired += expired

    def book(self, event: Event) -> None:
        """Move the points by an event, which is told."""
        self.balance += event.delta
        at_ms = event.updated_at_ms
        if event.update_type is UpdateType.INCREASE:
            self.points[NEVER if event.expires_at_ms is None else event.expires_at_ms] += event.value
            self.lifetime_points += event.value
        else:
            self._take(event.value, at_ms, expired_first=event.scene == POINTS_EXPIRED)
        self._take(self.points.total() - max(self.balance, 0), at_ms, expired_first=True)
        self.events.append(event)

    def held(self, at_ms: int) -> Counter[float]:
        """What is held by expiry, expired points as one: nothing tells them apart any more."""
        held: Counter[float] = Counter()
        for expiry, points in self.points.items():
            held[max(expiry, at_ms)] += points
        return +held

    def _take(self, points: int, at_ms: int, *, expired_first: bool) -> None:
        for expiry in sorted(self.points, key=lambda expiry: ((expiry <= at_ms) != expired_first, expiry)):
            taken = max(min(points, self.points[expiry]), 0)
            self.points[expiry] -= taken
            points -= taken


@dataclass(frozen=True)
class Move:
    """One change that a shop makes, before its balance is known."""

    update_type: UpdateType
    value: int
    life_ms: int | None
    scene: str


moves = st.one_of(
    st.builds(
        Move,
        st.just(UpdateType.INCREASE),
        st.integers(0, 12),
        st.sampled_from([None, 0, 1, 2, 3, 5, 9]),
        st.sampled_from(["SUCCESSFUL_ORDERS", "LUCKY_DRAW"]),
    ),
    st.builds(
        Move,
        st.just(UpdateType.DECREASE),
        st.integers(0, 16),
        st.none(),
        st.sampled_from(["REDEEM_COUPON", POINTS_EXPIRED]),
    ),
)


@dataclass(frozen=True)
class Millisecond:
    """What happens in one millisecond: silent expiry up to some time before it, then changes.

    With `returns` a last change leads back to the balance that it began with.
    """

    moves: tuple[Move, ...]
    after_ms: int
    silent_until_ms: int | None
    returns: bool


milliseconds = st.builds(
    Millisecond,
    st.lists(moves, min_size=1, max_size=5).map(tuple),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(0, 2)),
    st.booleans(),
)


def smallest_trail(events: Sequence[Event], start: int) -> list[Event]:
    """Of all orders that fit the balances, return the one that the ledger defines, by trying every one."""

    def content(event: Event) -> tuple[object, ...]:
        expiry = NEVER if event.expires_at_ms is None else event.expires_at_ms
        return (event.delta, event.balance, expiry, event.scene)

    def follows(order: Sequence[Event]) -> bool:
        balances = [start, *(event.balance for event in order)]
        return all(
            before is not None and before + event.delta == event.balance
            for before, event in zip(balances, order, strict=False)
        )

    orders = [order for order in permutations(events) if follows(order)]
    return list(min(orders, key=lambda order: [content(event) for event in order]))


def play(shop: Shopline, happening: Millisecond, at_ms: int) -> Shopline | None:
    """Let a millisecond happen; None where it is one of the ledger's known limits."""
    after = replace(shop, points=shop.points.copy(), events=[*shop.events])
    if happening.silent_until_ms is not None:
        after.expire_silently(at_ms - happening.silent_until_ms)
    is_silent = after.balance < shop.balance
    start = balance = after.balance
    events: list[Event] = []
    for number, move in enumerate(happening.moves):
        is_expiry = move.scene == POINTS_EXPIRED
        value = min(move.value, after.expired_points(at_ms)) if is_expiry else move.value
        expires_at_ms = None if move.life_ms is None else at_ms + move.life_ms
        event_id = f"{at_ms}-{number}"
        event = Event(event_id, ACCOUNT, move.update_type, move.scene, value, None, expires_at_ms, at_ms)
        balance += event.delta
        events.append(replace(event, balance=balance))
    if happening.returns:
        update_type = UpdateType.INCREASE if start >= balance else UpdateType.DECREASE
        back = abs(start - balance)
        events.append(Event(f"{at_ms}-back", ACCOUNT, update_type, "MANUALLY", back, start, None, at_ms))
        balance = start
    if len({event.content for event in events}) < len(events):
        return None  # Two identical events of one millisecond count once.
    trail = smallest_trail(events, start)
    is_loop = len(trail) > 1 and balance == start
    if is_loop and not shop.events:
        return None  # Nobody can order an account's first millisecond when it is a loop.
    if is_silent:
        # Where a loop starts, only the balance before tells, and that has changed unseen.
        is_partial = after.expired_points(at_ms) > 0
        if is_loop and (is_partial or shop.balance in {event.balance for event in trail}):
            return None
        # Expired points are gone before the event, but the fold lets the event draw on them.
        first = trail[0]
        if first.update_type is UpdateType.DECREASE and (first.scene == POINTS_EXPIRED or first.value > start):
            return None
    for event in trail:
        after.book(event)
    return after


@st.composite
def true_histories(draw: st.DrawFn, count_max: int = 5) -> Shopline:
    """What a shop did: every event was sent, and every balance in it was right."""
    shop = Shopline.opened(draw(st.integers(-10, 30)))
    at_ms = 1_000
    for happening in draw(st.lists(milliseconds, min_size=1, max_size=count_max)):
        at_ms += happening.after_ms
        alone = replace(happening, moves=happening.moves[:1], silent_until_ms=None, returns=False)
        after = play(shop, happening, at_ms) or play(shop, alone, at_ms)
        assert after is not None, "one event alone is never a known limit"
        shop = after
    return shop


free_events = st.builds(
    Event,
    event_id=st.uuids().map(str),
    account=st.just(ACCOUNT),
    update_type=st.sampled_from(UpdateType),
    scene=st.sampled_from(["SUCCESSFUL_ORDERS", POINTS_EXPIRED, "LUCKY_DRAW"]),
    value=st.integers(0, 6),
    balance=st.one_of(st.none(), st.integers(-4, 12)),
    expires_at_ms=st.one_of(st.none(), st.integers(1_000, 1_012)),
    updated_at_ms=st.integers(1_000, 1_006),
)
balanced_events = free_events.filter(lambda event: event.balance is not None)


def check_invariants(account: Account, entries: Sequence[Entry]) -> None:
    """What holds always, for the account and for every entry."""
    deltas = sum(entry.event.delta for entry in entries)
    assert account.balance == (account.opening or 0) + deltas - account.silently_expired + account.drift
    assert sum(lot.remaining for lot in account.lots) == max(account.balance, 0)
    assert all(0 < lot.remaining <= lot.original for lot in account.lots)
    assert account.drift == sum(entry.drift for entry in entries)
    assert account.silently_expired == sum(entry.silently_expired for entry in entries)
    for entry in entries:
        moved = entry.balance_before + entry.event.delta - entry.silently_expired + entry.drift
        assert entry.balance_after == moved
        assert entry.event.balance in {None, entry.balance_after}
        assert entry.silently_expired >= 0
    for before, after in pairwise(entries):
        assert before.balance_after == after.balance_before
    for at_ms in range(1_000, 1_014):
        active, _, expired = account.points_at(at_ms)
        assert active >= 0
        assert active <= max(account.balance, 0) - expired


def check_is_the_fold(book: Book) -> None:
    """The book is what the fold over its events says, every derived value and every kept state included."""
    history = book.history
    void = {entry.event.event_id for entry in history if entry.is_void}
    account, entries = fold(Account(), [entry.event for entry in history], void)
    assert book.complete() == account
    assert history == entries
    for at_ms, checkpoint in book.checkpoints.items():
        earlier = [entry.event for entry in history if entry.event.updated_at_ms <= at_ms]
        assert book.complete(checkpoint) == fold(Account(), earlier, void)[0]
    check_checkpoints_are_near(book)


def check_checkpoints_are_near(book: Book) -> None:
    """No more entries lie between two kept states than there may, but for those that share the last millisecond."""
    count = 0
    for at_ms, group in groupby(book.history, key=lambda entry: entry.event.updated_at_ms):
        assert count < book.limits.checkpoint_entries
        count += len(list(group))
        if at_ms in book.checkpoints:
            count = 0
        elif count >= book.limits.checkpoint_entries:
            assert at_ms == book.account.newest_at_ms, "a full stretch ends in a kept state"
    assert book.account.uncheckpointed == count


def without_ids(account: Account) -> Account:
    """An account but for the ids of its lots: of two ids for one content, the first to arrive names the event."""
    return replace(account, lots=tuple(lot._replace(event_id="") for lot in account.lots))


def split(data: st.DataObject, events: Sequence[Event]) -> list[Sequence[Event]]:
    """Split events into batches of any size."""
    if len(events) < 2:
        return [events] if events else []
    cuts = data.draw(st.sets(st.integers(1, len(events) - 1)))
    return [events[start:end] for start, end in pairwise([0, *sorted(cuts), len(events)])]


def fed(batches: Iterable[Sequence[Event]], limits: Limits | None = None) -> Book:
    """Write batches into a new book."""
    book = Book(limits or Limits())
    for batch in batches:
        book.post(batch)
    return book


@given(true_histories())
@settings(max_examples=examples(150), deadline=None)
def test_the_fold_finds_the_points_that_shopline_holds(shop: Shopline) -> None:
    """Balance, lots by expiry, silent expiry and lifetime points are SHOPLINE's own, and nothing drifts."""
    account, entries = fold(Account(), shop.events)

    assert account.drift == 0
    assert account.balance == shop.balance
    assert [entry.event for entry in entries] == shop.events
    at_ms = shop.events[-1].updated_at_ms
    held: Counter[float] = Counter()
    for lot in account.lots:
        held[NEVER if lot.expires_at_ms is None else max(lot.expires_at_ms, at_ms)] += lot.remaining
    assert held == shop.held(at_ms)
    assert account.silently_expired == shop.silently_expired
    assert account.lifetime_points == shop.lifetime_points
    check_invariants(account, entries)


@given(true_histories(), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_any_order_repetition_and_batches_give_the_same_account(
    shop: Shopline, limits: Limits, data: st.DataObject
) -> None:
    """However webhooks come, the account is the one that they would have made in time, without drift."""
    again = data.draw(st.lists(st.sampled_from(shop.events), max_size=6))
    renamed = [replace(event, event_id=f"again:{event.event_id}") for event in again]
    arrivals = data.draw(st.permutations([*shop.events, *again, *renamed]))

    book = Book(limits)
    answers = [answer for batch in split(data, arrivals) for answer in book.post(batch)]

    assert without_ids(book.complete()) == without_ids(fold(Account(), shop.events)[0])
    assert book.account.drift == 0
    assert [entry.event.content for entry in book.history] == [event.content for event in shop.events]
    assert [kind_of(answer) for answer in answers].count("DUPLICATE") == len(arrivals) - len(shop.events)
    check_is_the_fold(book)


@given(true_histories(), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_missing_events_drift_until_they_arrive(shop: Shopline, limits: Limits, data: st.DataObject) -> None:
    """With any part of a history the invariants hold after every batch; with the rest of it the drift is gone."""
    arrivals = data.draw(st.permutations(shop.events))

    book = Book(limits)
    for batch in split(data, arrivals):
        book.post(batch)
        check_invariants(book.complete(), book.history)
        check_is_the_fold(book)

    assert book.account.drift == 0
    assert book.complete() == fold(Account(), shop.events)[0]


@given(true_histories(), st.data())
@settings(max_examples=examples(150), deadline=None)
def test_increases_without_a_balance_do_not_depend_on_the_order_either(shop: Shopline, data: st.DataObject) -> None:
    """Where nothing can go below zero, other callers' events may arrive at any place among SHOPLINE's."""
    balances = [fold(Account(), shop.events[:1])[0].opening or 0, *(event.balance or 0 for event in shop.events)]
    assume(min(balances) >= 0)
    value, at_ms = data.draw(st.integers(0, 9)), data.draw(st.sampled_from(shop.events)).updated_at_ms
    other = Event("other", ACCOUNT, UpdateType.INCREASE, "LUCKY_DRAW", value, None, None, at_ms)
    arrivals = data.draw(st.permutations([*shop.events, other]))

    book = fed(split(data, arrivals))

    assert book.refused == {}
    assert book.complete() == fold(Account(), [*shop.events, other])[0]
    check_is_the_fold(book)


@given(st.lists(free_events, max_size=10), limits_of_any_size)
@settings(max_examples=examples(150), deadline=None)
def test_whatever_comes_the_book_is_the_fold_of_what_it_accepted(events: list[Event], limits: Limits) -> None:
    """Also of events that no true history has: applied directly or folded again, the result agrees."""
    book = Book(limits)

    for event in events:
        outcome = book.apply(event)
        check_is_the_fold(book)
        check_invariants(book.complete(), book.history)
        if event.balance is not None:
            assert outcome is not ApplyOutcome.REFUSED
        elif outcome is not ApplyOutcome.REFUSED:
            place = next(i for i, entry in enumerate(book.history) if entry.event is event)
            unbalanced = takewhile(lambda entry: entry.event.balance is None, book.history[place:])
            assert all(entry.balance_after >= 0 for entry in unbalanced)
        if book.history and outcome is ApplyOutcome.APPLIED:
            assert book.history[-1].event is event
        if outcome is ApplyOutcome.LATE:
            assert book.history[-1].event is not event


@given(st.lists(free_events, max_size=10), st.data())
@settings(max_examples=examples(400), deadline=None)
def test_an_event_without_a_balance_is_refused_where_the_fold_would_fall_below_zero(
    events: list[Event], data: st.DataObject
) -> None:
    """And nowhere else, whatever came before it in the same batch or earlier."""
    start = data.draw(st.integers(0, len(events)))
    accepted = [event for event in events[:start] if event.balance is not None]
    journal = Journal(Account(), fold(Account(), accepted)[1])

    for event in events[start:]:
        post = journal.post(event)
        entries = fold(Account(), [*accepted, event])[1]
        place = next(i for i, entry in enumerate(entries) if entry.event is event)
        unbalanced = [entries[place], *takewhile(lambda entry: entry.event.balance is None, entries[place + 1 :])]
        if post.outcome is ApplyOutcome.DUPLICATE:
            assert event.content in {known.content for known in accepted}
            continue
        is_short = event.balance is None and min(entry.balance_after for entry in unbalanced) < 0
        assert (post.outcome is ApplyOutcome.REFUSED) is is_short
        if post.entry is not None:
            assert post.entry.balance_before == entries[place].balance_before
            assert post.entry.balance_after == entries[place].balance_after
        if not is_short:
            accepted.append(event)


@given(st.lists(balanced_events, max_size=8, unique_by=lambda event: event.content), limits_of_any_size, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_whatever_carries_a_balance_may_come_in_any_order(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """The account is a pure function of the set of accepted events, true or not."""
    one = fed([[event] for event in events])
    other = fed(split(data, data.draw(st.permutations(events))), limits)

    assert one.complete() == other.complete()
    assert one.history == other.history
    assert len(one.entries) == len(events)


@given(st.lists(free_events, max_size=8), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_a_second_time_changes_nothing(events: list[Event], limits: Limits, data: st.DataObject) -> None:
    """Everything may be sent again: each event gets the answer that it had, and the account stays."""
    book = fed(split(data, events), limits)
    account, history, refused = book.account, book.history, dict(book.refused)
    checkpoints = dict(book.checkpoints)
    again = data.draw(st.permutations(events))

    answers = [answer for batch in split(data, again) for answer in book.post(batch)]

    assert (book.account, book.history, book.refused) == (account, history, refused)
    assert book.checkpoints == checkpoints
    outcomes = {event.event_id: outcome_of(answer) for event, answer in zip(again, answers, strict=True)}
    assert {event_id for event_id, outcome in outcomes.items() if outcome is ApplyOutcome.REFUSED} == set(refused)
    assert set(outcomes.values()) <= {ApplyOutcome.DUPLICATE, ApplyOutcome.REFUSED}


named_events = st.builds(replace, free_events, event_id=st.sampled_from("abcdefgh"))


@given(st.lists(named_events, max_size=10), limits_of_any_size, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_a_batch_answers_as_single_calls_do(events: list[Event], limits: Limits, data: st.DataObject) -> None:
    """Refusals are judged in the order of the request, and ids may repeat and be reused: batches tell no difference."""
    single, batched = Book(limits), Book(limits)

    answers = [answer for event in events for answer in single.post([event])]
    in_batches = [answer for batch in split(data, events) for answer in batched.post(batch)]

    assert list(map(kind_of, in_batches)) == list(map(kind_of, answers))
    assert batched.complete() == single.complete()
    assert batched.history == single.history
    assert batched.refused.keys() == single.refused.keys()
    check_is_the_fold(batched)


@given(st.lists(free_events, max_size=8, unique_by=lambda event: event.updated_at_ms), limits_of_any_size)
@settings(max_examples=examples(150), deadline=None)
def test_a_batch_in_time_tells_each_event_its_own_account(events: list[Event], limits: Limits) -> None:
    """Events that come in the order of their times hear the account that a single call would have told them."""
    events.sort(key=lambda event: event.updated_at_ms)
    single, batched = Book(limits), Book(limits)

    answers = [single.post([event])[0] for event in events]
    in_batch = batched.post(events) if events else []

    for one, other in zip(answers, in_batch, strict=True):
        assert isinstance(one, ApplyResult) == isinstance(other, ApplyResult)
        if isinstance(one, ApplyResult) and isinstance(other, ApplyResult):
            assert (one.outcome, one.entry) == (other.outcome, other.entry)
            assert batched.complete(one.account) == batched.complete(other.account)


@given(st.lists(free_events, min_size=1, max_size=8), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_the_last_answer_of_a_batch_is_the_account_as_it_stands(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """Whatever came before it, and whatever was late; and every answer can tell what is active now."""
    book = Book(limits)
    for batch in split(data, events):
        answers = book.post(batch)

        for answer in answers:
            if isinstance(answer, ApplyResult):
                active, _, expired = answer.account.points_at(READ_AT_MS)
                assert active + expired == max(answer.account.balance, 0)
        if isinstance(answers[-1], ApplyResult):
            assert book.complete(answers[-1].account) == book.complete()


@given(st.lists(free_events, max_size=9), limits_of_any_size, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_a_void_entry_counts_for_nothing_until_it_counts_again(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """Voiding gives the fold without the entries, and unvoiding what was before."""
    book = fed(split(data, events), limits)
    before, history = book.complete(), book.history
    ids = data.draw(st.sets(st.sampled_from(sorted(book.entries)))) if book.entries else set()

    book.set_void(ids, is_void=True)

    check_is_the_fold(book)
    counting = [entry for entry in book.history if not entry.is_void]
    without = fold(Account(), [entry.event for entry in history if entry.event.event_id not in ids])
    assert replace(book.complete(), newest_at_ms=None) == replace(without[0], newest_at_ms=None)
    assert counting == without[1]
    assert book.account.newest_at_ms == before.newest_at_ms
    check_invariants(book.complete(), counting)
    book.set_void(data.draw(st.permutations(sorted(ids))), is_void=False)
    assert book.complete() == before
    assert book.history == history
    check_is_the_fold(book)


@given(st.lists(free_events, min_size=1, max_size=9), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_the_book_goes_on_over_void_entries(events: list[Event], limits: Limits, data: st.DataObject) -> None:
    """Events come before, between and behind void entries, and what is void is known under its id and content."""
    half = data.draw(st.integers(0, len(events)))
    book = fed(split(data, events[:half]), limits)
    ids = data.draw(st.sets(st.sampled_from(sorted(book.entries)))) if book.entries else set()
    book.set_void(ids, is_void=True)

    for batch in split(data, events[half:]):
        book.post(batch)
        check_is_the_fold(book)

    assert {entry.event.event_id for entry in book.history if entry.is_void} == ids
    for event in events[:half]:
        known = replace(event, event_id=f"again:{event.event_id}")
        if event.event_id in ids:
            assert book.apply(event) is ApplyOutcome.DUPLICATE
            assert event.balance is None or book.apply(known) is ApplyOutcome.DUPLICATE
    book.set_void(ids, is_void=False)
    check_is_the_fold(book)


@given(st.lists(free_events, max_size=10), tiny_limits, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_far_lots_are_the_lots_beyond(events: list[Event], limits: Limits, data: st.DataObject) -> None:
    """The near lots and the far ones' sum are all lots: what is kept tells the same points, or that it must read."""
    book = fed(split(data, events), limits)

    kept, account = book.account, book.complete()

    assert account.lots[: len(kept.lots)] == kept.lots
    beyond = account.lots[len(kept.lots) :]
    if kept.far_lots is None:
        assert beyond == ()
    else:
        assert kept.far_lots == (sum(lot.remaining for lot in beyond), beyond[0].expires_at_ms, beyond[0].event_id)
        assert all(lot.remaining == lot.original for lot in beyond)
        for at_ms in range(1_000, beyond[0].order_ms if beyond[0].expires_at_ms else 1_014):
            assert kept.points_at(at_ms) == account.points_at(at_ms)
    if len(kept.lots) > limits.near_lots_max:
        behind = kept.lots[limits.near_lots_kept :]
        pairs = 2 if kept.lots[-1].expires_at_ms is None else 0
        drawn = sum(lot.order_ms <= kept.drawn_to_ms for lot in behind)
        assert len(behind) <= drawn + pairs, "no more is kept than was drawn from"
