"""Erasing stores from an operator's side: a gRPC client that lists the requests and erases a store part by part."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime

import grpc
import typer
from rich.console import Console
from rich.progress import Progress

from pointbook.v1 import programs_pb2, programs_pb2_grpc
from pointbook_cli.health import local_address
from pointbook_cli.quarantine import explain, printable
from shopline_shim.grpc_channel import open_channel
from shopline_shim.settings import ShimSettings

CALL_TIMEOUT_SECONDS = 60.0
PAGE_SIZE = 500


class Stores:
    """The stores of a server."""

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._programs = programs_pb2_grpc.ProgramsServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def erasures(self, merchant_id: str) -> Iterator[programs_pb2.StoreErasure]:
        """List requests to erase stores through all pages, of a merchant or of all, the open ones first."""
        request = programs_pb2.ListStoreErasuresRequest(merchant_id=merchant_id, page_size=PAGE_SIZE)
        while True:
            page = self._programs.ListStoreErasures(request, timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata)
            yield from page.erasures
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def release(self, merchant_id: str, store_id: str, reason: str) -> None:
        """Release a store of a merchant."""
        request = programs_pb2.ReleaseStoreRequest(merchant_id=merchant_id, store_id=store_id, reason=reason)
        self._programs.ReleaseStore(request, timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata)

    def erase(self, merchant_id: str, store_id: str, reason: str) -> Iterator[programs_pb2.EraseStoreResponse]:
        """Erase a store part by part until nothing remains."""
        request = programs_pb2.EraseStoreRequest(merchant_id=merchant_id, store_id=store_id, reason=reason)
        while True:
            part = self._programs.EraseStore(request, timeout=CALL_TIMEOUT_SECONDS, metadata=self._metadata)
            yield part
            if not part.remaining:
                return


@contextlib.contextmanager
def opened(settings: ShimSettings) -> Iterator[Stores]:
    """Open the stores of the server that the settings name. Raises OSError with the server's error."""
    with open_channel(settings, local_address(settings.grpc_address)) as channel:
        try:
            yield Stores(channel, settings.token.get_secret_value())
        except grpc.RpcError as error:
            raise OSError(explain(error)) from error


def erase_all(stores: Stores, merchant_id: str, store_id: str, reason: str) -> None:
    """Erase a store with a progress bar on a terminal, and print what was done."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    erased = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Erasing", total=None)
        for part in stores.erase(merchant_id, store_id, reason):
            erased += part.erased
            progress.update(bar, completed=erased, total=erased + part.remaining)
    typer.echo(f"Store {store_id} is erased; buyers that lost personal data: {erased:,}.")


def line_of(erasure: programs_pb2.StoreErasure, now: datetime) -> str:
    """Return a request as one line of a list."""
    if erasure.HasField("close_time"):
        state = f"CLOSED {erasure.close_time.ToJsonString()}"
    else:
        overdue = erasure.due_time.ToDatetime(tzinfo=UTC) <= now
        state = f"{'OVERDUE since' if overdue else 'OPEN until'} {erasure.due_time.ToJsonString()}"
    requested = f"requested {erasure.request_time.ToJsonString()}"
    return printable(f"{erasure.merchant_id}  {erasure.store_id}  {state}  {requested}  {erasure.reason}".rstrip())
