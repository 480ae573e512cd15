"""`pointbook doctor`: checks an installation."""

import os
import sys
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def doctor(
    is_strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    silent_hours: Annotated[
        float, typer.Option("--silent-hours", min=1, help="The hours without a webhook after which a store is silent.")
    ] = 48,
) -> None:
    """Check settings, database, certificates, tokens, webhooks, server and shim.

    The exit code is 0 if there are no problems, and 1 otherwise. Each check has a time limit.
    """
    import asyncio

    from pointbook_cli.doctor.output import exit_code, print_findings, to_json
    from pointbook_cli.doctor.runner import run_checks
    from pointbook_server.logs import configure_logs

    # An outage of the database would be logged in addition to its finding.
    configure_logs("ERROR", json=False)
    findings = asyncio.run(run_checks(os.environ, silent_hours))
    if as_json:
        typer.echo(to_json(findings))
    else:
        print_findings(findings)
    sys.exit(exit_code(findings, is_strict=is_strict))
