"""examples/java: its build, and the checkout against a server."""

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.certificates import Authority
from support.clients import Client
from support.probes import grpc_health, http_get
from support.processes import BIN, ROOT, Finished, Running, clean_environment, finish, pointbook, running
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

MERCHANT_ID = "2000001234"
STORE_ID = "1718263946864"
EXAMPLE = Path("examples", "java")
SOURCES = ("buf.yaml", "deploy", "proto")
JAVA_RELEASE_MIN = 17
JAVA_VARIABLES = ("JAVA_HOME", "MAVEN_ARGS", "MAVEN_OPTS")
BUILD_SECONDS_MAX = 480.0
CHECKOUT_SECONDS_MAX = 60.0
UNREACHABLE = re.compile(r".*(?:Could not (?:transfer|resolve|find)|Unknown host|was not found in).*")
"""What Maven prints when it cannot fetch an artifact."""


def java_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return a clean environment with the developer's choice of Java."""
    chosen = {name: os.environ[name] for name in JAVA_VARIABLES if name in os.environ}
    return clean_environment(settings) | chosen


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock that the processes of a parallel run share."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def require_java() -> None:
    """Skip the tests without a Maven that runs on a new enough Java."""
    if shutil.which("mvn") is None:
        pytest.skip("Maven is not installed")
    version = await finish("mvn", "--version", environment=java_environment({}))
    release = re.search(r"Java version: (\d+)", version.out)
    if release is None or int(release.group(1)) < JAVA_RELEASE_MIN:
        pytest.skip(f"Maven needs Java {JAVA_RELEASE_MIN} or later: {version}")


async def build(root: Path) -> None:
    """Build a copy of the example as its README states.

    Skips the tests if Maven cannot fetch what that takes.
    """
    shutil.copytree(ROOT / EXAMPLE, root / EXAMPLE, ignore=shutil.ignore_patterns("target"))
    for name in SOURCES:
        (root / name).symlink_to(ROOT / name)
    (root / ".venv").symlink_to(BIN.parent)
    command = ("mvn", "--quiet", "--batch-mode", "package")
    try:
        built = await finish(*command, environment=java_environment({}), cwd=root / EXAMPLE, seconds=BUILD_SECONDS_MAX)
    except TimeoutError:
        pytest.skip(f"Maven has not built the example within {BUILD_SECONDS_MAX} s")
    if built.exit_code != 0 and (unreachable := UNREACHABLE.search(built.out + built.err)):
        pytest.skip(f"Maven cannot fetch an artifact: {unreachable.group()}")
    assert built.exit_code == 0, built


@pytest.fixture(scope="module")
async def jar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built example, for all processes of a parallel run."""
    await require_java()
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    root = shared / "java-example"
    built = root / EXAMPLE / "target" / "checkout.jar"
    with locked(shared / "java-example.lock"):
        if not built.exists():
            shutil.rmtree(root, ignore_errors=True)
            await build(root)
    return built


@dataclass
class Dev:
    """A running `pointbook dev`."""

    process: Running
    settings: dict[str, str]

    @property
    def address(self) -> str:
        """The address of its gRPC server."""
        return self.settings["GRPC_ADDRESS"]

    async def give_points(self, buyer_id: str, points: int = 250) -> None:
        """Send a webhook that gives a buyer points."""
        amounts = ("--value", str(points), "--balance", str(points))
        url = f"http://{self.settings['HTTP_ADDRESS']}/webhooks/shopline"
        sent = await pointbook("webhook", "send", "--url", url, "--buyer", buyer_id, *amounts)
        assert sent.exit_code == 0, sent

    async def code_of(self, challenge_id: str) -> str:
        """Return the code that the terminal shows for a challenge."""
        await self.process.printed(challenge_id)
        message = re.search(rf"message \(challenge {challenge_id}\): .*?\b(\d{{6}})\b", self.process.err)
        assert message is not None, self.process.err
        return message.group(1)

    async def redemptions(self, buyer_id: str) -> list[redemption_pb2.Redemption]:
        """Return a buyer's redemptions, newest first."""
        client = Client(int(self.address.rpartition(":")[2]))
        buyer = identity_pb2.Buyer(store_id=STORE_ID, buyer_id=buyer_id)
        customer = identity_pb2.CustomerRef(merchant_id=MERCHANT_ID, buyer=buyer)
        request = redemption_pb2.ListRedemptionsRequest(merchant_id=MERCHANT_ID, customer=customer)
        response = await client.redemption.ListRedemptions(request)
        await client.close()
        return list(response.redemptions)


