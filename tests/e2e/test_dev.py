"""`pointbook dev`: one command, its printed commands, and Ctrl-C."""

import asyncio
import base64
import hmac
import json
import os
import re
import shlex
import signal
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pointbook.v1 import programs_pb2, webhooks_pb2
from support.clients import Client
from support.embedded_database import Cluster
from support.http_clients import http_client
from support.probes import database_is_stopped, grpc_health, http_get
from support.processes import BIN, ROOT, Finished, Running, clean_environment, finish, one_line, pointbook, running
from support.shell import find_grpcurl, shell_environment

MERCHANT_ID = "2000001234"
STORE_ID = "1718263946864"
BUYER_ID = "2404721679"
SECRET = "dev-secret"
READY_SECONDS_MAX = 5.0
STOP_SECONDS_MAX = 10.0
EXAMPLE_WEBHOOK = {
    "buyer_id": BUYER_ID,
    "points_balance": 20,
    "points_expiry_time": None,
    "store_id": STORE_ID,
    "update_type": "INCREASE",
    "updated_at": 1721829526566,
    "updated_scene": "SUCCESSFUL_REGISTRATION",
    "updated_value": 20,
}
"""SHOPLINE's sample of the Points update webhook, made consistent: a registration increases points, without expiry."""


@dataclass
class Dev:
    """A running `pointbook dev`, and its output."""

    process: Running
    data_dir: Path
    grpc_address: str
    http_address: str
    ready_seconds: float
    paste_lines: list[str]

    async def deliver(self, body: dict[str, Any], **changes: str) -> httpx.Response:
        """Deliver a webhook like SHOPLINE, signed in hex; `changes` replace headers."""
        raw = json.dumps(body).encode()
        headers = {
            "Content-Type": "application/json",
            "X-Shopline-Topic": "app_memberSystem_points/challenged",
            "X-Shopline-Hmac-Sha256": hmac.new(SECRET.encode(), raw, "sha256").hexdigest(),
            "X-Shopline-Shop-Domain": "example.myshopline.com",
            "X-Shopline-Shop-Id": STORE_ID,
            "X-Shopline-Merchant-Id": MERCHANT_ID,
            "X-Shopline-API-Version": "v20250601",
            "X-Shopline-Webhook-Id": "b54557e48a5fbf7d70bcd043",
        }
        headers |= {f"X-Shopline-{name.replace('_', '-')}": value for name, value in changes.items()}
        async with http_client(timeout=5.0) as client:
            return await client.post(f"http://{self.http_address}/webhooks/shopline", content=raw, headers=headers)

    async def ask(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        """Call a method with `buf curl`, by reflection."""
        finished = await self.buf_curl("-d", json.dumps(request), f"/pointbook.v1.{method}")
        assert finished.exit_code == 0, finished
        response: dict[str, Any] = json.loads(finished.out)
        return response

    async def buf_curl(self, *arguments: str) -> Finished:
        """Run `buf curl`; the last argument is the path of its URL."""
        *options, path = arguments
        command = ("curl", "--protocol", "grpc", "--http2-prior-knowledge", *options)
        return await finish(
            BIN / "buf", *command, f"http://{self.grpc_address}{path}", environment=clean_environment({})
        )

    async def balance(self, buyer_id: str = BUYER_ID) -> int:
        """Return a buyer's balance."""
        response = await self.ask("PointsService/GetPointsAccount", account_of(buyer_id))
        return int(response["account"].get("pointsBalance", 0))

    async def validate(self, buyer_id: str = BUYER_ID, **request: Any) -> dict[str, Any]:
        """Validate a redemption in the sample program."""
        buyer = {"store_id": STORE_ID, "buyer_id": buyer_id}
        request |= {"customer": {"merchant_id": MERCHANT_ID, "buyer": buyer}, "program_id": 1}
        return await self.ask("RedemptionService/ValidateRedemption", request)

    def client(self) -> Client:
        """Open a client."""
        return Client(int(self.grpc_address.rpartition(":")[2]))


def account_of(buyer_id: str) -> dict[str, str]:
    """Return a request for a buyer's account."""
    return {"merchant_id": MERCHANT_ID, "store_id": STORE_ID, "buyer_id": buyer_id}


def settings_of(data_dir: Path, **more: str) -> dict[str, str]:
    """Return settings for a `pointbook dev` with its own data folder and free ports."""
    return {"DATA_DIR": str(data_dir), "GRPC_ADDRESS": "127.0.0.1:0", "HTTP_ADDRESS": "127.0.0.1:0", **more}


async def read_welcome(process: Running, data_dir: Path, began: float) -> Dev:
    """Wait until it is ready, and read its output."""
    await process.printed("grpcurl -plaintext 127.0.0.1")
    grpc_address = found(r"gRPC +(\S+)", process.out)
    http_address = found(r"webhooks +http://([^/]+)/", process.out)

    async def ready() -> bool:
        return await http_get(f"http://{http_address}/readyz") == 200 and await grpc_health(grpc_address) == "SERVING"

    await process.until(ready)
    pasted = process.out.partition("Paste next")[2].splitlines()[1:]
    lines = [line.strip() for line in pasted if line.strip()]
    return Dev(process, data_dir, grpc_address, http_address, time.monotonic() - began, lines)


def found(pattern: str, text: str) -> str:
    """Return the match of a pattern in a text."""
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text}"
    return match.group(1)


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Dev]:
    """One `pointbook dev` for tests that use buyers of their own."""
    folder = tmp_path_factory.mktemp("dev")
    data_dir = folder / "deep" / "data"
    began = time.monotonic()
    async with running("dev", folder=folder, settings=settings_of(data_dir), is_fork=False) as process:
        running_dev = await read_welcome(process, data_dir, began)
        yield running_dev
        exit_code, _ = await process.stop(signal.SIGINT)
        assert exit_code == 0
        assert database_is_stopped(data_dir)


