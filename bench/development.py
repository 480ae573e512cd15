"""How long `pointbook dev` takes until it is ready: on a fresh folder, and on one that it knows."""

import re
import time
from pathlib import Path

from http_client import HttpConnection
from processes import read_line, started
from report import Result, Steps

READY = re.compile(r"http://(\S+)/readyz")
ANY_PORT = "127.0.0.1:0"
BAR = "≤ 5 s, aim 2 s"


async def measure_development(folder: Path, steps: Steps) -> list[Result]:
    """Start `pointbook dev` twice on one folder."""
    results = []
    for start in ("first start", "second start"):
        steps.begin(f"pointbook dev, {start}")
        results.append(Result(f"pointbook dev ready, {start}", await _start(folder), "s", BAR))
    return results


async def _start(folder: Path) -> float:
    environment = {
        "POINTBOOK_DATA_DIR": str(folder),
        "POINTBOOK_GRPC_ADDRESS": ANY_PORT,
        "POINTBOOK_HTTP_ADDRESS": ANY_PORT,
    }
    began = time.perf_counter()
    async with started("-m", "pointbook_cli.main", "dev", environment=environment) as process:
        while (address := READY.search(await read_line(process))) is None:
            pass
        async with HttpConnection(address[1]) as connection:
            status, _ = await connection.request(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        seconds = time.perf_counter() - began
    if status != 200:  # noqa: PLR2004 - ready
        raise RuntimeError(f"/readyz answered {status} after `pointbook dev` said that it was ready")
    return seconds
