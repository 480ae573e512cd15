"""A batch of events over accounts, one small example each: what is answered, and what is to be written."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.journal import PostedEvent
from pointbook_server.ledger.lots import Lot, OverflowLots
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, Event, UpdateType, fold
from pointbook_server.ledger.posting import AccountHistory, KnownEvent, LotsMissingError, Result, post_batch

ONE, TWO = AccountKey("store", "one"), AccountKey("store", "two")
NOW_MS = 1_000


def event(event_id: str, at_ms: int, delta: int, balance: int | None, account: AccountKey = ONE) -> Event:
    """Points come in, or go out."""
    update_type = UpdateType.INCREASE if delta >= 0 else UpdateType.DECREASE
    return Event(event_id, account, update_type, "LUCKY_DRAW", abs(delta), balance, None, at_ms)


def post(
    *events: Event,
    pages: Mapping[AccountKey, AccountHistory] | None = None,
    known: Mapping[str, KnownEvent] | None = None,
    refused: Mapping[AccountKey, PointbookError] | None = None,
    forgetting: Collection[int] = (),
) -> Result:
    """Post a batch to two accounts, which are new unless a page says otherwise."""
    every_page = {ONE: AccountHistory(Account()), TWO: AccountHistory(Account()), **(pages or {})}
    return post_batch(events, every_page, known or {}, refused or {}, NOW_MS, forgetting=forgetting)


def told(result: Result) -> list[str]:
    """What each event is told in a word."""
    return [
        answer.reason.value if isinstance(answer, PointbookError) else answer.outcome.value for answer in result.answers
    ]


def test_each_event_is_answered_in_its_place_with_its_own_account() -> None:
    """However the accounts are mixed."""
    result = post(event("a", 10, 5, 5), event("b", 10, 7, 7, TWO), event("c", 30, 5, 10), event("d", 20, 1, 8, TWO))

    assert told(result) == ["APPLIED"] * 4
    balances = [answer.account.balance for answer in result.answers if not isinstance(answer, PointbookError)]
    assert balances == [5, 7, 10, 8]
    assert list(result.entries) == [0, 1, 2, 3]
    assert {key: posting.account.balance for key, posting in result.postings.items()} == {ONE: 10, TWO: 8}


def test_an_id_that_came_before_in_the_batch_is_known() -> None:
    """With the same content it is a duplicate, with other content, another account's included, a mistake."""
    first = event("a", 10, 5, 5)

    result = post(first, first, event("a", 10, 6, 6), event("a", 10, 5, 5, TWO))

    assert told(result) == ["APPLIED", "DUPLICATE", "EVENT_ID_REUSED", "EVENT_ID_REUSED"]
    assert list(result.entries) == [0]
    assert result.postings[TWO].account == Account()


def test_an_id_of_the_book_is_known() -> None:
    """The answer is the account of now, and the entry as it stands in the book."""
    base, (entry,) = fold(Account(), [event("a", 10, 5, 5)])
    known = {"a": KnownEvent(entry.event, PostedEvent(ApplyOutcome.APPLIED, "a", entry))}

    result = post(entry.event, event("a", 10, 6, 6), pages={ONE: AccountHistory(base)}, known=known)

    assert told(result) == ["DUPLICATE", "EVENT_ID_REUSED"]
    answer = result.answers[0]
    assert not isinstance(answer, PointbookError)
    assert (answer.account, answer.entry) == (base, entry)
    assert result.entries == {}


def test_the_id_of_a_second_delivery_is_not_remembered() -> None:
    """Another content may take it, in the same batch as well."""
    result = post(event("a", 10, 5, 5), event("b", 10, 5, 5), event("b", 20, 1, 6))

    assert told(result) == ["APPLIED", "DUPLICATE", "APPLIED"]
    assert list(result.entries) == [0, 2]


def test_a_refusal_is_remembered_and_repeated() -> None:
    """It makes a row of the book, which claims its id, and says what was refused."""
    decrease = event("d", 10, -5, None)

    result = post(decrease, decrease, event("d", 10, -4, None), event("a", 20, 9, None))

    assert told(result) == ["INSUFFICIENT_POINTS", "INSUFFICIENT_POINTS", "EVENT_ID_REUSED", "APPLIED"]
    assert {number: verdict.outcome for number, verdict in result.entries.items()} == {
        0: ApplyOutcome.REFUSED,
        3: ApplyOutcome.APPLIED,
    }
    answer = result.answers[0]
    assert isinstance(answer, PointbookError)
    assert answer.metadata == {"event_id": "d", "updated_value": "5"}
    assert result.postings[ONE].account.balance == 9


def rows(result: Result) -> dict[int, ApplyOutcome]:
    """The outcomes of the events that make a row of the book, by their places."""
    return {number: verdict.outcome for number, verdict in result.entries.items()}


