"""The `pointbook` command. Each command imports what it needs when it runs, so that none waits for the others."""

import asyncio
import gc
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar
from zoneinfo import ZoneInfo

import typer
from pydantic_settings import BaseSettings

from pointbook_common.durations import DAY_MS

EXIT_USAGE = 2
TOKEN_DAYS_MAX = 36_500
TOKEN_NAME = re.compile(r"[!-~]{1,64}")
CLIENT_NAME = re.compile(r"[ -~]{1,255}")
BENEFITS_LEVEL = re.compile(r"[!-~]{1,58}")
"""With `:` and a number up to 1,000 behind it, it is the id of a benefit."""
GARBAGE_THRESHOLD = 20_000
"""How many more objects than before there must be until a service looks for garbage."""

app = typer.Typer(
    help="Pointbook: the points book of a shop group.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
token_app = typer.Typer(help="Make, list, rotate and revoke the bearer tokens of callers.", no_args_is_help=True)
webhook_app = typer.Typer(help="Try a shim.", no_args_is_help=True)
quarantine_app = typer.Typer(help="Deal with the webhooks that could not be applied.", no_args_is_help=True)
store_app = typer.Typer(help="Erase and release stores, and list the requests to erase.", no_args_is_help=True)
benefits_app = typer.Typer(help="Bring a merchant's benefits over from SHOPLINE.", no_args_is_help=True)
customer_app = typer.Typer(help="See what happened to a customer.", no_args_is_help=True)
app.add_typer(token_app, name="token")
app.add_typer(customer_app, name="customer")
app.add_typer(webhook_app, name="webhook")
app.add_typer(quarantine_app, name="quarantine")
app.add_typer(store_app, name="store")
app.add_typer(benefits_app, name="benefits")

ServerOption = Annotated[str, typer.Option("--server", help="The gRPC server; POINTBOOK_GRPC_ADDRESS by default.")]
MerchantOption = Annotated[
    str, typer.Option("--merchant", help="Whose quarantine; left out, that of the webhooks that name no merchant.")
]
S = TypeVar("S", bound=BaseSettings)
T = TypeVar("T")


def run() -> None:
    """Run the command line; what an operator can mend is one line on standard error."""
    _open_standard_streams()
    # gRPC would write lines of its own for each handshake that a stranger breaks off, and for each wrong header.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from pointbook_cli.embedded_postgres import EmbeddedPostgresError
    from pointbook_common.errors import SettingError
    from pointbook_server.errors import DatabaseDefectError, PointbookError

    try:
        app()
    except DatabaseDefectError as error:
        fail(f"the database refuses: {error}")
    except PointbookError as error:
        fail(f"{error} ({error.__cause__})" if error.__cause__ else str(error))
    except (EmbeddedPostgresError, SettingError, OSError) as error:
        fail(str(error))


def _open_standard_streams() -> None:
    """Open the standard streams that were closed: a socket would get their numbers, at which libuv aborts."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it takes no keyword


def fail(message: str) -> NoReturn:
    """End the command with one clear line."""
    typer.echo(f"pointbook: {message}", err=True)
    raise SystemExit(EXIT_USAGE)


def load_settings(settings_class: type[S], *required: str, **overrides: Any) -> S:
    """Read settings, or end the command with one line that names every wrong, missing or unknown one."""
    check_settings(settings_class, required=required, overrides=overrides)
    return settings_class(**overrides)


def check_settings(
    *classes: type[BaseSettings], required: tuple[str, ...] = (), overrides: dict[str, Any] | None = None
) -> None:
    """End the command with one line where settings are wrong."""
    from pointbook_cli.settings import settings_problems

    problems = settings_problems(classes, os.environ, required=required, overrides=overrides or {})
    if problems:
        fail("wrong settings: " + "; ".join(problems))


def run_until_stopped(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run a service, or a long command, until its end or until SIGINT or SIGTERM sets its stop event."""
    import uvloop

    from pointbook_common.open_files import raise_open_files

    async def guarded() -> T:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        return await main(stop)

    raise_open_files()
    # What was imported stays until the end, and what a call leaves behind is little: to look for garbage among all of
    # it after every other call, as Python does by itself, would take a tenth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, 20, 20)
    return uvloop.run(guarded())


def load_server_settings(**overrides: Any) -> tuple[Any, str]:
    """Read the server's settings, and return them with the URL of the database that they must name."""
    from pointbook_server.settings import ServerSettings

    settings = load_settings(ServerSettings, "database_url", **overrides)
    assert settings.database_url is not None  # noqa: S101 - it is required
    return settings, settings.database_url.get_secret_value()


@app.command()
def dev(
    reset: Annotated[bool, typer.Option("--reset", help="Erase the embedded database first, and begin anew.")] = False,
) -> None:
    """Run everything on the embedded database: loopback, plaintext, no tokens, reflection on."""
    from pointbook_cli.dev import run_dev
    from pointbook_server.logs import configure_logs
    from pointbook_server.settings import ServerSettings
    from shopline_shim.settings import ShimSettings

    check_settings(ServerSettings, ShimSettings)
    settings, shim_settings = ServerSettings(), ShimSettings()
    configure_logs(settings.log_level, json=False)
    run_until_stopped(lambda stop: run_dev(settings, shim_settings, stop, reset=reset))


@app.command()
def serve(
    workers: Annotated[int | None, typer.Option(min=1, help="Server processes; POINTBOOK_WORKERS otherwise.")] = None,
) -> None:
    """Run the gRPC server."""
    from pointbook_server.logs import configure_logs

    settings, url = load_server_settings(**({} if workers is None else {"workers": workers}))
    configure_logs(settings.log_level, json=True)
    if settings.workers > 1:
        from pointbook_cli.server_workers import run_server_workers

        run_until_stopped(lambda stop: run_server_workers(settings, url, stop))
    else:
        from pointbook_cli.serve import run_server

        run_until_stopped(lambda stop: run_server(settings, url, stop))


@app.command(hidden=True)
def worker() -> None:
    """Run one of several server processes that share a port; `pointbook serve --workers` starts it."""
    from pointbook_cli.serve import run_server
    from pointbook_cli.supervisor import run_as_worker
    from pointbook_server.logs import configure_logs

    settings, url = load_server_settings()
    configure_logs(settings.log_level, json=True)
    run_until_stopped(
        lambda stop: run_as_worker(lambda stop, ready: run_server(settings, url, stop, ready), stop),
    )


@app.command()
def shim(
    workers: Annotated[
        int | None, typer.Option(min=1, help="Shim processes; POINTBOOK_SHIM_WORKERS otherwise.")
    ] = None,
) -> None:
    """Run the HTTP shim that turns signed SHOPLINE webhooks into gRPC calls."""
    from pointbook_server.logs import configure_logs
    from shopline_shim.settings import ShimSettings

    overrides = {} if workers is None else {"shim_workers": workers}
    settings = load_settings(ShimSettings, "shopline_secrets", **overrides)
    configure_logs(settings.log_level, json=True)
    if settings.shim_workers > 1:
        from pointbook_cli.shim_workers import run_shim_workers

        run_until_stopped(lambda stop: run_shim_workers(settings, stop))
    else:
        from shopline_shim.server import ShimServer

        run_until_stopped(lambda stop: ShimServer(settings).serve(stop=stop))


@app.command(hidden=True)
def shim_worker(
    listener: Annotated[int, typer.Argument(help="The descriptor of the listening socket that it inherits.")],
) -> None:
    """Run one of several shim processes that share a socket; `pointbook shim --workers` starts it."""
    from pointbook_cli.supervisor import run_as_worker
    from pointbook_server.logs import configure_logs
    from shopline_shim.server import ShimServer
    from shopline_shim.settings import ShimSettings

    settings = load_settings(ShimSettings, "shopline_secrets")
    configure_logs(settings.log_level, json=True)
    shim = ShimServer(settings, socket.socket(fileno=listener))
    run_until_stopped(
        lambda stop: run_as_worker(lambda stop, ready: shim.serve(stop=stop, ready=ready), stop),
    )


@app.command()
def migrate() -> None:
    """Bring the database to the newest revision."""
    from pointbook_server.db.migrations import migrate as run_migrations

    _, url = load_server_settings()
    before, after = asyncio.run(run_migrations(url))
    if before == after:
        typer.echo(f"The database is at revision {after} already.")
    else:
        typer.echo(f"The database went from revision {before or 'nothing'} to {after}.")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A .csv, .jsonl or .ndjson file; - is standard input.")],
    file_format: Annotated[str, typer.Option("--format", help="csv or jsonl, where the name does not say.")] = "",
    merchant: Annotated[str, typer.Option(help="The merchant of lines that name none.")] = "",
    store: Annotated[str, typer.Option(help="The store of lines that name none.")] = "",
    opening_balances: Annotated[
        bool, typer.Option("--opening-balances", help="Each line is what an account held, and opens it.")
    ] = False,
    at: Annotated[str, typer.Option(help="The time of lines that have none: RFC 3339 or milliseconds.")] = "",
    server: Annotated[str, typer.Option(help="HOST:PORT; POINTBOOK_GRPC_ADDRESS otherwise.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, max=1_000, help="Lines in one call.")] = 500,
    in_flight: Annotated[int, typer.Option(min=1, max=16, help="Calls on their way at a time.")] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Judge every line without a server, and send nothing.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write every refused line to this file, as JSON Lines.")] = None,
) -> None:
    """Send the points events of a file to a server. Sent again, it changes nothing: its events are duplicates."""
    from pointbook_cli.importing import Plan, run_import
    from pointbook_cli.points_file import FORMATS, Format, Manner, read_time_ms
    from pointbook_server.rpc.request_fields import TIME_MS_MAX, YEAR_2000_MS
    from shopline_shim.settings import ShimSettings

    settings = load_settings(ShimSettings, **({"grpc_address": server} if server else {}))
    written = file_format.lower() or FORMATS.get(file.suffix.lower(), "")
    if written not in set(Format):
        fail(f"--format must be one of {', '.join(Format)}, unless the file's name ends in {', '.join(FORMATS)}")
    at_ms = read_time_ms(at) if at else None
    if at and (at_ms is None or not YEAR_2000_MS <= at_ms <= TIME_MS_MAX):
        fail("--at must be RFC 3339, such as 2026-01-31T12:00:00Z, or milliseconds since 1970, from the year 2000 on")
    plan = Plan(
        file=file,
        manner=Manner(Format(written), merchant, store, at_ms, opening_balances),
        report=report,
        server=None if dry_run else settings,
        batch_size=batch_size,
        in_flight=in_flight,
    )
    sys.exit(run_until_stopped(lambda stop: run_import(plan, stop)))


@app.command()
def verify(
    merchant: Annotated[str, typer.Option(help="Only this merchant's accounts.")] = "",
    store: Annotated[str, typer.Option(help="Only this store's accounts.")] = "",
    buyer: Annotated[str, typer.Option(help="Only this buyer's accounts.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many differences to show at most.")] = 100,
) -> None:
    """Fold every account of the database again from its entries, and show where the book says anything else."""
    from pointbook_cli.verifying import run_verify
    from pointbook_server.ledger.audit import AuditScope

    _, url = load_server_settings()
    sys.exit(run_until_stopped(lambda stop: run_verify(url, AuditScope(merchant, store, buyer), limit, stop)))


@app.command()
def health(
    shim: Annotated[bool, typer.Option(help="Ask a shim's /readyz instead of the gRPC server.")] = False,
) -> None:
    """Tell by the exit code whether the server that the settings name is serving: for container health checks."""
    from pointbook_cli.health import ProbeSettings, server_state, shim_state

    settings = load_settings(ProbeSettings)
    serving, cause = shim_state(settings) if shim else server_state(settings)
    typer.echo("serving" if serving else f"not serving: {cause}".removesuffix(": "))
    if not serving:
        sys.exit(1)


@token_app.command("create")
def create_token(
    name: Annotated[str, typer.Option(help="Who will use it, for the list.")],
    merchant: Annotated[list[str], typer.Option(help="A merchant it is for, or * for all; may be repeated.")],
    scope: Annotated[list[str], typer.Option(help="A scope it has, such as points.write; may be repeated.")],
    days: Annotated[
        int | None, typer.Option(min=1, max=TOKEN_DAYS_MAX, help="After how many days it expires; never by default.")
    ] = None,
    client_name: Annotated[
        list[str] | None,
        typer.Option(help="Bind it to a client certificate with this common or alternative name; may be repeated."),
    ] = None,
) -> None:
    """Make a token and print it once: only its hash is kept."""
    from pointbook_server.access.model import Scope
    from pointbook_server.access.rules import new_token
    from pointbook_server.clock import system_clock

    unknown = set(scope) - set(Scope)
    if unknown:
        fail(f"no such scope: {', '.join(sorted(unknown))}; there are {', '.join(Scope)}")
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
    with_access_store(lambda store: store.create(token))
    typer.echo(bearer)


@token_app.command("list")
def list_tokens(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, with RFC 3339 times.")] = False,
) -> None:
    """List all tokens with their last use, never their secrets."""
    from pointbook_cli.tokens import json_of, print_table

    tokens = with_access_store(lambda store: store.read_all())
    if as_json:
        typer.echo(json_of(tokens))
    else:
        print_table(tokens)


@token_app.command("rotate")
def rotate_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="The id of `pointbook token list`.")],
    overlap: Annotated[
        str, typer.Option(help="How long the old token stays good: 0, or a number with s, m, h or d.")
    ] = "24h",
) -> None:
    """Replace a token: print a new one once, and let the old one expire after the overlap."""
    from pointbook_cli.tokens import read_duration_ms, time_of
    from pointbook_server.access.transactions import NotRotatableError
    from pointbook_server.clock import system_clock

    overlap_ms = read_duration_ms(overlap)
    if overlap_ms is None:
        fail("--overlap must be 0, or a number with s, m, h or d, such as 24h, of at most 3,650 days")
    try:
        old, _, bearer = with_access_store(lambda store: store.rotate(token_id, system_clock(), overlap_ms))
    except NotRotatableError as error:
        fail(f"token {token_id} {error}")
    typer.echo(bearer)
    typer.echo(f"Token {token_id} expires at {time_of(old.expires_at_ms)}.", err=True)


