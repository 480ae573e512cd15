"""The process of the tests' server.

`python -m pointbook_client.testing.server_process PARENT` runs the server of production with a clock that its parent
moves and with senders that capture messages. The parent asks for both over standard input, so that no client of the
server can.
"""

import base64
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import uvloop
from pydantic import SecretStr

from pointbook_client.testing.messages import CapturedMessage, DeliveryFailure
from pointbook_client.testing.requests import serve_requests
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import new_token
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.clock import system_clock
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.migrations import migrate
from pointbook_server.delivery.sender import DeliveryFailedError, DeliveryUncertainError, Message
from pointbook_server.logs import configure_logs
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from pointbook_server.settings import KEY_BYTES, ServerSettings

_CODE_KEY = SecretStr(base64.b64encode(b"c" * KEY_BYTES).decode())
_QUARANTINE_KEY = SecretStr(base64.b64encode(b"q" * KEY_BYTES).decode())
"""The keys are the same after each restart, so that codes and webhooks from before it stay readable."""


class MovableClock:
    """The real time, moved by an offset.

    The database runs on this machine and has the same time, so the check of the clocks always succeeds.
    """

    def __init__(self) -> None:
        self.offset_ms = 0

    def __call__(self) -> int:
        """Return the server's time, in milliseconds since 1970 (UTC)."""
        return system_clock() + self.offset_ms

    async def read_database(self, _connection: Connection) -> int:
        """Return the database's time, which is the server's."""
        return self()


class InjectedFailures:
    """The failures of the next messages, of all channels together."""

    def __init__(self) -> None:
        self._failure: DeliveryFailure | None = None
        self._left: int | None = None

    def set(self, failure: DeliveryFailure | None, count: int | None) -> None:
        """Fail the next `count` messages, or all further ones; None ends it."""
        self._failure, self._left = failure, count

    def take(self) -> DeliveryFailure | None:
        """Return how the next message fails, and count it."""
        if self._left is not None:
            if self._left == 0:
                return None
            self._left -= 1
        return self._failure


class CapturingSender:
    """A sender that appends messages to a file, or fails.

    The message is in the file before the caller gets a response, and stays there if the server is killed.
    """

    needs_destination = True

    def __init__(self, channel: Channel, file: int, failures: InjectedFailures) -> None:
        self._channel = channel
        self._file = file
        self._failures = failures

    async def send(self, message: Message) -> None:
        """Capture a message.

        Raises DeliveryFailedError without capturing it, and DeliveryUncertainError after it.
        """
        failure = self._failures.take()
        if failure is DeliveryFailure.REFUSED:
            raise DeliveryFailedError("the test refuses this message")
        captured = CapturedMessage(
            merchant_id=message.merchant_id,
            channel=self._channel.value,
            to=message.destination,
            subject=message.subject,
            text=message.text,
            code=message.code,
            challenge_id=message.challenge_id,
        )
        os.write(self._file, json.dumps(asdict(captured)).encode() + b"\n")
        if failure is DeliveryFailure.UNCERTAIN:
            raise DeliveryUncertainError("the test loses the answer to this message")


class ServerProcess:
    """A server that its parent controls."""

    def __init__(self) -> None:
        self._clock = MovableClock()
        self._failures = InjectedFailures()
        self._server: Server | None = None
        self._database: Database | None = None

    async def migrate(self, database_url: str) -> dict[str, Any]:
        """Create the tables of a new database."""
        await migrate(database_url)
        return {}

    async def create_token(
        self, database_url: str, merchants: list[str] | None, scopes: list[str] | None
    ) -> dict[str, Any]:
        """Create a token, by default for all merchants and with all scopes."""
        if self._database is None:
            self._database = Database(database_url, pool_size=1)
        allowed = list(Scope) if scopes is None else [Scope(scope) for scope in scopes]
        token, bearer = new_token("testing", merchants or [ALL_MERCHANTS], allowed, self._clock(), None)
        await TokenTransactions(self._database).create(token)
        return {"token": bearer}

    async def start(
        self, database_url: str, messages_file: str, port: int, *, tokens: bool, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Start the server on a port of loopback."""
        file = os.open(messages_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        senders = {channel: CapturingSender(channel, file, self._failures) for channel in (Channel.SMS, Channel.EMAIL)}
        values: dict[str, Any] = {
            "code_keys": {"testing": _CODE_KEY},
            "quarantine_keys": {"testing": _QUARANTINE_KEY},
            **settings,
            "grpc_address": f"127.0.0.1:{port}",
        }
        self._server = Server(
            ServerSettings(**values), database_url, senders=senders, development=not tokens, clock=self._clock
        )
        await self._server.start()
        return {}

    async def set_clock(self, offset_ms: int) -> dict[str, Any]:
        """Move the clock, and do what has become due."""
        was_moved = offset_ms > self._clock.offset_ms
        self._clock.offset_ms = offset_ms
        if was_moved and self._server is not None:
            await self._server.maintenance.run_jobs()
        return {}

    async def fail_deliveries(self, failure: str | None, count: int | None) -> dict[str, Any]:
        """Fail the next messages; no failure ends it."""
        self._failures.set(None if failure is None else DeliveryFailure(failure), count)
        return {}


async def run(parent: int) -> None:
    """Serve the parent's requests until its end."""
    process = ServerProcess()
    await serve_requests(
        parent,
        {
            "migrate": process.migrate,
            "create_token": process.create_token,
            "start": process.start,
            "set_clock": process.set_clock,
            "fail_deliveries": process.fail_deliveries,
        },
    )
    # The database ends with the parent too, so a clean end would preserve nothing.
    os._exit(0)


if __name__ == "__main__":
    configure_logs("INFO", json=False)
    uvloop.run(run(int(sys.argv[1])))