@contextlib.asynccontextmanager
async def running_dev(folder: Path, settings: dict[str, str]) -> AsyncIterator[Dev]:
    """Run `pointbook dev` during the block, then kill it."""
    async with running("dev", folder=folder, settings=settings) as process:
        await process.printed("Pointbook is ready")

        async def is_ready() -> bool:
            is_listening = await http_get(f"http://{settings['HTTP_ADDRESS']}/readyz") == 200
            return is_listening and await grpc_health(settings["GRPC_ADDRESS"]) == "SERVING"

        await process.until(is_ready)
        yield Dev(process, settings)


def dev_settings(folder: Path) -> dict[str, str]:
    """Return the settings of a `pointbook dev` whose addresses survive a restart."""
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("GRPC_ADDRESS", "HTTP_ADDRESS")}
    return {"DATA_DIR": str(folder / "data"), **addresses}


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Dev]:
    """One `pointbook dev` for tests that use buyers of their own."""
    folder = tmp_path_factory.mktemp("dev")
    async with running_dev(folder, dev_settings(folder)) as started:
        yield started
        await started.process.stop(signal.SIGINT)


@dataclass
class Checkout:
    """A running checkout, whose terminal the test reads and types into."""

    process: asyncio.subprocess.Process
    out: str = ""

    @classmethod
    async def start(cls, jar: Path, *arguments: str, **settings: str) -> Self:
        """Start a checkout with some options."""
        command = ("java", "-jar", str(jar), *arguments)
        environment = java_environment(settings)
        return cls(
            await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)
        )

    async def read(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches a pattern."""
        assert self.process.stdout is not None
        async with asyncio.timeout(CHECKOUT_SECONDS_MAX):
            while not (match := re.search(pattern, self.out)):
                read = await self.process.stdout.read(4096)
                assert read, f"no {pattern} in {self.out}"
                self.out += read.decode()
        return match

    async def challenge(self) -> str:
        """Wait for the prompt, and return the id of the challenge whose code it asks for."""
        await self.read("code that the customer says: $")
        return (await self.read(r"code sent, challenge (\S+)\n")).group(1)

    def say(self, code: str) -> None:
        """Type a code."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{code}\n".encode())

    async def end(self) -> Finished:
        """Close the input, and return what it has printed once it has ended."""
        try:
            async with asyncio.timeout(CHECKOUT_SECONDS_MAX):
                out, err = await self.process.communicate()
        finally:
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()
        assert self.process.returncode is not None
        return Finished(self.process.returncode, self.out + out.decode(), err.decode())


async def run_checkout(jar: Path, dev: Dev, *arguments: str) -> Finished:
    """Run a checkout whose customer says the right code."""
    checkout = await Checkout.start(jar, *arguments, GRPC_ADDRESS=dev.address)
    checkout.say(await dev.code_of(await checkout.challenge()))
    return await checkout.end()


def order_of(out: str) -> str:
    """Return the order that a checkout printed."""
    match = re.search(r"^redeeming as (order-\S+);", out, re.MULTILINE)
    assert match is not None, out
    return match.group(1)


def redemption_of(finished: Finished) -> str:
    """Return the id of the redemption of a checkout that succeeded."""
    assert (finished.exit_code, finished.err) == (0, ""), finished
    (redemption_id,) = re.findall(r"\bredeemed (\S+): 10 points", finished.out)
    assert isinstance(redemption_id, str)
    return redemption_id


