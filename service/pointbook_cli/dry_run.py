"""Check a file without a server: how its own lines repeat, contradict and depend on each other."""

from pointbook.v1 import points_pb2
from pointbook_cli.points_file import Refused
from pointbook_cli.progress import counted
from pointbook_cli.sorted_lines import SortedLine, disk_errors, open_private_database
from pointbook_server.ledger.model import AccountKey, Event, UpdateType
from pointbook_server.ledger.running_balances import RunningBalances

REOPENED = "Another line of the file opens this account at the same time with another balance; keep one of them."
REUSED = "Another line of the file has this event_id with other content; give every event an id of its own."


class DryRun:
    """Judges sorted lines one after the other as the server does, and refuses only what the server certainly refuses.

    Raises OSError where the disk is full.
    """

    def __init__(self, *, opening_balances: bool = False) -> None:
        self._reused = REOPENED if opening_balances else REUSED
        self._repeated = 0
        self._short = 0
        self._first_short = 0
        self._account = b""
        self._balance = 0
        self._updated_at_ms = 0
        self._millisecond = RunningBalances(0, ())
        self._content: tuple[bytes, bytes] | None = None
        self._claims = open_private_database()
        self._claims.execute("CREATE TABLE claims (name BLOB PRIMARY KEY, account BLOB, place BLOB) WITHOUT ROWID")

    def close(self) -> None:
        """Delete everything."""
        self._claims.close()

    def judge(self, line: SortedLine) -> Refused | None:
        """Return why a line is refused; None where only the server can say more."""
        content = (line.account, line.place)
        claimed = self._claimed(line.repeated_name)
        if claimed not in {None, content}:
            return Refused(line.number, line.update.event_id, "EVENT_ID_REUSED", self._reused)
        if claimed is not None or (line.update.HasField("points_balance") and content == self._content):
            self._repeated += 1
            return None
        self._claim(line.repeated_name, content)
        self._content = content
        self._move(line)
        return None

    def notes(self) -> list[str]:
        """Return what an operator should know about the lines besides the refusals."""
        notes = []
        if self._repeated:
            lines = counted(self._repeated, "line repeats", "lines repeat")
            notes.append(f"{lines} another line of the file: each event counts once")
        if self._short:
            lines = counted(self._short, "line takes", "lines take")
            notes.append(
                f"{lines} more points than the file gives the account up to that time (the first is line "
                f"{self._first_short}): refused unless the account already holds enough"
            )
        return notes

    def _claimed(self, name: bytes | None) -> tuple[bytes, bytes] | None:
        """Return the content that has an event_id; None where no line before had it."""
        if name is None:
            return None
        with disk_errors():
            row: tuple[bytes, bytes] | None = self._claims.execute(
                "SELECT account, place FROM claims WHERE name = ?", (name,)
            ).fetchone()
        return row

    def _claim(self, name: bytes | None, content: tuple[bytes, bytes]) -> None:
        if name is not None:
            with disk_errors():
                self._claims.execute("INSERT INTO claims VALUES (?, ?, ?)", (name, *content))

    def _move(self, line: SortedLine) -> None:
        """Move the balance that the account has by the file alone.

        Inside a millisecond the ledger orders events without a balance by their event_ids, not as they are sent.
        """
        event = _event_of(line.update)
        if line.account != self._account:
            self._account, self._balance, self._updated_at_ms = line.account, 0, 0
        if event.updated_at_ms != self._updated_at_ms:
            self._updated_at_ms, self._millisecond = event.updated_at_ms, RunningBalances(self._balance, ())
        if event.balance is not None:
            self._balance = event.balance
        elif self._millisecond.covers(event):
            self._millisecond.add(event)
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