def test_a_forgotten_refusal_makes_no_row_and_is_judged_anew() -> None:
    """Its event_id is claimed by nothing, so that the same event is accepted once the points are there."""
    decrease = event("d", 20, -5, None)

    result = post(decrease, event("a", 10, 9, None), decrease, decrease, forgetting={0, 2, 3})

    assert told(result) == ["INSUFFICIENT_POINTS", "APPLIED", "APPLIED", "DUPLICATE"]
    assert rows(result) == {1: ApplyOutcome.APPLIED, 2: ApplyOutcome.APPLIED}
    assert (result.leaves_ids_unclaimed, result.lifted) == (True, frozenset())
    answer = result.answers[0]
    assert isinstance(answer, PointbookError)
    assert "judged anew" in answer.message


def test_other_content_may_take_the_id_of_a_forgotten_refusal() -> None:
    """Nothing stands under it."""
    result = post(event("d", 10, -5, None), event("d", 10, 5, None), forgetting={0})

    assert told(result) == ["INSUFFICIENT_POINTS", "APPLIED"]


@pytest.mark.parametrize(
    ("balance", "forgetting", "answers", "lifted"),
    [
        (9, {0}, ["APPLIED"], {"d"}),
        (4, {0}, ["INSUFFICIENT_POINTS"], set()),
        (9, (), ["INSUFFICIENT_POINTS"], set()),
        (9, {1}, ["INSUFFICIENT_POINTS", "APPLIED"], {"d"}),
        (9, {0}, ["APPLIED", "DUPLICATE"], {"d"}),
    ],
)
def test_a_remembered_refusal_is_lifted_only_by_a_caller_who_asks(
    balance: int, forgetting: Collection[int], answers: list[str], lifted: set[str]
) -> None:
    """All others get the answer that they got before."""
    decrease = event("d", 20, -5, None)
    refusal = post(decrease).entries[0]
    known = {"d": KnownEvent(decrease, PostedEvent(ApplyOutcome.REFUSED, "d", refusal.entry))}
    base, _ = fold(Account(), [event("a", 10, balance, None)])

    result = post(*[decrease] * len(answers), pages={ONE: AccountHistory(base)}, known=known, forgetting=forgetting)

    assert told(result) == answers
    assert result.lifted == lifted
    assert list(result.entries) == ([answers.index("APPLIED")] if lifted else [])


def test_a_refusal_of_the_same_batch_is_lifted() -> None:
    """One row is left for the event_id: the entry."""
    decrease = event("d", 20, -5, None)

    result = post(decrease, event("a", 10, 9, None), decrease, forgetting={2})

    assert told(result) == ["INSUFFICIENT_POINTS", "APPLIED", "APPLIED"]
    assert rows(result) == {1: ApplyOutcome.APPLIED, 2: ApplyOutcome.APPLIED}


def test_an_account_that_cannot_be_posted_to_spoils_no_other() -> None:
    """Its events are told why, and claim no ids."""
    error = PointbookError(Reason.STORE_NOT_FOUND, "No such store.")

    result = post(event("a", 10, 5, 5), event("a", 10, 7, 7, TWO), event("b", 10, 1, 1), refused={ONE: error})

    assert told(result) == ["STORE_NOT_FOUND", "APPLIED", "STORE_NOT_FOUND"]
    assert list(result.entries) == [1]


@pytest.mark.parametrize(
    ("expires_at_ms", "posted"),
    [
        (NOW_MS, event("b", 20, 1, 11)),
        (NOW_MS + 1, event("b", 20, -5, None)),
        (NOW_MS + 1, event("b", 20, -5, 5)),
    ],
)
def test_an_account_whose_far_lots_are_needed_is_named(expires_at_ms: int, posted: Event) -> None:
    """To tell what is active now, to judge, or to draw: they are read, and the batch is posted again."""
    lots = (Lot(4, 4, 500, "a"), Lot(6, 6, expires_at_ms, "x"))
    whole = Account(opening=10, balance=10, newest_at_ms=10, lots=lots)
    near = replace(whole, lots=lots[:1], far_lots=OverflowLots(6, expires_at_ms, "x"))

    with pytest.raises(LotsMissingError) as missing:
        post(event("c", 20, 1, 1, TWO), posted, pages={ONE: AccountHistory(near)})

    assert missing.value.key == ONE
    assert told(post(posted, pages={ONE: AccountHistory(whole)})) == ["APPLIED"]


def test_far_lots_that_nobody_needs_are_not_read() -> None:
    """As long as none of them has expired by now."""
    near = Account(
        opening=10, balance=10, newest_at_ms=10, lots=(Lot(4, 4, 500, "a"),), far_lots=OverflowLots(6, NOW_MS + 1, "x")
    )

    result = post(event("b", 20, -4, 6), pages={ONE: AccountHistory(near)})

    assert told(result) == ["APPLIED"]
    assert result.postings[ONE].account.far_lots == OverflowLots(6, NOW_MS + 1, "x")
