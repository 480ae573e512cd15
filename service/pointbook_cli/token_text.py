"""Output of `pointbook token`: tokens as a table or JSON, times and durations."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pointbook_common.durations import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from pointbook_server.access.model import Token

UNITS_MS = {"s": SECOND_MS, "m": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}
DURATION_MS_MAX = 3_650 * DAY_MS
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
            *("" if time_ms is None else f"{_to_datetime(time_ms):%Y-%m-%d %H:%M}" for time_ms in times),
        )
    Console(emoji=False).print(table)


def to_json(tokens: Sequence[Token]) -> str:
    """Return tokens as one JSON array."""
    return json.dumps(
        [
            {
                "id": token.token_id,
                "name": token.name,
                "merchants": list(token.merchants),
                "scopes": list(token.scopes),
                "client_names": list(token.client_names),
                "created": format_time(token.created_at_ms),
                "expires": format_time(token.expires_at_ms),
                "revoked": format_time(token.revoked_at_ms),
                "last_used": format_time(token.last_used_at_ms),
                "rotated_to": token.rotated_to,
            }
            for token in tokens
        ],
        indent=2,
    )


def format_time(time_ms: int | None) -> str | None:
    """Return a time in RFC 3339; None for None."""
    return None if time_ms is None else _to_datetime(time_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_duration_ms(text: str) -> int | None:
    """Parse a duration such as 24h; None if it is invalid or too long."""
    if text == "0":
        return 0
    match = _DURATION.fullmatch(text)
    duration_ms = int(match[1]) * UNITS_MS[match[2]] if match else -1
    return duration_ms if 0 <= duration_ms <= DURATION_MS_MAX else None


def _to_datetime(time_ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)
