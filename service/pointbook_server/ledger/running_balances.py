"""The running balances of an account, for checking events without a balance."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from pointbook_server.ledger.fold import clamp
from pointbook_server.ledger.model import Entry, Event

_UNBALANCED, _BALANCED = 0, 1
"""Inside a millisecond, events without a balance come first."""


class RunningBalances:
    """The balances after entries that are not void, in ledger order."""

    def __init__(self, balance: int, entries: Iterable[Entry]) -> None:
        counting = [entry for entry in entries if not entry.is_void]
        self._initial = balance
        self._positions = [_position(entry.event) for entry in counting]
        self._after = [entry.balance_after for entry in counting]
        self._last_loop_ms = _last_loop_ms(entry.event for entry in counting)

    def balance_before(self, event: Event) -> int:
        """Return the balance before an event without one."""
        return self._balance_at(bisect_left(self._positions, _position(event)))

    def covers(self, event: Event) -> bool:
        """Return whether an event without a balance makes no balance negative.

        Balances count up to the next event that carries one.
        Source: docs/reference/ledger.md#events-without-a-balance.
        """
        start = bisect_left(self._positions, _position(event))
        after = [self._balance_at(start), *self._after[start : self._end_of_run(start)]]
        return min(after) + event.delta >= 0

    def add(self, event: Event) -> bool:
        """Insert an event; return False if only a new fold can compute the balances.

        This is so if the event joins others with a balance in its millisecond, or comes before a loop
        (`_last_loop_ms`), whose order depends on the balance and the lots before it.
        """
        position = _position(event)
        start = bisect_left(self._positions, position)
        end = self._end_of_run(start)
        before = self._balance_at(start)
        after = clamp(before + event.delta) if event.balance is None else event.balance
        self._after[start:end] = [after, *(clamp(balance + after - before) for balance in self._after[start:end])]
        is_alone = event.balance is None or position not in self._positions[start : start + 1]
        self._positions.insert(start, position)
        return is_alone and event.updated_at_ms > self._last_loop_ms

    def _balance_at(self, index: int) -> int:
        return self._after[index - 1] if index else self._initial

    def _end_of_run(self, start: int) -> int:
        """Return the end of the run of entries without a balance from a position on."""
        while start < len(self._positions) and self._positions[start][1] == _UNBALANCED:
            start += 1
        return start


def _position(event: Event) -> tuple[int, int, str]:
    if event.balance is None:
        return event.updated_at_ms, _UNBALANCED, event.event_id
    return event.updated_at_ms, _BALANCED, ""


def _last_loop_ms(events: Iterable[Event]) -> int:
    """Return the last millisecond whose events may form a loop; -1 if there is none.

    A loop leads back to the balance at which it began, so it can start at any of its balances. In all other
    milliseconds, the events alone determine the order.
    """
    changes: defaultdict[int, list[int]] = defaultdict(list)
    for event in events:
        if event.balance is not None:
            changes[event.updated_at_ms].append(event.delta)
    return max((at_ms for at_ms, deltas in changes.items() if len(deltas) > 1 and sum(deltas) == 0), default=-1)
