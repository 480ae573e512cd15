"""`pointbook dev`: the whole system in one process, on the embedded database."""

import asyncio
import contextlib
import os
import secrets
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
import typer
from google.protobuf.json_format import ParseDict
from pydantic import SecretStr

from pointbook.v1 import programs_pb2
from pointbook_cli.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError
from pointbook_cli.sample_webhook import DEV_SECRET
from pointbook_cli.services.listen_addresses import check_unused
from pointbook_client import connect
from pointbook_common.addresses import is_loopback
from pointbook_common.tracing import build_tracing
from pointbook_server.db.migrations import migrate
from pointbook_server.delivery.console import ConsoleSender
from pointbook_server.delivery.sender import Sender
from pointbook_server.delivery.senders import build_senders
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from pointbook_server.settings import KEY_BYTES, ServerSettings
from shopline_shim.server import ShimServer
from shopline_shim.settings import ShimSettings

MERCHANT_ID = "2000001234"
STORE_ID = "1718263946864"
DATABASE_RESTART_SECONDS = 2.0
DATABASE_FOLDER = "postgres"
KEY_FILES = {"code_keys": "code.key", "quarantine_keys": "quarantine.key"}
"""The files in the data folder with generated keys, by the settings that they replace."""
PROGRAM = {
    "merchant_id": MERCHANT_ID,
    "program_id": 1,
    "display_name": "Sample program",
    "store_ids": [STORE_ID],
    "redemption_enabled": True,
    "criteria": {"multiples_of": 10, "max_points_per_redemption": 200},
    "point_value": "0.01",
    "currency_code": "USD",
}

log = structlog.get_logger()


async def run_dev(
    settings: ServerSettings, shim_settings: ShimSettings, stop: asyncio.Event, *, reset: bool = False
) -> None:
    """Run everything until the stop event; with `reset`, erase the database first."""
    try:
        await _run(settings, shim_settings, stop, reset=reset)
    except EmbeddedPostgresError:
        # Ctrl-C also ends a database program that has just started and is not in its own session yet.
        if not stop.is_set():
            raise


async def _run(settings: ServerSettings, shim_settings: ShimSettings, stop: asyncio.Event, *, reset: bool) -> None:
    began = time.monotonic()
    _check_addresses(POINTBOOK_GRPC_ADDRESS=settings.grpc_address, POINTBOOK_HTTP_ADDRESS=shim_settings.http_address)
    if reset:
        await _reset(settings)
    console = ConsoleSender()
    senders: dict[Channel, Sender] = {Channel.SMS: console, Channel.EMAIL: console, **build_senders(settings)}
    async with contextlib.AsyncExitStack() as stack:
        database_url = await stack.enter_async_context(_database(settings))
        await migrate(database_url, offline=True)
        settings = settings.model_copy(update={**_generated_keys(settings), "tls_cert_file": None})
        tracing = build_tracing("server") if settings.tracing else None
        server = Server(settings, database_url, senders=senders, development=True, tracing=tracing)
        stack.push_async_callback(server.stop)
        await server.start()
        grpc_address = f"{settings.grpc_address.rpartition(':')[0]}:{server.port}"
        await _create_sample(grpc_address)

        changes: dict[str, object] = {
            "grpc_address": grpc_address,
            "server_ca_file": None,
            "http_tls_cert_file": None,
        }
        if not shim_settings.shopline_secrets:
            changes["shopline_secrets"] = (SecretStr(DEV_SECRET),)
        if not shim_settings.missed_call_secrets:
            changes["missed_call_secrets"] = (SecretStr(DEV_SECRET),)
        if not shim_settings.shim_metrics_address:
            changes["shim_metrics_address"] = shim_settings.http_address
        shim = ShimServer(shim_settings.model_copy(update=changes))
        await _serve_shim(stack, shim)
        _print_welcome(
            grpc_address=grpc_address,
            http_address=shim.address,
            app_secret="the app secret is dev-secret" if "shopline_secrets" in changes else "with your app secrets",
            call_secret="the secret is dev-secret" if "missed_call_secrets" in changes else "with your secrets",
            database="POINTBOOK_DATABASE_URL" if settings.database_url else f"embedded, {database_url}",
            seconds=time.monotonic() - began,
        )
        await stop.wait()
        log.info("stopping")


def _check_addresses(**addresses: str) -> None:
    """Raise OSError that names every address beyond loopback and every address in use."""
    problems = []
    for name, address in addresses.items():
        if not is_loopback(address):
            problems.append(f"{name}: `pointbook dev` has no tokens and serves only loopback addresses")
            continue
        try:
            check_unused(name, address)
        except OSError as error:
            problems.append(str(error))
    if problems:
        raise OSError("; ".join(problems))


async def _serve_shim(stack: contextlib.AsyncExitStack, shim: ShimServer) -> None:
    """Run the shim until the stack unwinds."""
    ready, stop = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(shim.serve(stop=stop, ready=ready))

    async def stop_shim() -> None:
        stop.set()
        await serving

    stack.push_async_callback(stop_shim)
    started = asyncio.create_task(ready.wait())
    await asyncio.wait([serving, started], return_when=asyncio.FIRST_COMPLETED)
    started.cancel()
    if serving.done():
        await serving