@token_app.command("revoke")
def revoke_token(token_id: Annotated[str, typer.Argument(help="The id of `pointbook token list`.")]) -> None:
    """Revoke a token: it is refused everywhere within two seconds."""
    from pointbook_server.clock import system_clock

    if not with_access_store(lambda store: store.revoke(token_id, system_clock())):
        fail(f"there is no token {token_id} to revoke")
    typer.echo(f"Token {token_id} is revoked.")


def with_access_store(use: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    """Use the tokens of the database that the settings name."""
    from pointbook_cli.database_checks import check_migrated
    from pointbook_server.access.transactions import TokenTransactions
    from pointbook_server.db.database import Database

    _, url = load_server_settings()

    async def work() -> T:
        await check_migrated(url)
        database = Database(url, pool_size=1)
        try:
            return await use(TokenTransactions(database))
        finally:
            await database.dispose()

    return asyncio.run(work())


@webhook_app.command("send")
def send_webhook(
    file: Annotated[Path | None, typer.Argument(help="A JSON body to send as it is; a sample otherwise.")] = None,
    url: Annotated[str, typer.Option(help="The shim; the one of POINTBOOK_HTTP_ADDRESS by default.")] = "",
    base64: Annotated[bool, typer.Option(help="Sign in base64, as SHOPLINE's documentation has it.")] = False,
    merchant: Annotated[str, typer.Option(help="The merchant's id.")] = "2000001234",
    store: Annotated[str, typer.Option(help="The store's id.")] = "1718263946864",
    buyer: Annotated[str, typer.Option(help="The customer's id.")] = "2404721679",
    update_type: Annotated[str, typer.Option("--type", help="INCREASE or DECREASE.")] = "INCREASE",
    scene: Annotated[str, typer.Option(help="Why the points change.")] = "SUCCESSFUL_REGISTRATION",
    value: Annotated[int, typer.Option(help="How many points.")] = 20,
    balance: Annotated[int, typer.Option(help="The balance after the change.")] = 20,
    updated_at: Annotated[int, typer.Option(help="When, in milliseconds since 1970.")] = 1721829526566,
) -> None:
    """Sign a points webhook and send it. Sent again as it is, the sample is the same event again.

    It is signed with the first secret of POINTBOOK_SHOPLINE_SECRETS, or with the one of `pointbook dev`: process lists
    show what a command line holds.
    """
    from pointbook_cli.webhook import SECRET, Delivery, send
    from shopline_shim.settings import ShimSettings

    settings = load_settings(ShimSettings)
    scheme = "https" if settings.http_tls_cert_file else "http"
    url = url or f"{scheme}://{settings.http_address}/webhooks/shopline"
    secret = settings.shopline_secrets[0].get_secret_value() if settings.shopline_secrets else SECRET
    sample = {
        "buyer_id": buyer,
        "points_balance": balance,
        "points_expiry_time": "",
        "store_id": store,
        "update_type": update_type,
        "updated_at": updated_at,
        "updated_scene": scene,
        "updated_value": value,
    }
    body = file.read_bytes() if file else json.dumps(sample).encode()
    delivery = Delivery(merchant_id=merchant, store_id=store, secret=secret, base64=base64)
    status, answer = send(url, body, delivery)
    typer.echo(f"{status} {answer}")
    if status != 200:  # noqa: PLR2004 - the one answer that SHOPLINE takes for received
        sys.exit(1)


@quarantine_app.command("list")
def list_quarantine(
    merchant: MerchantOption = "",
    server: ServerOption = "",
    state: Annotated[str, typer.Option(help="QUARANTINED or REPLAYED.")] = "QUARANTINED",
    reason: Annotated[str, typer.Option(help="Only those with this reason, such as STORE_UNKNOWN.")] = "",
    topic: Annotated[str, typer.Option(help="Only those of this topic.")] = "",
    since: Annotated[datetime | None, typer.Option(help="Only those received from this time (UTC) on.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only those received before this time (UTC).")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 1_000,
) -> None:
    """List webhooks in quarantine, one a line, the oldest first."""
    from pointbook_cli.quarantine import WebhookFilter, line_of, names_of

    for option, names, given in (
        ("--state", names_of("QuarantineState"), state),
        ("--reason", ["", *names_of("QuarantineReason")], reason),
    ):
        if given not in names:
            fail(f"{option} must be one of {', '.join(filter(None, names))}")
    with open_quarantine(server, merchant) as quarantine:
        found = quarantine.webhooks(WebhookFilter(state, reason or "UNSPECIFIED", topic, since, until))
        for webhook in islice(found, limit):
            typer.echo(line_of(webhook))
        if next(found, None) is not None:
            typer.echo(f"There are more than {limit:,}; see --limit.", err=True)


@quarantine_app.command("show")
def show_quarantined(
    quarantine_id: Annotated[str, typer.Argument(metavar="ID", help="The id of `pointbook quarantine list`.")],
    merchant: MerchantOption = "",
    server: ServerOption = "",
) -> None:
    """Show a webhook with its headers and its body. The body of a customer webhook is personal data."""
    from pointbook_cli.quarantine import text_of

    with open_quarantine(server, merchant) as quarantine:
        typer.echo(text_of(quarantine.get(quarantine_id)))


@quarantine_app.command("replay")
def replay_quarantined(
    quarantine_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which to replay.")] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Replay all that wait, but ENDPOINT_MISMATCH and TOO_OLD only with --reason."),
    ] = False,
    reason: Annotated[str, typer.Option(help="With --all: only those with this reason.")] = "",
    as_merchant: Annotated[str, typer.Option(help="The merchant that webhooks named wrongly, or not at all.")] = "",
    as_topic: Annotated[str, typer.Option(help="The topic of webhooks that name none; the others keep theirs.")] = "",
    override: Annotated[
        bool,
        typer.Option("--override", help="Apply a customers/ webhook against another topic of the same moment."),
    ] = False,
    merchant: MerchantOption = "",
    server: ServerOption = "",
) -> None:
    """Translate webhooks again and apply each once; the exit code is 1 while some are refused."""
    from pointbook_cli.quarantine import names_of, replay_all
    from shopline_shim.translate import TRANSLATED_TOPICS

    if as_topic and as_topic not in TRANSLATED_TOPICS:
        fail(f"--as-topic must be one of {', '.join(sorted(TRANSLATED_TOPICS))}")
    if bool(quarantine_ids) is everything:
        fail("name the webhooks to replay, or use --all")
    if reason and not everything:
        fail("--reason is for --all")
    if reason not in ["", *names_of("QuarantineReason")]:
        fail(f"--reason must be one of {', '.join(names_of('QuarantineReason'))}")
    if override and everything:
        fail("--override is for webhooks that are named")
    with open_quarantine(server, merchant) as quarantine:
        ids = quarantine_ids or quarantine.waiting(reason)
        if not replay_all(quarantine, ids, as_merchant, as_topic, override=override):
            sys.exit(1)


