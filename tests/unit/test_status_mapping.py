"""The mapping of reasons to gRPC statuses, and the contents of a status."""

import json
from typing import Any

import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from pointbook.v1 import errors_pb2
from pointbook_server.errors import FieldViolation, PointbookError, store_not_found
from pointbook_server.reasons import REASONS, Reason, Retry
from pointbook_server.redemption.status_codes import STATUS_CODES
from pointbook_server.redemption.violations import Violation, sort_violations, to_error
from pointbook_server.rpc.status_mapping import (
    ATTEMPT_SECONDS,
    PUSHBACK_SECONDS_MAX,
    grpc_code,
    retry_pushback,
    to_status,
)
from support.envoy import SERVICE_CONFIG

STATUS_BYTES_MAX = 4_096
NEVER_ERRORS = {Reason.REDEEMABLE, Reason.CODE_NOT_ISSUED}
"""Statuses 800 and 876 appear in responses only."""
CODES_WITHOUT_STATUS = {
    StatusCode.INVALID_ARGUMENT: {Reason.INVALID_FIELDS},
    StatusCode.UNAUTHENTICATED: {Reason.TOKEN_MISSING, Reason.TOKEN_INVALID, Reason.TOKEN_EXPIRED},
    StatusCode.PERMISSION_DENIED: {Reason.SCOPE_MISSING, Reason.MERCHANT_FORBIDDEN},
    StatusCode.NOT_FOUND: {
        Reason.ENTRY_NOT_FOUND,
        Reason.REDEMPTION_NOT_FOUND,
        Reason.BENEFIT_NOT_FOUND,
        Reason.CUSTOM_PRIVILEGE_NOT_FOUND,
        Reason.STORE_NOT_FOUND,
        Reason.WEBHOOK_NOT_FOUND,
    },
    StatusCode.ALREADY_EXISTS: {
        Reason.EVENT_ID_REUSED,
        Reason.IDENTIFIER_TAKEN,
        Reason.REFERENCE_REUSED,
        Reason.STORE_TAKEN,
    },
    StatusCode.FAILED_PRECONDITION: {
        Reason.REDEMPTION_SETTLED,
        Reason.KEY_NOT_CONFIGURED,
        Reason.STORE_UNPROVEN,
        Reason.STORE_IN_USE,
    },
    StatusCode.RESOURCE_EXHAUSTED: {Reason.QUEUE_FULL, Reason.SEND_LIMIT_REACHED, Reason.TOKEN_LIMIT_REACHED},
    StatusCode.ABORTED: {Reason.STALE_ETAG, Reason.TRANSACTION_CONFLICT},
    StatusCode.UNAVAILABLE: {
        Reason.DATABASE_UNAVAILABLE,
        Reason.SHUTTING_DOWN,
        Reason.CODE_KEY_UNKNOWN,
        Reason.CLOCK_WRONG,
    },
    StatusCode.DEADLINE_EXCEEDED: {Reason.DEADLINE_EXCEEDED},
    StatusCode.INTERNAL: {Reason.INTERNAL},
}
"""The gRPC codes of reasons without a redemption status code."""
CODES_BY_STATUS = {
    801: StatusCode.INVALID_ARGUMENT,
    802: StatusCode.INVALID_ARGUMENT,
    816: StatusCode.NOT_FOUND,
    1101: StatusCode.NOT_FOUND,
    1632: StatusCode.NOT_FOUND,
}
"""The gRPC codes of redemption status codes; all others are FAILED_PRECONDITION."""
RETRIED = {StatusCode.UNAVAILABLE, StatusCode.ABORTED, StatusCode.RESOURCE_EXHAUSTED, StatusCode.DEADLINE_EXCEEDED}
"""The codes that callers retry, by themselves or through a retry policy."""


def detail(status: Status, kind: type[Any]) -> Any:
    """Return the only detail of a type."""
    found = [message for packed in status.details if packed.Unpack(message := kind())]
    assert len(found) == 1
    return found[0]


def invalid(violations: list[FieldViolation]) -> PointbookError:
    """Build the error of a request with invalid fields."""
    return PointbookError(Reason.INVALID_FIELDS, "Wrong fields.", violations=violations)


def test_every_reason_is_in_the_contract() -> None:
    """Clients switch over ErrorReason."""
    names = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118 - not a dict

    assert {reason.value for reason in Reason} <= names
    assert all(reason.name == reason.value for reason in Reason)


def test_every_reason_without_status_code_has_its_grpc_code() -> None:
    expected = {reason: code for code, reasons in CODES_WITHOUT_STATUS.items() for reason in reasons}
    actual = {reason: grpc_code(reason) for reason in Reason if reason not in STATUS_CODES}

    assert expected == actual


def test_every_status_code_has_its_grpc_code() -> None:
    refusals = {reason: status for reason, status in STATUS_CODES.items() if reason not in NEVER_ERRORS}
    expected = {
        reason: CODES_BY_STATUS.get(status, StatusCode.FAILED_PRECONDITION) for reason, status in refusals.items()
    } | {Reason.DELIVERY_FAILED: StatusCode.UNAVAILABLE}

    assert expected == {reason: grpc_code(reason) for reason in refusals}


