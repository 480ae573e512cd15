"""`pointbook customer`: show a customer with their points and their timeline."""

import sys
from typing import Annotated

import typer

from pointbook_cli.command_line import fail, load_client_settings, parse_time_zone
from pointbook_cli.commands.options import ServerOption
from pointbook_cli.exit_codes import EXIT_PROBLEMS

app = typer.Typer(help="Show what happened to a customer.", no_args_is_help=True)


@app.command("show")
def show_customer(
    identifier: Annotated[
        str, typer.Argument(help="+8613812345678, ada@example.com, STORE/BUYER, or an identifier of --kind.")
    ],
    merchant: Annotated[str, typer.Option(help="The customer's merchant.")],
    kind: Annotated[
        str,
        typer.Option(help="mobile, email, external-id, card-number, card-external-id, customer-id or buyer."),
    ] = "",
    program: Annotated[
        int | None,
        typer.Option(min=1, max=2**63 - 1, help="Also show the customer's points in this program."),
    ] = None,
    since: Annotated[str, typer.Option(help="Only events since 30d (ago), 2026-01-31 or an RFC 3339 time.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The maximum number of events to show.")] = 100,
    time_zone: Annotated[str, typer.Option("--time-zone", help="The IANA time zone of the times shown.")] = "UTC",
    contacts: Annotated[
        bool, typer.Option("--contacts", help="Show contacts in full; the token needs the scope admin.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, with RFC 3339 times.")] = False,
    server: ServerOption = "",
) -> None:
    """Show a customer, their points, and their timeline, newest first.

    The exit code is 0, 1 if there is no such customer, and 2 if the command failed.
    """
    from pointbook_cli import customer_view
    from pointbook_cli.customer_text import print_view
    from pointbook_server.clock import system_clock

    effective_kind = kind or customer_view.guess_kind(identifier)
    if effective_kind not in customer_view.KINDS:
        problem = f"--kind must be one of {', '.join(customer_view.KINDS)}"
        fail(problem if kind else f"the identifier is ambiguous: {problem}")
    if effective_kind == "buyer" and not customer_view.is_buyer(identifier):
        fail("a buyer is STORE/BUYER")
    zone = parse_time_zone(time_zone)
    since_ms = customer_view.parse_since_ms(since, system_clock(), zone) if since else None
    if since and since_ms is None:
        fail("--since must be a duration such as 30d, a day such as 2026-01-31, or RFC 3339")
    query = customer_view.CustomerQuery(merchant, effective_kind, identifier, program, since_ms, limit, contacts)
    settings = load_client_settings(server)
    if not kind:
        typer.echo(f"Assuming --kind {effective_kind}.", err=True)
    view = customer_view.read_view(settings, query)
    if view is None:
        typer.echo(f"pointbook: merchant {merchant} has no customer with this {effective_kind}", err=True)
        sys.exit(EXIT_PROBLEMS)
    if as_json:
        typer.echo(customer_view.to_json(view, query, is_guessed=not kind))
    else:
        print_view(view, query, zone)