@quarantine_app.command("drop")
def drop_quarantined(
    quarantine_id: Annotated[str, typer.Argument(metavar="ID", help="The id of `pointbook quarantine list`.")],
    reason: Annotated[str, typer.Option(help="Why, for the audit log; name no person.")],
    merchant: MerchantOption = "",
    server: ServerOption = "",
) -> None:
    """Delete a webhook for good, replayed or not."""
    with open_quarantine(server, merchant) as quarantine:
        quarantine.drop(quarantine_id, reason)
    typer.echo(f"Webhook {quarantine_id} is dropped.")


def open_quarantine(server: str, merchant: str) -> AbstractContextManager[Any]:
    """Open a merchant's quarantine on a server, with the token of POINTBOOK_TOKEN."""
    from pointbook_cli.quarantine import opened
    from shopline_shim.settings import ShimSettings

    return opened(load_settings(ShimSettings, **({"grpc_address": server} if server else {})), merchant)


@store_app.command("erasures")
def list_store_erasures(
    merchant: Annotated[str, typer.Option(help="Whose stores; left out, those of all merchants.")] = "",
    server: ServerOption = "",
) -> None:
    """List the requests to erase stores, one a line: the open ones first, those due soonest before the others."""
    from pointbook_cli.stores import line_of

    now = datetime.now(UTC)
    with open_stores(server) as stores:
        for erasure in stores.erasures(merchant):
            typer.echo(line_of(erasure, now))


