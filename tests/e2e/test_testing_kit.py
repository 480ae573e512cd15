"""The testing kit in a pytest of its own, as its users run it."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pointbook_client.testing import processes
from pointbook_client.testing.errors import PointbookTestingError
from pointbook_client.testing.options import PointbookOptions
from pointbook_client.testing.processes import ChildProcess
from pointbook_client.testing.session import PointbookSession
from support import checkout_suite, checkout_suite_with_tokens
from support.docs_pages import DOCS, blocks_of
from support.processes import HAS_PROC, Finished, Running, clean_environment, finish
from support.waiting import until

PAGE = DOCS / "testing.md"
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error")
CONFIGURATION = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
"""
UNTIL_KILLED = """
import json
import os
import signal
from pathlib import Path


def test_that_does_not_end(pointbook, pointbook_session):
    fork = os.fork() if Path("forks").exists() else None
    if fork == 0:
        # The fork outlives pytest. It has its own process group, but not its output.
        os.setsid()
        os.closerange(0, 3)
        signal.pause()
        os._exit(0)
    # A shell starts its background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes = [each._process.pid for each in (pointbook_session._database, pointbook_session._server)]
    folder = str(pointbook_session._messages_file.parent)
    Path("running.new").write_text(json.dumps({"processes": processes, "folder": folder, "fork": fork}))
    Path("running.new").rename("running.json")
    signal.pause()
"""
FAILING = """
def test_that_fails(pointbook):
    pointbook.add_customer(points=10)
    assert pointbook.messages
"""
IMPORTED = "import json, sys; print(json.dumps([name for name in {names!r} if name in sys.modules]))"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a user's tests."""
    (tmp_path / "pytest.ini").write_text(CONFIGURATION)
    return tmp_path


@pytest.fixture(scope="module")
async def parallel_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of a team's tests, of those of the page, and of one that fails.

    Each run starts servers of its own, which takes seconds.
    """
    folder = tmp_path_factory.mktemp("team")
    (folder / "pytest.ini").write_text(CONFIGURATION)
    shutil.copy(checkout_suite.__file__, folder / "test_checkout.py")
    *tests, _ = blocks_of(PAGE.read_text(), "python")
    for number, test in enumerate(tests):
        (folder / f"test_page_{number}.py").write_text(test)
    (folder / "test_failing.py").write_text(FAILING)
    return await run_pytest(folder, "-n", "2", "-rpf")


async def run_pytest(folder: Path, *options: str) -> Finished:
    """Run the tests of a folder."""
    return await finish(*PYTEST, *options, environment=clean_environment({}), cwd=folder, seconds=200)


async def imported_by(module: str, *names: str) -> list[str]:
    """Return which modules the import of a module imports too."""
    code = f"import {module}; {IMPORTED.format(names=names)}"
    finished = await finish(sys.executable, "-c", code, environment=clean_environment({}))
    assert finished.exit_code == 0, finished.out
    return list(json.loads(finished.out))


def test_a_team_tests_its_checkout_in_parallel_processes(parallel_run: Finished) -> None:
    assert parallel_run.out.count("\nPASSED test_checkout.py::") == 21, parallel_run.out
    assert "1 failed, 23 passed in" in parallel_run.out


def test_the_tests_of_the_page_pass(parallel_run: Finished) -> None:
    assert parallel_run.out.count("\nPASSED test_page_0.py::") == 1, parallel_run.out
    assert parallel_run.out.count("\nPASSED test_page_1.py::") == 1, parallel_run.out


def test_a_failed_test_shows_the_log_of_the_server(parallel_run: Finished) -> None:
    assert parallel_run.exit_code == 1, parallel_run.out
    assert "\nFAILED test_failing.py::test_that_fails" in parallel_run.out
    assert "Captured log of Pointbook" in parallel_run.out
    assert "method=CustomersService/PutCustomer" in parallel_run.out


async def test_a_team_tests_with_tokens_by_the_options_of_the_page(folder: Path) -> None:
    *_, options = blocks_of(PAGE.read_text(), "python")
    (folder / "conftest.py").write_text(options)
    shutil.copy(checkout_suite_with_tokens.__file__, folder / "test_checkout.py")
    finished = await run_pytest(folder)

    assert finished.exit_code == 0, finished.out
    assert "5 passed" in finished.out


@pytest.mark.skipif(not HAS_PROC, reason="processes are looked up in /proc")
@pytest.mark.parametrize("has_fork", [False, True])
@pytest.mark.parametrize("order", [signal.SIGKILL, signal.SIGINT])
async def test_nothing_is_left_when_pytest_ends_early(
    folder: Path,
    order: signal.Signals,
    has_fork: bool,  # noqa: FBT001 - a parameter of pytest
) -> None:
    if has_fork:
        (folder / "forks").touch()
    (folder / "test_endless.py").write_text(UNTIL_KILLED)
    process = await Running.start(*PYTEST, environment=clean_environment({}), folder=folder, cwd=folder)

    async def is_running() -> bool:
        return (folder / "running.json").exists()

    running: dict[str, Any] = {}
    try:
        await process.until(is_running)
        running |= json.loads((folder / "running.json").read_text())
        database = Path(running["folder"])
        assert (database / "server.log").exists()
        postgres = int((database / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
        await process.stop(order)
        left = [*(Path("/proc", str(pid)) for pid in (*running["processes"], postgres)), database]
        await until(lambda: not any(each.exists() for each in left), seconds=30)
    finally:
        await process.kill()
        if fork := running.get("fork"):
            os.kill(fork, signal.SIGKILL)


async def test_the_client_imports_neither_pytest_nor_the_server() -> None:
    names = ("pytest", "pointbook_server", "pointbook_cli", "pointbook_client.testing")

    assert await imported_by("pointbook_client", *names) == []


async def test_the_plugin_imports_no_server_before_a_test_uses_it() -> None:
    names = ("pointbook_server", "pointbook_cli", "asyncpg")

    assert await imported_by("pointbook_client.testing.plugin", *names) == []
    assert await imported_by("pointbook_client.testing", "pytest", *names) == []


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The empty folder in which sessions create theirs."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pointbook_client.testing.session.fastest_place", lambda: None)
    return tmp_path


def test_an_invalid_setting_is_named_and_leaves_nothing(temporary: Path) -> None:
    with pytest.raises(PointbookTestingError, match="merchant_sends_max"):
        PointbookSession(PointbookOptions(settings={"merchant_sends_max": 0}))
    assert list(temporary.iterdir()) == []


def test_a_database_that_does_not_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(PointbookTestingError, match="database_process has ended with exit code"):
        PointbookSession(PointbookOptions())
    assert list(temporary.iterdir()) == []


def test_a_missing_server_is_named(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr("pointbook_client.testing.session.find_spec", lambda _name: None)
    with pytest.raises(PointbookTestingError, match=r"pip install 'pointbook-client\[testing\]'"):
        PointbookSession(PointbookOptions())
    assert list(temporary.iterdir()) == []


def test_a_process_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    process = ChildProcess("pointbook_client.testing.no_such_module", log=tmp_path / "log")
    with pytest.raises(PointbookTestingError, match=r"exit code 1:\n.*No module named"):
        process.request("start")
    process.stop()


def test_a_reply_that_came_too_late_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = ChildProcess("pointbook_client.testing.server_process", log=tmp_path / "log")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "REPLY_SECONDS_MAX", 0.0)
        with pytest.raises(PointbookTestingError, match="does not reply within"):
            process.request("fail_deliveries", failure="no such failure", count=None)

    assert "error" not in process.request("set_clock", offset_ms=0)
    process.kill()