def printed_once(dev: Dev, line: str) -> str:
    """Return the only printed command that contains a text."""
    (match,) = [pasted for pasted in dev.paste_lines if line in pasted]
    return match


async def time_a_start(folder: Path) -> float:
    """Start another `dev` with new data; return the seconds until it is ready."""
    began = time.monotonic()
    settings = settings_of(folder / f"data-{began}")
    async with running("dev", folder=folder, settings=settings, is_fork=False) as process:
        return (await read_welcome(process, folder, began)).ready_seconds


async def test_dev_is_ready_in_five_seconds(dev: Dev, tmp_path: Path, record_property: Any) -> None:
    record_property("dev_ready_seconds", round(dev.ready_seconds, 2))
    best = dev.ready_seconds
    if best >= READY_SECONDS_MAX:
        best = min(best, await time_a_start(tmp_path), await time_a_start(tmp_path))
    # On a loaded machine `dev` gets only a share of a processor.
    share = min(1.0, (os.cpu_count() or 1) / max(os.getloadavg()[0], 0.01))
    assert best * share < READY_SECONDS_MAX
    printed_seconds = float(found(r"ready after ([0-9.]+) s", dev.process.out))
    assert printed_seconds <= dev.ready_seconds
    for path in ("/webhooks/shopline", "/healthz", "/readyz", "/metrics"):
        assert f"http://{dev.http_address}{path}" in dev.process.out
    assert await http_get(f"http://{dev.http_address}/metrics") == 200
    assert await http_get(f"http://{dev.http_address}/other") == 404


