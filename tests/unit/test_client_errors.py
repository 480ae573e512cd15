"""The client's exceptions: one for each reason, with what the server says."""

import copy
import gc
import pickle
from collections.abc import Iterable
from typing import Any
from weakref import ref

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from pointbook.v1 import points_pb2
from pointbook_client import errors, reasons
from pointbook_client.calls import CallDefaults, to_error, to_update_error
from pointbook_client.errors import BY_CODE, FieldViolation, PointbookError
from pointbook_client.reasons import BY_REASON
from pointbook_server.errors import FieldViolation as ServerViolation
from pointbook_server.errors import PointbookError as ServerError
from pointbook_server.reasons import REASONS, GrpcCode, Reason
from pointbook_server.rpc.status_mapping import to_status

STATUS_KEY = "grpc-status-details-bin"
ERROR_REASONS = [reason for reason, spec in REASONS.items() if spec.grpc_code is not GrpcCode.OK]
REFUSED = frozenset(
    {
        "INVALID_ARGUMENT",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
    }
)
"""The codes of the server with which it has changed nothing, and never will."""


class FailedCall(grpc.RpcError):
    """A failed call of grpcio."""

    def __init__(
        self, code: grpc.StatusCode, details: str | None = "", trailing: Iterable[tuple[str, str | bytes]] | None = ()
    ) -> None:
        super().__init__()
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        """Return the gRPC code."""
        return self._code

    def details(self) -> str | None:
        """Return the message."""
        return self._details

    def trailing_metadata(self) -> Any:
        """Return the trailing metadata."""
        return self._trailing


def sent_by_server(error: ServerError, *more: tuple[str, str]) -> FailedCall:
    """Return the failed call of an error that the server raises."""
    status = rpc_status.to_status(to_status(error))
    return FailedCall(status.code, status.details, (*(status.trailing_metadata or ()), *more))


def with_details(*details: Message, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION) -> FailedCall:
    """Return a failed call with details."""
    status = Status(code=code.value[0], message="No.")
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return FailedCall(code, "No.", [(STATUS_KEY, status.SerializeToString())])


@pytest.mark.parametrize("reason", ERROR_REASONS)
def test_error_of_the_server_is_the_exception_of_its_reason(reason: Reason) -> None:
    code = grpc.StatusCode[REASONS[reason].grpc_code]

    error = to_error(sent_by_server(ServerError(reason, "A message.", metadata={"store_id": "1"})), "r-1")

    assert type(error) is BY_REASON[reason]
    assert isinstance(error, BY_CODE[code])
    assert (error.grpc_code, error.reason, error.message) == (code, reason, "A message.")
    assert error.metadata == {"store_id": "1"}
    assert error.outcome_unknown is (code.name not in REFUSED)


def test_every_exception_is_of_a_reason_that_fails_calls() -> None:
    assert set(BY_REASON) == {reason.value for reason in ERROR_REASONS}
    own = [
        value for value in vars(reasons).values() if isinstance(value, type) and value.__module__ == reasons.__name__
    ]
    assert set(own) <= set(BY_REASON.values())
    assert len(set(BY_REASON.values())) == len(BY_REASON)


@pytest.mark.parametrize("reason", [each for each in ERROR_REASONS if BY_REASON[each].__module__ == reasons.__name__])
def test_docstring_states_code_and_retry_as_the_server_does(reason: Reason) -> None:
    text = " ".join((BY_REASON[reason].__doc__ or "").split())

    assert text.startswith(f"The error {reason}.")
    assert f"- gRPC code: {REASONS[reason].grpc_code}." in text
    assert f"- Retry: {REASONS[reason].retry.value}." in text
    status_code = REASONS[reason].status_code
    assert ("Status code:" in text) is (status_code is not None)
    assert status_code is None or f"Status code: {status_code}." in text
    assert "- Cure: " in text


def test_every_code_of_the_server_has_a_class_that_is_exported() -> None:
    codes = {grpc.StatusCode[spec.grpc_code] for spec in REASONS.values()} - {grpc.StatusCode.OK}

    assert codes <= set(BY_CODE)
    for code, exception in BY_CODE.items():
        name = "".join(word.capitalize() for word in code.name.split("_"))
        # Its own name would be that of asyncio's exception.
        expected = "CallCancelled" if code is grpc.StatusCode.CANCELLED else name
        assert exception.__name__ == f"{expected}Error"


def test_details_are_decoded() -> None:
    raised = ServerError(
        Reason.INVALID_FIELDS,
        "Wrong fields.",
        violations=[ServerViolation("update.points", "must be 0 or more")],
        retry_after_seconds=1.5,
        metadata={"status_code": "801"},
    )

    error = to_error(sent_by_server(raised, ("x-request-id", "from-server")), "from-client")

    assert error.violations == (FieldViolation("update.points", "must be 0 or more"),)
    assert error.retry_delay is not None
    assert error.retry_delay.total_seconds() == 1.5
    assert error.status_code == 801
    assert error.request_id == "from-server"
    assert str(error) == (
        "INVALID_ARGUMENT: INVALID_FIELDS: Wrong fields. (update.points: must be 0 or more) (request from-server)"
    )
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "Wrong fields."
    assert ("x-request-id", "from-server") in error.trailing_metadata()


