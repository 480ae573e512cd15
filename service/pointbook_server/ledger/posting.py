"""A batch of events and the accounts that they are posted to: what is to be answered, and what is to be written."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.holds import Hold, settled_by, without
from pointbook_server.ledger.journal import AccountChange, Journal, PostedEvent
from pointbook_server.ledger.lots import OverflowLotsNeededError
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, ApplyResult, Entry, Event, UpdateType


class KnownEvent(NamedTuple):
    """An event whose id is in the book, or was posted earlier in the same batch."""

    event: Event
    post: PostedEvent


class AccountHistory(NamedTuple):
    """What is known of one account: a state, the entries since then (none on the direct way), and its holds by now."""

    base: Account
    history: Sequence[Entry] = ()
    holds: tuple[Hold, ...] = ()


class Settlement(NamedTuple):
    """A hold that SHOPLINE has booked, and the event by which it did."""

    account: AccountKey
    hold: Hold
    event_id: str


@dataclass(slots=True)
class Result:
    """What a batch comes to: an answer for each event in turn, what each account comes to, and the new entries."""

    answers: list[ApplyResult | PointbookError] = field(default_factory=list)
    postings: dict[AccountKey, AccountChange] = field(default_factory=dict)
    entries: dict[int, ApplyResult] = field(default_factory=dict)
    """The verdicts that make a row of the book, by the place of their events in the batch."""
    settlements: list[Settlement] = field(default_factory=list)
    holds: dict[AccountKey, tuple[Hold, ...]] = field(default_factory=dict)
    """What is left of the holds."""
    leaves_ids_unclaimed: bool = False
    """Whether an event makes no row, so that writing the batch does not check its event_id against the book."""
    lifted: frozenset[str] = frozenset()
    """The event_ids of the book whose remembered refusal gives way to an entry."""


class LotsMissingError(Exception):
    """An account's far lots are needed: read more of them, and post the batch again."""

    def __init__(self, key: AccountKey) -> None:
        super().__init__()
        self.key = key


def post_batch(
    events: Sequence[Event],
    pages: Mapping[AccountKey, AccountHistory],
    known: Mapping[str, KnownEvent],
    refused: Mapping[AccountKey, PointbookError],
    now_ms: int,
    *,
    forgetting: Collection[int] = (),
) -> Result:
    """Post events in the order in which they came.

    `known` are the events of the book that share an event_id with these, `refused` the accounts that cannot be posted
    to, `forgetting` the places of events whose refusal is not remembered. The answers' accounts can tell what is active
    at `now_ms`. Raises LotsMissingError.
    """
    journals = {key: Journal(page.base, page.history) for key, page in pages.items()}
    met = dict(known)
    rows: dict[str, int] = {}
    places: list[PointbookError | tuple[AccountKey, int]] = []
    leaves_ids_unclaimed = False
    for number, event in enumerate(events):
        key = event.account
        seen = met.get(event.event_id)
        forgets = number in forgetting
        if key in refused:
            places.append(refused[key])
        elif seen is not None and seen.event.content != event.content:
            places.append(_reused(event.event_id))
        else:
            journal = journals[key]
            if seen is not None and not is_judged_anew(seen, forgets=forgets):
                journal.repeat(seen.post)
            else:
                post = _post(journal, event)
                if _makes_row(post, forgets=forgets):
                    met[event.event_id] = KnownEvent(event, post)
                    rows[event.event_id] = number
                else:
                    leaves_ids_unclaimed = True
            places.append((key, len(journal) - 1))
    postings = {key: _close(key, journal, now_ms) for key, journal in journals.items()}
    lifted = frozenset(rows.keys() & known.keys())
    result = Result(postings=postings, leaves_ids_unclaimed=leaves_ids_unclaimed, lifted=lifted)
    for number, place in enumerate(places):
        if isinstance(place, PointbookError):
            result.answers.append(place)
            continue
        key, index = place
        verdict = result.postings[key].verdicts[index]
        is_refused = verdict.outcome is ApplyOutcome.REFUSED
        result.answers.append(_refusal(verdict, forgets=number in forgetting) if is_refused else verdict)
        if rows.get(events[number].event_id) == number:
            result.entries[number] = verdict
    if any(page.holds for page in pages.values()):
        _settle(result, pages, now_ms)
    return result


def _settle(result: Result, pages: Mapping[AccountKey, AccountHistory], now_ms: int) -> None:
    """Let each new decrease settle one hold at most, and tell all accounts with the holds that are left."""
    left = {key: page.holds for key, page in pages.items() if page.holds}
    for verdict in result.entries.values():
        event = verdict.entry.event
        key = event.account
        if key not in left or verdict.outcome is ApplyOutcome.REFUSED or event.update_type is not UpdateType.DECREASE:
            continue
        hold = settled_by(left[key], event.value, event.scene, event.updated_at_ms, now_ms)
        if hold is not None:
            left[key] = without(left[key], hold.redemption_id)
            result.settlements.append(Settlement(key, hold, event.event_id))
    result.holds = left
    for number, answer in enumerate(result.answers):
        if isinstance(answer, ApplyResult) and answer.entry.event.account in left:
            account = replace(answer.account, holds=left[answer.entry.event.account])
            result.answers[number] = answer._replace(account=account)


def is_judged_anew(seen: KnownEvent, *, forgets: bool) -> bool:
    """Return whether an event that was refused before is judged again, as its caller asks."""
    return forgets and seen.post.outcome is ApplyOutcome.REFUSED


def _makes_row(post: PostedEvent, *, forgets: bool) -> bool:
    """Return whether a post makes a row of the book, which claims its event_id."""
    return post.outcome is ApplyOutcome.APPLIED or (post.outcome is ApplyOutcome.REFUSED and not forgets)


def _post(journal: Journal, event: Event) -> PostedEvent:
    try:
        return journal.post(event)
    except OverflowLotsNeededError:
        raise LotsMissingError(event.account) from None


def _close(key: AccountKey, journal: Journal, now_ms: int) -> AccountChange:
    try:
        posting = journal.close()
    except OverflowLotsNeededError:
        raise LotsMissingError(key) from None
    for verdict in posting.verdicts:
        far_lots = verdict.account.far_lots
        if far_lots is not None and far_lots.order_ms <= now_ms:
            raise LotsMissingError(key)
    return posting


def _reused(event_id: str) -> PointbookError:
    return PointbookError(
        Reason.EVENT_ID_REUSED,
        "This event_id is in the book with other content; give every event an id of its own.",
        metadata={"event_id": event_id},
    )


def _refusal(verdict: ApplyResult, *, forgets: bool) -> PointbookError:
    event = verdict.entry.event
    again = "It is judged anew when it is sent again." if forgets else "The answer stays the same for this event_id."
    return PointbookError(
        Reason.INSUFFICIENT_POINTS,
        f"The update would take the account below zero. {again}",
        metadata={"event_id": event.event_id, "updated_value": str(event.value)},
    )
