"""`pointbook store`: list erasure requests, erase stores, and release stores."""

from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from pointbook_cli.command_line import load_client_settings
from pointbook_cli.commands.options import REASON_HELP, ServerOption

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The store's id.")]

app = typer.Typer(help="Erase and release stores, and list erasure requests.", no_args_is_help=True)


@app.command("erasures")
def list_store_erasures(
    merchant: Annotated[str, typer.Option(help="The merchant of the stores; by default, all merchants.")] = "",
    server: ServerOption = "",
) -> None:
    """List requests to erase stores, one per line.

    Open ones come first, those with the earliest due time before others.
    """
    from pointbook_cli.store_client import format_erasure

    now = datetime.now(UTC)
    with _open_stores(server) as stores:
        for erasure in stores.erasures(merchant):
            typer.echo(format_erasure(erasure, now))


@app.command("erase")
def erase_store(
    store_id: StoreArgument,
    merchant: Annotated[str, typer.Option(help="The store's merchant.")],
    reason: Annotated[str, typer.Option(help=REASON_HELP)],
    server: ServerOption = "",
) -> None:
    """Erase the personal data of a store's customers permanently.

    After an interruption, run it again to continue.
    """
    from pointbook_cli.store_client import erase_all

    with _open_stores(server) as stores:
        erase_all(stores, merchant, store_id, reason)


@app.command("release")
def release_store(
    store_id: StoreArgument,
    merchant: Annotated[str, typer.Option(help="The merchant that has registered the store.")],
    reason: Annotated[str, typer.Option(help=REASON_HELP)],
    server: ServerOption = "",
) -> None:
    """Release a store without data, so that another merchant can register it."""
    with _open_stores(server) as stores:
        stores.release(merchant, store_id, reason)
    typer.echo(f"Store {store_id} is released.")


def _open_stores(server: str) -> AbstractContextManager[Any]:
    from pointbook_cli.store_client import open_stores

    return open_stores(load_client_settings(server))
