"""The balance of an account after each of its entries: events without one are judged by these alone, without lots."""

from bisect import bisect_left
from collections.abc import Iterable

from pointbook_server.ledger.model import Entry, Event

_UNBALANCED, _BALANCED = 0, 1
"""Inside a millisecond events without a balance come first."""


class Balances:
    """Running balances in the order of the book, from a balance that stands before all of them.

    Void entries move nothing, and have no place here.
    """

    def __init__(self, balance: int, entries: Iterable[Entry]) -> None:
        counting = [entry for entry in entries if not entry.is_void]
        self._before = balance
        self._places = [_place(entry.event) for entry in counting]
        self._after = [entry.balance_after for entry in counting]

    def before(self, event: Event) -> int:
        """Tell the balance that an event without one would find at its place."""
        return self._balance_at(bisect_left(self._places, _place(event)))

    def cover(self, event: Event) -> bool:
        """Tell whether an event without a balance leaves none below zero, at its place or up to the next that has one.

        Source: ledger.md, fold.
        """
        start = bisect_left(self._places, _place(event))
        after = [self._balance_at(start), *self._after[start : self._end_of_run(start)]]
        return min(after) + event.delta >= 0

    def add(self, event: Event) -> bool:
        """Let an event have its place; False where only a fold can tell the balances from now on.

        That is so where several entries of one millisecond carry a balance: their order depends on what precedes them.
        """
        place = _place(event)
        start = bisect_left(self._places, place)
        end = self._end_of_run(start)
        before = self._balance_at(start)
        after = before + event.delta if event.balance is None else event.balance
        self._after[start:end] = [after, *(balance + after - before for balance in self._after[start:end])]
        is_alone = event.balance is None or place not in self._places[start : start + 1]
        is_next_alone = len(set(self._places[end : end + 2])) == len(self._places[end : end + 2])
        self._places.insert(start, place)
        return is_alone and is_next_alone

    def _balance_at(self, index: int) -> int:
        return self._after[index - 1] if index else self._before

    def _end_of_run(self, start: int) -> int:
        """Tell where the entries without a balance end that begin at a place."""
        while start < len(self._places) and self._places[start][1] == _UNBALANCED:
            start += 1
        return start


def _place(event: Event) -> tuple[int, int, str]:
    if event.balance is None:
        return event.updated_at_ms, _UNBALANCED, event.event_id
    return event.updated_at_ms, _BALANCED, ""
