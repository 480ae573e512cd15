"""`/readyz` of a shim in front of a real server."""

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from pointbook.v1 import access_pb2
from pointbook_cli.health_probe import probe_shim
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import split_bearer
from pointbook_server.server import Server
from shopline_shim.readiness import ReadinessCheck
from shopline_shim.settings import ShimSettings
from support.clients import Client
from support.clocks import NOW_MS
from support.servers import Service, server_settings
from support.shims import shim_client
from support.tokens import make_token, revoke_token
from support.unique_names import unique
from support.waiting import until

WEBHOOK_SCOPES = [Scope.POINTS_WRITE, Scope.WEBHOOKS]
MISSED_CALLS = {"missed_call_secrets": (SecretStr("call-secret"),)}


async def readyz(http: httpx.AsyncClient) -> tuple[int, str]:
    """Return the status of `/readyz`, and the cause if the shim is not ready."""
    response = await http.get("/readyz")
    return response.status_code, "" if response.is_success else response.json()["detail"]


async def readiness(service: Service, token: str, **changes: Any) -> tuple[int, str]:
    """Return the result of `/readyz` of a shim with a token."""
    async with shim_client(service.server.port, token, **changes) as http:
        return await readyz(http)


@pytest.mark.parametrize(
    ("token", "cause"),
    [
        ("", "POINTBOOK_TOKEN is not set, and the gRPC server requires a token."),
        ("wrong", "POINTBOOK_TOKEN is unknown to the gRPC server, or revoked."),
        ("pb_0123456789abcdef_wrong", "POINTBOOK_TOKEN is unknown to the gRPC server, or revoked."),
    ],
)
async def test_missing_or_unknown_token_is_not_ready(service: Service, token: str, cause: str) -> None:
    assert await readiness(service, token) == (503, cause)


async def test_expired_token_is_not_ready(service: Service) -> None:
    token = await make_token(service.database_url, [ALL_MERCHANTS], list(Scope), NOW_MS)

    assert await readiness(service, token) == (503, "POINTBOOK_TOKEN has expired.")


@pytest.mark.parametrize(
    ("scopes", "changes", "missing"),
    [
        ([Scope.POINTS_WRITE], {}, "webhooks"),
        ([Scope.WEBHOOKS], {}, "points.write"),
        ([Scope.POINTS_READ, Scope.ADMIN], {}, "points.write, webhooks"),
        (WEBHOOK_SCOPES, MISSED_CALLS, "telephony"),
        ([Scope.TELEPHONY], MISSED_CALLS, "points.write, webhooks"),
        ([Scope.REDEEM], MISSED_CALLS, "points.write, webhooks, telephony"),
    ],
)
async def test_token_without_all_scopes_is_not_ready_and_the_missing_ones_are_named(
    service: Service, scopes: list[Scope], changes: dict[str, Any], missing: str
) -> None:
    token = await make_token(service.database_url, [unique("merchant")], scopes)

    assert await readiness(service, token, **changes) == (503, f"POINTBOOK_TOKEN lacks scopes: {missing}.")


@pytest.mark.parametrize(
    ("merchants", "scopes", "changes"),
    [
        ([ALL_MERCHANTS], WEBHOOK_SCOPES, {}),
        (["2000001234"], WEBHOOK_SCOPES, {}),
        (["2000001234"], [*WEBHOOK_SCOPES, Scope.TELEPHONY], MISSED_CALLS),
        ([ALL_MERCHANTS], list(Scope), MISSED_CALLS),
    ],
)
async def test_token_with_the_scopes_is_ready(
    service: Service, merchants: list[str], scopes: list[Scope], changes: dict[str, Any]
) -> None:
    token = await make_token(service.database_url, merchants, scopes)

    assert await readiness(service, token, **changes) == (200, "")


async def test_revoked_token_is_not_ready_within_seconds(service: Service) -> None:
    token = await make_token(service.database_url, [ALL_MERCHANTS], WEBHOOK_SCOPES)
    async with shim_client(service.server.port, token) as http:
        assert await readyz(http) == (200, "")
        await revoke_token(service.database_url, token)

        async def is_not_ready() -> bool:
            return (await readyz(http))[0] != 200

        await until(is_not_ready, 5.0)
        result = await readyz(http)

    assert result == (503, "POINTBOOK_TOKEN is unknown to the gRPC server, or revoked.")


@pytest.mark.parametrize("token", ["", "any"])
async def test_shim_is_ready_if_the_server_needs_no_token(service: Service, token: str) -> None:
    server = Server(server_settings(), service.database_url, senders={}, development=True)
    await server.start()
    async with shim_client(server.port, token) as http:
        result = await readyz(http)
    await server.stop()

    assert result == (200, "")


async def test_health_command_shows_the_cause(service: Service, admin_token: str) -> None:
    cause = "POINTBOOK_TOKEN is not set, and the gRPC server requires a token."
    for token, state in (("", (False, cause)), (admin_token, (True, ""))):
        async with shim_client(service.server.port, token) as http:
            settings = ShimSettings(http_address=f"{http.base_url.host}:{http.base_url.port}")
            assert await asyncio.to_thread(probe_shim, settings) == state


async def test_caller_access_has_the_sorted_merchants_and_scopes_of_the_token(service: Service) -> None:
    token = await make_token(service.database_url, ["m-2", "m-1"], [Scope.WEBHOOKS, Scope.POINTS_WRITE])
    client = Client(service.server.port, token)
    response = await client.access.GetCallerAccess(access_pb2.GetCallerAccessRequest())
    await client.close()

    assert response == access_pb2.GetCallerAccessResponse(
        token_id=split_bearer(token)[0], merchant_ids=["m-1", "m-2"], scopes=["points.write", "webhooks"]
    )


class CountingServer:
    """A server whose token has all scopes, and that counts token checks."""

    def __init__(self) -> None:
        self.check_count = 0

    async def is_serving(self) -> bool:
        """Return True."""
        return True

    async def caller_access(self) -> access_pb2.GetCallerAccessResponse:
        """Count the check."""
        self.check_count += 1
        await asyncio.sleep(0)
        return access_pb2.GetCallerAccessResponse(scopes=[scope.value for scope in Scope])


async def test_concurrent_and_later_probes_share_one_token_check() -> None:
    server, shim = CountingServer(), ReadinessCheck(ShimSettings(shopline_secrets=(SecretStr("shop-secret"),)))

    assert set(await asyncio.gather(*(shim.find_cause(server) for _ in range(50)))) == {""}
    assert {await shim.find_cause(server) for _ in range(50)} == {""}
    assert server.check_count == 1
