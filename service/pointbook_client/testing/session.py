"""The database and the server of a test session."""

import shutil
import tempfile
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pointbook_client.testing.errors import PointbookTestingError
from pointbook_client.testing.folders import fastest_place
from pointbook_client.testing.messages import CapturedMessage, DeliveryFailure, read_messages
from pointbook_client.testing.options import PointbookOptions
from pointbook_client.testing.ports import free_port
from pointbook_client.testing.processes import ChildProcess

_START_ATTEMPTS = 5


class PointbookSession:
    """A server and its database, in two processes, so that a test can kill the server."""

    def __init__(self, options: PointbookOptions) -> None:
        """Start both. Raises PointbookTestingError if that fails; nothing is left then."""
        if find_spec("pointbook_server") is None:
            raise PointbookTestingError("the server is not installed: pip install 'pointbook-client[testing]'")
        self._options = options
        # The database's process deletes it, also if this process is killed.
        self._folder = Path(tempfile.mkdtemp(prefix="pointbook-testing-", dir=fastest_place()))
        self._messages_file = self._folder / "messages.jsonl"
        self._server_log = self._folder / "server.log"
        self._offset = timedelta()
        self.admin_token = ""
        self._database = ChildProcess(
            "pointbook_client.testing.database_process", str(self._folder), log=self._folder / "database.log"
        )
        self._server = self._spawn_server()
        try:
            self._database_url = self._create_database()
            self.port = self._start_on_a_free_port()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """The address of the server, which stays the same after a restart."""
        return f"127.0.0.1:{self.port}"

    @property
    def log_size(self) -> int:
        """The size of the server's log so far, in bytes."""
        return self._server_log.stat().st_size

    def read_log(self, start: int) -> str:
        """Return the log of the server from a byte on, that of killed servers included."""
        with self._server_log.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def check_server(self) -> None:
        """Raise PointbookTestingError if the server does not run."""
        if not self._server.is_running:
            raise PointbookTestingError("the server has ended: call `restart` first")

    def begin_test(self) -> None:
        """Return to the real time and to deliveries that succeed, on a running server."""
        self._offset = timedelta()
        if not self._server.is_running:
            self.restart()
        self.set_clock(self._offset)
        self.fail_deliveries(None, None)

    def set_clock(self, offset: timedelta) -> None:
        """Move the server's clock ahead of the real time.

        The clock of a server that was killed moves at its restart.
        """
        self._offset = offset
        if self._server.is_running:
            self._server.request("set_clock", offset_ms=offset // timedelta(milliseconds=1))

    def fail_deliveries(self, failure: DeliveryFailure | None, count: int | None) -> None:
        """Fail the next `count` messages, or all further ones; None ends it."""
        self.check_server()
        self._server.request("fail_deliveries", failure=None if failure is None else failure.value, count=count)

    def messages(self, merchant_id: str) -> list[CapturedMessage]:
        """Return the messages of a merchant, the oldest first."""
        return read_messages(self._messages_file, merchant_id)

    def create_token(self, merchants: list[str] | None = None, scopes: list[str] | None = None) -> str:
        """Create a token, by default for all merchants and with all scopes."""
        self.check_server()
        reply = self._server.request(
            "create_token", database_url=self._database_url, merchants=merchants, scopes=scopes
        )
        return str(reply["token"])

    def kill(self) -> None:
        """Kill the server as in a crash."""
        self._server.kill()

    def restart(self) -> None:
        """Start a killed server on the same port and data; kill a running one first.

        Raises PointbookTestingError if it cannot start; it can be restarted again then.
        """
        if self._server.is_running:
            self._server.kill()
        self._server = self._spawn_server()
        try:
            self._start_server(self.port)
        except BaseException:
            self._server.kill()  # Calls would wait for it, and the next test would not restart it.
            raise
        self.set_clock(self._offset)

    def close(self) -> None:
        """Stop both processes, and delete the data."""
        self._server.kill()
        self._database.stop()
        if self._folder.exists():  # The process of the database has failed.
            shutil.rmtree(self._folder)

    def _spawn_server(self) -> ChildProcess:
        return ChildProcess("pointbook_client.testing.server_process", log=self._server_log)

    def _create_database(self) -> str:
        """Start the database and create its tables; return its URL.

        The process of the server imports its modules meanwhile.
        """
        url = str(self._database.request("start")["url"])
        self._server.request("migrate", database_url=url)
        return url

    def _start_on_a_free_port(self) -> int:
        """Start the server, and return its port.

        Another process may take a free port first.
        """
        if self._options.tokens:
            self.admin_token = self.create_token()
        for _ in range(_START_ATTEMPTS - 1):
            port = free_port()
            try:
                self._start_server(port)
            except PointbookTestingError as error:
                if "cannot listen" not in str(error):
                    raise
            else:
                return port
        port = free_port()
        self._start_server(port)
        return port

    def _start_server(self, port: int) -> None:
        parameters: dict[str, Any] = {
            "database_url": self._database_url,
            "messages_file": str(self._messages_file),
            "port": port,
            "tokens": self._options.tokens,
            "settings": dict(self._options.settings),
        }
        self._server.request("start", **parameters)
