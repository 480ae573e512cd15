"""The examples in Python, against `pointbook dev`."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.dev_server import DevServer, dev_server
from support.example_programs import Dialogue, dialogue
from support.processes import ROOT
from support.unique_names import unique

EXAMPLES = ROOT / "examples/python"
PYTHON = (sys.executable, "-u")
CHECKOUT = str(EXAMPLES / "checkout.py")
QUICKSTART_LINES_MAX = 25


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DevServer]:
    """A `pointbook dev`, for tests with buyers of their own."""
    async with dev_server(tmp_path_factory.mktemp("dev")) as server:
        yield server


async def new_buyer(dev: DevServer) -> str:
    """Return a new buyer with 100 points."""
    buyer_id = unique("buyer")
    await dev.add_points(buyer_id, 100)
    return buyer_id


async def type_code(program: Dialogue, dev: DevServer) -> None:
    """Type the code that the terminal of the server shows."""
    challenge_id = await program.printed(r"challenge (\S+),")
    await program.type(await dev.code_of(challenge_id))


def test_the_quickstart_is_short() -> None:
    lines = (EXAMPLES / "quickstart.py").read_text().splitlines()

    assert len(lines) <= QUICKSTART_LINES_MAX


async def test_the_quickstart_survives_a_killed_server(dev: DevServer, tmp_path: Path) -> None:
    quickstart = tmp_path / "quickstart.py"
    quickstart.write_text((EXAMPLES / "quickstart.py").read_text().replace("127.0.0.1:50051", dev.grpc_address))

    async with dialogue(*PYTHON, str(quickstart), await new_buyer(dev)) as program:
        redemption_id = await program.printed(r"redeemed (\S+)\n")
        await dev.process.kill()
        await program.type("")
        await dev.restart()
        finished = await program.end()

    assert finished.exit_code == 0, finished
    assert f"the same {redemption_id}\n" in finished.out
    assert "reversed 10\n" in finished.out


async def test_the_checkout_redeems_with_a_code(dev: DevServer) -> None:
    async with dialogue(*PYTHON, CHECKOUT, await new_buyer(dev), "--address", dev.grpc_address) as program:
        await type_code(program, dev)
        redemption_id = await program.printed(r"redeemed: (\S+), 10 points, 90 left\n")
        finished = await program.end()

    assert finished.exit_code == 0, finished
    assert "redeemable: 10 points, worth 0.10\n" in finished.out
    assert "reversed: 10 points\n" in finished.out
    assert f"listed: {redemption_id} REVERSED 10 points\n" in finished.out


async def test_the_checkout_goes_on_after_an_outage(dev: DevServer) -> None:
    options = ("--address", dev.grpc_address, "--timeout", "0.5")
    async with dialogue(*PYTHON, CHECKOUT, await new_buyer(dev), *options) as program:
        challenge_id = await program.printed(r"challenge (\S+),")
        code = await dev.code_of(challenge_id)
        await dev.process.kill()
        await program.type(code)
        reference = await program.printed(r"reference: (\S+)\n")
        await dev.restart()
        await program.printed(r"redeemed: (\S+), 10 points, 90 left\n")
        finished = await program.end()

    assert finished.exit_code == 0, finished
    assert reference in finished.out
    assert "no answer yet: " in finished.err
    assert finished.out.count("listed: ") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--points", "15"), "no: 807 NOT_A_MULTIPLE: Points are redeemed in multiples of 10."),
        (("--points", "1000"), "no: 803 INSUFFICIENT_POINTS: "),
        (("--merchant", "not valid"), "wrong field customer.merchant_id: "),
        (("--program", "99"), "no: 1101 PROGRAM_NOT_FOUND: "),
    ],
    ids=["a wrong amount", "too few points", "a wrong field", "an unknown program"],
)
async def test_the_checkout_says_why_not(dev: DevServer, arguments: tuple[str, ...], expected: str) -> None:
    async with dialogue(*PYTHON, CHECKOUT, await new_buyer(dev), "--address", dev.grpc_address, *arguments) as program:
        finished = await program.end()

    assert expected in finished.out + finished.err


async def test_the_checkout_refuses_a_wrong_code(dev: DevServer) -> None:
    async with dialogue(*PYTHON, CHECKOUT, await new_buyer(dev), "--address", dev.grpc_address) as program:
        await program.printed(r"challenge (\S+),")
        await program.type("000000")
        finished = await program.end()

    assert finished.exit_code == 1
    assert "refused: CODE_INVALID: " in finished.err
