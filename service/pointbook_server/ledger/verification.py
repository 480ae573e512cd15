"""Whether what the book keeps of an account is what its entries say: they are folded again from the very beginning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pointbook_server.ledger.lots import NEVER_MS, Lot, OverflowLots
from pointbook_server.ledger.model import Account, Entry, Fold

SUMS = ("opening", "balance", "drift", "silently_expired", "lifetime_points", "newest_at_ms")
DERIVED = ("ordinal", "balance_before", "balance_after", "drift", "silently_expired", "draws")
NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something of an account that is not as the fold says."""

    what: str
    stored: str
    folded: str


class Verification:
    """One account while its entries come, each millisecond's together and in turn, and its checkpoints after them.

    It holds the account's state and no entries, so that an account may have any number of them.
    """

    def __init__(self) -> None:
        self._fold = Fold(Account())

    def add(self, stored: Sequence[Entry]) -> Iterator[Mismatch]:
        """Fold the entries of the next millisecond, and compare each with what the book derived for it."""
        void = {entry.event.event_id for entry in stored if entry.is_void}
        self._fold.run([entry.event for entry in stored], void)
        folded = {entry.event.event_id: entry for entry in self._fold.entries}
        # What has been compared is let go: only the state goes on.
        self._fold.entries.clear()
        self._fold.checkpoints.clear()
        for entry in stored:
            again = folded[entry.event.event_id]
            if again != entry:
                yield from _differing(f"entry {entry.event.event_id}: ", DERIVED, entry, again)

    def check_checkpoint(self, stored: Account) -> Iterator[Mismatch]:
        """Compare a checkpoint with the state as it stands, which must be the one of the checkpoint's moment."""
        name = f"checkpoint {stored.newest_at_ms}"
        folded = self._fold.account()
        if folded.newest_at_ms != stored.newest_at_ms:
            yield Mismatch(name, "is there", "has no entry of its time")
        else:
            yield from _check_state(f"{name}: ", stored, folded)

    def close(self, stored: Account | None) -> Iterator[Mismatch]:
        """Compare the account with the state after all entries."""
        folded = self._fold.account()
        if stored is None and folded.newest_at_ms is not None:
            yield Mismatch("account", NOTHING, f"entries that come to {folded.balance}")
        elif stored is not None and folded.newest_at_ms is None:
            yield Mismatch("account", "is there", "has no entries")
        elif stored is not None:
            yield from _check_state("", stored, folded)


def _check_state(prefix: str, stored: Account, folded: Account) -> Iterator[Mismatch]:
    """Compare a state as it is kept with a fold that has all lots."""
    yield from _differing(prefix, SUMS, stored, folded)
    # A book from before this was noted has the latest there is, which only makes it read more.
    if stored.drawn_to_ms not in {folded.drawn_to_ms, NEVER_MS}:
        yield from _differing(prefix, ("drawn_to_ms",), stored, folded)
    yield from _check_lots(prefix, stored, folded.lots)


def _check_lots(prefix: str, stored: Account, lots: Sequence[Lot]) -> Iterator[Mismatch]:
    """Compare the lots that are kept with the first of all, and the sum with the others: the first difference alone.

    Where one lot is missing or too many, all behind it are shifted.
    """
    near = len(stored.lots)
    for place, (kept, lot) in enumerate(zip_longest(stored.lots, lots[:near])):
        if kept != lot:
            yield Mismatch(f"{prefix}lots[{place}]", str(kept), str(lot or NOTHING))
            return
    far_lots = _sum(lots[near:])
    if stored.far_lots != far_lots:
        yield Mismatch(f"{prefix}far_lots", str(stored.far_lots or NOTHING), str(far_lots or NOTHING))


def _sum(lots: Sequence[Lot]) -> OverflowLots | None:
    """Sum lots as they are kept where they are not kept one by one."""
    if not lots:
        return None
    return OverflowLots(sum(lot.remaining for lot in lots), lots[0].expires_at_ms, lots[0].event_id)


def _differing(prefix: str, names: Sequence[str], stored: object, folded: object) -> Iterator[Mismatch]:
    for name in names:
        kept, again = getattr(stored, name), getattr(folded, name)
        if kept != again:
            yield Mismatch(f"{prefix}{name}", _shown(kept), _shown(again))


def _shown(value: object) -> str:
    return NOTHING if value is None or value == () else str(value)
