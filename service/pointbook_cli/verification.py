"""`pointbook verify`: the accounts of a database, folded again and compared."""

import asyncio
import contextlib
from collections.abc import Iterator

import typer

from pointbook_cli.exit_codes import EXIT_PROBLEMS, EXIT_STOPPED
from pointbook_cli.progress import Meter
from pointbook_cli.services.database_checks import check_migrated
from pointbook_cli.terminal import count_of
from pointbook_server.clock import system_clock
from pointbook_server.db.database import Database
from pointbook_server.ledger.verification import Mismatch
from pointbook_server.ledger.verifier import LedgerVerifier, MerchantAccountKey, VerificationScope, VerificationSize
from pointbook_server.redemption.verifier import RedemptionMismatch, RedemptionVerifier


class VerificationReport:
    """The counts of a verification, and the first differences that it found."""

    def __init__(self, limit: int) -> None:
        self.differences = 0
        self._limit = limit
        self._lines: list[str] = []
        self._accounts = self._entries = 0
        self._meters = contextlib.ExitStack()
        self._meter: Meter | None = None

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show progress while the context is open, once the total is known."""
        with self._meters:
            yield

    def on_start(self, total: VerificationSize) -> None:
        """Start the progress bar with the number of accounts and entries to verify."""
        self._meter = self._meters.enter_context(Meter(total.accounts + total.entries, self.summary))

    def on_progress(self, done: VerificationSize) -> None:
        """Count verified accounts and entries."""
        self._accounts += done.accounts
        self._entries += done.entries
        if self._meter is not None:
            self._meter.advance(done.accounts + done.entries)

    def on_mismatch(self, account: MerchantAccountKey, mismatch: Mismatch) -> None:
        """Add a difference of an account."""
        name = f"merchant {account.merchant_id}, store {account.key.store_id}, buyer {account.key.buyer_id}"
        self._add(f"{name}: {mismatch.name}: stored {mismatch.stored}, folded {mismatch.folded}")

    def on_redemption_mismatch(self, mismatch: RedemptionMismatch) -> None:
        """Add a difference of a redemption."""
        self._add(f"merchant {mismatch.merchant_id}, redemption {mismatch.redemption_id}: {mismatch.text}")

    def _add(self, line: str) -> None:
        self.differences += 1
        if len(self._lines) < self._limit:
            self._lines.append(line)

    def summary(self) -> str:
        """Return the counts as text."""
        accounts = count_of(self._accounts, "account", "accounts")
        entries = count_of(self._entries, "entry", "entries")
        return f"{accounts}, {entries}: {count_of(self.differences, 'difference', 'differences')}"

    def print(self) -> None:
        """Print the differences and the counts."""
        for line in self._lines:
            typer.echo(line)
        if self.differences > len(self._lines):
            more = count_of(self.differences - len(self._lines), "more difference", "more differences")
            typer.echo(f"and {more}; --limit shows more")
        typer.echo(f"{self.summary()}.")


async def run_verify(database_url: str, scope: VerificationScope, limit: int, stop: asyncio.Event) -> int:
    """Verify accounts, print differences, and return the exit code.

    Raises DATABASE_UNAVAILABLE.
    """
    await check_migrated(database_url)
    report = VerificationReport(limit)
    database = Database(database_url, pool_size=1)
    try:
        with report.progress():
            verifying = asyncio.create_task(_verify(database, scope, report))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({verifying, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            verifying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await verifying
    finally:
        await database.dispose()
    if stop.is_set():
        typer.echo("Stopped before the end.")
    report.print()
    if stop.is_set():
        return EXIT_STOPPED
    return EXIT_PROBLEMS if report.differences else 0


async def _verify(database: Database, scope: VerificationScope, report: VerificationReport) -> None:
    await LedgerVerifier(database).run(scope, report)
    ids = (scope.merchant_id, scope.store_id, scope.buyer_id)
    await RedemptionVerifier(database).run(*ids, system_clock(), report.on_redemption_mismatch)