def test_unavailable_is_only_for_causes_that_pass_soon() -> None:
    """A standard retry policy retries UNAVAILABLE within seconds."""
    retries = {reason: REASONS[reason].retry for reason in Reason if grpc_code(reason) is StatusCode.UNAVAILABLE}

    assert set(retries.values()) == {Retry.SOON}
    assert set(retries) == {
        Reason.DATABASE_UNAVAILABLE,
        Reason.SHUTTING_DOWN,
        Reason.CODE_KEY_UNKNOWN,
        Reason.CLOCK_WRONG,
        Reason.DELIVERY_FAILED,
    }


def test_retried_grpc_codes_mean_that_a_retry_can_help() -> None:
    """STALE_ETAG is the exception: gRPC prescribes its code."""
    helpful = {Retry.SOON, Retry.LATER}
    retried = {reason for reason in Reason if REASONS[reason].retry not in helpful and grpc_code(reason) in RETRIED}

    assert retried == {Reason.STALE_ETAG}


def test_status_contains_reason_values_and_resource() -> None:
    status = to_status(store_not_found("s-1"))
    info = detail(status, ErrorInfo)
    resource = detail(status, ResourceInfo)

    assert StatusCode.NOT_FOUND.value[0] == status.code
    assert (info.domain, info.reason, dict(info.metadata)) == ("pointbook", "STORE_NOT_FOUND", {"store_id": "s-1"})
    assert (resource.resource_type, resource.resource_name) == ("pointbook.v1.Store", "s-1")


@pytest.mark.parametrize(("seconds", "expected_ms"), [(0.0, 0), (1.0, 1_000), (59.25, 59_250), (1.009, 1_009)])
def test_retry_info_names_the_delay(seconds: float, expected_ms: int) -> None:
    status = to_status(PointbookError(Reason.DELIVERY_FAILED, "No.", retry_after_seconds=seconds))

    assert expected_ms == detail(status, RetryInfo).retry_delay.ToMilliseconds()


def pushback(reason: Reason, seconds: float | None, remaining_seconds: float | None = None) -> str | None:
    """Return what a client's retry policy is told, None for nothing."""
    metadata = dict(retry_pushback(PointbookError(reason, "No.", retry_after_seconds=seconds), remaining_seconds))
    assert set(metadata) <= {"grpc-retry-pushback-ms"}
    return metadata.get("grpc-retry-pushback-ms")


@pytest.mark.parametrize("reason", Reason)
def test_a_retry_is_forbidden_unless_the_reason_can_pass(reason: Reason) -> None:
    can_pass = REASONS[reason].retry in {Retry.SOON, Retry.LATER} and reason is not Reason.DEADLINE_EXCEEDED

    assert pushback(reason, None) == (None if can_pass else "-1")
    assert pushback(reason, 0.25) == ("250" if can_pass else "-1")


@pytest.mark.parametrize(
    ("seconds", "remaining_seconds", "expected"),
    [
        (0.0, None, None),
        (1.009, None, "1009"),
        (PUSHBACK_SECONDS_MAX, None, "2000"),
        (PUSHBACK_SECONDS_MAX + 0.001, None, "-1"),
        (1.0, 1.0 + ATTEMPT_SECONDS, "1000"),
        (1.0, 1.0 + ATTEMPT_SECONDS - 0.001, "-1"),
        (None, 0.001, None),
    ],
)
def test_a_retry_waits_for_a_short_delay_only(
    seconds: float | None, remaining_seconds: float | None, expected: str | None
) -> None:
    assert pushback(Reason.QUEUE_FULL, seconds, remaining_seconds) == expected


def test_a_client_waits_no_longer_for_the_server_than_by_its_own_policy() -> None:
    (method_config,) = json.loads(SERVICE_CONFIG.read_text())["methodConfig"]

    assert method_config["retryPolicy"]["maxBackoff"] == f"{PUSHBACK_SECONDS_MAX:g}s"


def test_few_violations_are_all_included() -> None:
    violations = [FieldViolation(f"field[{index}]", "must be shorter") for index in range(50)]
    status = to_status(invalid(violations))
    included = detail(status, BadRequest).field_violations

    assert [(v.field, v.description) for v in violations] == [(v.field, v.description) for v in included]
    assert "omitted_violations" not in detail(status, ErrorInfo).metadata


def test_violations_beyond_fifty_are_counted() -> None:
    status = to_status(invalid([FieldViolation(f"f[{index}]", "is required") for index in range(200)]))

    assert len(detail(status, BadRequest).field_violations) == 50
    assert detail(status, ErrorInfo).metadata["omitted_violations"] == "150"


@pytest.mark.parametrize("letter", ["x", "é", "点", "😀"])
def test_status_stays_under_four_kib(letter: str) -> None:
    violations = [FieldViolation(f"{index}{letter * 1_000}", letter * 1_000) for index in range(200)]
    error = PointbookError(Reason.INVALID_FIELDS, letter * 1_000, violations=violations, metadata={"a": letter * 1_000})
    status = to_status(error)
    included = len(detail(status, BadRequest).field_violations)

    assert status.ByteSize() < STATUS_BYTES_MAX
    assert included >= 1
    assert detail(status, ErrorInfo).metadata["omitted_violations"] == str(200 - included)


def test_metadata_of_a_refusal_lists_every_violation() -> None:
    violations = sort_violations(Violation.of(reason, "No.") for reason in STATUS_CODES if reason not in NEVER_ERRORS)
    metadata = detail(to_status(to_error(violations)), ErrorInfo).metadata

    assert metadata["status_code"] == "801"
    assert [f"{violation.code} {violation.reason}" for violation in violations] == metadata["violations"].split(", ")
