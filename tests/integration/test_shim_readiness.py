"""`/readyz` of a shim before a real server: ready only where webhooks and missed calls could be applied."""

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from pointbook.v1 import access_pb2
from pointbook_cli.health import shim_state
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import split_bearer
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.db.database import Database
from pointbook_server.server import Server
from shopline_shim.readiness import Readiness
from shopline_shim.settings import ShimSettings
from support.harness import NOW_MS, Client, Service, make_token, server_settings, unique
from support.shims import shim_before
from support.waiting import until

NEEDED = [Scope.POINTS_WRITE, Scope.WEBHOOKS]
MISSED_CALLS = {"missed_call_secrets": (SecretStr("call-secret"),)}


async def readyz(http: httpx.AsyncClient) -> tuple[int, str]:
    """Ask a shim whether it is ready: the status, and the cause where it is not."""
    answer = await http.get("/readyz")
    return answer.status_code, "" if answer.is_success else answer.json()["detail"]


async def readiness(service: Service, token: str, **changes: Any) -> tuple[int, str]:
    """Start a shim with a token, and ask it."""
    async with shim_before(service.server.port, token, **changes) as http:
        return await readyz(http)


async def revoke(service: Service, bearer: str) -> None:
    """Revoke a token, as an operator does from another process."""
    database = Database(service.database_url, pool_size=1)
    assert await TokenTransactions(database).revoke(split_bearer(bearer)[0], NOW_MS)
    await database.dispose()


@pytest.mark.parametrize(
    ("token", "cause"),
    [
        ("", "POINTBOOK_TOKEN is not set, and the gRPC server requires a token."),
        ("wrong", "POINTBOOK_TOKEN is unknown to the gRPC server, or revoked."),
        ("pb_0123456789abcdef_wrong", "POINTBOOK_TOKEN is unknown to the gRPC server, or revoked."),
    ],
)
async def test_a_token_that_the_server_does_not_know_is_not_ready(service: Service, token: str, cause: str) -> None:
    """The cause is named, and the token is not."""
    assert await readiness(service, token) == (503, cause)


async def test_an_expired_token_is_not_ready(service: Service) -> None:
    """By the server's clock."""
    token = await make_token(service.database_url, [ALL_MERCHANTS], list(Scope), NOW_MS)

    assert await readiness(service, token) == (503, "POINTBOOK_TOKEN has expired.")


@pytest.mark.parametrize(
    ("scopes", "changes", "missing"),
    [
        ([Scope.POINTS_WRITE], {}, "webhooks"),
        ([Scope.WEBHOOKS], {}, "points.write"),
        ([Scope.POINTS_READ, Scope.ADMIN], {}, "points.write, webhooks"),
        (NEEDED, MISSED_CALLS, "telephony"),
        ([Scope.TELEPHONY], MISSED_CALLS, "points.write, webhooks"),
        ([Scope.REDEEM], MISSED_CALLS, "points.write, webhooks, telephony"),
    ],
)
async def test_a_token_without_the_scopes_is_not_ready(
    service: Service, scopes: list[Scope], changes: dict[str, Any], missing: str
) -> None:
    """Every missing scope is named; telephony is needed for missed calls alone."""
    token = await make_token(service.database_url, [unique("merchant")], scopes)

    assert await readiness(service, token, **changes) == (503, f"POINTBOOK_TOKEN lacks scopes: {missing}.")


@pytest.mark.parametrize(
    ("merchants", "scopes", "changes"),
    [
        ([ALL_MERCHANTS], NEEDED, {}),
        (["2000001234"], NEEDED, {}),
        (["2000001234"], [*NEEDED, Scope.TELEPHONY], MISSED_CALLS),
        ([ALL_MERCHANTS], list(Scope), MISSED_CALLS),
    ],
)
async def test_a_token_with_the_scopes_is_ready(
    service: Service, merchants: list[str], scopes: list[Scope], changes: dict[str, Any]
) -> None:
    """For one merchant or for all."""
    token = await make_token(service.database_url, merchants, scopes)

    assert await readiness(service, token, **changes) == (200, "")


async def test_a_revoked_token_turns_the_shim_unready(service: Service) -> None:
    """Within the two seconds in which servers hear of it, and the one for which the shim keeps an answer."""
    token = await make_token(service.database_url, [ALL_MERCHANTS], NEEDED)
    async with shim_before(service.server.port, token) as http:
        assert await readyz(http) == (200, "")
        await revoke(service, token)

        async def is_not_ready() -> bool:
            return (await readyz(http))[0] != 200

        await until(is_not_ready, 5.0)
        found = await readyz(http)

    assert found == (503, "POINTBOOK_TOKEN is unknown to the gRPC server, or revoked.")


@pytest.mark.parametrize("token", ["", "any"])
async def test_without_tokens_the_shim_is_ready(service: Service, token: str) -> None:
    """As in `pointbook dev`."""
    server = Server(server_settings(), service.database_url, senders={}, development=True)
    await server.start()
    async with shim_before(server.port, token) as http:
        found = await readyz(http)
    await server.stop()

    assert found == (200, "")


async def test_the_health_command_shows_the_cause(service: Service, admin_token: str) -> None:
    """Where operators look first."""
    cause = "POINTBOOK_TOKEN is not set, and the gRPC server requires a token."
    for token, state in (("", (False, cause)), (admin_token, (True, ""))):
        async with shim_before(service.server.port, token) as http:
            settings = ShimSettings(http_address=f"{http.base_url.host}:{http.base_url.port}")
            assert await asyncio.to_thread(shim_state, settings) == state


async def test_callers_are_told_what_their_own_token_allows(service: Service) -> None:
    """Sorted, and by the id that the list of tokens shows."""
    token = await make_token(service.database_url, ["m-2", "m-1"], [Scope.WEBHOOKS, Scope.POINTS_WRITE])
    client = Client(service.server.port, token)
    answer = await client.access.GetCallerAccess(access_pb2.GetCallerAccessRequest())
    await client.close()

    assert answer == access_pb2.GetCallerAccessResponse(
        token_id=split_bearer(token)[0], merchant_ids=["m-1", "m-2"], scopes=["points.write", "webhooks"]
    )


class CountingServer:
    """A server that allows everything, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def is_serving(self) -> bool:
        """Serve always."""
        return True

    async def caller_access(self) -> access_pb2.GetCallerAccessResponse:
        """Count the question."""
        self.asked += 1
        await asyncio.sleep(0)
        return access_pb2.GetCallerAccessResponse(scopes=[scope.value for scope in Scope])


async def test_probes_share_one_question_about_the_token() -> None:
    """However many come at once, or one after the other."""
    server, shim = CountingServer(), Readiness(ShimSettings(shopline_secrets=(SecretStr("shop-secret"),)))

    assert set(await asyncio.gather(*(shim.cause(server) for _ in range(50)))) == {""}
    assert {await shim.cause(server) for _ in range(50)} == {""}
    assert server.asked == 1