async def _reset(settings: ServerSettings) -> None:
    """Delete the embedded database and its keys; other files of the data folder stay."""
    if settings.database_url is not None:
        raise OSError("--reset: POINTBOOK_DATABASE_URL names a database that `pointbook dev` must not erase; unset it")
    _make_data_folder(settings.data_dir)
    await EmbeddedPostgres(settings.data_dir / DATABASE_FOLDER).erase()
    for file in KEY_FILES.values():
        (settings.data_dir / file).unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _database(settings: ServerSettings) -> AsyncIterator[str]:
    """Yield the URL of the database in the settings, or of the embedded one.

    The embedded database is restarted when it ends.
    """
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    _make_data_folder(settings.data_dir)
    postgres = EmbeddedPostgres(settings.data_dir / DATABASE_FOLDER)
    await postgres.start()
    watch = asyncio.create_task(_keep_running(postgres))
    try:
        yield postgres.url()
    finally:
        watch.cancel()
        await asyncio.wait([watch])
        await postgres.stop()


async def _keep_running(postgres: EmbeddedPostgres) -> None:
    """Restart the database whenever it ends."""
    while True:
        log.error("the embedded database ended, restarting it", exit_code=await postgres.wait())
        while not await _restart(postgres):
            log.error("the embedded database did not start, retrying")


async def _restart(postgres: EmbeddedPostgres) -> bool:
    await asyncio.sleep(DATABASE_RESTART_SECONDS)
    try:
        await postgres.start()
    except EmbeddedPostgresError as error:
        log.warning("start failed", error=str(error))
        return False
    return True


def _make_data_folder(folder: Path) -> None:
    """Create the data folder.

    An existing one may hold other files and keeps its mode; our files are private.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _generated_keys(settings: ServerSettings) -> dict[str, dict[str, SecretStr]]:
    """Return generated keys for settings without keys.

    They are stored, so that a restart can read existing data.
    """
    return {
        name: {"dev": _read_or_create_key(settings.data_dir, file)}
        for name, file in KEY_FILES.items()
        if not getattr(settings, name)
    }


def _read_or_create_key(folder: Path, file: str) -> SecretStr:
    """Read a key file, created at the first start."""
    _make_data_folder(folder)
    path = folder / file
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(b64encode(secrets.token_bytes(KEY_BYTES)))
    return SecretStr(path.read_text())


async def _create_sample(grpc_address: str) -> None:
    """Create the sample store and program unless the program exists.

    A developer's changes stay.
    """
    async with connect(grpc_address, tls=False) as client:
        programs = client.programs
        listed = await programs.ListPrograms(programs_pb2.ListProgramsRequest(merchant_id=MERCHANT_ID))
        if any(program.program_id == PROGRAM["program_id"] for program in listed.programs):
            return
        store = programs_pb2.Store(
            merchant_id=MERCHANT_ID,
            store_id=STORE_ID,
            shop_domain="example.myshopline.com",
            display_name="Sample store",
        )
        await programs.PutStore(programs_pb2.PutStoreRequest(store=store))
        program = ParseDict(PROGRAM, programs_pb2.Program())
        await programs.PutProgram(programs_pb2.PutProgramRequest(program=program))


def _print_welcome(
    *, grpc_address: str, http_address: str, app_secret: str, call_secret: str, database: str, seconds: float
) -> None:
    """Print the addresses, and commands to paste next.

    Their buyer is new, so that they work at every start.
    """
    buyer_id = str(int(time.time()))
    account = f'{{"merchant_id":"{MERCHANT_ID}","store_id":"{STORE_ID}","buyer_id":"{buyer_id}"}}'
    buyer = f'{{"merchant_id":"{MERCHANT_ID}","buyer":{{"store_id":"{STORE_ID}","buyer_id":"{buyer_id}"}}}}'
    redemption = f'{{"customer":{buyer},"program_id":1,"points":20}}'
    pointbook = os.path.relpath(Path(sys.executable).parent / "pointbook")
    typer.echo(f"""
Pointbook is ready after {seconds:.1f} s. Ctrl-C stops it.

  gRPC      {grpc_address}  (plaintext, no tokens, reflection on)
  webhooks  http://{http_address}/webhooks/shopline  ({app_secret})
  calls     http://{http_address}/callbacks/missed-call  ({call_secret})
  probes    http://{http_address}/healthz  http://{http_address}/readyz  http://{http_address}/metrics
  database  {database}
  sample    merchant {MERCHANT_ID}, store {STORE_ID}, program 1: multiples of 10, at most 200 at a time

Paste next, in another terminal:

  {pointbook} webhook send --buyer {buyer_id} --url http://{http_address}/webhooks/shopline
  grpcurl -plaintext -d '{account}' {grpc_address} pointbook.v1.PointsService/GetPointsAccount
  grpcurl -plaintext -d '{redemption}' {grpc_address} pointbook.v1.RedemptionService/ValidateRedemption
  grpcurl -plaintext {grpc_address} list
""")
