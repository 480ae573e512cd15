"""SMS and e-mail by Apprise, which supports about a hundred providers.

Apprise is optional. It blocks, so it runs in threads of its own.
"""

import asyncio
import importlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from pointbook_common.errors import SettingError
from pointbook_server.customers import emails
from pointbook_server.delivery.sender import (
    HANDOVER_TIMEOUT_SECONDS,
    DeliveryFailedError,
    DeliveryUncertainError,
    FailureKind,
    Message,
    uncertain_error,
)
from pointbook_server.programs.model import Channel
from pointbook_server.provider_settings import DESTINATION

THREADS_MAX = 8
PROVIDER = "Apprise"
SAMPLE_DESTINATIONS = {Channel.SMS: "+12025550143", Channel.EMAIL: "someone@example.com"}
"""Destinations with which URLs are checked when the server starts; nothing is sent to them."""
LEAKY_LOGGERS = ("apprise", "urllib3", "requests", "requests_oauthlib", "oauthlib")
"""Loggers that write destinations, URLs with credentials and providers' answers, at every level."""


class AppriseSender:
    """A sender that builds an Apprise service for each message.

    The destination is part of the service's URL.

    Apprise reports only whether a provider accepted a message: it returns False for a refusal, an unreachable provider
    and a timeout alike, so all of them are uncertain. Only a message that never reached an Apprise service is a
    definite failure.
    """

    needs_destination = True

    def __init__(self, setting: str, url: str, channel: Channel) -> None:
        self._url = url
        self._channel = channel
        self._apprise = _import_apprise(setting)
        # Redirects could carry codes to another site. Nothing is stored on disk.
        self._asset = self._apprise.AppriseAsset(http_redirects=False, storage_mode="memory")
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="apprise")
        if self._build_service(SAMPLE_DESTINATIONS[channel]) is None:
            raise SettingError(f"{setting}: Apprise does not understand it")

    async def aclose(self) -> None:
        """Accept no more messages. Those in flight end by Apprise's own timeouts."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def send(self, message: Message) -> None:
        """Send a message. Raises the errors of `Sender.send`."""
        failure = await self._attempt(message)
        if failure is not None:
            raise failure

    async def _attempt(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        """Make one attempt in a thread, and return its failure."""
        job = self._threads.submit(self._send, message)
        result = asyncio.wrap_future(job)
        try:
            await asyncio.wait([result], timeout=HANDOVER_TIMEOUT_SECONDS)
            # A job can be cancelled only if no thread has started it.
            if job.cancel():
                return DeliveryFailedError(f"{PROVIDER} had no thread free", FailureKind.UNREACHABLE)
            return await result
        finally:
            # If the caller was cancelled, a message that still waits for a thread is not sent.
            job.cancel()

    def _send(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        """Send from a thread, and return the failure.

        An exception that is no longer awaited would be logged by asyncio.
        """
        try:
            service = self._build_service(self._address(message.destination))
            if service is None:
                return DeliveryFailedError(f"{PROVIDER} does not understand the destination")
            # A service never retries, even if its URL asks for it; `Apprise.notify` would.
            title = message.subject if self._channel is Channel.EMAIL else ""
            if service.notify(body=message.text, title=title, body_format=self._apprise.NotifyFormat.TEXT):
                return None
        except Exception as error:  # noqa: BLE001 - services raise errors of any type
            return uncertain_error(PROVIDER, error)
        return DeliveryUncertainError(f"{PROVIDER} did not report that the message was accepted")

    def _address(self, destination: str) -> str:
        """Return a destination in the form that providers accept.

        An e-mail address has its domain in ASCII.
        """
        address = emails.read(destination) if self._channel is Channel.EMAIL else None
        return destination if address is None else address.envelope

    def _build_service(self, destination: str) -> Any:
        """Return a service for one destination, or None if Apprise does not understand it."""
        url = self._url.replace(DESTINATION, quote(destination, safe=""))
        return self._apprise.Apprise.instantiate(url, asset=self._asset)


def _import_apprise(setting: str) -> Any:
    """Import Apprise, which is an optional dependency, and mute its loggers."""
    try:
        library = importlib.import_module("apprise")
    except ImportError:
        raise SettingError(f"{setting}: Apprise is not installed; pip install 'pointbook[apprise]'") from None
    for name in LEAKY_LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    return library
