"""Every line that the README shows with a prompt, run as printed but for the ports."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from e2e.processes import ROOT, find_grpcurl, finish, free_port, http_get, running, shell_environment

README = (ROOT / "README.md").read_text()
LINES = [
    line.removeprefix("$ ")
    for block in re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]
REFUSED_LINE = next(line for line in LINES if '"updated_value":-4' in line)
"""The tour ends with a request whose every wrong field is named."""


@pytest.fixture(scope="module")
async def ports(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[int, int]]:
    """A running `pointbook dev`: the ports of gRPC and of HTTP."""
    folder: Path = tmp_path_factory.mktemp("readme")
    grpc_port, http_port = free_port(), free_port()
    settings = {
        "DATA_DIR": str(folder / "data"),
        "GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
        "HTTP_ADDRESS": f"127.0.0.1:{http_port}",
    }
    async with running("dev", folder=folder, settings=settings) as process:

        async def ready() -> bool:
            return await http_get(f"http://127.0.0.1:{http_port}/readyz") == 200

        await process.until(ready)
        yield grpc_port, http_port
        await process.terminate()


def test_the_tour_has_lines() -> None:
    """The tour shows a webhook, an account, a question, a code, and an error."""
    assert len(LINES) >= 9


async def test_every_line_works_as_printed(ports: tuple[int, int]) -> None:
    """A newcomer who pastes the tour sees what it says."""
    grpc_port, http_port = ports
    environment = shell_environment() | {
        "POINTBOOK_HTTP_ADDRESS": f"127.0.0.1:{http_port}",
        "POINTBOOK_GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
    }
    skipped = 0
    for line in LINES:
        if line.startswith("grpcurl") and find_grpcurl() is None:
            skipped += 1
            continue
        here = line.replace("127.0.0.1:50051", f"127.0.0.1:{grpc_port}")
        here = here.replace("127.0.0.1:8080", f"127.0.0.1:{http_port}")
        finished = await finish("bash", "-c", here, environment=environment)
        if line is REFUSED_LINE:
            assert finished.exit_code != 0
            for field in ("event_id", "update_type", "updated_at", "store_id", "buyer_id", "updated_value"):
                assert f"update.{field}" in finished.err
        else:
            assert finished.exit_code == 0, (line, finished)
    if skipped:
        pytest.skip(f"grpcurl is not installed: {skipped} lines were not run; test_dev.py asks the same by buf curl")
