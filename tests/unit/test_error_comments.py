"""The comments of ErrorReason, the reference manual of errors, match the code."""

import re
from pathlib import Path

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


def items(label: str) -> dict[Reason, str]:
    """Return the text after a label, without its full stop, by reason.

    It is empty where the comment lacks the label.
    """
    found = {
        reason: re.findall(rf"\b{label}: (.+?)\.(?= [A-Z]|$)", COMMENTS[reason.value], re.MULTILINE)
        for reason in Reason
    }
    assert [reason for reason, texts in found.items() if len(texts) > 1] == []
    return {reason: texts[0] if texts else "" for reason, texts in found.items()}


def test_every_reason_has_a_comment() -> None:
    assert {reason.value for reason in Reason} == set(COMMENTS)


def test_comments_open_with_the_name_and_the_cause() -> None:
    assert [each for each in Reason if not COMMENTS[each.value].startswith(f" ERROR_REASON_{each}: ")] == []


def test_comments_state_the_grpc_code() -> None:
    assert items("gRPC code") == {reason: spec.grpc_code.value for reason, spec in REASONS.items()}


def test_comments_state_the_status_code() -> None:
    assert items("Status code") == {reason: str(spec.status_code or "") for reason, spec in REASONS.items()}


def test_comments_state_the_resource() -> None:
    assert items("Resource") == {
        reason: f"{spec.resource.type}, named by `{spec.resource.metadata_key}`" if spec.resource else ""
        for reason, spec in REASONS.items()
    }


def test_comments_state_whether_a_retry_helps() -> None:
    assert items("Retry") == {reason: spec.retry.value for reason, spec in REASONS.items()}


def test_comments_state_cure_and_metadata() -> None:
    assert [
        (reason, label) for label in ("Cure", "Metadata") for reason, text in items(label).items() if not text
    ] == []
