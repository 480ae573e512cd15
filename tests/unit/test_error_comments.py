"""The comments of ErrorReason, the reference manual of errors, match the code."""

import re
from pathlib import Path

import pytest

from pointbook_server.reasons import REASONS, Reason

ERRORS_PROTO = Path(__file__).parents[2] / "proto/pointbook/v1/errors.proto"


def comments() -> dict[str, str]:
    """Return the comment of each reason by its name, with one item per line."""
    blocks = re.findall(r"((?:  //.*\n)+)  ERROR_REASON_(\w+) = \d+;", ERRORS_PROTO.read_text())
    return {
        name: re.sub(r"\n  //(?! -|\n)\s*", " ", block).replace("  //", "")
        for block, name in blocks
        if name != "UNSPECIFIED"
    }


COMMENTS = comments()


def item(reason: Reason, label: str) -> str:
    """Return the text after a label in the comment of a reason, without its full stop."""
    found = re.findall(rf"\b{label}: (.+?)\.(?= [A-Z]|$)", COMMENTS[reason.value], re.MULTILINE)
    assert len(found) <= 1
    return found[0] if found else ""


def test_every_reason_has_a_comment() -> None:
    assert {reason.value for reason in Reason} == set(COMMENTS)


@pytest.mark.parametrize("reason", Reason)
def test_the_comment_opens_with_the_name_and_the_cause(reason: Reason) -> None:
    assert COMMENTS[reason.value].startswith(f" ERROR_REASON_{reason}: ")


@pytest.mark.parametrize("reason", Reason)
def test_the_comment_states_the_grpc_code(reason: Reason) -> None:
    assert item(reason, "gRPC code") == REASONS[reason].grpc_code.value


@pytest.mark.parametrize("reason", Reason)
def test_the_comment_states_the_status_code(reason: Reason) -> None:
    assert item(reason, "Status code") == str(REASONS[reason].status_code or "")


@pytest.mark.parametrize("reason", Reason)
def test_the_comment_states_the_resource(reason: Reason) -> None:
    resource = REASONS[reason].resource
    assert item(reason, "Resource") == (f"{resource.type}, named by `{resource.metadata_key}`" if resource else "")


@pytest.mark.parametrize("reason", Reason)
def test_the_comment_states_whether_a_retry_helps(reason: Reason) -> None:
    assert item(reason, "Retry") == REASONS[reason].retry.value


@pytest.mark.parametrize("reason", Reason)
def test_the_comment_states_cure_and_metadata(reason: Reason) -> None:
    assert item(reason, "Cure")
    assert item(reason, "Metadata")
