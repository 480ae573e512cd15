"""The check of a database's ledger and redemptions."""

from support.processes import pointbook


async def run_verify(database_url: str, merchant_id: str) -> None:
    """Run `pointbook verify` for a merchant. It must find no difference."""
    verified = await pointbook("verify", "--merchant", merchant_id, DATABASE_URL=database_url)
    assert verified.exit_code == 0, verified.out + verified.err
