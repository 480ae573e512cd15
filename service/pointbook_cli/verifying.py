"""`pointbook verify`: the book of a database, folded again and compared with itself and with the redemptions."""

import asyncio
import contextlib
from collections.abc import Iterator

import typer

from pointbook_cli.database_checks import check_migrated
from pointbook_cli.progress import Meter, counted
from pointbook_server.clock import system_clock
from pointbook_server.db.database import Database
from pointbook_server.ledger.verification import Mismatch
from pointbook_server.ledger.verifier import LedgerVerifier, MerchantAccountKey, VerificationScope, VerificationSize
from pointbook_server.redemption.verifier import RedemptionMismatch, RedemptionVerifier

EXIT_DIFFERENT = 1
EXIT_STOPPED = 130


class Findings:
    """Counts what was verified, and keeps the first differences."""

    def __init__(self, limit: int) -> None:
        self.differences = 0
        self._limit = limit
        self._shown: list[str] = []
        self._accounts = self._entries = 0
        self._meters = contextlib.ExitStack()
        self._meter: Meter | None = None

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Show progress, once it is known how much there is."""
        with self._meters:
            yield

    def on_start(self, total: VerificationSize) -> None:
        """Hear how much there is to verify."""
        self._meter = self._meters.enter_context(Meter(total.accounts + total.entries, self.told))

    def on_progress(self, done: VerificationSize) -> None:
        """Count what has been verified."""
        self._accounts += done.accounts
        self._entries += done.entries
        if self._meter is not None:
            self._meter.advance(done.accounts + done.entries)

    def on_mismatch(self, account: MerchantAccountKey, mismatch: Mismatch) -> None:
        """Count what is different of an account."""
        name = f"merchant {account.merchant_id}, store {account.key.store_id}, buyer {account.key.buyer_id}"
        self._keep(f"{name}: {mismatch.what}: stored {mismatch.stored}, folded {mismatch.folded}")

    def tell_redemption(self, difference: RedemptionMismatch) -> None:
        """Count what is different of a redemption."""
        self._keep(f"merchant {difference.merchant_id}, redemption {difference.redemption_id}: {difference.text}")

    def _keep(self, line: str) -> None:
        """Count a difference, and keep it where there are few."""
        self.differences += 1
        if len(self._shown) < self._limit:
            self._shown.append(line)

    def told(self) -> str:
        """Tell the counts."""
        accounts = counted(self._accounts, "account", "accounts")
        entries = counted(self._entries, "entry", "entries")
        return f"{accounts}, {entries}: {counted(self.differences, 'difference', 'differences')}"

    def print(self) -> None:
        """Print the differences and the counts."""
        for line in self._shown:
            typer.echo(line)
        if self.differences > len(self._shown):
            more = counted(self.differences - len(self._shown), "more difference", "more differences")
            typer.echo(f"and {more}; --limit shows more")
        typer.echo(f"{self.told()}.")


async def _verify(database: Database, wanted: VerificationScope, findings: Findings) -> None:
    await LedgerVerifier(database).run(wanted, findings)
    ids = (wanted.merchant_id, wanted.store_id, wanted.buyer_id)
    await RedemptionVerifier(database).run(*ids, system_clock(), findings.tell_redemption)


async def run_verify(database_url: str, wanted: VerificationScope, limit: int, stop: asyncio.Event) -> int:
    """Verify accounts, print what is different, and answer the exit code. Raises DATABASE_UNAVAILABLE."""
    await check_migrated(database_url)
    findings = Findings(limit)
    database = Database(database_url, pool_size=1)
    try:
        with findings.telling():
            verifying = asyncio.create_task(_verify(database, wanted, findings))
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
    findings.print()
    if stop.is_set():
        return EXIT_STOPPED
    return EXIT_DIFFERENT if findings.differences else 0
