"""Posting a batch of events to accounts, without I/O."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pointbook_server.errors import PointbookError
from pointbook_server.ledger.holds import Hold, find_settled_hold, without_redemption
from pointbook_server.ledger.journal import AccountChange, Journal, PostedEvent
from pointbook_server.ledger.lots import OverflowLotsNeededError
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, ApplyResult, Entry, Event, UpdateType
from pointbook_server.reasons import Reason


class KnownEvent(NamedTuple):
    """An event whose event_id is in the ledger, or occurred earlier in the batch."""

    event: Event
    post: PostedEvent


class AccountHistory(NamedTuple):
    """A state of an account, the entries since then, and its current holds.

    No entries are needed if all new events are later.
    """

    base: Account
    entries: Sequence[Entry] = ()
    holds: tuple[Hold, ...] = ()


class Settlement(NamedTuple):
    """A hold that SHOPLINE has booked, and the event that booked it."""

    account_key: AccountKey
    hold: Hold
    event_id: str


@dataclass(slots=True)
class BatchResult:
    """The results of a batch, one for each event in order, and all changes to write."""

    results: list[ApplyResult | PointbookError] = field(default_factory=list)
    changes: dict[AccountKey, AccountChange] = field(default_factory=dict)
    new_rows: dict[int, ApplyResult] = field(default_factory=dict)
    """The results that become rows of the ledger, by the index of their event in the batch."""
    settlements: list[Settlement] = field(default_factory=list)
    remaining_holds: dict[AccountKey, tuple[Hold, ...]] = field(default_factory=dict)
    leaves_ids_unclaimed: bool = False
    """Whether an event makes no row, so that writing the batch does not check its event_id against the ledger."""
    replaced_refusals: frozenset[str] = frozenset()
    """The event_ids whose stored refusal is replaced by a new row."""


@dataclass(slots=True)
class _PostedBatch:
    """The events of a batch after posting, before the fold."""

    posts: list[PointbookError | tuple[AccountKey, int]] = field(default_factory=list)
    """The error of each event, or its account and the index of its post in the account's journal."""
    row_indexes: dict[str, int] = field(default_factory=dict)
    """The index of the event that claims each event_id."""
    leaves_ids_unclaimed: bool = False


class LotsMissingError(Exception):
    """An account lacks overflow lots: load more, and post the batch again."""

    def __init__(self, key: AccountKey) -> None:
        super().__init__()
        self.key = key


def post_batch(
    events: Sequence[Event],
    histories: Mapping[AccountKey, AccountHistory],
    known_events: Mapping[str, KnownEvent],
    account_errors: Mapping[AccountKey, PointbookError],
    now_ms: int,
    *,
    forget_refusal_of: Collection[int] = (),
) -> BatchResult:
    """Post events in order of arrival, and return their results and the changes.

    `known_events` are the events of the ledger that share an event_id with these, `account_errors` the errors of
    accounts that accept no events, `forget_refusal_of` the indexes of events whose refusal is not stored. The accounts
    in the results have the lots that `points_at(now_ms)` needs. Raises LotsMissingError.
    """
    journals = {key: Journal(history.base, history.entries) for key, history in histories.items()}
    posted = _post_events(events, journals, known_events, account_errors, forget_refusal_of)
    batch_result = BatchResult(
        changes={key: _close(key, journal, now_ms) for key, journal in journals.items()},
        leaves_ids_unclaimed=posted.leaves_ids_unclaimed,
        replaced_refusals=frozenset(posted.row_indexes.keys() & known_events.keys()),
    )
    _add_results(batch_result, events, posted, forget_refusal_of)
    if any(history.holds for history in histories.values()):
        _settle(batch_result, histories, now_ms)
    return batch_result


def _post_events(
    events: Sequence[Event],
    journals: Mapping[AccountKey, Journal],
    known_events: Mapping[str, KnownEvent],
    account_errors: Mapping[AccountKey, PointbookError],
    forget_refusal_of: Collection[int],
) -> _PostedBatch:
    """Post each event to the journal of its account, unless it has an error."""
    posted = _PostedBatch()
    known = dict(known_events)
    for index, event in enumerate(events):
        key = event.account_key
        earlier = known.get(event.event_id)
        forget_refusal = index in forget_refusal_of
        if key in account_errors:
            posted.posts.append(account_errors[key])
        elif earlier is not None and earlier.event.content != event.content:
            posted.posts.append(_event_id_reused(event.event_id))
        else:
            journal = journals[key]
            if earlier is not None and not is_checked_again(earlier, forget_refusal=forget_refusal):
                journal.repeat(earlier.post)
            else:
                post = _post(journal, event)
                if _makes_row(post, forget_refusal=forget_refusal):
                    known[event.event_id] = KnownEvent(event, post)
                    posted.row_indexes[event.event_id] = index
                else:
                    posted.leaves_ids_unclaimed = True
            posted.posts.append((key, len(journal) - 1))
    return posted


