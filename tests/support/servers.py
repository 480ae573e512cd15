"""Servers in the process of a test."""

import pytest

from pointbook_server.rpc import admission
from pointbook_server.server import Server


async def stop_idle(server: Server) -> None:
    """Stop a server whose clients have all their answers, without the pause for calls that follow an answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "QUIET_SECONDS", 0.0)
        await server.stop()
