"""What a test suite can choose for its server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PointbookOptions:
    """The options of the server for all tests of a session.

    Replace the fixture `pointbook_options` in a `conftest.py` to change them::

        @pytest.fixture(scope="session")
        def pointbook_options() -> PointbookOptions:
            return PointbookOptions(tokens=True, settings={"merchant_sends_max": 50})
    """

    tokens: bool = False
    """Whether calls need a token, as in production. Without, the server is as in `pointbook dev`: it requires no token,
    registers stores on first sight, and sends codes to changed contacts without a pause."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the server by their names without POINTBOOK_, in lower case. Variables of the environment are not
    read."""