async def test_a_checkout_validates_redeems_reverses_and_lists(jar: Path, dev: Dev) -> None:
    buyer_id = unique("buyer")
    await dev.give_points(buyer_id)

    finished = await run_checkout(jar, dev, "--buyer", buyer_id)

    redemption_id, order = redemption_of(finished), order_of(finished.out)
    validated, code, redeeming, *results = finished.out.splitlines()
    assert validated == "10 of 250 points may be redeemed, worth 0.10"
    assert code.startswith("code sent, challenge ")
    assert redeeming == f"redeeming as {order}; after a crash, go on with --order {order}"
    assert results == [
        f"code that the customer says: redeemed {redemption_id}: 10 points, 0 reversed, PENDING, {order}",
        f"reversed {redemption_id}: 10 points, 10 reversed, REVERSED, {order}",
        f"listed {redemption_id}: 10 points, 10 reversed, REVERSED, {order}",
    ]


async def test_an_earlier_order_returns_its_redemption_without_a_code(jar: Path, dev: Dev) -> None:
    buyer_id = unique("buyer")
    await dev.give_points(buyer_id)
    first = await run_checkout(jar, dev, "--buyer", buyer_id)
    again = await Checkout.start(jar, "--buyer", buyer_id, "--order", order_of(first.out), GRPC_ADDRESS=dev.address)

    repeated = await again.end()

    assert redemption_of(repeated) == redemption_of(first)
    (stored,) = await dev.redemptions(buyer_id)
    assert (stored.points, stored.reversed_points) == (10, 10)


async def test_the_list_has_all_pages(jar: Path, dev: Dev) -> None:
    buyer_id = unique("buyer")
    await dev.give_points(buyer_id)
    runs = [await run_checkout(jar, dev, "--buyer", buyer_id, "--page-size", "1") for _ in range(3)]

    listed = re.findall(r"^listed (\S+):", runs[-1].out, re.MULTILINE)

    assert listed == [redemption_of(each) for each in reversed(runs)]


async def test_a_refusal_prints_every_violation(jar: Path, dev: Dev) -> None:
    buyer_id = unique("buyer")
    await dev.give_points(buyer_id)

    refused = await (await Checkout.start(jar, "--buyer", buyer_id, "--points", "255", GRPC_ADDRESS=dev.address)).end()

    assert (refused.exit_code, refused.err) == (1, "")
    headline, *violations = refused.out.splitlines()
    assert headline == "255 points may not be redeemed:"
    assert [violation.partition(":")[0] for violation in violations] == [
        "  803 INSUFFICIENT_POINTS",
        "  807 NOT_A_MULTIPLE",
        "  819 ABOVE_MAX_PER_REDEMPTION",
    ]


async def test_a_wrong_field_is_named_with_the_request_id(jar: Path, dev: Dev) -> None:
    failed = await (await Checkout.start(jar, "--merchant", "two words", GRPC_ADDRESS=dev.address)).end()

    assert (failed.exit_code, failed.out) == (1, "")
    error, violation = failed.err.splitlines()
    request_id = re.fullmatch(r"INVALID_FIELDS: .* \(request (\S+)\)", error)
    assert request_id is not None, error
    assert violation.startswith("  customer.merchant_id: ")
    await dev.process.printed(request_id.group(1))


async def test_a_wrong_code_is_asked_again(jar: Path, dev: Dev) -> None:
    buyer_id = unique("buyer")
    await dev.give_points(buyer_id)
    checkout = await Checkout.start(jar, "--buyer", buyer_id, GRPC_ADDRESS=dev.address)
    code = await dev.code_of(await checkout.challenge())

    checkout.say(f"{int(code) ^ 1:06}")
    await checkout.read(r"CODE_INVALID: .* status_code=808 (?s:.*)code that the customer says: $")
    checkout.say(code)

    assert redemption_of(await checkout.end())


