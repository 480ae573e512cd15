"""The metadata of a call that the server reads."""

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

AUTHORIZATION_HEADER = "authorization"
REQUEST_ID_HEADER = "x-request-id"
PREVIOUS_ATTEMPTS_HEADER = "x-previous-attempts"
"""Returned with the errors of calls that gRPC or a balancer has sent before."""
_GRPC_ATTEMPTS_HEADER = "grpc-previous-rpc-attempts"
_ENVOY_ATTEMPT_HEADER = "x-envoy-attempt-count"
"""The number of this attempt, from 1."""
_BEARER = "bearer "
_FEW_DIGITS = re.compile(r"[0-9]{1,4}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Headers(NamedTuple):
    """The headers of a call; `bearer` is None if no token was sent."""

    bearer: str | None
    request_id: str


def read_headers(metadata: Iterable[tuple[str, str | bytes]] | None) -> Headers:
    """Return the headers of a call.

    The first bearer token counts: a proxy may add authorization of another kind. The caller's request id is used if it
    is safe to log, otherwise a new one.
    """
    bearer, request_id = None, ""
    for key, value in metadata or ():
        if not isinstance(value, str):
            continue
        if key == AUTHORIZATION_HEADER and bearer is None and value[: len(_BEARER)].lower() == _BEARER:
            bearer = value[len(_BEARER) :]
        elif key == REQUEST_ID_HEADER and not request_id and _REQUEST_ID.fullmatch(value):
            request_id = value
    return Headers(bearer, request_id or f"{random.getrandbits(64):016x}")


def previous_attempts(metadata: Iterable[tuple[str, str | bytes]] | None) -> int:
    """Return how often gRPC or Envoy has sent this call before.

    Source: https://github.com/grpc/proposal/blob/master/A6-client-retries.md#exposed-retry-metadata
    """
    found = dict(metadata or ())
    return max(_number(found.get(_GRPC_ATTEMPTS_HEADER)), _number(found.get(_ENVOY_ATTEMPT_HEADER)) - 1, 0)


def _number(value: str | bytes | None) -> int:
    """Return a number of a few digits in a header; 0 if it has none."""
    return int(value) if isinstance(value, str) and _FEW_DIGITS.fullmatch(value) else 0
