"""The metadata of a call that the server reads."""

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

AUTHORIZATION_HEADER = "authorization"
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Headers(NamedTuple):
    """The headers of a call; `authorization` is empty if it has none."""

    authorization: str
    request_id: str


def read_headers(metadata: Iterable[tuple[str, str | bytes]] | None) -> Headers:
    """Return the headers of a call.

    The caller's request id is used if it is safe to log, otherwise a new one.
    """
    authorization = request_id = ""
    for key, value in metadata or ():
        if key == AUTHORIZATION_HEADER and not authorization and isinstance(value, str):
            authorization = value
        elif key == REQUEST_ID_HEADER and not request_id and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            request_id = value
    return Headers(authorization, request_id or f"{random.getrandbits(64):016x}")
