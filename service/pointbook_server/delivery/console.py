"""A sender for development: it prints codes on the terminal of `pointbook dev`."""

import sys

from pointbook_server.delivery.sender import Message


class ConsoleSender:
    """A sender that prints messages; it needs no destination."""

    needs_destination = False

    async def send(self, message: Message) -> None:
        """Print a message on standard error."""
        print(f"message (challenge {message.challenge_id}): {message.text}", file=sys.stderr, flush=True)  # noqa: T201 - printing is its job