@pytest.mark.parametrize(
    "trailing",
    [
        None,
        (),
        [("x-other", "1")],
        [(STATUS_KEY, b"")],
        [(STATUS_KEY, b"\xff\xff\xff")],
        [(STATUS_KEY, "no bytes")],
        [
            (
                STATUS_KEY,
                Status(details=[AnyMessage(type_url="type.googleapis.com/no.Such", value=b"1")]).SerializeToString(),
            )
        ],
        [
            (
                STATUS_KEY,
                Status(
                    details=[AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")]
                ).SerializeToString(),
            )
        ],
    ],
)
def test_missing_and_broken_details_leave_code_and_message(trailing: Any) -> None:
    error = to_error(FailedCall(grpc.StatusCode.FAILED_PRECONDITION, "No.", trailing), "r-1")

    assert type(error) is errors.FailedPreconditionError
    assert (error.reason, dict(error.metadata), error.violations, error.retry_delay) == ("", {}, (), None)
    assert (error.message, error.request_id, error.status_code) == ("No.", "r-1", None)


def test_violation_of_the_whole_request_has_no_field() -> None:
    error = PointbookError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "No.",
        violations=[FieldViolation("", "is no request"), FieldViolation("a", "b")],
    )

    assert str(error) == "INVALID_ARGUMENT: No. (is no request; a: b)"


def test_delay_beyond_all_times_is_ignored() -> None:
    info = ErrorInfo(reason="QUEUE_FULL", domain="pointbook")
    failed = with_details(info, RetryInfo(retry_delay=Duration(seconds=2**62)), code=grpc.StatusCode.RESOURCE_EXHAUSTED)

    assert to_error(failed, "").retry_delay is None


def test_reason_of_a_newer_server_has_the_class_of_its_code() -> None:
    error = to_error(with_details(ErrorInfo(reason="NEW", domain="pointbook", metadata={"a": "b"})), "")

    assert type(error) is errors.FailedPreconditionError
    assert (error.reason, error.metadata) == ("NEW", {"a": "b"})


def test_details_of_another_domain_are_ignored() -> None:
    info = ErrorInfo(reason="STORE_NOT_FOUND", domain="proxy.example", metadata={"status_code": "803"})
    failed = with_details(
        info, BadRequest(field_violations=[BadRequest.FieldViolation(field="a")]), code=grpc.StatusCode.NOT_FOUND
    )

    error = to_error(failed, "")

    assert type(error) is errors.NotFoundError
    assert (error.reason, error.metadata, error.violations) == ("", {}, ())


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_error_of_the_connection_has_the_class_of_its_code(code: grpc.StatusCode) -> None:
    error = to_error(FailedCall(code, None), "r-1")

    assert type(error) is BY_CODE.get(code, PointbookError)
    assert error.message == ""
    assert str(error) == f"{code.name} (request r-1)"
    # A proxy may have refused it, which does not count earlier attempts.
    assert error.outcome_unknown


def test_refusal_of_a_repeated_call_is_not_final() -> None:
    refused = ServerError(Reason.INSUFFICIENT_POINTS, "No.")

    assert not to_error(sent_by_server(refused), "").outcome_unknown
    assert to_error(sent_by_server(refused, ("x-previous-attempts", "1")), "").outcome_unknown


@pytest.mark.parametrize("value", ["", "abc", "8.5", "-1"])
def test_status_code_that_is_no_number_is_none(value: str) -> None:
    error = PointbookError(grpc.StatusCode.FAILED_PRECONDITION, "No.", metadata={"status_code": value})

    assert error.status_code is None


def test_error_survives_another_process() -> None:
    """Task queues pickle exceptions."""
    error = to_error(sent_by_server(ServerError(Reason.INSUFFICIENT_POINTS, "No.", metadata={"a": "b"})), "r-1")

    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - of this test
        assert type(same) is reasons.InsufficientPointsError
        assert str(same) == str(error)
        assert (same.metadata, same.reason, same.outcome_unknown) == ({"a": "b"}, "INSUFFICIENT_POINTS", False)
    assert pickle.loads(pickle.dumps(PointbookError(grpc.StatusCode.UNKNOWN, "?"))).metadata == {}  # noqa: S301 - as above


def test_error_is_freed_without_a_garbage_collection() -> None:
    refused = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), grpc.aio.Metadata())
    gc.disable()
    try:
        try:
            with CallDefaults(1.0, lambda: "").running("/a/B", None):
                raise refused
        except PointbookError as error:
            found = ref(error)
        assert found() is None
    finally:
        gc.enable()


def test_error_is_caught_as_one_of_grpc() -> None:
    with pytest.raises(grpc.RpcError):
        raise to_error(FailedCall(grpc.StatusCode.UNAVAILABLE), "")


def test_error_of_an_update_is_that_of_a_call() -> None:
    sent = points_pb2.UpdateError(
        code=grpc.StatusCode.NOT_FOUND.value[0],
        reason="STORE_NOT_FOUND",
        message="No.",
        metadata={"store_id": "1"},
        violations=[points_pb2.FieldViolation(field="a", description="b")],
    )

    error = to_update_error(sent, "r-1")

    assert type(error) is reasons.StoreNotFoundError
    assert (error.grpc_code, error.metadata, error.request_id) == (grpc.StatusCode.NOT_FOUND, {"store_id": "1"}, "r-1")
    assert error.violations == (FieldViolation("a", "b"),)


def test_update_with_an_unknown_code_and_reason_has_an_error() -> None:
    error = to_update_error(points_pb2.UpdateError(code=99, reason="NEW", message="No."))

    assert type(error) is PointbookError
    assert (error.grpc_code, error.reason) == (grpc.StatusCode.UNKNOWN, "NEW")
