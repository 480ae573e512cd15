"""Fixtures of the integration tests: shims."""

from collections.abc import AsyncIterator

import pytest

from support.fake_servers import RunningShim, shim_with_fakes
from support.servers import Service
from support.shims import WebhookSender, webhook_sender


@pytest.fixture(scope="module")
async def sender(service: Service, admin_token: str) -> AsyncIterator[WebhookSender]:
    """A sender to a shim whose token has all scopes for all merchants."""
    async with webhook_sender(service.server.port, admin_token, service.client) as sender:
        yield sender


@pytest.fixture(scope="module")
async def shared_shim() -> AsyncIterator[RunningShim]:
    """A shim with default settings in front of a fake server, for all tests of a file."""
    async with shim_with_fakes() as running:
        yield running


@pytest.fixture
def shim(shared_shim: RunningShim) -> RunningShim:
    """The file's shim, after resetting its fake server."""
    shared_shim.reset_fakes()
    return shared_shim
