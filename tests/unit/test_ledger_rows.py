"""The conversion of the ledger's entities to rows and back."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pointbook_server.ledger import rows
from pointbook_server.ledger.lots import Draw, Lot
from pointbook_server.ledger.model import Account, AccountKey, Entry, Event, UpdateType

KEY = AccountKey("store", "buyer")
EVENT = Event("event", KEY, UpdateType.INCREASE, "LUCKY_DRAW", 5, 5, None, 10)
points = st.integers(1, 10**15)
expiries = st.none() | st.integers(0, 2**53)
lots = st.lists(st.builds(Lot, points, points, expiries, st.text()), max_size=3).map(tuple)
draws = st.lists(st.builds(Draw, points, expiries, st.text()), max_size=3).map(tuple)


@given(lots)
def test_lots_are_stored_as_json_that_reads_back_equal(account_lots: tuple[Lot, ...]) -> None:
    _, *row = rows.checkpoint_to_row("merchant", KEY, Account(lots=account_lots))

    assert json.loads(row[8]) == [list(lot) for lot in account_lots]
    assert rows.account_from_row(row)[1].lots == account_lots  # type: ignore[arg-type] # a tuple is unpacked like a row


@given(draws)
def test_draws_are_stored_as_json_that_reads_back_equal(entry_draws: tuple[Draw, ...]) -> None:
    row = rows.derived_to_row(Entry(EVENT, 0, 0, 5, 0, 0, entry_draws), None)

    assert json.loads(row[5]) == [list(draw) for draw in entry_draws]
