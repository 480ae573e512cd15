"""SMS by a provider's HTTP gateway that accepts JSON."""

import json
import ssl
from typing import Any

import httpx

from pointbook_server.delivery.sender import (
    HANDOVER_TIMEOUT_SECONDS,
    RESPONSE_TIMEOUT_SECONDS,
    DeliveryFailedError,
    DeliveryUncertainError,
    Message,
    refused_error,
    uncertain_error,
    unreachable_error,
)
from pointbook_server.provider_settings import PLACEHOLDER, HttpGateway

CONNECTIONS_MAX = 32
CONNECT_STEP_TIMEOUT_SECONDS = HANDOVER_TIMEOUT_SECONDS / 2
"""The time for each step before a request: a free connection, TCP, TLS. If all three are slow, the caller's own timeout
ends the attempt, and the failure counts as uncertain."""
PROVIDER = "the SMS gateway"
_NOT_SENT_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_REFUSAL_STATUSES = range(400, 500)


class HttpGatewaySender:
    """A sender that posts each message over a new connection.

    The gateway may close a reused connection at any moment, which would turn a definite failure into an uncertain one.
    """

    needs_destination = True

    def __init__(self, gateway: HttpGateway) -> None:
        self._gateway = gateway
        headers = httpx.Headers({"User-Agent": "pointbook", "Content-Type": "application/json", "Connection": "close"})
        headers.update(gateway.headers)
        self._client = httpx.AsyncClient(
            headers=headers,
            # Trusts the system's certificates, or those in SSL_CERT_FILE.
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=0),
            timeout=httpx.Timeout(
                RESPONSE_TIMEOUT_SECONDS, connect=CONNECT_STEP_TIMEOUT_SECONDS, pool=CONNECT_STEP_TIMEOUT_SECONDS
            ),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def send(self, message: Message) -> None:
        """Post a message. Raises the errors of `Sender.send`."""
        failure = await self._attempt(message)
        if failure is not None:
            raise failure

    async def _attempt(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        """Make one attempt, and return its failure.

        It is raised later, so that the library's error is not its cause.
        """
        try:
            status = await self._post(message)
        except _NOT_SENT_ERRORS as error:
            return unreachable_error(PROVIDER, error)
        except Exception as error:  # noqa: BLE001 - after any other error the gateway may have accepted the message
            return uncertain_error(PROVIDER, error)
        if status in self._gateway.success:
            return None
        if status in _REFUSAL_STATUSES:
            return refused_error(PROVIDER, status)
        return DeliveryUncertainError(f"{PROVIDER} answered with status {status}")

    async def _post(self, message: Message) -> int:
        """Return the status of the gateway's answer.

        Its body is never read, because only the status decides.
        """
        content = json.dumps(fill_template(self._gateway.body, message), ensure_ascii=False).encode()
        async with self._client.stream(self._gateway.method, self._gateway.url, content=content) as response:
            return response.status_code


def fill_template(template: Any, message: Message) -> Any:
    """Replace the placeholders in the string values of a JSON template.

    Values are data: they cannot end a JSON string, and placeholders in them are not replaced.
    """
    if isinstance(template, dict):
        return {name: fill_template(value, message) for name, value in template.items()}
    if isinstance(template, list):
        return [fill_template(value, message) for value in template]
    if not isinstance(template, str):
        return template
    values = {"to": message.destination, "text": message.text, "challenge_id": message.challenge_id}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)
