"""The examples in Python, run against `pointbook dev` as printed but for the port."""

import asyncio
import re
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pointbook_client.testing.ports import free_port
from support.probes import grpc_health
from support.processes import ROOT, Running, clean_environment, pointbook, running
from support.unique_names import unique

EXAMPLES = ROOT / "examples/python"
QUICKSTART_LINES_MAX = 25
ANSWER_SECONDS_MAX = 30.0


@dataclass
class Dev:
    """A `pointbook dev` that can be killed and started again with its data."""

    folder: Path
    grpc_port: int
    http_port: int

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Running]:
        """Run it during the block, then kill it."""
        settings = {
            "DATA_DIR": str(self.folder / "data"),
            "GRPC_ADDRESS": self.address,
            "HTTP_ADDRESS": f"127.0.0.1:{self.http_port}",
        }
        async with running("dev", folder=self.folder, settings=settings) as process:
            await process.printed("Pointbook is ready")

            async def serving() -> bool:
                return await grpc_health(self.address) == "SERVING"

            await process.until(serving)
            yield process

    @property
    def address(self) -> str:
        """The address of the gRPC server."""
        return f"127.0.0.1:{self.grpc_port}"

    async def new_buyer(self) -> str:
        """Return the id of a new buyer with 20 points."""
        buyer_id = unique("buyer")
        url = f"http://127.0.0.1:{self.http_port}/webhooks/shopline"
        sent = await pointbook("webhook", "send", "--buyer", buyer_id, "--url", url)
        assert sent.exit_code == 0, sent
        return buyer_id


@pytest.fixture(scope="module")
async def shared_dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Dev, Running]]:
    """A running `pointbook dev`, for tests with buyers of their own."""
    dev = Dev(tmp_path_factory.mktemp("dev"), free_port(), free_port())
    async with dev.started() as process:
        yield dev, process


class Program:
    """A running example, whose prompts are answered."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.out = ""

    @classmethod
    async def start(cls, *command: str | Path) -> "Program":
        """Start an example."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-u", *command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, env=clean_environment({})
            )
        )

    async def until(self, text: str) -> None:
        """Read the output until it contains a text."""
        assert self.process.stdout is not None
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            while text not in self.out:
                chunk = await self.process.stdout.read(1_000)
                assert chunk, f"it ended without {text!r}: {self.out}"
                self.out += chunk.decode()

    def answer(self, line: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    async def end(self) -> int:
        """Read the output to its end, and return the exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            self.out += (await self.process.stdout.read()).decode()
            return await self.process.wait()


def after(label: str, output: str) -> str:
    """Return the word after a label."""
    match = re.search(rf"{label}:? (\S+)", output)
    assert match is not None, output
    return match[1]


def sent_codes(process: Running) -> list[str]:
    """Return the one-time codes that were printed."""
    return re.findall(r"message \(challenge [^)]+\): .*?\b(\d{6})\b", process.err)


def test_the_quickstart_is_short() -> None:
    lines = (EXAMPLES / "quickstart.py").read_text().splitlines()

    assert len(lines) <= QUICKSTART_LINES_MAX


async def test_the_quickstart_survives_a_killed_server(tmp_path: Path) -> None:
    dev = Dev(tmp_path, free_port(), free_port())
    program = tmp_path / "quickstart.py"
    program.write_text((EXAMPLES / "quickstart.py").read_text().replace("127.0.0.1:50051", dev.address))
    async with dev.started():
        example = await Program.start(program, await dev.new_buyer())
        await example.until("press Enter")
    example.answer("")
    async with dev.started():
        exit_code = await example.end()

    assert exit_code == 0, example.out
    assert after("redeemed", example.out) == after("the same", example.out)
    assert "reversed 10" in example.out


async def test_the_checkout_redeems_with_a_code(shared_dev: tuple[Dev, Running]) -> None:
    dev, process = shared_dev
    codes_before = sent_codes(process)
    example = await Program.start(EXAMPLES / "checkout.py", await dev.new_buyer(), "--address", dev.address)
    await example.until("customer says")
    (code,) = sent_codes(process)[len(codes_before) :]
    example.answer(code)
    exit_code = await example.end()

    assert exit_code == 0, example.out
    assert "redeemable: 10 points, worth 0.10" in example.out
    redemption_id = after("redeemed", example.out).rstrip(",")
    assert "reversed: 10 points" in example.out
    assert f"listed: {redemption_id} REVERSED 10 points" in example.out


@pytest.mark.parametrize(
    ("arguments", "answer", "expected"),
    [
        (("--points", "15"), None, "no: 807 NOT_A_MULTIPLE: Points are redeemed in multiples of 10."),
        (("--points", "10"), "000000", "refused: CODE_INVALID"),
        (("--merchant", "not valid"), None, "wrong field customer.merchant_id: "),
        (("--program", "99"), None, "no: 1101 PROGRAM_NOT_FOUND"),
    ],
    ids=["a wrong amount", "a wrong code", "a wrong field", "an unknown program"],
)
async def test_the_checkout_says_why_not(
    shared_dev: tuple[Dev, Running], arguments: tuple[str, ...], answer: str | None, expected: str
) -> None:
    dev, _ = shared_dev
    example = await Program.start(EXAMPLES / "checkout.py", await dev.new_buyer(), "--address", dev.address, *arguments)
    if answer is not None:
        await example.until("customer says")
        example.answer(answer)
    await example.end()

    assert expected in example.out