class WithholdingProxy:
    """Forwards a port to a server, and can withhold the answers."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._connections: list[tuple[asyncio.StreamWriter, asyncio.Event]] = []
        self.withheld_bytes = 0

    async def listen(self) -> asyncio.Server:
        """Start to accept connections."""
        return await asyncio.start_server(self._forward, self._host, 0)

    def withhold(self) -> None:
        """Withhold the answers of the connections that are open; pass on requests."""
        for _, is_withheld in self._connections:
            is_withheld.set()

    def cut(self) -> None:
        """Break the connections whose answers are withheld."""
        for writer, is_withheld in self._connections:
            if is_withheld.is_set():
                writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
        is_withheld = asyncio.Event()
        self._connections.append((writer, is_withheld))
        await asyncio.gather(
            self._pump(reader, server_writer, asyncio.Event()), self._pump(server_reader, writer, is_withheld)
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_withheld: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if is_withheld.is_set():
                    self.withheld_bytes += len(data)
                else:
                    writer.write(data)
                    await writer.drain()
        writer.close()


async def test_a_lost_answer_redeems_once(jar: Path, dev: Dev) -> None:
    buyer_id = unique("buyer")
    await dev.give_points(buyer_id)
    proxy = WithholdingProxy(dev.address)
    async with await proxy.listen() as listener:
        port = listener.sockets[0].getsockname()[1]
        checkout = await Checkout.start(jar, "--buyer", buyer_id, GRPC_ADDRESS=f"127.0.0.1:{port}")
        code = await dev.code_of(await checkout.challenge())

        proxy.withhold()
        checkout.say(code)

        async def is_redeemed() -> bool:
            return bool(await dev.redemptions(buyer_id))

        await until(is_redeemed)
        await until(lambda: proxy.withheld_bytes > 0)
        proxy.cut()
        finished = await checkout.end()

    (stored,) = await dev.redemptions(buyer_id)
    assert stored.redemption_id == redemption_of(finished)


async def test_a_checkout_survives_a_killed_server(jar: Path, tmp_path: Path) -> None:
    buyer_id, settings = unique("buyer"), dev_settings(tmp_path)
    async with running_dev(tmp_path, settings) as dev:
        await dev.give_points(buyer_id)
        checkout = await Checkout.start(jar, "--buyer", buyer_id, GRPC_ADDRESS=dev.address)
        code = await dev.code_of(await checkout.challenge())
        await dev.process.kill()
    checkout.say(code)

    async with running_dev(tmp_path, settings) as dev:
        finished = await checkout.end()
        (stored,) = await dev.redemptions(buyer_id)
        await dev.process.stop(signal.SIGINT)

    assert stored.redemption_id == redemption_of(finished)


async def test_a_token_and_a_certificate_are_sent_over_tls_only(jar: Path, database_url: str, tmp_path: Path) -> None:
    authority, address = Authority(), f"127.0.0.1:{free_port()}"
    ca_file = tmp_path / "ca.crt"
    ca_file.write_bytes(authority.pem)
    cert, key = authority.issue("server").write(tmp_path, "server")
    server = {"TLS_CERT_FILE": str(cert), "TLS_KEY_FILE": str(key), "TLS_CLIENT_CA_FILE": str(ca_file)}
    cert, key = authority.issue("till").write(tmp_path, "till")
    token = await make_token(database_url, [ALL_MERCHANTS], [Scope.REDEEM], client_names=["till"])
    plain = {"GRPC_ADDRESS": address, "TOKEN": token}
    tls = {"SERVER_CA_FILE": str(ca_file), "CLIENT_CERT_FILE": str(cert), "CLIENT_KEY_FILE": str(key)}
    settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": address, **server}
    async with running("serve", folder=tmp_path, settings=settings) as process:
        await process.printed('"serving"')
        authenticated = await (await Checkout.start(jar, **plain, **tls)).end()
        await process.stop()

    refused = await (await Checkout.start(jar, **plain)).end()

    assert "  1101 PROGRAM_NOT_FOUND: " in authenticated.out, authenticated
    assert (refused.exit_code, refused.out) == (2, "")
    assert "POINTBOOK_SERVER_CA_FILE" in refused.err
    assert token not in refused.err
