"""A batch of events and the accounts that they are posted to: what is to be answered, and what is to be written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.holds import Hold, settled_by, without
from pointbook_server.ledger.journal import Journal, Post, Posting
from pointbook_server.ledger.lots import FarLotsNeededError
from pointbook_server.ledger.model import Account, AccountKey, Entry, Event, Outcome, UpdateType, Verdict


class KnownEvent(NamedTuple):
    """An event whose id is in the book, or was posted earlier in the same batch."""

    event: Event
    post: Post


class Page(NamedTuple):
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

    answers: list[Verdict | PointbookError] = field(default_factory=list)
    postings: dict[AccountKey, Posting] = field(default_factory=dict)
    entries: dict[int, Verdict] = field(default_factory=dict)
    """The verdicts that make a row of the book, by the place of their events in the batch."""
    settlements: list[Settlement] = field(default_factory=list)
    holds: dict[AccountKey, tuple[Hold, ...]] = field(default_factory=dict)
    """What is left of the holds."""
    repeats_content: bool = False
    """Whether an event repeats the content of another under an event_id that is not known."""


class LotsMissingError(Exception):
    """An account's far lots are needed: read more of them, and post the batch again."""

    def __init__(self, key: AccountKey) -> None:
        super().__init__()
        self.key = key


def post_batch(
    events: Sequence[Event],
    pages: Mapping[AccountKey, Page],
    known: Mapping[str, KnownEvent],
    refused: Mapping[AccountKey, PointbookError],
    now_ms: int,
) -> Result:
    """Post events in the order in which they came.

    `known` are the events of the book that share an event_id with these, `refused` the accounts that cannot be posted
    to. The answers' accounts can tell what is active at `now_ms`. Raises LotsMissingError.
    """
    journals = {key: Journal(page.base, page.history) for key, page in pages.items()}
    met = dict(known)
    places: list[PointbookError | tuple[AccountKey, int, bool]] = []
    repeats_content = False
    for event in events:
        key = event.account
        seen = met.get(event.event_id)
        if key in refused:
            places.append(refused[key])
        elif seen is not None and seen.event.content != event.content:
            places.append(_reused(event.event_id))
        else:
            journal, is_new = journals[key], False
            if seen is None:
                is_new = _post(journal, event, met)
                repeats_content = repeats_content or not is_new
            else:
                journal.repeat(seen.post)
            places.append((key, len(journal) - 1, is_new))
    postings = {key: _close(key, journal, now_ms) for key, journal in journals.items()}
    result = Result(postings=postings, repeats_content=repeats_content)
    for number, place in enumerate(places):
        if isinstance(place, PointbookError):
            result.answers.append(place)
            continue
        key, index, is_new = place
        verdict = result.postings[key].verdicts[index]
        result.answers.append(_refusal(verdict) if verdict.outcome is Outcome.REFUSED else verdict)
        if is_new:
            result.entries[number] = verdict
    if any(page.holds for page in pages.values()):
        _settle(result, pages, now_ms)
    return result


def _settle(result: Result, pages: Mapping[AccountKey, Page], now_ms: int) -> None:
    """Let each new decrease settle one hold at most, and tell all accounts with the holds that are left."""
    left = {key: page.holds for key, page in pages.items() if page.holds}
    for verdict in result.entries.values():
        event = verdict.entry.event
        key = event.account
        if key not in left or verdict.outcome is Outcome.REFUSED or event.update_type is not UpdateType.DECREASE:
            continue
        hold = settled_by(left[key], event.value, event.scene, event.updated_at_ms, now_ms)
        if hold is not None:
            left[key] = without(left[key], hold.redemption_id)
            result.settlements.append(Settlement(key, hold, event.event_id))
    result.holds = left
    for number, answer in enumerate(result.answers):
        if isinstance(answer, Verdict) and answer.entry.event.account in left:
            account = replace(answer.account, holds=left[answer.entry.event.account])
            result.answers[number] = answer._replace(account=account)


def _post(journal: Journal, event: Event, met: dict[str, KnownEvent]) -> bool:
    """Post an event whose id is new; tell whether it makes a row of the book, which claims the id."""
    try:
        post = journal.post(event)
    except FarLotsNeededError:
        raise LotsMissingError(event.account) from None
    if post.outcome is Outcome.DUPLICATE:
        return False
    met[event.event_id] = KnownEvent(event, post)
    return True


def _close(key: AccountKey, journal: Journal, now_ms: int) -> Posting:
    try:
        posting = journal.close()
    except FarLotsNeededError:
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


def _refusal(verdict: Verdict) -> PointbookError:
    event = verdict.entry.event
    return PointbookError(
        Reason.INSUFFICIENT_POINTS,
        "The update would take the account below zero. The answer stays the same for this event_id.",
        metadata={"event_id": event.event_id, "updated_value": str(event.value)},
    )
