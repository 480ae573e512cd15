"""A gRPC client of stores.

It lists erasure requests, erases stores and releases them.
"""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime

import typer
from rich.progress import Progress

from pointbook.v1 import programs_pb2
from pointbook_cli.server_access import open_client
from pointbook_cli.terminal import escape_unprintable, plain_console
from pointbook_client.sync import PointbookClient
from shopline_shim.settings import ShimSettings

CALL_TIMEOUT_SECONDS = 60.0
PAGE_SIZE = 500


class StoreClient:
    """A client for the stores of a server."""

    def __init__(self, client: PointbookClient) -> None:
        self._client = client

    def erasures(self, merchant_id: str) -> Iterator[programs_pb2.StoreErasure]:
        """List the erasure requests of a merchant or of all, open ones first."""
        request = programs_pb2.ListStoreErasuresRequest(merchant_id=merchant_id, page_size=PAGE_SIZE)
        for page in self._client.pages(self._client.programs.ListStoreErasures, request):
            yield from page.erasures

    def release(self, merchant_id: str, store_id: str, reason: str) -> None:
        """Release a merchant's store."""
        request = programs_pb2.ReleaseStoreRequest(merchant_id=merchant_id, store_id=store_id, reason=reason)
        self._client.programs.ReleaseStore(request)

    def erase(self, merchant_id: str, store_id: str, reason: str) -> Iterator[programs_pb2.EraseStoreResponse]:
        """Erase a store in parts until nothing remains."""
        request = programs_pb2.EraseStoreRequest(merchant_id=merchant_id, store_id=store_id, reason=reason)
        while True:
            part = self._client.programs.EraseStore(request)
            yield part
            if not part.remaining:
                return


@contextlib.contextmanager
def open_stores(settings: ShimSettings) -> Iterator[StoreClient]:
    """Open the stores of the server in the settings.

    Raises OSError with the server's error.
    """
    with open_client(settings, timeout_seconds=CALL_TIMEOUT_SECONDS) as client:
        yield StoreClient(client)


def erase_all(stores: StoreClient, merchant_id: str, store_id: str, reason: str) -> None:
    """Erase a store with a progress bar on a terminal, and print a summary."""
    console = plain_console()
    erased = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Erasing", total=None)
        for part in stores.erase(merchant_id, store_id, reason):
            erased += part.erased
            progress.update(bar, completed=erased, total=erased + part.remaining)
    typer.echo(f"Store {store_id} is erased; buyers that lost personal data: {erased:,}.")


def format_erasure(erasure: programs_pb2.StoreErasure, now: datetime) -> str:
    """Return an erasure request as one line of a list."""
    if erasure.HasField("close_time"):
        state = f"CLOSED {erasure.close_time.ToJsonString()}"
    else:
        overdue = erasure.due_time.ToDatetime(tzinfo=UTC) <= now
        state = f"{'OVERDUE since' if overdue else 'OPEN until'} {erasure.due_time.ToJsonString()}"
    requested = f"requested {erasure.request_time.ToJsonString()}"
    return escape_unprintable(
        f"{erasure.merchant_id}  {erasure.store_id}  {state}  {requested}  {erasure.reason}".rstrip()
    )
