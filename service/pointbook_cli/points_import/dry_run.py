"""Checks of a file without a server: repeated, contradicting and missing lines."""

from pointbook.v1 import points_pb2
from pointbook_cli.points_import.points_file import RefusedLine
from pointbook_cli.points_import.sorted_lines import SortedLine, disk_errors, open_private_database
from pointbook_cli.terminal import count_of
from pointbook_server.ledger.model import AccountKey, Event, UpdateType
from pointbook_server.ledger.running_balances import RunningBalances

REOPENED = "Another line of the file opens this account at the same time with another balance; remove one of them."
REUSED = "Another line of the file has this event_id with other content; use a unique event_id for each event."


class DryRun:
    """A check of sorted lines without a server.

    It refuses only lines that the server would certainly refuse. Raises OSError if the disk is full.
    """

    def __init__(self, *, opening_balances: bool = False) -> None:
        self._reused_message = REOPENED if opening_balances else REUSED
        self._repeated = 0
        self._short = 0
        self._first_short = 0
        self._account = b""
        self._balance = 0
        self._updated_at_ms = 0
        self._balances_in_millisecond = RunningBalances(0, ())
        self._content: tuple[bytes, bytes] | None = None
        self._seen_ids = open_private_database()
        self._seen_ids.execute(
            "CREATE TABLE seen_ids (event_key BLOB PRIMARY KEY, account BLOB, sort_key BLOB) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Delete all stored data."""
        self._seen_ids.close()

    def check(self, line: SortedLine) -> RefusedLine | None:
        """Return a line as refused; None if the server may accept it."""
        content = (line.account, line.sort_key)
        earlier = self._content_of(line.repeated_id)
        if earlier not in {None, content}:
            return RefusedLine(line.number, line.update.event_id, "EVENT_ID_REUSED", self._reused_message)
        if earlier is not None or (line.update.HasField("points_balance") and content == self._content):
            self._repeated += 1
            return None
        self._store_id(line.repeated_id, content)
        self._content = content
        self._update_balance(line)
        return None

    def notes(self) -> list[str]:
        """Return notes about lines that are not refused."""
        notes = []
        if self._repeated:
            lines = count_of(self._repeated, "line repeats", "lines repeat")
            notes.append(f"{lines} another line of the file: each event counts once")
        if self._short:
            lines = count_of(self._short, "line takes", "lines take")
            notes.append(
                f"{lines} more points than the file gives the account up to that time (the first is line "
                f"{self._first_short}): refused unless the account already holds enough"
            )
        return notes

    def _content_of(self, event_key: bytes | None) -> tuple[bytes, bytes] | None:
        """Return the content of the earlier line with an event_id; None if there is none."""
        if event_key is None:
            return None
        with disk_errors():
            row: tuple[bytes, bytes] | None = self._seen_ids.execute(
                "SELECT account, sort_key FROM seen_ids WHERE event_key = ?", (event_key,)
            ).fetchone()
        return row

    def _store_id(self, event_key: bytes | None, content: tuple[bytes, bytes]) -> None:
        if event_key is not None:
            with disk_errors():
                self._seen_ids.execute("INSERT INTO seen_ids VALUES (?, ?, ?)", (event_key, *content))

    def _update_balance(self, line: SortedLine) -> None:
        """Update the account's balance, as far as the file determines it.

        Within a millisecond the ledger orders events without a balance by event_id, not as they are sent.
        """
        event = _event_of(line.update)
        if line.account != self._account:
            self._account, self._balance, self._updated_at_ms = line.account, 0, 0
        if event.updated_at_ms != self._updated_at_ms:
            self._updated_at_ms, self._balances_in_millisecond = event.updated_at_ms, RunningBalances(self._balance, ())
        if event.balance is not None:
            self._balance = event.balance
        elif self._balances_in_millisecond.covers(event):
            self._balances_in_millisecond.add(event)
            self._balance += event.delta
        else:
            self._short += 1
            self._first_short = min(self._first_short or line.number, line.number)


def _event_of(update: points_pb2.PointsUpdate) -> Event:
    increases = update.update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE
    return Event(
        event_id=update.event_id,
        account_key=AccountKey(update.store_id, update.buyer_id),
        update_type=UpdateType.INCREASE if increases else UpdateType.DECREASE,
        scene="",
        value=update.updated_value,
        balance=update.points_balance if update.HasField("points_balance") else None,
        expires_at_ms=None,
        updated_at_ms=update.updated_at.ToMilliseconds(),
    )
