"""The order of events that share a millisecond, derived from their balances.

Balances are nodes, and an event is an edge from the balance before it to the balance after it. The true order uses
every event once: an Eulerian trail, which Hierholzer's algorithm finds in linear time once a start is chosen. Taking
the smallest edge first at every node makes it the smallest trail from that start.
Source: docs/reference/ledger.md#trail-of-balances.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeVar


class BalancedEvent(Protocol):
    """The attributes of an event that determine the order; it has a balance."""

    @property
    def delta(self) -> int:
        """The signed change in points."""

    @property
    def balance(self) -> int | None:
        """The balance after the change."""

    @property
    def expires_at_ms(self) -> int | None:
        """The expiry of the points."""

    @property
    def scene(self) -> str:
        """The reason for the change."""


E = TypeVar("E", bound=BalancedEvent)


def order_millisecond(events: Sequence[E], *, balance: int | None, expired: int) -> list[E]:
    """Return the events of one millisecond in ledger order; all carry a balance.

    `balance` is the balance before them (None for a new account). `expired` are those of its points whose lots have
    expired, which SHOPLINE may have deducted without an event. If there is no trail, the events are sorted by content.
    """
    ordered = sorted(events, key=_content)
    if len(ordered) < 2:  # noqa: PLR2004 - one event has one order
        return ordered
    for start in _starts(ordered, balance, expired):
        trail = _find_trail(ordered, start)
        if trail is not None:
            return trail
    return ordered


def _content(event: BalancedEvent) -> tuple[int, int, bool, int, str]:
    """Return the sort key (change, balance, expiry, scene); no expiry sorts last."""
    expiry = event.expires_at_ms
    return (event.delta, _after(event), expiry is None, expiry or 0, event.scene)


def _after(event: BalancedEvent) -> int:
    assert event.balance is not None, "events without a balance are not part of the trail"  # noqa: S101 - narrows the type
    return event.balance


def _before(event: BalancedEvent) -> int:
    return _after(event) - event.delta


def _starts(events: Sequence[BalancedEvent], balance: int | None, expired: int) -> list[int]:
    """Return the balances from which a trail may start, in the order to try them."""
    starts = [] if balance is None else [balance, balance - expired]
    surplus = Counter(_before(event) for event in events)
    surplus.subtract(_after(event) for event in events)
    forced = [node for node, count in surplus.items() if count > 0]
    if not forced:
        starts.append(min(_before(event) for event in events))
    elif len(forced) == 1 and surplus[forced[0]] == 1:
        starts.append(forced[0])
    return starts


def _find_trail(events: Sequence[E], start: int) -> list[E] | None:
    """Return the smallest trail from a start through all events, if there is one.

    The events must be sorted.
    """
    leaving: defaultdict[int, list[E]] = defaultdict(list)
    for event in reversed(events):
        leaving[_before(event)].append(event)
    path: list[E] = []
    walk: list[E] = []
    node = start
    while True:
        if leaving[node]:
            event = leaving[node].pop()
            walk.append(event)
            node = _after(event)
        elif walk:
            path.append(walk.pop())
            node = _after(walk[-1]) if walk else start
        else:
            break
    path.reverse()
    nodes = [start, *(_after(event) for event in path)]
    connected = all(_before(event) == node for event, node in zip(path, nodes, strict=False))
    return path if len(path) == len(events) and connected else None
