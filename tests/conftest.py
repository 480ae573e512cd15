"""Fixtures: PostgreSQL per process, database and server per file, shop per test."""

import gc
from collections.abc import AsyncIterator, Callable, Generator

import pytest
import structlog
from hypothesis import settings

from pointbook_server import maintenance
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.database import Database
from pointbook_server.db.migrations import migrate
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import TestClock
from support.embedded_database import Cluster
from support.examples import QUICK
from support.forked import FORKS
from support.leaks import find_leaks
from support.outbox import Outbox
from support.servers import Service, server_settings, stop_idle
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

TEMPLATE = "pointbook_template"
FIGURE = "figure"
LOGS: pytest.StashKey[dict[str, list[str]]] = pytest.StashKey()
"""The logs and the output of each file's tests."""

# The option `--hypothesis-profile` replaces this profile.
settings.load_profile(QUICK)

# Tracebacks without local variables, as in production.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests, and keep the garbage collector from their objects.

    It would read these million objects again and again, but they stay until the end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Store the logs and the output of each test."""
    report = yield
    logs = item.config.stash.setdefault(LOGS, {}).setdefault(str(item.path), [])
    logs += [text for _, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests measured, with their goals."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    rows = [figure for report in reports for name, figure in report.user_properties if name == FIGURE]
    if rows:
        terminalreporter.section("figures")
    for what, value, goal in rows:
        terminalreporter.line(f"{what:<76} {value:>14}   {goal}")


def pytest_sessionfinish() -> None:
    """Stop the fork server."""
    FORKS.stop()


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, float | str, str], None]:
    """Record a figure with its goal for the table at the end of the run."""

    def record(what: str, value: float | str, goal: str) -> None:
        record_property(FIGURE, (what, value if isinstance(value, str) else f"{value:,.1f}", goal))

    return record


@pytest.fixture(scope="session")
async def cluster() -> AsyncIterator[Cluster]:
    """A PostgreSQL for this process of the test run."""
    running = Cluster()
    await running.start()
    yield running
    await running.stop()


async def _migrate(url: str) -> None:
    await migrate(url)


@pytest.fixture(scope="module")
async def database_url(cluster: Cluster) -> str:
    """A migrated database for one test file."""
    await cluster.template(TEMPLATE, _migrate)
    return await cluster.clone(TEMPLATE)


@pytest.fixture(scope="module")
async def database(database_url: str) -> AsyncIterator[Database]:
    """A pool of connections to the file's database, separate from the server's."""
    pool = Database(database_url, pool_size=4)
    yield pool
    await pool.dispose()


@pytest.fixture(scope="module")
async def admin_token(database_url: str) -> str:
    """A token with all scopes for all merchants."""
    return await make_token(database_url, [ALL_MERCHANTS], list(Scope))


@pytest.fixture(scope="module")
async def service(
    request: pytest.FixtureRequest, cluster: Cluster, database_url: str, admin_token: str
) -> AsyncIterator[Service]:
    """A server as in production, except for its clock and its senders.

    At the end, no code and no contact may be in its database, its logs or the database's log.
    """
    clock, outbox = TestClock(), Outbox()
    server = Server(server_settings(), database_url, senders={Channel.SMS: outbox, Channel.EMAIL: outbox}, clock=clock)
    with pytest.MonkeyPatch.context() as patch:
        # Tests run the jobs of maintenance themselves, so that none runs at a random time.
        patch.setattr(maintenance, "INTERVAL_SECONDS", 1_000_000.0)
        await server.start()
        client = Client(server.port, admin_token)
        yield Service(server, client, clock, outbox, database_url)
        await client.close()
        await stop_idle(server)
    logs = request.config.stash.get(LOGS, {}).get(str(request.path), [])
    assert not await find_leaks(database_url, outbox.messages, "\n".join([*logs, cluster.log]))


@pytest.fixture
def client(service: Service) -> Client:
    """A client whose token has all scopes for all merchants."""
    return service.client


@pytest.fixture
async def shop(client: Client) -> Shop:
    """A merchant with a registered store, for one test."""
    own = Shop(unique("merchant"), unique("store"))
    await client.put_store(own.merchant_id, own.store_id)
    return own
