"""The time until `pointbook dev` is ready.

On a new folder, and on an existing one.
"""

import re
import time
from pathlib import Path

from load.http_client import HttpConnection
from reporting.progress import StepProgress
from reporting.results import Result
from servers.subprocesses import read_line, run_python

READY = re.compile(r"http://(\S+)/readyz")
ANY_PORT = "127.0.0.1:0"
BAR = "≤ 2 s, aim 1 s"


async def measure_startup(folder: Path, steps: StepProgress) -> list[Result]:
    """Start `pointbook dev` twice on one folder."""
    results = []
    for name in ("first start", "second start"):
        steps.begin(f"pointbook dev, {name}")
        results.append(Result(f"pointbook dev ready, {name}", await _measure_start(folder), "s", BAR))
    return results


async def _measure_start(folder: Path) -> float:
    environment = {
        "POINTBOOK_DATA_DIR": str(folder),
        "POINTBOOK_GRPC_ADDRESS": ANY_PORT,
        "POINTBOOK_HTTP_ADDRESS": ANY_PORT,
    }
    started = time.perf_counter()
    async with run_python("-m", "pointbook_cli.main", "dev", environment=environment) as process:
        while (address := READY.search(await read_line(process))) is None:
            pass
        async with HttpConnection(address[1]) as connection:
            status, _ = await connection.request(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        seconds = time.perf_counter() - started
    if status != 200:  # noqa: PLR2004 - HTTP OK
        raise RuntimeError(f"/readyz returned {status} although `pointbook dev` printed that it was ready")
    return seconds
