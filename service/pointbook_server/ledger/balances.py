"""The balance of an account after each of its entries: events without one are judged by these alone, without lots."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from pointbook_server.ledger.model import Entry, Event, bounded

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
        self._last_loop_ms = _last_loop_ms(entry.event for entry in counting)

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

        That is so where it joins entries with a balance in their millisecond, and where it comes before a loop: the
        order of one depends on the balance and on the lots that precede it, however far away.
        """
        place = _place(event)
        start = bisect_left(self._places, place)
        end = self._end_of_run(start)
        before = self._balance_at(start)
        after = bounded(before + event.delta) if event.balance is None else event.balance
        self._after[start:end] = [after, *(bounded(balance + after - before) for balance in self._after[start:end])]
        is_alone = event.balance is None or place not in self._places[start : start + 1]
        self._places.insert(start, place)
        return is_alone and event.updated_at_ms > self._last_loop_ms

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


def _last_loop_ms(events: Iterable[Event]) -> int:
    """Find the last millisecond whose events with a balance may lead back to where they began; -1 where none may.

    Such a loop can be entered at any of its balances. All other orders are forced by the events themselves.
    """
    changes: defaultdict[int, list[int]] = defaultdict(list)
    for event in events:
        if event.balance is not None:
            changes[event.updated_at_ms].append(event.delta)
    return max((at_ms for at_ms, deltas in changes.items() if len(deltas) > 1 and sum(deltas) == 0), default=-1)
