"""A sender that stores the messages of one-time codes instead of sending them."""

from dataclasses import dataclass, field

from pointbook_server.delivery.sender import Message


@dataclass
class Outbox:
    """A sender that stores its messages, or raises `error` if it is set."""

    needs_destination: bool = False
    messages: list[Message] = field(default_factory=list)
    error: Exception | None = None

    async def send(self, message: Message) -> None:
        """Store a message, or raise `error`."""
        if self.error is not None:
            raise self.error
        self.messages.append(message)
