"""What a way of delivering one-time codes must offer."""

from dataclasses import dataclass
from typing import Protocol


class DeliveryFailedError(Exception):
    """The provider definitely did not take the message. Its text is logged, so it must not quote the message."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message to one customer. `destination` is empty where the sender needs none."""

    destination: str
    text: str
    challenge_id: str


class Sender(Protocol):
    """Delivers messages of one channel."""

    needs_destination: bool

    async def send(self, message: Message) -> None:
        """Deliver a message.

        Raises DeliveryFailedError when the provider definitely did not take it; after any other exception, or a
        timeout, nobody knows.
        """
