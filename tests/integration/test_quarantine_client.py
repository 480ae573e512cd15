"""A replay ends with errors that the next webhook would get, too."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from pointbook.v1 import webhooks_pb2, webhooks_pb2_grpc
from pointbook_cli.quarantine_client import NotReplayedError, Quarantine
from pointbook_client import PointbookError
from pointbook_client.sync import connect
from pointbook_server import errors
from pointbook_server.reasons import Reason
from pointbook_server.rpc.status_mapping import abort


class FailingWebhooks(webhooks_pb2_grpc.WebhooksServiceServicer):
    """A quarantine whose reads fail with a code, or with a reason."""

    failure: grpc.StatusCode | Reason

    async def GetQuarantinedWebhook(  # noqa: N802 - gRPC names the methods
        self,
        _request: object,
        context: grpc.aio.ServicerContext[
            webhooks_pb2.GetQuarantinedWebhookRequest, webhooks_pb2.GetQuarantinedWebhookResponse
        ],
    ) -> webhooks_pb2.GetQuarantinedWebhookResponse:
        """Fail."""
        if isinstance(self.failure, Reason):
            await abort(
                context, errors.PointbookError(self.failure, "in trouble", retry_after_seconds=60.0), "request-1"
            )
        await context.abort(self.failure, "in trouble")
        raise AssertionError("gRPC's abort has not raised")


@pytest.fixture
async def failing() -> AsyncIterator[tuple[FailingWebhooks, str]]:
    """A failing quarantine, and its address."""
    servicer, server = FailingWebhooks(), grpc.aio.server()
    webhooks_pb2_grpc.add_WebhooksServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


def replay(address: str) -> None:
    """Replay a webhook."""
    with connect(address, timeout=10) as client:
        Quarantine(client, "merchant").replay("q-1", "", "", override=False)


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    ],
)
async def test_an_error_of_all_webhooks_ends_the_replay(
    code: grpc.StatusCode, failing: tuple[FailingWebhooks, str]
) -> None:
    servicer, address = failing
    servicer.failure = code

    with pytest.raises(PointbookError, match=f"{code.name}: in trouble") as caught:
        await asyncio.to_thread(replay, address)
    assert caught.value.grpc_code is code


@pytest.mark.parametrize("reason", [Reason.CODE_KEY_UNKNOWN, Reason.STORE_NOT_FOUND, Reason.INVALID_FIELDS])
async def test_an_error_of_one_webhook_leaves_it_in_quarantine(
    reason: Reason, failing: tuple[FailingWebhooks, str]
) -> None:
    servicer, address = failing
    servicer.failure = reason

    with pytest.raises(NotReplayedError, match=rf"{reason}: in trouble \(request request-1\)"):
        await asyncio.to_thread(replay, address)