@store_app.command("erase")
def erase_store(
    store_id: Annotated[str, typer.Argument(metavar="STORE", help="The store's id.")],
    merchant: Annotated[str, typer.Option(help="Whose store it is.")],
    reason: Annotated[str, typer.Option(help="Why, for the audit; name no person.")],
    server: ServerOption = "",
) -> None:
    """Erase the personal data of a store's customers for good. Interrupted, the same command goes on."""
    from pointbook_cli.stores import erase_all

    with open_stores(server) as stores:
        erase_all(stores, merchant, store_id, reason)


@store_app.command("release")
def release_store(
    store_id: Annotated[str, typer.Argument(metavar="STORE", help="The store's id.")],
    merchant: Annotated[str, typer.Option(help="The merchant that has it.")],
    reason: Annotated[str, typer.Option(help="Why, for the audit log; name no person.")],
    server: ServerOption = "",
) -> None:
    """Release a store without data, so that another merchant can register it."""
    with open_stores(server) as stores:
        stores.release(merchant, store_id, reason)
    typer.echo(f"Store {store_id} is released.")


def open_stores(server: str) -> AbstractContextManager[Any]:
    """Open the stores of a server, with the token of POINTBOOK_TOKEN."""
    from pointbook_cli.stores import opened
    from shopline_shim.settings import ShimSettings

    return opened(load_settings(ShimSettings, **({"grpc_address": server} if server else {})))


