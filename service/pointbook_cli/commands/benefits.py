"""`pointbook benefits`: import a membership level's benefits from SHOPLINE."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from pointbook_cli.command_line import fail, load_client_settings
from pointbook_cli.commands.options import ServerOption

LEVEL_CODE = re.compile(r"[!-~]{1,58}")
"""With `:` and a number up to 1,000 after it, it is the id of a benefit, of at most 64 characters."""

app = typer.Typer(help="Import a merchant's benefits from SHOPLINE.", no_args_is_help=True)


@app.command("import")
def import_benefits(
    file: Annotated[Path, typer.Argument(help="The response of SHOPLINE's GraphQL API; - is standard input.")],
    merchant: Annotated[str, typer.Option(help="The merchant of the benefits.")],
    level: Annotated[str, typer.Option(help="The membership level in the GraphQL query.")],
    membership_type: Annotated[
        str,
        typer.Option(
            help="LEVEL, PAID, BASIC or DUAL, which the response does not contain; by default, it stays unchanged."
        ),
    ] = "",
    prune: Annotated[bool, typer.Option("--prune", help="Delete items of earlier files that this one lacks.")] = False,
    server: ServerOption = "",
) -> None:
    """Import the benefits and custom privileges of one level, and print what changed.

    A second run changes nothing.
    """
    from pointbook_cli.benefits_import import BenefitsImportOptions, run_import
    from pointbook_server.benefits.model import LEVEL_PREFIX, MembershipType

    level_code = level.removeprefix(LEVEL_PREFIX)
    if not LEVEL_CODE.fullmatch(level_code):
        fail("--level must be 1 to 58 visible ASCII characters without spaces")
    if membership_type and membership_type not in set(MembershipType):
        fail(f"--membership-type must be one of {', '.join(MembershipType)}")
    options = BenefitsImportOptions(file, merchant, level_code, membership_type, prune)
    sys.exit(run_import(load_client_settings(server), options))