async def test_data_folder_and_keys_are_private(dev: Dev) -> None:
    assert stat.S_IMODE(dev.data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((dev.data_dir / "postgres").stat().st_mode) == 0o700
    for name in ("code.key", "quarantine.key"):
        assert stat.S_IMODE((dev.data_dir / name).stat().st_mode) == 0o600


async def test_shoplines_sample_webhook_counts_once(dev: Dev) -> None:
    hexadecimal = await dev.deliver(EXAMPLE_WEBHOOK)
    assert (hexadecimal.status_code, hexadecimal.json()) == (200, {"outcome": "APPLIED"})
    assert await dev.balance() == 20

    digest = hmac.digest(SECRET.encode(), json.dumps(EXAMPLE_WEBHOOK).encode(), "sha256")
    repetitions = (
        await dev.deliver(EXAMPLE_WEBHOOK),
        await dev.deliver(EXAMPLE_WEBHOOK, Webhook_Id="0123456789abcdef01234567"),
        await dev.deliver(EXAMPLE_WEBHOOK, Hmac_Sha256=base64.b64encode(digest).decode()),
    )
    assert [response.json() for response in repetitions] == [{"outcome": "DUPLICATE"}] * 3
    differs = [response.headers.get("x-pointbook-webhook-id-differs") for response in repetitions]
    assert differs == [None, "true", None]
    assert {response.status_code for response in repetitions} == {200}
    assert await dev.balance() == 20


async def test_a_forged_webhook_gets_401_and_changes_nothing(dev: Dev) -> None:
    raw = json.dumps(EXAMPLE_WEBHOOK | {"buyer_id": "forged"}).encode()
    forged = await dev.deliver(
        EXAMPLE_WEBHOOK | {"buyer_id": "forged"}, Hmac_Sha256=hmac.new(b"another", raw, "sha256").hexdigest()
    )
    assert forged.status_code == 401
    assert forged.headers["content-type"] == "application/problem+json"
    assert hmac.new(SECRET.encode(), raw, "sha256").hexdigest() not in forged.text
    assert await dev.balance("forged") == 0


async def test_webhook_send_sends_samples_and_files(dev: Dev, tmp_path: Path) -> None:
    url = ("--url", f"http://{dev.http_address}/webhooks/shopline")
    file = tmp_path / "body.json"
    file.write_text(
        json.dumps(EXAMPLE_WEBHOOK | {"buyer_id": "from-a-file", "updated_value": 70, "points_balance": 70})
    )

    sample = await pointbook("webhook", "send", *url, "--buyer", "sample", "--value", "30", "--balance", "30")
    again = await pointbook(
        "webhook", "send", *url, "--base64", "--buyer", "sample", "--value", "30", "--balance", "30"
    )
    sent = await pointbook("webhook", "send", *url, "--base64", file)
    forged = await pointbook("webhook", "send", *url, "--buyer", "sample", SHOPLINE_SECRETS="another-secret")

    assert sample == Finished(0, '200 {"outcome":"APPLIED"}\n', "")
    assert again == Finished(0, '200 {"outcome":"DUPLICATE"}\n', "")
    assert sent == Finished(0, '200 {"outcome":"APPLIED"}\n', "")
    assert (forged.exit_code, forged.out[:4]) == (1, "401 ")
    assert await dev.balance("sample") == 30
    assert await dev.balance("from-a-file") == 70


async def test_unmet_criteria_return_their_status_codes(dev: Dev) -> None:
    buyer_id = "rich"
    await dev.deliver(EXAMPLE_WEBHOOK | {"buyer_id": buyer_id, "updated_value": 250, "points_balance": 250})

    codes = {
        points: (await dev.validate(buyer_id, points=points))["status"]["code"] for points in (15, 20, 200, 210, 260)
    }

    assert codes == {15: 807, 20: 800, 200: 800, 210: 819, 260: 803}


async def test_more_than_the_active_points_is_status_803(dev: Dev) -> None:
    await dev.deliver(EXAMPLE_WEBHOOK | {"buyer_id": "poor"})
    await dev.deliver(EXAMPLE_WEBHOOK | {"buyer_id": "expired", "points_expiry_time": EXAMPLE_WEBHOOK["updated_at"]})

    assert (await dev.validate("poor", points=30))["status"]["code"] == 803
    assert (await dev.validate("poor", points=20))["redeemable"] is True
    assert (await dev.validate("expired", points=20))["status"]["code"] == 803


async def test_the_console_prints_the_code_and_the_response_does_not(dev: Dev) -> None:
    buyer_id = "careful"
    await dev.deliver(EXAMPLE_WEBHOOK | {"buyer_id": buyer_id, "updated_value": 250, "points_balance": 250})

    response = await dev.validate(buyer_id, points=20, issue_otp=True)
    challenge_id = response["issuedCode"]["challengeId"]
    await dev.process.printed(challenge_id)
    message = found(rf"message \(challenge {challenge_id}\): (.*)", dev.process.err)
    code = found(r"\b(\d{6})\b", message)

    assert response["issuedCode"]["sent"] is True
    assert code not in json.dumps(response)
    right = await dev.validate(buyer_id, points=20, validation_code=code, challenge_id=challenge_id)
    assert (right["redeemable"], right["status"]["code"]) == (True, 800)
    other_amount = await dev.validate(buyer_id, points=30, validation_code=code, challenge_id=challenge_id)
    assert other_amount["status"]["code"] == 808
    wrong = await dev.validate(buyer_id, points=20, validation_code=f"{int(code) ^ 1:06}", challenge_id=challenge_id)
    assert wrong["status"]["code"] == 808


async def test_printed_commands_work(dev: Dev) -> None:
    if find_grpcurl() is None:
        pytest.skip("grpcurl is not installed; the same requests are run with buf curl")
    results = [await run_in_shell(line) for line in dev.paste_lines]

    assert {response.exit_code for response in results} == {0}, results
    sent, account, validated, services = (response.out for response in results)
    assert sent in {'200 {"outcome":"APPLIED"}\n', '200 {"outcome":"DUPLICATE"}\n'}
    assert re.search(r'"points_?balance": "20"', account, re.IGNORECASE)
    assert json.loads(validated)["redeemable"] is True
    assert "pointbook.v1.PointsService" in services.split()


async def test_printed_requests_work_with_buf_curl(dev: Dev) -> None:
    assert len(dev.paste_lines) == 4
    assert (await run_in_shell(printed_once(dev, "webhook send"))).exit_code == 0
    for name in ("PointsService/GetPointsAccount", "RedemptionService/ValidateRedemption"):
        words = shlex.split(printed_once(dev, name))
        response = await dev.buf_curl("-d", words[words.index("-d") + 1], f"/pointbook.v1.{name}")
        assert response.exit_code == 0, response
        assert "20" in response.out
    services = await dev.buf_curl("--list-services", "")
    assert {"pointbook.v1.PointsService", "grpc.health.v1.Health"} <= set(services.out.split())


async def run_in_shell(line: str) -> Finished:
    """Run a printed command in the folder in which `dev` was started."""
    return await finish("bash", "-c", line, environment=shell_environment(), cwd=ROOT)


async def test_health_commands_succeed_while_dev_serves(dev: Dev) -> None:
    settings = {"GRPC_ADDRESS": dev.grpc_address, "HTTP_ADDRESS": dev.http_address}
    assert await pointbook("health", **settings) == Finished(0, "serving\n", "")
    assert await pointbook("health", "--shim", **settings) == Finished(0, "serving\n", "")


async def test_a_second_dev_on_the_same_data_is_refused(dev: Dev) -> None:
    second = await pointbook("dev", **settings_of(dev.data_dir))

    line = one_line(second)
    assert "in use" in line
    assert str(dev.process.process.pid) in line
    assert await http_get(f"http://{dev.http_address}/readyz") == 200


async def test_a_second_dev_on_the_same_port_is_refused(dev: Dev, tmp_path: Path) -> None:
    for name, address in (("GRPC_ADDRESS", dev.grpc_address), ("HTTP_ADDRESS", dev.http_address)):
        data_dir = tmp_path / name
        line = one_line(await pointbook("dev", **settings_of(data_dir, **{name: address})))

        assert f"POINTBOOK_{name}" in line
        assert address in line
        assert database_is_stopped(data_dir)


async def test_addresses_beyond_loopback_are_refused(tmp_path: Path) -> None:
    for name in ("GRPC_ADDRESS", "HTTP_ADDRESS"):
        for allowed in ("false", "true"):
            settings = settings_of(tmp_path / "data", **{name: "0.0.0.0:0"}, ALLOW_PLAINTEXT=allowed)
            assert f"POINTBOOK_{name}" in one_line(await pointbook("dev", **settings))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
async def test_a_restart_preserves_points_keys_and_program(tmp_path: Path, order: signal.Signals) -> None:
    data_dir = tmp_path / "data"
    # TLS files, which are missing, are ignored: `dev` uses plaintext on loopback.
    tls = {"TLS_CERT_FILE": "x", "TLS_KEY_FILE": "x", "HTTP_TLS_CERT_FILE": "x", "HTTP_TLS_KEY_FILE": "x"}
    settings = settings_of(data_dir, **tls, SERVER_CA_FILE="x")
    async with running("dev", folder=tmp_path, settings=settings) as process:
        first = await read_welcome(process, data_dir, time.monotonic())
        await first.deliver(EXAMPLE_WEBHOOK)
        client = first.client()
        program = (
            await client.programs.GetProgram(programs_pb2.GetProgramRequest(merchant_id=MERCHANT_ID, program_id=1))
        ).program
        program.display_name = "My program"
        program.criteria.multiples_of = 7
        await client.programs.PutProgram(programs_pb2.PutProgramRequest(program=program))
        key = (data_dir / "code.key").read_bytes()
        quarantine_id = (
            await client.webhooks.QuarantineWebhook(
                webhooks_pb2.QuarantineWebhookRequest(
                    merchant_id=MERCHANT_ID,
                    topic="customers/update",
                    body=b"personal data",
                    reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED,
                )
            )
        ).quarantine_id
        await client.close()

        exit_code, stop_seconds = await process.stop(order)

        assert exit_code == 0, process.err
        assert stop_seconds < STOP_SECONDS_MAX
        assert "Traceback" not in process.err
        assert database_is_stopped(data_dir)
        for address in (first.grpc_address, first.http_address):
            assert await http_get(f"http://{address}/") == 0

    async with running("dev", folder=tmp_path, settings=settings) as process:
        again = await read_welcome(process, data_dir, time.monotonic())
        assert await again.balance() == 20
        assert (await again.validate(points=14))["status"]["code"] == 800
        assert (await again.validate(points=20))["status"]["code"] == 807
        assert (data_dir / "code.key").read_bytes() == key
        quarantined = await again.ask(
            "WebhooksService/GetQuarantinedWebhook", {"merchant_id": MERCHANT_ID, "quarantine_id": quarantine_id}
        )
        assert base64.b64decode(quarantined["webhook"]["body"]) == b"personal data"
        await process.stop(order)


async def test_reset_erases_only_the_database_and_its_keys(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    settings = settings_of(data_dir)
    async with running("dev", folder=tmp_path, settings=settings) as process:
        first = await read_welcome(process, data_dir, time.monotonic())
        assert (await first.deliver(EXAMPLE_WEBHOOK)).status_code == 200
        assert "in use" in one_line(await pointbook("dev", "--reset", **settings))
        assert await first.balance() == 20
        await process.kill()
    key = (data_dir / "code.key").read_bytes()
    (data_dir / "notes.txt").write_text("mine")

    async with running("dev", "--reset", folder=tmp_path, settings=settings) as process:
        again = await read_welcome(process, data_dir, time.monotonic())
        assert await again.balance() == 0
        assert (data_dir / "code.key").read_bytes() != key
        assert (data_dir / "notes.txt").read_text() == "mine"
        await process.stop(signal.SIGINT)


async def test_reset_refuses_a_database_of_the_settings(database_url: str, tmp_path: Path) -> None:
    line = one_line(await pointbook("dev", "--reset", **settings_of(tmp_path / "data", DATABASE_URL=database_url)))

    assert "POINTBOOK_DATABASE_URL" in line
    assert not (tmp_path / "data").exists()


async def test_ctrl_c_does_not_wait_for_idle_clients(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with running("dev", folder=tmp_path, settings=settings_of(data_dir)) as process:
        dev = await read_welcome(process, data_dir, time.monotonic())
        client = dev.client()
        await client.account(MERCHANT_ID, STORE_ID, BUYER_ID)
        host, _, port = dev.http_address.rpartition(":")
        _, idle = await asyncio.open_connection(host, int(port))

        exit_code, stop_seconds = await process.stop(signal.SIGINT)

        assert (exit_code, database_is_stopped(data_dir)) == (0, True)
        assert stop_seconds < STOP_SECONDS_MAX
        idle.close()
        await client.close()


async def test_ctrl_c_during_the_start_stops_dev(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with running("dev", folder=tmp_path, settings=settings_of(data_dir)) as process:

        async def making() -> bool:
            return (data_dir / "postgres" / "server.lock").exists()

        await process.until(making)
        exit_code, stop_seconds = await process.stop(signal.SIGINT)
        assert exit_code == 0, process.err
        assert stop_seconds < STOP_SECONDS_MAX
        assert "Traceback" not in process.err
        assert database_is_stopped(data_dir)
    async with running("dev", folder=tmp_path, settings=settings_of(data_dir)) as process:
        await read_welcome(process, data_dir, time.monotonic())
        await process.stop(signal.SIGINT)


async def test_after_sigkill_the_database_ends_and_acknowledged_data_stays(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with running("dev", folder=tmp_path, settings=settings_of(data_dir)) as process:
        dev = await read_welcome(process, data_dir, time.monotonic())
        assert (await dev.deliver(EXAMPLE_WEBHOOK)).status_code == 200
        await process.kill()
    async with running("dev", folder=tmp_path, settings=settings_of(data_dir)) as process:
        again = await read_welcome(process, data_dir, time.monotonic())
        assert await again.balance() == 20
        await process.stop(signal.SIGINT)
    assert database_is_stopped(data_dir)


async def test_a_database_of_the_settings_replaces_the_embedded_one(cluster: Cluster, tmp_path: Path) -> None:
    async def nothing(_url: str) -> None:
        pass

    await cluster.template("empty", nothing)
    url = (await cluster.clone("empty")).replace("pointbook@", "pointbook:pw-never-shown@")
    data_dir = tmp_path / "data"
    settings = settings_of(data_dir, DATABASE_URL=url, SHOPLINE_SECRETS="other-secret")
    async with running("dev", folder=tmp_path, settings=settings) as process:
        dev = await read_welcome(process, data_dir, time.monotonic())
        assert (await dev.deliver(EXAMPLE_WEBHOOK)).status_code == 401
        sent = await pointbook(
            "webhook", "send", "--url", f"http://{dev.http_address}/webhooks/shopline", SHOPLINE_SECRETS="other-secret"
        )
        assert sent.exit_code == 0, sent
        assert await dev.balance() == 20
        assert not (data_dir / "postgres").exists()
        exit_code, _ = await process.stop(signal.SIGINT)
        assert exit_code == 0
        for text in (process.out, process.err):
            assert "pw-never-shown" not in text
            assert "other-secret" not in text
    async with running("dev", folder=tmp_path, settings=settings) as process:
        again = await read_welcome(process, data_dir, time.monotonic())
        assert await again.balance() == 20
        await process.stop(signal.SIGINT)


async def test_an_existing_data_folder_keeps_its_mode(tmp_path: Path) -> None:
    data_dir = tmp_path / "shared"
    data_dir.mkdir(mode=0o755)
    data_dir.chmod(0o755)
    async with running("dev", folder=tmp_path, settings=settings_of(data_dir)) as process:
        await process.printed("Pointbook is ready")
        await process.terminate()

    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o755
    assert stat.S_IMODE((data_dir / "postgres").stat().st_mode) == 0o700