@customer_app.command("show")
def show_customer(
    identifier: Annotated[
        str, typer.Argument(help="+8613812345678, ada@example.com, STORE/BUYER, or what --kind says.")
    ],
    merchant: Annotated[str, typer.Option(help="Whose customer it is.")],
    kind: Annotated[
        str,
        typer.Option(help="mobile, email, external-id, card-number, card-external-id, customer-id or buyer."),
    ] = "",
    program: Annotated[
        int | None,
        typer.Option(min=1, max=2**63 - 1, help="Also show the customer's points in this program."),
    ] = None,
    since: Annotated[str, typer.Option(help="Only what happened since: 30d, 2026-01-31 or RFC 3339.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many lines of the timeline at most.")] = 100,
    time_zone: Annotated[str, typer.Option("--time-zone", help="The IANA time zone of the times shown.")] = "UTC",
    contacts: Annotated[
        bool, typer.Option("--contacts", help="Show contacts in full; the token needs the scope admin.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with RFC 3339 times.")] = False,
    server: ServerOption = "",
) -> None:
    """Show who a customer is, their points, and all that happened to them, the newest first.

    The exit code is 0, 1 if there is no such customer, and 2 if the command failed.
    """
    from pointbook_cli import customer
    from pointbook_cli.customer_text import print_view
    from pointbook_server.clock import system_clock
    from shopline_shim.settings import ShimSettings

    chosen = kind or customer.guessed_kind(identifier)
    if chosen not in customer.KINDS:
        what = f"--kind must be one of {', '.join(customer.KINDS)}"
        fail(what if kind else f"the identifier is ambiguous: {what}")
    if chosen == "buyer" and not customer.is_buyer(identifier):
        fail("a buyer is STORE/BUYER")
    zone = read_time_zone(time_zone)
    since_ms = customer.read_since_ms(since, system_clock(), zone) if since else None
    if since and since_ms is None:
        fail("--since must be a duration such as 30d, a day such as 2026-01-31, or RFC 3339")
    wanted = customer.CustomerQuery(merchant, chosen, identifier, program, since_ms, limit, contacts)
    settings = load_settings(ShimSettings, **({"grpc_address": server} if server else {}))
    if not kind:
        typer.echo(f"Taken for --kind {chosen}.", err=True)
    try:
        view = customer.read_view(settings, wanted)
    except customer.CustomerNotFoundError:
        typer.echo(f"pointbook: merchant {merchant} has no customer with this {chosen}", err=True)
        sys.exit(1)
    if as_json:
        typer.echo(customer.json_of(view, wanted, is_guessed=not kind))
    else:
        print_view(view, wanted, zone)


