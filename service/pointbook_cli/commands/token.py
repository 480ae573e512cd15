"""`pointbook token`: create, list, rotate and revoke bearer tokens."""

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer

from pointbook_cli.command_line import fail, load_server_settings
from pointbook_cli.commands.options import TOKEN_ID_HELP
from pointbook_common.durations import DAY_MS

DAYS_MAX = 36_500
TOKEN_NAME = re.compile(r"[!-~]{1,64}")
CLIENT_NAME = re.compile(r"[ -~]{1,255}")

app = typer.Typer(help="Create, list, rotate and revoke the bearer tokens of callers.", no_args_is_help=True)
T = TypeVar("T")


@app.command("create")
def create_token(
    name: Annotated[str, typer.Option(help="The name of the token's user, for the list.")],
    merchant: Annotated[
        list[str], typer.Option(help="A merchant that the token may access, or * for all; repeatable.")
    ],
    scope: Annotated[list[str], typer.Option(help="A scope of the token, such as points.write; repeatable.")],
    days: Annotated[
        int | None, typer.Option(min=1, max=DAYS_MAX, help="The days until the token expires; by default, it does not.")
    ] = None,
    client_name: Annotated[
        list[str] | None,
        typer.Option(help="Bind the token to a client certificate with this common or alternative name; repeatable."),
    ] = None,
) -> None:
    """Create a token and print it.

    Only its hash is stored, so it cannot be printed again.
    """
    from pointbook_server.access.model import Scope
    from pointbook_server.access.rules import new_token
    from pointbook_server.clock import system_clock

    unknown = set(scope) - set(Scope)
    if unknown:
        fail(f"no such scope: {', '.join(sorted(unknown))}; the scopes are {', '.join(Scope)}")
    for text in (name, *merchant):
        if not TOKEN_NAME.fullmatch(text):
            fail("names and merchants must be 1 to 64 visible ASCII characters without spaces")
    client_names = client_name or []
    if not all(CLIENT_NAME.fullmatch(text) for text in client_names):
        fail("client names must be 1 to 255 printable ASCII characters")
    now_ms = system_clock()
    expires_at_ms = None if days is None else now_ms + days * DAY_MS
    scopes = [Scope(item) for item in scope]
    token, bearer = new_token(name, merchant, scopes, now_ms, expires_at_ms, client_names=client_names)
    _run_with_tokens(lambda tokens: tokens.create(token))
    typer.echo(bearer)


@app.command("list")
def list_tokens(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, with RFC 3339 times.")] = False,
) -> None:
    """List all tokens with the time of their last use, without their secrets."""
    from pointbook_cli.token_text import print_table, to_json

    stored = _run_with_tokens(lambda tokens: tokens.read_all())
    if as_json:
        typer.echo(to_json(stored))
    else:
        print_table(stored)


@app.command("rotate")
def rotate_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help=TOKEN_ID_HELP)],
    overlap: Annotated[
        str, typer.Option(help="How long the old token stays valid: 0, or a number with s, m, h or d.")
    ] = "24h",
) -> None:
    """Replace a token: print a new one, and expire the old one after the overlap."""
    from pointbook_cli.token_text import format_time, parse_duration_ms
    from pointbook_server.access.transactions import NotRotatableError
    from pointbook_server.clock import system_clock

    overlap_ms = parse_duration_ms(overlap)
    if overlap_ms is None:
        fail("--overlap must be 0, or a number with s, m, h or d, such as 24h, of at most 3,650 days")
    try:
        old, _, bearer = _run_with_tokens(lambda tokens: tokens.rotate(token_id, system_clock(), overlap_ms))
    except NotRotatableError as error:
        fail(f"token {token_id} {error}")
    typer.echo(bearer)
    typer.echo(f"Token {token_id} expires at {format_time(old.expires_at_ms)}.", err=True)


@app.command("revoke")
def revoke_token(token_id: Annotated[str, typer.Argument(help=TOKEN_ID_HELP)]) -> None:
    """Revoke a token: all servers reject it within two seconds."""
    from pointbook_server.clock import system_clock

    if not _run_with_tokens(lambda tokens: tokens.revoke(token_id, system_clock())):
        fail(f"there is no token {token_id} to revoke")
    typer.echo(f"Token {token_id} is revoked.")


def _run_with_tokens(use: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    """Run a function on the tokens of the database in the settings."""
    # First: wrong settings end the command, which then need not wait for the imports.
    _, url = load_server_settings()

    import asyncio

    from pointbook_cli.services.database_checks import check_migrated
    from pointbook_server.access.transactions import TokenTransactions
    from pointbook_server.db.database import Database

    async def run() -> T:
        await check_migrated(url)
        database = Database(url, pool_size=1)
        try:
            return await use(TokenTransactions(database))
        finally:
            await database.dispose()

    return asyncio.run(run())
