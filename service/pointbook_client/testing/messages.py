"""The messages that the server has captured instead of sending them."""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class DeliveryFailure(StrEnum):
    """How the delivery of messages fails."""

    REFUSED = "REFUSED"
    """The provider refuses the message, which does not arrive. It costs no cooldown."""
    UNCERTAIN = "UNCERTAIN"
    """The message arrives, but the answer of the provider is lost. Its code is valid."""


@dataclass(frozen=True, slots=True)
class CapturedMessage:
    """A message that was captured instead of sent."""

    merchant_id: str
    channel: str
    """SMS or EMAIL."""
    to: str
    """The mobile number in E.164, or the e-mail address."""
    subject: str
    """The subject of an e-mail: the program's name."""
    text: str
    code: str
    """The one-time code in the text."""
    challenge_id: str


def read_messages(file: Path, merchant_id: str) -> list[CapturedMessage]:
    """Return a merchant's messages in the order in which they were sent."""
    lines = file.read_text().splitlines() if file.exists() else []
    messages = [CapturedMessage(**json.loads(line)) for line in lines]
    return [message for message in messages if message.merchant_id == merchant_id]
