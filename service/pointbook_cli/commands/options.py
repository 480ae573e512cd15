"""Options that several commands have."""

from typing import Annotated

import typer

ServerOption = Annotated[
    str, typer.Option("--server", help="HOST:PORT of the gRPC server; POINTBOOK_GRPC_ADDRESS by default.")
]
TOKEN_ID_HELP = "A token's id, from `pointbook token list`."  # noqa: S105 - a help text
QUARANTINE_ID_HELP = "A webhook's id, from `pointbook quarantine list`."
REASON_HELP = "The reason, for the audit log. Do not name persons."
