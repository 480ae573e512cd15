"""The interface of senders, and the outcomes of an attempt to deliver a message.

An attempt fails in one of three ways, which only this module decides:

- *Refused*: the provider answered that it does not accept the message. Definite.
- *Unreachable*: the attempt ended before the message was handed over (no connection, a wrong certificate, no free
  connection or thread in time), so nothing was sent. Definite.
- *Uncertain*: everything else, such as a message that was handed over and not answered, a connection lost while waiting
  for the answer, or an ambiguous answer. The message may have arrived, so it is not sent again.

A definite failure is a DeliveryFailedError and costs no cooldown; any other exception of a sender is uncertain. The
senders here raise only the two errors below, with a text of our own and without a cause: errors of libraries quote
addresses, URLs and providers' answers.

Source: docs/reference/validation-codes.md#delivery
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

HANDOVER_TIMEOUT_SECONDS = 4.0
"""The time until a message must be handed over. It is shorter than the time that callers wait for a delivery, so that
an unreachable provider is a definite failure."""
RESPONSE_TIMEOUT_SECONDS = 10.0
"""The time that a sender waits for an answer if its caller waits longer."""


class FailureKind(StrEnum):
    """Why a message was definitely not sent."""

    REFUSED = "REFUSED"
    UNREACHABLE = "UNREACHABLE"


class DeliveryFailedError(Exception):
    """The provider definitely did not accept the message.

    The text is logged, so it must not quote the message.
    """

    def __init__(self, text: str, kind: FailureKind = FailureKind.REFUSED) -> None:
        super().__init__(text)
        self.kind = kind


class DeliveryUncertainError(Exception):
    """The provider may have accepted the message.

    The text is logged, so it must not quote the message.
    """


@dataclass(frozen=True, slots=True)
class Message:
    """A message to one customer; its repr shows neither the destination nor the text.

    `destination` is empty if the sender needs none; `subject` is for e-mail. `code` is the code in the text, and
    `merchant_id` the merchant who sends it, for senders that need them apart, such as the one of the testing kit.
    """

    destination: str = field(repr=False)
    text: str = field(repr=False)
    challenge_id: str
    subject: str = field(default="", repr=False)
    code: str = field(default="", repr=False)
    merchant_id: str = field(default="", repr=False)


class Sender(Protocol):
    """A sender of the messages of one channel."""

    needs_destination: bool

    async def send(self, message: Message) -> None:
        """Deliver a message.

        Raises DeliveryFailedError if the provider definitely did not accept it. After any other exception, or a
        timeout, it may have arrived.
        """


@runtime_checkable
class ClosableSender(Protocol):
    """A sender with resources to release when the server stops."""

    async def aclose(self) -> None:
        """Release all resources; messages in flight are cut off."""


def unreachable_error(provider: str, error: Exception) -> DeliveryFailedError:
    """Return the error for a message that was not handed over."""
    return DeliveryFailedError(f"{provider} could not be reached ({_root_cause_name(error)})", FailureKind.UNREACHABLE)


def refused_error(provider: str, status: int) -> DeliveryFailedError:
    """Return the error for a message that a provider refused, with the status."""
    return DeliveryFailedError(f"{provider} refused the message with status {status}", FailureKind.REFUSED)


def uncertain_error(provider: str, error: Exception) -> DeliveryUncertainError:
    """Return the error for a message that was handed over and not answered."""
    return DeliveryUncertainError(f"{provider} did not answer ({_root_cause_name(error)})")


def _root_cause_name(error: BaseException) -> str:
    """Return the type of the first error of a chain.

    It says more than the error in which a library wrapped it.
    """
    while isinstance(cause := error.__cause__ or error.__context__, Exception):
        error = cause
    return type(error).__name__