def read_time_zone(name: str) -> ZoneInfo:
    """Read an IANA time zone, or end the command."""
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        fail("--time-zone must be an IANA time zone such as Asia/Shanghai")


@benefits_app.command("import")
def import_benefits(
    file: Annotated[Path, typer.Argument(help="What SHOPLINE's GraphQL answered for the level; - is standard input.")],
    merchant: Annotated[str, typer.Option(help="Whose benefits they are.")],
    level: Annotated[str, typer.Option(help="The membership level that SHOPLINE was asked for.")],
    membership_type: Annotated[
        str, typer.Option(help="LEVEL, PAID, BASIC or DUAL, which SHOPLINE does not tell; left out, it stays as it is.")
    ] = "",
    prune: Annotated[bool, typer.Option("--prune", help="Delete what only an earlier file had.")] = False,
    server: ServerOption = "",
) -> None:
    """Put the benefits and custom privileges of one level, and print what differs. Repeated, it changes nothing."""
    from pointbook_cli.benefits import Plan, run_import
    from pointbook_server.benefits.model import LEVEL_PREFIX, MembershipType
    from shopline_shim.settings import ShimSettings

    level_code = level.removeprefix(LEVEL_PREFIX)
    if not BENEFITS_LEVEL.fullmatch(level_code):
        fail("--level must be 1 to 58 visible ASCII characters without spaces")
    if membership_type and membership_type not in set(MembershipType):
        fail(f"--membership-type must be one of {', '.join(MembershipType)}")
    settings = load_settings(ShimSettings, **({"grpc_address": server} if server else {}))
    sys.exit(run_import(settings, Plan(file, merchant, level_code, membership_type, prune)))


if __name__ == "__main__":
    run()
