"""How `pointbook token` shows tokens, and reads how long a rotated one stays good."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pointbook_server.access.model import Token

UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
OVERLAP_MS_MAX = 3_650 * UNITS_MS["d"]
_DURATION = re.compile(r"([0-9]{1,9})([smhd])")


def print_table(tokens: Sequence[Token]) -> None:
    """Print tokens as a table."""
    names = ("name", "merchants", "scopes", "clients", "created", "expires", "revoked", "last used")
    table = Table(Column("id", no_wrap=True), *names)
    for token in tokens:
        times = (token.created_at_ms, token.expires_at_ms, token.revoked_at_ms, token.last_used_at_ms)
        table.add_row(
            token.token_id,
            escape(token.name),
            escape(" ".join(token.merchants)),
            " ".join(token.scopes),
            escape(" ".join(token.client_names)),
            *("" if time_ms is None else f"{_datetime(time_ms):%Y-%m-%d %H:%M}" for time_ms in times),
        )
    Console(emoji=False).print(table)


def json_of(tokens: Sequence[Token]) -> str:
    """Write tokens as one JSON array."""
    return json.dumps(
        [
            {
                "id": token.token_id,
                "name": token.name,
                "merchants": list(token.merchants),
                "scopes": list(token.scopes),
                "client_names": list(token.client_names),
                "created": time_of(token.created_at_ms),
                "expires": time_of(token.expires_at_ms),
                "revoked": time_of(token.revoked_at_ms),
                "last_used": time_of(token.last_used_at_ms),
                "rotated_to": token.rotated_to,
            }
            for token in tokens
        ],
        indent=2,
    )


def time_of(time_ms: int | None) -> str | None:
    """Write a time in RFC 3339; None stays None."""
    return None if time_ms is None else _datetime(time_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_duration_ms(text: str) -> int | None:
    """Read a duration such as 24h; None where it has no such form or is too long."""
    if text == "0":
        return 0
    found = _DURATION.fullmatch(text)
    duration_ms = int(found[1]) * UNITS_MS[found[2]] if found else -1
    return duration_ms if 0 <= duration_ms <= OVERLAP_MS_MAX else None


def _datetime(time_ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)
