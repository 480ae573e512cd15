"""The pure ledger: an account is a function of the set of its events.

True histories come from a small model of SHOPLINE that tracks its points by expiry and sends every change. The ledger
must compute the same points from the events alone.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise, takewhile

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pointbook_server.errors import PointbookError
from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.journal import Journal
from pointbook_server.ledger.model import Account, ApplyOutcome, ApplyResult, Entry, Event, UpdateType
from pointbook_server.ledger.scenes import EXPIRED_SCENE
from support.examples import examples
from support.ledger import without_lot_ids
from support.ledger_events import ACCOUNT
from support.memory_ledger import READ_AT_MS, Ledger, Limits
from support.shopline_model import NEVER, Shopline, true_histories

tiny_limits = st.builds(
    lambda checkpoint_entries, recent_entries, stored_lots_max, fewer, overflow_lots_read_min: Limits(
        checkpoint_entries, recent_entries, stored_lots_max, max(stored_lots_max - fewer, 1), overflow_lots_read_min
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(2, 4),
)
limits_of_any_size = st.one_of(st.just(Limits()), tiny_limits, tiny_limits)


def outcome_of(result: ApplyResult | PointbookError) -> ApplyOutcome:
    """Return the outcome of a result; an error is a refusal."""
    return ApplyOutcome.REFUSED if isinstance(result, PointbookError) else result.outcome


def kind_of(result: ApplyResult | PointbookError) -> str:
    """Return the kind of a result, regardless of the position in time."""
    if isinstance(result, PointbookError):
        return result.reason.value
    return "DUPLICATE" if result.outcome is ApplyOutcome.DUPLICATE else "ACCEPTED"


free_events = st.builds(
    Event,
    event_id=st.uuids().map(str),
    account_key=st.just(ACCOUNT),
    update_type=st.sampled_from(UpdateType),
    scene=st.sampled_from(["SUCCESSFUL_ORDERS", EXPIRED_SCENE, "LUCKY_DRAW"]),
    value=st.integers(0, 6),
    balance=st.one_of(st.none(), st.integers(-4, 12)),
    expires_at_ms=st.one_of(st.none(), st.integers(1_000, 1_012)),
    updated_at_ms=st.integers(1_000, 1_006),
)
balanced_events = free_events.filter(lambda event: event.balance is not None)


def check_invariants(account: Account, entries: Sequence[Entry]) -> None:
    """Check the invariants of an account and of its entries.

    Source: docs/reference/ledger.md#invariants.
    """
    deltas = sum(entry.event.delta for entry in entries)
    assert account.balance == (account.opening or 0) + deltas - account.silently_expired + account.drift
    assert sum(lot.remaining for lot in account.lots) == max(account.balance, 0)
    assert all(0 < lot.remaining <= lot.original for lot in account.lots)
    assert account.drift == sum(entry.drift for entry in entries)
    assert account.silently_expired == sum(entry.silently_expired for entry in entries)
    for entry in entries:
        expected = entry.balance_before + entry.event.delta - entry.silently_expired + entry.drift
        assert entry.balance_after == expected
        assert entry.event.balance in {None, entry.balance_after}
        assert entry.silently_expired >= 0
    for before, after in pairwise(entries):
        assert before.balance_after == after.balance_before
    for at_ms in range(1_000, 1_014):
        active, _, expired = account.points_at(at_ms)
        assert active >= 0
        assert active <= max(account.balance, 0) - expired


def assert_equals_fold(ledger: Ledger) -> None:
    """Check that the account, the entries and the checkpoints are the fold."""
    history = ledger.history
    void_ids = {entry.event.event_id for entry in history if entry.is_void}
    account, entries = fold(Account(), [entry.event for entry in history], void_ids)
    assert ledger.load_all_lots() == account
    assert history == entries
    for at_ms, checkpoint in ledger.checkpoints.items():
        earlier = [entry.event for entry in history if entry.event.updated_at_ms <= at_ms]
        assert ledger.load_all_lots(checkpoint) == fold(Account(), earlier, void_ids)[0]
    assert_checkpoints_are_close(ledger)


def assert_checkpoints_are_close(ledger: Ledger) -> None:
    """Check that checkpoints are close enough.

    Entries of the last millisecond may exceed the limit.
    """
    count = 0
    for at_ms, group in groupby(ledger.history, key=lambda entry: entry.event.updated_at_ms):
        assert count < ledger.limits.checkpoint_entries
        count += len(list(group))
        if at_ms in ledger.checkpoints:
            count = 0
        elif count >= ledger.limits.checkpoint_entries:
            assert at_ms == ledger.account.newest_at_ms, "a checkpoint follows enough entries"
    assert ledger.account.uncheckpointed == count


def split(data: st.DataObject, events: Sequence[Event]) -> list[Sequence[Event]]:
    """Split events into batches of any size."""
    if len(events) < 2:
        return [events] if events else []
    cuts = data.draw(st.sets(st.integers(1, len(events) - 1)))
    return [events[start:end] for start, end in pairwise([0, *sorted(cuts), len(events)])]


def ledger_after(batches: Iterable[Sequence[Event]], limits: Limits | None = None) -> Ledger:
    """Apply batches to a new ledger."""
    ledger = Ledger(limits or Limits())
    for batch in batches:
        ledger.post(batch)
    return ledger


@given(true_histories())
@settings(max_examples=examples(150), deadline=None)
def test_the_fold_computes_the_points_that_shopline_has(shop: Shopline) -> None:
    """Balance, lots, silent expiry and lifetime points agree, without drift."""
    account, entries = fold(Account(), shop.events)

    assert account.drift == 0
    assert account.balance == shop.balance
    assert [entry.event for entry in entries] == shop.events
    at_ms = shop.events[-1].updated_at_ms
    points: Counter[float] = Counter()
    for lot in account.lots:
        points[NEVER if lot.expires_at_ms is None else max(lot.expires_at_ms, at_ms)] += lot.remaining
    assert points == shop.points_by_expiry(at_ms)
    assert account.silently_expired == shop.silently_expired
    assert account.lifetime_points == shop.lifetime_points
    check_invariants(account, entries)


@given(true_histories(), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_the_account_depends_on_neither_order_nor_repetition_nor_batches(
    shop: Shopline, limits: Limits, data: st.DataObject
) -> None:
    again = data.draw(st.lists(st.sampled_from(shop.events), max_size=6))
    renamed = [event._replace(event_id=f"again:{event.event_id}") for event in again]
    arrivals = data.draw(st.permutations([*shop.events, *again, *renamed]))

    ledger = Ledger(limits)
    results = [result for batch in split(data, arrivals) for result in ledger.post(batch)]

    assert without_lot_ids(ledger.load_all_lots()) == without_lot_ids(fold(Account(), shop.events)[0])
    assert ledger.account.drift == 0
    assert [entry.event.content for entry in ledger.history] == [event.content for event in shop.events]
    assert [kind_of(result) for result in results].count("DUPLICATE") == len(arrivals) - len(shop.events)
    assert_equals_fold(ledger)


@given(true_histories(), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_drift_disappears_once_all_events_have_arrived(shop: Shopline, limits: Limits, data: st.DataObject) -> None:
    """The invariants hold after every batch."""
    arrivals = data.draw(st.permutations(shop.events))

    ledger = Ledger(limits)
    for batch in split(data, arrivals):
        ledger.post(batch)
        check_invariants(ledger.load_all_lots(), ledger.history)
        assert_equals_fold(ledger)

    assert ledger.account.drift == 0
    assert ledger.load_all_lots() == fold(Account(), shop.events)[0]


@given(true_histories(), st.data())
@settings(max_examples=examples(150), deadline=None)
def test_an_increase_without_a_balance_may_arrive_in_any_order(shop: Shopline, data: st.DataObject) -> None:
    """This holds for histories without negative balances, where nothing is refused."""
    balances = [fold(Account(), shop.events[:1])[0].opening or 0, *(event.balance or 0 for event in shop.events)]
    assume(min(balances) >= 0)
    value, at_ms = data.draw(st.integers(0, 9)), data.draw(st.sampled_from(shop.events)).updated_at_ms
    other = Event("other", ACCOUNT, UpdateType.INCREASE, "LUCKY_DRAW", value, None, None, at_ms)
    arrivals = data.draw(st.permutations([*shop.events, other]))

    ledger = ledger_after(split(data, arrivals))

    assert ledger.refused == {}
    assert ledger.load_all_lots() == fold(Account(), [*shop.events, other])[0]
    assert_equals_fold(ledger)


@given(st.lists(free_events, max_size=10), limits_of_any_size)
@settings(max_examples=examples(150), deadline=None)
def test_the_ledger_is_the_fold_of_the_accepted_events(events: list[Event], limits: Limits) -> None:
    """Also for events that no true history has, applied directly or folded again."""
    ledger = Ledger(limits)

    for event in events:
        outcome = ledger.apply(event)
        assert_equals_fold(ledger)
        check_invariants(ledger.load_all_lots(), ledger.history)
        if event.balance is not None:
            assert outcome is not ApplyOutcome.REFUSED
        elif outcome is not ApplyOutcome.REFUSED:
            position = next(i for i, entry in enumerate(ledger.history) if entry.event is event)
            unbalanced = takewhile(lambda entry: entry.event.balance is None, ledger.history[position:])
            assert all(entry.balance_after >= 0 for entry in unbalanced)
        if ledger.history and outcome is ApplyOutcome.APPLIED:
            assert ledger.history[-1].event is event
        if outcome is ApplyOutcome.LATE:
            assert ledger.history[-1].event is not event


@given(st.lists(free_events, max_size=10), st.data())
@settings(max_examples=examples(400), deadline=None)
def test_an_event_without_a_balance_is_refused_only_if_the_fold_would_become_negative(
    events: list[Event], data: st.DataObject
) -> None:
    """Regardless of what arrived before it, in the same batch or earlier."""
    start = data.draw(st.integers(0, len(events)))
    accepted = [event for event in events[:start] if event.balance is not None]
    journal = Journal(Account(), fold(Account(), accepted)[1])

    for event in events[start:]:
        post = journal.post(event)
        entries = fold(Account(), [*accepted, event])[1]
        position = next(i for i, entry in enumerate(entries) if entry.event is event)
        unbalanced = [entries[position], *takewhile(lambda entry: entry.event.balance is None, entries[position + 1 :])]
        if post.outcome is ApplyOutcome.DUPLICATE:
            assert event.content in {known.content for known in accepted}
            continue
        is_short = event.balance is None and min(entry.balance_after for entry in unbalanced) < 0
        assert (post.outcome is ApplyOutcome.REFUSED) is is_short
        if post.entry is not None:
            assert post.entry.balance_before == entries[position].balance_before
            assert post.entry.balance_after == entries[position].balance_after
        if not is_short:
            accepted.append(event)


@given(st.lists(balanced_events, max_size=8, unique_by=lambda event: event.content), limits_of_any_size, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_events_with_a_balance_may_arrive_in_any_order(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """Also events that no true history has."""
    in_order = ledger_after([[event] for event in events])
    permuted = ledger_after(split(data, data.draw(st.permutations(events))), limits)

    assert in_order.load_all_lots() == permuted.load_all_lots()
    assert in_order.history == permuted.history
    assert len(in_order.entries) == len(events)


@given(st.lists(free_events, max_size=8), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_sending_everything_again_changes_nothing(events: list[Event], limits: Limits, data: st.DataObject) -> None:
    """Each event gets a duplicate, or the refusal that it got before."""
    ledger = ledger_after(split(data, events), limits)
    account, history, refused = ledger.account, ledger.history, dict(ledger.refused)
    checkpoints = dict(ledger.checkpoints)
    again = data.draw(st.permutations(events))

    results = [result for batch in split(data, again) for result in ledger.post(batch)]

    assert (ledger.account, ledger.history, ledger.refused) == (account, history, refused)
    assert ledger.checkpoints == checkpoints
    outcomes = {event.event_id: outcome_of(result) for event, result in zip(again, results, strict=True)}
    assert {event_id for event_id, outcome in outcomes.items() if outcome is ApplyOutcome.REFUSED} == set(refused)
    assert set(outcomes.values()) <= {ApplyOutcome.DUPLICATE, ApplyOutcome.REFUSED}


named_events = st.builds(Event._replace, free_events, event_id=st.sampled_from("abcdefgh"))


@given(st.lists(named_events, max_size=10), limits_of_any_size, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_a_batch_gives_the_same_results_as_single_calls(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """Also with repeated and reused event_ids."""
    single, batched = Ledger(limits), Ledger(limits)

    results = [result for event in events for result in single.post([event])]
    in_batches = [result for batch in split(data, events) for result in batched.post(batch)]

    assert list(map(kind_of, in_batches)) == list(map(kind_of, results))
    assert batched.load_all_lots() == single.load_all_lots()
    assert batched.history == single.history
    assert batched.refused.keys() == single.refused.keys()
    assert_equals_fold(batched)


@given(st.lists(free_events, max_size=8, unique_by=lambda event: event.updated_at_ms), limits_of_any_size)
@settings(max_examples=examples(150), deadline=None)
def test_events_in_order_of_time_get_the_same_account_in_a_batch_as_in_single_calls(
    events: list[Event], limits: Limits
) -> None:
    events.sort(key=lambda event: event.updated_at_ms)
    single, batched = Ledger(limits), Ledger(limits)

    results = [single.post([event])[0] for event in events]
    in_batch = batched.post(events) if events else []

    for one, other in zip(results, in_batch, strict=True):
        assert isinstance(one, ApplyResult) == isinstance(other, ApplyResult)
        if isinstance(one, ApplyResult) and isinstance(other, ApplyResult):
            assert (one.outcome, one.entry) == (other.outcome, other.entry)
            assert batched.load_all_lots(one.account) == batched.load_all_lots(other.account)


@given(st.lists(free_events, min_size=1, max_size=8), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_the_last_result_of_a_batch_has_the_current_account(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """And every result has the lots that the active points need."""
    ledger = Ledger(limits)
    for batch in split(data, events):
        results = ledger.post(batch)

        for result in results:
            if isinstance(result, ApplyResult):
                active, _, expired = result.account.points_at(READ_AT_MS)
                assert active + expired == max(result.account.balance, 0)
        if isinstance(results[-1], ApplyResult):
            assert ledger.load_all_lots(results[-1].account) == ledger.load_all_lots()


@given(st.lists(free_events, max_size=9), limits_of_any_size, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_voiding_gives_the_fold_without_the_entries_and_unvoiding_restores_it(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """Only the newest time stays."""
    ledger = ledger_after(split(data, events), limits)
    before, history = ledger.load_all_lots(), ledger.history
    ids = data.draw(st.sets(st.sampled_from(sorted(ledger.entries)))) if ledger.entries else set()

    ledger.set_void(ids, is_void=True)

    assert_equals_fold(ledger)
    counting = [entry for entry in ledger.history if not entry.is_void]
    expected = fold(Account(), [entry.event for entry in history if entry.event.event_id not in ids])
    assert replace(ledger.load_all_lots(), newest_at_ms=None) == replace(expected[0], newest_at_ms=None)
    assert counting == expected[1]
    assert ledger.account.newest_at_ms == before.newest_at_ms
    check_invariants(ledger.load_all_lots(), counting)
    ledger.set_void(data.draw(st.permutations(sorted(ids))), is_void=False)
    assert ledger.load_all_lots() == before
    assert ledger.history == history
    assert_equals_fold(ledger)


@given(st.lists(free_events, min_size=1, max_size=9), limits_of_any_size, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_events_may_arrive_before_between_and_after_void_entries(
    events: list[Event], limits: Limits, data: st.DataObject
) -> None:
    """Void entries are still known by their event_id and content."""
    half = data.draw(st.integers(0, len(events)))
    ledger = ledger_after(split(data, events[:half]), limits)
    ids = data.draw(st.sets(st.sampled_from(sorted(ledger.entries)))) if ledger.entries else set()
    ledger.set_void(ids, is_void=True)

    for batch in split(data, events[half:]):
        ledger.post(batch)
        assert_equals_fold(ledger)

    assert {entry.event.event_id for entry in ledger.history if entry.is_void} == ids
    for event in events[:half]:
        known = event._replace(event_id=f"again:{event.event_id}")
        if event.event_id in ids:
            assert ledger.apply(event) is ApplyOutcome.DUPLICATE
            assert event.balance is None or ledger.apply(known) is ApplyOutcome.DUPLICATE
    ledger.set_void(ids, is_void=False)
    assert_equals_fold(ledger)


@given(st.lists(free_events, max_size=10), tiny_limits, st.data())
@settings(max_examples=examples(150), deadline=None)
def test_stored_lots_and_the_overflow_are_all_lots(events: list[Event], limits: Limits, data: st.DataObject) -> None:
    """The stored account gives the same active points, unless it needs overflow lots."""
    ledger = ledger_after(split(data, events), limits)

    stored, account = ledger.account, ledger.load_all_lots()

    assert account.lots[: len(stored.lots)] == stored.lots
    rest = account.lots[len(stored.lots) :]
    if stored.overflow is None:
        assert rest == ()
    else:
        assert stored.overflow == (sum(lot.remaining for lot in rest), rest[0].expires_at_ms, rest[0].event_id)
        assert all(lot.remaining == lot.original for lot in rest)
        for at_ms in range(1_000, rest[0].expiry_or_never_ms if rest[0].expires_at_ms else 1_014):
            assert stored.points_at(at_ms) == account.points_at(at_ms)
    if len(stored.lots) > limits.stored_lots_max:
        extra = stored.lots[limits.stored_lots_after_trim :]
        pairs = 2 if stored.lots[-1].expires_at_ms is None else 0
        drawn = sum(lot.expiry_or_never_ms <= stored.drawn_to_ms for lot in extra)
        assert len(extra) <= drawn + pairs, "only lots up to the latest drawn expiry are stored in addition"
