"""Hooks that see every call, such as those of OpenTelemetry."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import grpc

_log = logging.getLogger("pointbook_client")


class ObservedCall(Protocol):
    """A running call."""

    def metadata(self) -> Sequence[tuple[str, str]]:
        """Return metadata to send with the call, such as `traceparent`."""

    def end(self, code: grpc.StatusCode) -> None:
        """End the call with its gRPC code, after all of its attempts."""


class CallObserver(Protocol):
    """Sees the calls of a client.

    What it raises is logged. No attribute may contain personal data.
    """

    def start(self, method: str) -> ObservedCall:
        """Start a call of a method.

        A method is like `/pointbook.v1.RedemptionService/RedeemPoints`.
        """


@contextmanager
def log_failures() -> Iterator[None]:
    """Log what an observer raises in the block.

    The call goes on: its result may be a redemption.
    """
    try:
        yield
    except Exception:  # noqa: BLE001 - the observer's own, of any kind
        _log.exception("The observer of calls failed.")
