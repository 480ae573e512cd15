"""The programs of examples/, built by their own tools, against `pointbook dev`."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2, redemption_pb2_grpc
from support.certificates import Authority
from support.dev_server import DevServer, dev_server
from support.example_programs import GO, JAVA, OUT, TYPESCRIPT, Example, build_example, dialogue
from support.processes import Finished, clean_environment, finish
from support.redemption import REVERSED
from support.relay import Relay, relay_to
from support.unique_names import unique

MERCHANT_ID = "2000001234"
STORE_ID = "1718263946864"
QUICKSTART_LINES_MAX = 25
go_at_once = pytest.mark.parametrize(
    "example",
    [GO, pytest.param(JAVA, marks=pytest.mark.soak), pytest.param(TYPESCRIPT, marks=pytest.mark.soak)],
    ids=lambda example: example.name,
    indirect=True,
)
"""Runs a test of faults with Go always, and with the other languages in the soak tests: they cost a minute."""


@dataclass(frozen=True)
class Till:
    """The program of one language, a `pointbook dev`, and a relay between them."""

    example: Example
    dev: DevServer
    relay: Relay

    async def buyer(self, points: int = 100) -> str:
        """Return a new buyer with points."""
        buyer_id = unique("buyer")
        await self.dev.add_points(buyer_id, points)
        return buyer_id

    async def check_out(self, buyer_id: str, *arguments: str, code: str | None = None, **settings: str) -> Finished:
        """Run a checkout, and type the code that the terminal shows, or another one."""
        settings = {"GRPC_ADDRESS": self.relay.address, **settings}
        async with dialogue(*self.example.checkout, "--buyer", buyer_id, *arguments, **settings) as program:
            challenge_id = await program.printed(r"challenge (\S+)\n")
            await program.type(code or await self.dev.code_of(challenge_id))
            return await program.end()

    async def fail(self, *arguments: str) -> Finished:
        """Run a checkout that fails before it asks for a code."""
        async with dialogue(*self.example.checkout, *arguments, GRPC_ADDRESS=self.relay.address) as program:
            finished = await program.end()
        assert finished.exit_code == 1, finished
        return finished

    def timeout(self, seconds: int) -> tuple[str, ...]:
        """Return the option that limits each call."""
        return tuple(part.format(seconds) for part in self.example.timeout)


async def redemptions_of(dev: DevServer, buyer_id: str) -> list[redemption_pb2.Redemption]:
    """Return what a buyer redeemed."""
    buyer = identity_pb2.Buyer(store_id=STORE_ID, buyer_id=buyer_id)
    customer = identity_pb2.CustomerRef(merchant_id=MERCHANT_ID, buyer=buyer)
    request = redemption_pb2.ListRedemptionsRequest(merchant_id=MERCHANT_ID, customer=customer)
    async with grpc.aio.insecure_channel(dev.grpc_address) as channel:
        response = await redemption_pb2_grpc.RedemptionServiceStub(channel).ListRedemptions(request)
    return list(response.redemptions)


async def assert_redeemed_once_and_reversed(dev: DevServer, buyer_id: str) -> None:
    """Check that one redemption took 10 points of 100 and gave them back."""
    (redemption,) = await redemptions_of(dev, buyer_id)
    assert (redemption.points, redemption.reversed_points, redemption.state) == (10, 10, REVERSED)
    assert len(redemption.reversals) == 1
    assert redemption.current_active_points == 100


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DevServer]:
    """A `pointbook dev` for tests that use buyers of their own."""
    async with dev_server(tmp_path_factory.mktemp("dev")) as server:
        yield server


@pytest.fixture(scope="module")
async def module_relay(dev: DevServer) -> AsyncIterator[Relay]:
    """A relay in front of the `pointbook dev`."""
    async with relay_to(dev.grpc_address) as relay:
        yield relay


@pytest.fixture(scope="module", params=[GO, JAVA, TYPESCRIPT], ids=lambda example: example.name)
async def example(request: pytest.FixtureRequest) -> Example:
    """The built programs of one language."""
    built: Example = request.param
    await build_example(built)
    return built


@pytest.fixture
def relay(module_relay: Relay) -> Relay:
    """A relay that forwards all calls."""
    module_relay.reset()
    return module_relay


@pytest.fixture
def till(example: Example, dev: DevServer, relay: Relay) -> Till:
    """A till in each language."""
    return Till(example, dev, relay)


@pytest.fixture(scope="module")
async def quickstart() -> str:
    """The built quickstart."""
    await build_example(GO)
    return f"{OUT}/go/quickstart"


async def test_checkout_redeems_reverses_and_lists_all_pages(till: Till) -> None:
    buyer_id = await till.buyer()

    first = await till.check_out(buyer_id)
    second = await till.check_out(buyer_id, "--points", "20", "--page-size", "1")

    assert (first.exit_code, first.err, second.exit_code, second.err) == (0, "", 0, "")
    assert "10 of 100 points may be redeemed, worth 0.10\n" in first.out
    listed = [
        f"{each.redemption_id} {each.points} points REVERSED {each.external_reference_number}"
        for each in await redemptions_of(till.dev, buyer_id)
    ]
    assert len(listed) == 2
    assert second.out.splitlines()[-4:] == [
        f"redeemed 20 points as {listed[0].split()[0]}: PENDING",
        "reversed 20 points: REVERSED",
        *listed,
    ]
    assert till.relay.calls["ListRedemptions"] >= 3


async def test_refused_redemption_prints_its_violations(till: Till) -> None:
    buyer_id = await till.buyer(points=20)

    refused = await till.fail("--buyer", buyer_id, "--points", "215")

    assert refused.out.splitlines() == [
        "803 INSUFFICIENT_POINTS: Only 20 points are active.",
        "807 NOT_A_MULTIPLE: Points are redeemed in multiples of 10.",
        "819 ABOVE_MAX_PER_REDEMPTION: At most 200 points are redeemed at a time.",
    ]
    assert refused.err == "the points cannot be redeemed\n"
    assert await redemptions_of(till.dev, buyer_id) == []


async def test_wrong_code_prints_reason_and_request(till: Till) -> None:
    buyer_id = await till.buyer()

    refused = await till.check_out(buyer_id, code="x")

    assert refused.exit_code == 1
    assert re.fullmatch(
        r"CODE_INVALID: .+ status_code=808 violations=808 CODE_INVALID \(request \w+\)\n", refused.err
    ), refused
    assert await redemptions_of(till.dev, buyer_id) == []


async def test_wrong_field_is_printed(till: Till) -> None:
    refused = await till.fail("--merchant", "two words")

    assert refused.err.startswith("INVALID_FIELDS: ")
    assert "\n  customer.merchant_id: " in refused.err


@go_at_once
async def test_checkout_goes_on_with_the_order_of_an_earlier_run(till: Till) -> None:
    buyer_id = await till.buyer()
    first = await till.check_out(buyer_id)
    (order,) = re.findall(r"redeeming as (\S+);", first.out)

    async with dialogue(
        *till.example.checkout, "--buyer", buyer_id, "--order", order, GRPC_ADDRESS=till.relay.address
    ) as program:
        again = await program.end()

    assert again.exit_code == 0, again
    assert "code that the customer says" not in again.out
    await assert_redeemed_once_and_reversed(till.dev, buyer_id)


async def test_unavailable_server_is_called_again(till: Till) -> None:
    buyer_id = await till.buyer()
    till.relay.refusals["ValidateRedemption"] = [20, None]
    till.relay.refusals["RedeemPoints"] = [20]

    finished = await till.check_out(buyer_id)

    assert finished.exit_code == 0, finished
    assert (till.relay.calls["ValidateRedemption"], till.relay.calls["RedeemPoints"]) == (3, 2)
    await assert_redeemed_once_and_reversed(till.dev, buyer_id)


@go_at_once
async def test_pushback_of_the_server_is_obeyed(till: Till) -> None:
    buyer_id = await till.buyer()
    till.relay.refusals["ValidateRedemption"] = [-1]

    refused = await till.fail("--buyer", buyer_id)

    assert refused.err.startswith("DATABASE_UNAVAILABLE: ")
    assert "(retry after 1s)" in refused.err
    assert till.relay.calls["ValidateRedemption"] == 1


@go_at_once
async def test_server_killed_in_a_redemption_whose_response_is_lost_redeems_once(till: Till) -> None:
    buyer_id = await till.buyer()
    till.relay.losses["RedeemPoints"] = till.dev.kill_and_restart

    finished = await till.check_out(buyer_id, *till.timeout(30))

    assert finished.exit_code == 0, finished
    assert till.relay.calls["RedeemPoints"] == 2
    await assert_redeemed_once_and_reversed(till.dev, buyer_id)


@go_at_once
async def test_server_killed_while_it_handles_a_redemption_redeems_once(till: Till) -> None:
    buyer_id = await till.buyer()
    arguments = ("--buyer", buyer_id, *till.timeout(30))

    async with dialogue(*till.example.checkout, *arguments, GRPC_ADDRESS=till.dev.grpc_address) as program:
        code = await till.dev.code_of(await program.printed(r"challenge (\S+)\n"))
        till.dev.process.process.send_signal(signal.SIGSTOP)
        await program.type(code)
        await program.printed("redeeming as (.*)\n")
        await till.dev.kill_and_restart()
        finished = await program.end()

    assert finished.exit_code == 0, finished
    await assert_redeemed_once_and_reversed(till.dev, buyer_id)


@go_at_once
async def test_redemption_without_an_answer_before_its_deadline_is_repeated(till: Till) -> None:
    buyer_id = await till.buyer()
    passed = asyncio.Event()

    async def wait() -> None:
        await passed.wait()

    till.relay.losses["RedeemPoints"] = wait
    finished = await till.check_out(buyer_id, *till.timeout(2))
    passed.set()

    assert finished.exit_code == 0, finished
    assert "no answer, repeating order-" in finished.out
    assert till.relay.calls["RedeemPoints"] == 2
    await assert_redeemed_once_and_reversed(till.dev, buyer_id)


@go_at_once
async def test_token_and_certificate_are_sent_over_tls_and_never_in_plain_text(till: Till, tmp_path: Path) -> None:
    buyer_id, authority = await till.buyer(), Authority()
    issued, trusted = authority.issue(), tmp_path / "ca.crt"
    trusted.write_bytes(authority.pem)
    cert, key = authority.issue("till").write(tmp_path, "till")
    credentials = grpc.ssl_server_credentials([(issued.key, issued.chain)], authority.pem, require_client_auth=True)
    files = {"SERVER_CA_FILE": str(trusted), "CLIENT_CERT_FILE": str(cert), "CLIENT_KEY_FILE": str(key)}

    async with relay_to(till.dev.grpc_address, credentials) as relay:
        settings = {"GRPC_ADDRESS": relay.address, "TOKEN": "pb_secret"}
        finished = await till.check_out(buyer_id, **settings, **files)
        async with dialogue(*till.example.checkout, **settings) as program:
            refused = await program.end()

    assert finished.exit_code == 0, finished
    assert relay.tokens == {"Bearer pb_secret"}
    assert refused.exit_code != 0
    assert "pb_secret" not in refused.out + refused.err


async def test_quickstart_survives_a_server_that_is_killed_between_its_calls(quickstart: str, dev: DevServer) -> None:
    buyer_id = unique("buyer")
    await dev.add_points(buyer_id, 100)

    async with dialogue(quickstart, buyer_id, GRPC_ADDRESS=dev.grpc_address) as program:
        await program.printed(r"(10) points redeemed")
        await dev.process.kill()
        await program.type("")
        await dev.restart()
        finished = await program.end()

    assert (finished.exit_code, finished.err) == (0, "")
    assert finished.out.endswith("10 points reversed\n")
    await assert_redeemed_once_and_reversed(dev, buyer_id)


async def test_quickstart_survives_a_server_that_is_killed_in_its_calls(
    quickstart: str, dev: DevServer, relay: Relay
) -> None:
    buyer_id = unique("buyer")
    await dev.add_points(buyer_id, 100)
    relay.losses |= {"RedeemPoints": dev.kill_and_restart, "ReverseRedemption": dev.kill_and_restart}

    async with dialogue(quickstart, buyer_id, GRPC_ADDRESS=relay.address) as program:
        await program.type("")
        finished = await program.end()

    assert (finished.exit_code, finished.err) == (0, "")
    assert (relay.calls["RedeemPoints"], relay.calls["ReverseRedemption"]) == (2, 2)
    await assert_redeemed_once_and_reversed(dev, buyer_id)


def test_quickstart_is_short() -> None:
    lines = (GO.folder / "quickstart/main.go").read_text().splitlines()

    assert len(lines) <= QUICKSTART_LINES_MAX


@pytest.mark.usefixtures("quickstart")
async def test_go_sources_are_formatted() -> None:
    sources = [path for path in GO.folder.rglob("*.go") if "gen" not in path.parts]

    finished = await finish("gofmt", "-l", *sources, environment=clean_environment({}))

    assert (finished.exit_code, finished.out, finished.err) == (0, "", "")


def test_typescript_has_no_unchecked_types() -> None:
    sources = list((TYPESCRIPT.folder / "src").glob("*.ts"))

    assert sources
    assert [path.name for path in sources if re.search(r"\bany\b|@ts-|\bas unknown\b", path.read_text())] == []


def test_lock_file_of_npm_names_no_registry() -> None:
    assert "http" not in (TYPESCRIPT.folder / "package-lock.json").read_text()
