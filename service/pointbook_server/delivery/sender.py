"""What a way of delivering one-time codes must offer, and what becomes of a message that does not arrive.

Every failure is one of three, and this is the only place that says which:

- *Refused*: the provider answered that it will not take the message. Definite.
- *Unreachable*: the attempt ended before the message was handed over (no connection, a wrong certificate, nobody free
  in time), so nothing can have been sent. Definite.
- *Uncertain*: everything else. The message was handed over and no answer came, the connection was lost while one was
  awaited, or the answer leaves it open. It may have arrived, so it is never sent again blindly.

The definite ones are a DeliveryFailedError, which costs no cooldown; whatever else a sender raises is uncertain. Our
senders raise nothing but the two errors below, whose texts are our own words, and without a context: the errors of
libraries quote addresses, URLs and what providers answer.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

READY_SECONDS = 4.0
"""How long an attempt may take until its message is handed over: less than any caller waits for a delivery, so that a
provider who cannot be reached is a definite failure."""
ANSWER_SECONDS = 10.0
"""How long a sender waits for an answer where its caller waits even longer."""


class FailureKind(StrEnum):
    """Why a message was definitely not sent."""

    REFUSED = "REFUSED"
    UNREACHABLE = "UNREACHABLE"


class DeliveryFailedError(Exception):
    """The provider definitely did not take the message. Its text is logged, so it must not quote the message."""

    def __init__(self, text: str, kind: FailureKind = FailureKind.REFUSED) -> None:
        super().__init__(text)
        self.kind = kind


class DeliveryUncertainError(Exception):
    """Nobody knows whether the provider took the message. Its text is logged, so it must not quote the message."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message to one customer. `destination` is empty where the sender needs none; `subject` is for e-mail.

    Its repr tells nothing of what it says, and to whom.
    """

    destination: str = field(repr=False)
    text: str = field(repr=False)
    challenge_id: str
    subject: str = field(default="", repr=False)


class Sender(Protocol):
    """Delivers messages of one channel."""

    needs_destination: bool

    async def send(self, message: Message) -> None:
        """Deliver a message.

        Raises DeliveryFailedError when the provider definitely did not take it; after any other exception, or a
        timeout, nobody knows.
        """


@runtime_checkable
class HoldsResources(Protocol):
    """A sender that has something to give back when the server stops."""

    async def aclose(self) -> None:
        """Give everything back; what is still on its way is cut."""


def unreachable(provider: str, error: Exception) -> DeliveryFailedError:
    """Tell that nothing can have been sent, and by which type of error."""
    return DeliveryFailedError(f"{provider} could not be reached ({_cause(error)})", FailureKind.UNREACHABLE)


def refused(provider: str, status: int) -> DeliveryFailedError:
    """Tell that a provider refused a message, and by which status."""
    return DeliveryFailedError(f"{provider} refused the message with status {status}", FailureKind.REFUSED)


def uncertain(provider: str, error: Exception) -> DeliveryUncertainError:
    """Tell that a message was handed over and never answered, and by which type of error."""
    return DeliveryUncertainError(f"{provider} did not answer ({_cause(error)})")


def _cause(error: BaseException) -> str:
    """Name the type of the first error, which tells an operator more than what a library made of it."""
    while isinstance(cause := error.__cause__ or error.__context__, Exception):
        error = cause
    return type(error).__name__
