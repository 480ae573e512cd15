"""The table of errors: every reason is in the contract, has one gRPC code, and reaches the client whole."""

from typing import Any

import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from pointbook.v1 import errors_pb2
from pointbook_server.errors import REASONS, FieldViolation, PointbookError, Reason, Retry, store_not_found
from pointbook_server.redemption.status_codes import STATUS_CODES
from pointbook_server.redemption.violations import Violation, sort_violations, to_error
from pointbook_server.rpc.status_mapping import grpc_code, to_status

STATUS_BYTES_MAX = 4_096
NEVER_ERRORS = {Reason.REDEEMABLE, Reason.CODE_NOT_ISSUED}
"""800 and 876 are statuses of an answer."""
CODES_OF_CALLS = {
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
"""The gRPC codes of the reasons that are no refusals of a redemption."""
CODES_OF_REFUSALS = {
    801: StatusCode.INVALID_ARGUMENT,
    802: StatusCode.INVALID_ARGUMENT,
    816: StatusCode.NOT_FOUND,
    1101: StatusCode.NOT_FOUND,
    1632: StatusCode.NOT_FOUND,
}
"""The gRPC codes of the redemption's status codes; the others are FAILED_PRECONDITION."""
REPEATED = {StatusCode.UNAVAILABLE, StatusCode.ABORTED, StatusCode.RESOURCE_EXHAUSTED, StatusCode.DEADLINE_EXCEEDED}
"""The codes that callers repeat, each for themselves or by a policy."""


def detail(status: Status, kind: type[Any]) -> Any:
    """Unpack the one detail of a kind."""
    found = [message for packed in status.details if packed.Unpack(message := kind())]
    assert len(found) == 1
    return found[0]


def invalid(violations: list[FieldViolation]) -> PointbookError:
    """Make the error of a request with wrong fields."""
    return PointbookError(Reason.INVALID_FIELDS, "Wrong fields.", violations=violations)


def test_every_reason_is_in_the_contract() -> None:
    """Clients switch over ErrorReason, so a reason outside of it would be a surprise."""
    names = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118 - no dict

    assert {reason.value for reason in Reason} <= names
    assert all(reason.name == reason.value for reason in Reason)


def test_every_reason_of_a_call_has_its_code() -> None:
    """The table of api.md: one gRPC code a reason, and none is forgotten."""
    expected = {reason: code for code, reasons in CODES_OF_CALLS.items() for reason in reasons}
    actual = {reason: grpc_code(reason) for reason in Reason if reason not in STATUS_CODES}

    assert expected == actual


def test_every_refusal_of_a_redemption_has_its_code() -> None:
    """Status codes become the gRPC codes that redemption.md names."""
    refusals = {reason: status for reason, status in STATUS_CODES.items() if reason not in NEVER_ERRORS}
    expected = {
        reason: CODES_OF_REFUSALS.get(status, StatusCode.FAILED_PRECONDITION) for reason, status in refusals.items()
    } | {Reason.DELIVERY_FAILED: StatusCode.UNAVAILABLE}

    assert expected == {reason: grpc_code(reason) for reason in refusals}


def test_unavailable_is_only_for_causes_that_pass_soon() -> None:
    """A standard retry policy repeats UNAVAILABLE within seconds, for every reason."""
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
    """But for a stale etag, whose code the contract of gRPC prescribes."""
    helpful = {Retry.SOON, Retry.LATER}
    repeated = {reason for reason in Reason if REASONS[reason].retry not in helpful and grpc_code(reason) in REPEATED}

    assert repeated == {Reason.STALE_ETAG}


def test_an_error_names_its_reason_and_values() -> None:
    """A program can act on an error: one ErrorInfo of our domain, and the resource where one is missing."""
    status = to_status(store_not_found("s-1"))
    info = detail(status, ErrorInfo)
    resource = detail(status, ResourceInfo)

    assert StatusCode.NOT_FOUND.value[0] == status.code
    assert (info.domain, info.reason, dict(info.metadata)) == ("pointbook", "STORE_NOT_FOUND", {"store_id": "s-1"})
    assert (resource.resource_type, resource.resource_name) == ("pointbook.v1.Store", "s-1")


@pytest.mark.parametrize(("seconds", "expected_ms"), [(0.0, 0), (1.0, 1_000), (59.25, 59_250), (1.009, 1_009)])
def test_retry_info_names_the_delay(seconds: float, expected_ms: int) -> None:
    """RetryInfo tells when to come again, to the millisecond."""
    status = to_status(PointbookError(Reason.DELIVERY_FAILED, "No.", retry_after_seconds=seconds))

    assert expected_ms == detail(status, RetryInfo).retry_delay.ToMilliseconds()


def test_few_violations_are_all_included() -> None:
    """A request is mended in one go: each wrong field by its path."""
    violations = [FieldViolation(f"field[{index}]", "must be shorter") for index in range(50)]
    status = to_status(invalid(violations))
    told = detail(status, BadRequest).field_violations

    assert [(v.field, v.description) for v in violations] == [(v.field, v.description) for v in told]
    assert "omitted_violations" not in detail(status, ErrorInfo).metadata


def test_violations_beyond_fifty_are_counted() -> None:
    """The first fifty wrong fields are named, the others counted."""
    status = to_status(invalid([FieldViolation(f"f[{index}]", "is required") for index in range(200)]))

    assert len(detail(status, BadRequest).field_violations) == 50
    assert detail(status, ErrorInfo).metadata["omitted_violations"] == "150"


@pytest.mark.parametrize("letter", ["x", "é", "点", "😀"])
def test_a_status_stays_under_four_kib(letter: str) -> None:
    """However long the paths are, the status arrives, and says how many violations it leaves out."""
    violations = [FieldViolation(f"{index}{letter * 1_000}", letter * 1_000) for index in range(200)]
    error = PointbookError(Reason.INVALID_FIELDS, letter * 1_000, violations=violations, metadata={"a": letter * 1_000})
    status = to_status(error)
    told = len(detail(status, BadRequest).field_violations)

    assert status.ByteSize() < STATUS_BYTES_MAX
    assert told >= 1
    assert detail(status, ErrorInfo).metadata["omitted_violations"] == str(200 - told)


def test_a_refusal_names_every_violation() -> None:
    """An error has one reason, yet its metadata names all that speaks against the redemption."""
    everything = sort_violations(Violation.of(reason, "No.") for reason in STATUS_CODES if reason not in NEVER_ERRORS)
    metadata = detail(to_status(to_error(everything)), ErrorInfo).metadata

    assert metadata["status_code"] == "801"
    assert [f"{found.code} {found.reason}" for found in everything] == metadata["violations"].split(", ")
