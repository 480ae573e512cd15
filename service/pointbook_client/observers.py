"""Hooks that see every call, such as those of OpenTelemetry."""

from collections.abc import Sequence
from typing import Protocol

import grpc


class ObservedCall(Protocol):
    """A running call."""

    def metadata(self) -> Sequence[tuple[str, str]]:
        """Return metadata to send with the call, such as `traceparent`."""

    def end(self, code: grpc.StatusCode) -> None:
        """End the call with its gRPC code, after all of its attempts."""


class CallObserver(Protocol):
    """Sees the calls of a client.

    It must not raise, and no attribute may contain personal data.
    """

    def start(self, method: str) -> ObservedCall:
        """Start a call of a method.

        A method is like `/pointbook.v1.RedemptionService/RedeemPoints`.
        """
