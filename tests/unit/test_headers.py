"""The metadata of a call that the server reads."""

import re
from typing import Any

import pytest

from pointbook_server.rpc.headers import previous_attempts, read_headers

ID = "x-request-id"


def request_id(*values: str | bytes) -> str:
    """Return the request id of a call with some ids in its metadata."""
    return read_headers([(ID, value) for value in values]).request_id


@pytest.mark.parametrize("value", ["checkout-17", "a", "A.b_c-9", "0" * 64])
def test_an_id_of_the_caller_is_used(value: str) -> None:
    assert request_id(value) == value


@pytest.mark.parametrize("values", [(), ("",), ("0" * 65,), ("two words",), ("a\nb",), ("näh",), ("a/b",), (b"bytes",)])
def test_a_call_without_a_valid_id_gets_a_new_one(values: tuple[str | bytes, ...]) -> None:
    found = {request_id(*values) for _ in range(2)}

    assert len(found) == 2
    assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in found)


def test_the_first_valid_id_counts() -> None:
    assert request_id("two words", "first", "second") == "first"


@pytest.mark.parametrize(
    ("metadata", "count"),
    [
        (None, 0),
        ((), 0),
        ([("grpc-previous-rpc-attempts", "2")], 2),
        ([("x-envoy-attempt-count", "1")], 0),
        ([("x-envoy-attempt-count", "3")], 2),
        ([("grpc-previous-rpc-attempts", "1"), ("x-envoy-attempt-count", "1")], 1),
        ([("grpc-previous-rpc-attempts", "-1")], 0),
        ([("grpc-previous-rpc-attempts", "many")], 0),
        ([("grpc-previous-rpc-attempts", "1" * 5_000)], 0),
        ([("grpc-previous-rpc-attempts", b"1")], 0),
    ],
)
def test_previous_attempts_are_those_of_grpc_or_envoy(metadata: Any, count: int) -> None:
    assert previous_attempts(metadata) == count
