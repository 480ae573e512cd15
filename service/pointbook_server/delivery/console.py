"""The console sender, for development only: codes appear where `pointbook dev` runs."""

import sys

from pointbook_server.delivery.sender import Message


class ConsoleSender:
    """Prints messages instead of sending them, so it needs no destination."""

    needs_destination = False

    async def send(self, message: Message) -> None:
        """Print a message."""
        print(f"message (challenge {message.challenge_id}): {message.text}", file=sys.stderr, flush=True)  # noqa: T201 - the console is where it delivers
