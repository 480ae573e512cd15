"""The pytest plugin with the fixture `pointbook`.

pytest imports it in every run. It starts nothing, and imports the client alone, before a test uses the fixture.
"""

from collections.abc import Iterator

import pytest

from pointbook_client.testing.options import PointbookOptions
from pointbook_client.testing.server import PointbookServer
from pointbook_client.testing.session import PointbookSession


@pytest.fixture(scope="session")
def pointbook_options() -> PointbookOptions:
    """Return the options of the server; a `conftest.py` can replace them."""
    return PointbookOptions()


@pytest.fixture(scope="session")
def pointbook_session(pointbook_options: PointbookOptions) -> Iterator[PointbookSession]:
    """Run the server that the tests of this process share."""
    session = PointbookSession(pointbook_options)
    yield session
    session.close()


@pytest.fixture
def pointbook(request: pytest.FixtureRequest, pointbook_session: PointbookSession) -> Iterator[PointbookServer]:
    """Yield the server, with a merchant, a store and a program for this test alone."""
    server = PointbookServer(pointbook_session)
    yield server
    server.close()
    # pytest prints it if the test fails.
    request.node.add_report_section("teardown", "log of Pointbook", server.log)
