"""Verification of one account by a new fold of its entries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pointbook_server.ledger.fold import Fold
from pointbook_server.ledger.lots import NEVER_MS, Lot, OverflowLots
from pointbook_server.ledger.model import Account, Entry

ACCOUNT_FIELDS = ("opening", "balance", "drift", "silently_expired", "lifetime_points", "newest_at_ms")
ENTRY_FIELDS = ("ordinal", "balance_before", "balance_after", "drift", "silently_expired", "draws")
NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A stored value that differs from the fold; `name` says which, such as `lots[0]`."""

    name: str
    stored: str
    folded: str


class AccountVerification:
    """The verification of one account, millisecond by millisecond.

    It does not keep entries in memory, so an account may have any number of them.
    """

    def __init__(self) -> None:
        self._fold = Fold(Account())

    def add(self, stored: Sequence[Entry]) -> Iterator[Mismatch]:
        """Fold the entries of the next millisecond, and compare their derived values."""
        void_ids = {entry.event.event_id for entry in stored if entry.is_void}
        self._fold.apply([entry.event for entry in stored], void_ids)
        folded_entries = {entry.event.event_id: entry for entry in self._fold.entries}
        # Compared entries are dropped: only the state is needed from here on.
        self._fold.entries.clear()
        self._fold.checkpoints.clear()
        for entry in stored:
            folded = folded_entries[entry.event.event_id]
            if folded != entry:
                yield from _compare_fields(f"entry {entry.event.event_id}: ", ENTRY_FIELDS, entry, folded)

    def check_checkpoint(self, stored: Account) -> Iterator[Mismatch]:
        """Compare a checkpoint with the current state, which must have the same time."""
        name = f"checkpoint {stored.newest_at_ms}"
        folded = self._fold.account()
        if folded.newest_at_ms != stored.newest_at_ms:
            yield Mismatch(name, "exists", "no entry at its time")
        else:
            yield from _compare_states(f"{name}: ", stored, folded)

    def close(self, stored: Account | None) -> Iterator[Mismatch]:
        """Compare the stored account with the state after all entries."""
        folded = self._fold.account()
        if stored is None and folded.newest_at_ms is not None:
            yield Mismatch("account", NOTHING, f"a balance of {folded.balance}")
        elif stored is not None and folded.newest_at_ms is None:
            yield Mismatch("account", "exists", "no entries")
        elif stored is not None:
            yield from _compare_states("", stored, folded)


def _compare_states(prefix: str, stored: Account, folded: Account) -> Iterator[Mismatch]:
    """Compare a stored state with a fold that has all lots."""
    yield from _compare_fields(prefix, ACCOUNT_FIELDS, stored, folded)
    # Accounts older than this column have the maximum, which only makes some draws load more lots.
    if stored.drawn_to_ms not in {folded.drawn_to_ms, NEVER_MS}:
        yield from _compare_fields(prefix, ("drawn_to_ms",), stored, folded)
    yield from _compare_lots(prefix, stored, folded.lots)


def _compare_lots(prefix: str, stored: Account, lots: Sequence[Lot]) -> Iterator[Mismatch]:
    """Compare the stored lots and the overflow with all lots.

    Only the first difference is reported: a missing or extra lot shifts all later ones.
    """
    stored_count = len(stored.lots)
    for index, (stored_lot, lot) in enumerate(zip_longest(stored.lots, lots[:stored_count])):
        if stored_lot != lot:
            yield Mismatch(f"{prefix}lots[{index}]", str(stored_lot), str(lot or NOTHING))
            return
    overflow = _overflow(lots[stored_count:])
    if stored.overflow != overflow:
        yield Mismatch(f"{prefix}far_lots", str(stored.overflow or NOTHING), str(overflow or NOTHING))


def _overflow(lots: Sequence[Lot]) -> OverflowLots | None:
    if not lots:
        return None
    return OverflowLots(sum(lot.remaining for lot in lots), lots[0].expires_at_ms, lots[0].event_id)


def _compare_fields(prefix: str, names: Sequence[str], stored: object, folded: object) -> Iterator[Mismatch]:
    for name in names:
        stored_value, folded_value = getattr(stored, name), getattr(folded, name)
        if stored_value != folded_value:
            yield Mismatch(f"{prefix}{name}", _format(stored_value), _format(folded_value))


def _format(value: object) -> str:
    return NOTHING if value is None or value == () else str(value)
