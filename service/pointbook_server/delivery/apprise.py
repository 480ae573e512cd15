"""SMS and e-mail by Apprise, which knows a hundred providers. It is optional, and blocks: threads of our own run it."""

import asyncio
import importlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from pointbook_common.errors import SettingError
from pointbook_server.customers import emails
from pointbook_server.delivery.sender import (
    READY_SECONDS,
    DeliveryFailedError,
    DeliveryUncertainError,
    FailureKind,
    Message,
    uncertain,
)
from pointbook_server.programs.model import Channel
from pointbook_server.provider_settings import DESTINATION

THREADS_MAX = 8
PROVIDER = "Apprise"
SAMPLES = {Channel.SMS: "+12025550143", Channel.EMAIL: "someone@example.com"}
"""Destinations with which a URL is tried when the server starts; nothing is sent to them."""
LOGGERS = ("apprise", "urllib3", "requests", "requests_oauthlib", "oauthlib")
"""They log destinations, URLs with credentials in them and what providers answer, at every level."""


class AppriseSender:
    """Sends each message by an Apprise service of its own, whose URL has the destination in it.

    Apprise tells only whether a provider took a message, not whether it could have: a refusal, a provider that is away
    and a timeout are all False. So each of them is uncertain. Definite is only what never came to Apprise's provider.
    """

    needs_destination = True

    def __init__(self, setting: str, url: str, channel: Channel) -> None:
        self._url = url
        self._channel = channel
        self._apprise = _library(setting)
        # Redirects would carry codes to where nobody has sent them, and nothing is to be kept on disk.
        self._asset = self._apprise.AppriseAsset(http_redirects=False, storage_mode="memory")
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="apprise")
        if self._service(SAMPLES[channel]) is None:
            raise SettingError(f"{setting}: Apprise does not understand it")

    async def aclose(self) -> None:
        """Take no more messages. Those on their way end by Apprise's own timeouts."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def send(self, message: Message) -> None:
        """Send a message, as `Sender` says."""
        failure = await self._attempt(message)
        if failure is not None:
            raise failure

    async def _attempt(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        sending = self._threads.submit(self._send, message)
        sent = asyncio.wrap_future(sending)
        try:
            await asyncio.wait([sent], timeout=READY_SECONDS)
            # Only what no thread has begun can still be cancelled.
            if sending.cancel():
                return DeliveryFailedError(f"{PROVIDER} had no thread free", FailureKind.UNREACHABLE)
            return await sent
        finally:
            # What still waits for a thread when its caller leaves is never sent.
            sending.cancel()

    def _send(self, message: Message) -> DeliveryFailedError | DeliveryUncertainError | None:
        """Send in a thread. Nothing is raised there: asyncio logs errors that nobody waits for any more."""
        try:
            service = self._service(self._address(message.destination))
            if service is None:
                return DeliveryFailedError(f"{PROVIDER} does not understand the destination")
            # The service itself never tries again, whatever its URL says; `Apprise.notify` would.
            title = message.subject if self._channel is Channel.EMAIL else ""
            if service.notify(body=message.text, title=title, body_format=self._apprise.NotifyFormat.TEXT):
                return None
        except Exception as error:  # noqa: BLE001 - services raise what they like
            return uncertain(PROVIDER, error)
        return DeliveryUncertainError(f"{PROVIDER} does not know that the message was taken")

    def _address(self, destination: str) -> str:
        """Return a destination as providers take it: an e-mail address with its domain in ASCII."""
        address = emails.read(destination) if self._channel is Channel.EMAIL else None
        return destination if address is None else address.envelope

    def _service(self, destination: str) -> Any:
        """Make the service for one destination, or None where Apprise cannot."""
        url = self._url.replace(DESTINATION, quote(destination, safe=""))
        return self._apprise.Apprise.instantiate(url, asset=self._asset)


def _library(setting: str) -> Any:
    """Import Apprise, which is installed where it is wanted alone, and keep what it logs to itself."""
    try:
        library = importlib.import_module("apprise")
    except ImportError:
        raise SettingError(f"{setting}: Apprise is not installed; pip install 'pointbook[apprise]'") from None
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    return library
