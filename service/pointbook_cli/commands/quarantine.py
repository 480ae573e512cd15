"""`pointbook quarantine`: webhooks that could not be applied."""

import sys
from contextlib import AbstractContextManager
from datetime import datetime
from itertools import islice
from typing import Annotated, Any

import typer

from pointbook_cli.command_line import fail, load_client_settings
from pointbook_cli.commands.options import QUARANTINE_ID_HELP, REASON_HELP, ServerOption
from pointbook_cli.exit_codes import EXIT_PROBLEMS

MerchantOption = Annotated[
    str, typer.Option("--merchant", help="The merchant; by default, the webhooks that name no merchant.")
]

app = typer.Typer(help="Handle the webhooks that could not be applied.", no_args_is_help=True)


@app.command("list")
def list_quarantine(
    merchant: MerchantOption = "",
    server: ServerOption = "",
    state: Annotated[str, typer.Option(help="QUARANTINED or REPLAYED.")] = "QUARANTINED",
    reason: Annotated[str, typer.Option(help="Only webhooks with this reason, such as STORE_UNKNOWN.")] = "",
    topic: Annotated[str, typer.Option(help="Only webhooks of this topic.")] = "",
    since: Annotated[datetime | None, typer.Option(help="Only webhooks received at or after this time (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only webhooks received before this time (UTC).")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of webhooks.")] = 1_000,
) -> None:
    """List webhooks in quarantine, one per line, oldest first."""
    from pointbook_cli.quarantine_client import WebhookFilter, enum_names, format_line

    for option, names, value in (
        ("--state", enum_names("QuarantineState"), state),
        ("--reason", ["", *enum_names("QuarantineReason")], reason),
    ):
        if value not in names:
            fail(f"{option} must be one of {', '.join(filter(None, names))}")
    with _open_quarantine(server, merchant) as quarantine:
        webhooks = quarantine.webhooks(WebhookFilter(state, reason or "UNSPECIFIED", topic, since, until))
        for webhook in islice(webhooks, limit):
            typer.echo(format_line(webhook))
        if next(webhooks, None) is not None:
            typer.echo(f"There are more than {limit:,}; see --limit.", err=True)


@app.command("show")
def show_quarantined(
    quarantine_id: Annotated[str, typer.Argument(metavar="ID", help=QUARANTINE_ID_HELP)],
    merchant: MerchantOption = "",
    server: ServerOption = "",
) -> None:
    """Print a webhook with its headers and its body.

    The body of a customer webhook is personal data.
    """
    from pointbook_cli.quarantine_client import format_webhook

    with _open_quarantine(server, merchant) as quarantine:
        typer.echo(format_webhook(quarantine.get(quarantine_id)))


@app.command("replay")
def replay_quarantined(
    quarantine_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="The webhooks to replay.")
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Replay all webhooks; ENDPOINT_MISMATCH and TOO_OLD only with --reason."),
    ] = False,
    reason: Annotated[str, typer.Option(help="With --all: only webhooks with this reason.")] = "",
    as_merchant: Annotated[str, typer.Option(help="The merchant of webhooks that name a wrong one or none.")] = "",
    as_topic: Annotated[str, typer.Option(help="The topic of webhooks that name none.")] = "",
    override: Annotated[
        bool,
        typer.Option(
            "--override", help="Apply a customers/ webhook that contradicts another topic of the same moment."
        ),
    ] = False,
    merchant: MerchantOption = "",
    server: ServerOption = "",
) -> None:
    """Translate webhooks again and apply each once.

    The exit code is 1 if some are refused.
    """
    from pointbook_cli.quarantine_client import enum_names, replay_all
    from pointbook_common.shopline_webhooks import TRANSLATED_TOPICS

    if as_topic and as_topic not in TRANSLATED_TOPICS:
        fail(f"--as-topic must be one of {', '.join(sorted(TRANSLATED_TOPICS))}")
    if bool(quarantine_ids) is everything:
        fail("name the webhooks to replay, or use --all")
    if reason and not everything:
        fail("--reason requires --all")
    if reason not in ["", *enum_names("QuarantineReason")]:
        fail(f"--reason must be one of {', '.join(enum_names('QuarantineReason'))}")
    if override and everything:
        fail("--override cannot be combined with --all: name the webhooks")
    with _open_quarantine(server, merchant) as quarantine:
        ids = quarantine_ids or quarantine.replayable_ids(reason)
        if not replay_all(quarantine, ids, as_merchant, as_topic, override=override):
            sys.exit(EXIT_PROBLEMS)


@app.command("drop")
def drop_quarantined(
    quarantine_id: Annotated[str, typer.Argument(metavar="ID", help=QUARANTINE_ID_HELP)],
    reason: Annotated[str, typer.Option(help=REASON_HELP)],
    merchant: MerchantOption = "",
    server: ServerOption = "",
) -> None:
    """Delete a webhook permanently, whether it was replayed or not."""
    with _open_quarantine(server, merchant) as quarantine:
        quarantine.drop(quarantine_id, reason)
    typer.echo(f"Webhook {quarantine_id} is dropped.")


def _open_quarantine(server: str, merchant: str) -> AbstractContextManager[Any]:
    from pointbook_cli.quarantine_client import open_quarantine

    return open_quarantine(load_client_settings(server), merchant)
