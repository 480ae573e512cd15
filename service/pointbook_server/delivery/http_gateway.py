"""SMS by an HTTP gateway that takes JSON, as most providers have one."""

import json
import ssl
from typing import Any

import httpx

from pointbook_server.delivery.sender import (
    ANSWER_SECONDS,
    READY_SECONDS,
    DeliveryFailedError,
    DeliveryUncertainError,
    Message,
    refused,
    uncertain,
    unreachable,
)
from pointbook_server.provider_settings import PLACEHOLDER, HttpGateway

CONNECTIONS_MAX = 32
STEP_SECONDS = READY_SECONDS / 2
"""How long each step towards a request may take: a free connection, TCP, TLS. Where all three are slow the caller's
patience ends first, and the failure counts as uncertain."""
PROVIDER = "the SMS gateway"
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_REFUSALS = range(400, 500)


class HttpGatewaySender:
    """Posts each message over a connection of its own.

    A connection that is kept is one that the gateway may close just now, which would turn a definite failure into an
    uncertain one.
    """

    needs_destination = True

    def __init__(self, gateway: HttpGateway) -> None:
        self._gateway = gateway
        headers = httpx.Headers({"User-Agent": "pointbook", "Content-Type": "application/json", "Connection": "close"})
        headers.update(gateway.headers)
        self._client = httpx.AsyncClient(
            headers=headers,
            # The system's certificates, or those that SSL_CERT_FILE names.
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=0),
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=STEP_SECONDS, pool=STEP_SECONDS),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def send(self, message: Message) -> None:
        """Post a message, as `Sender` says."""
        failure = await self._attempt(message)
        if failure is not None:
            raise failure

    async def _attempt(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        """Try once. The failure is returned, so that it is raised without the library's error behind it."""
        try:
            status = await self._post(message)
        except _NOT_SENT as error:
            return unreachable(PROVIDER, error)
        except Exception as error:  # noqa: BLE001 - whatever else it is, nobody knows what the gateway has done
            return uncertain(PROVIDER, error)
        if status in self._gateway.success:
            return None
        if status in _REFUSALS:
            return refused(PROVIDER, status)
        return DeliveryUncertainError(f"{PROVIDER} answered with status {status}")

    async def _post(self, message: Message) -> int:
        """Return the status of the gateway's answer. It decides, so the body is never read, however long it is."""
        content = json.dumps(filled(self._gateway.body, message), ensure_ascii=False).encode()
        async with self._client.stream(self._gateway.method, self._gateway.url, content=content) as response:
            return response.status_code


def filled(template: Any, message: Message) -> Any:
    """Fill the string values of a JSON template. What is filled in is data: it cannot end a string, or be filled."""
    if isinstance(template, dict):
        return {name: filled(value, message) for name, value in template.items()}
    if isinstance(template, list):
        return [filled(value, message) for value in template]
    if not isinstance(template, str):
        return template
    parts = {"to": message.destination, "text": message.text, "challenge_id": message.challenge_id}
    return PLACEHOLDER.sub(lambda match: parts[match[1]], template)
