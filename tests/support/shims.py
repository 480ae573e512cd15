"""A shim before a server, over real HTTP: what the files of shim tests share."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from pydantic import SecretStr

from shopline_shim.server import ShimServer
from shopline_shim.settings import ShimSettings

SECRET = "app-secret"
PATH = "/webhooks/shopline"


@asynccontextmanager
async def shim_before(port: int, token: str, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run a shim before a server, with some settings changed, and answer a client that speaks to it."""
    values: dict[str, Any] = {
        "http_address": "127.0.0.1:0",
        "shim_metrics_address": "127.0.0.1:0",
        "grpc_address": f"127.0.0.1:{port}",
        "shopline_secrets": (SecretStr(SECRET),),
        "token": SecretStr(token),
    }
    settings = ShimSettings(**{**values, **changes})
    shim, stop, ready = ShimServer(settings), asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(shim.serve(stop=stop, ready=ready))
    await asyncio.wait_for(ready.wait(), 5)
    async with httpx.AsyncClient(base_url=f"http://{shim.address}", trust_env=False) as http:
        try:
            yield http
        finally:
            stop.set()
            await serving