def _add_results(
    batch_result: BatchResult, events: Sequence[Event], posted: _PostedBatch, forget_refusal_of: Collection[int]
) -> None:
    """Add the result of each event, and the results that become rows."""
    for index, (event, post) in enumerate(zip(events, posted.posts, strict=True)):
        if isinstance(post, PointbookError):
            batch_result.results.append(post)
            continue
        key, post_index = post
        result = batch_result.changes[key].results[post_index]
        is_refused = result.outcome is ApplyOutcome.REFUSED
        batch_result.results.append(
            _insufficient_points(result, forget_refusal=index in forget_refusal_of) if is_refused else result
        )
        if posted.row_indexes.get(event.event_id) == index:
            batch_result.new_rows[index] = result


def _settle(batch_result: BatchResult, histories: Mapping[AccountKey, AccountHistory], now_ms: int) -> None:
    """Settle at most one hold for each new decrease.

    The accounts in the results get the remaining holds.
    """
    remaining = {key: history.holds for key, history in histories.items() if history.holds}
    for result in batch_result.new_rows.values():
        event = result.entry.event
        key = event.account_key
        is_decrease = result.outcome is not ApplyOutcome.REFUSED and event.update_type is UpdateType.DECREASE
        if key not in remaining or not is_decrease:
            continue
        hold = find_settled_hold(remaining[key], event.value, event.scene, event.updated_at_ms, now_ms)
        if hold is not None:
            remaining[key] = without_redemption(remaining[key], hold.redemption_id)
            batch_result.settlements.append(Settlement(key, hold, event.event_id))
    batch_result.remaining_holds = remaining
    for index, result_or_error in enumerate(batch_result.results):
        if isinstance(result_or_error, ApplyResult) and result_or_error.entry.event.account_key in remaining:
            account = replace(result_or_error.account, holds=remaining[result_or_error.entry.event.account_key])
            batch_result.results[index] = result_or_error._replace(account=account)


def is_checked_again(known: KnownEvent, *, forget_refusal: bool) -> bool:
    """Return whether a known event is checked again.

    A refused event is, if its caller asks to forget the refusal.
    """
    return forget_refusal and known.post.outcome is ApplyOutcome.REFUSED


def _makes_row(post: PostedEvent, *, forget_refusal: bool) -> bool:
    """Return whether a post becomes a row of the ledger, which claims its event_id."""
    return post.outcome is ApplyOutcome.APPLIED or (post.outcome is ApplyOutcome.REFUSED and not forget_refusal)


def _post(journal: Journal, event: Event) -> PostedEvent:
    try:
        return journal.post(event)
    except OverflowLotsNeededError:
        raise LotsMissingError(event.account_key) from None


def _close(key: AccountKey, journal: Journal, now_ms: int) -> AccountChange:
    try:
        change = journal.close()
    except OverflowLotsNeededError:
        raise LotsMissingError(key) from None
    for result in change.results:
        overflow = result.account.overflow
        if overflow is not None and overflow.first_expiry_or_never_ms <= now_ms:
            raise LotsMissingError(key)
    return change


def _event_id_reused(event_id: str) -> PointbookError:
    return PointbookError(
        Reason.EVENT_ID_REUSED,
        "The ledger has another event with this event_id; use a unique event_id for each event.",
        metadata={"event_id": event_id},
    )


def _insufficient_points(result: ApplyResult, *, forget_refusal: bool) -> PointbookError:
    event = result.entry.event
    retry = "A retry is checked again." if forget_refusal else "A retry with this event_id gets the same error."
    return PointbookError(
        Reason.INSUFFICIENT_POINTS,
        f"The update would make the account's balance negative. {retry}",
        metadata={"event_id": event.event_id, "updated_value": str(event.value)},
    )
