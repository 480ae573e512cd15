"""Errors of gRPC calls: their rich details, and how they are logged."""

from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from pointbook.v1 import points_pb2

_DETAILS_HEADER = "grpc-status-details-bin"
ACCESS_DENIED = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})


def error_details(error: grpc.RpcError) -> tuple[ErrorInfo, BadRequest]:
    """Return the rich details of an error.

    Missing or unreadable details are empty messages.
    """
    info, bad_request = ErrorInfo(), BadRequest()
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type] # the error of a call is also the call
        for detail in status.details if status else ():
            _ = detail.Unpack(info) or detail.Unpack(bad_request)
    except (ValueError, DecodeError):
        return ErrorInfo(), BadRequest()
    return info, bad_request


def to_call_error(error: points_pb2.UpdateError, request_id: str) -> grpc.aio.AioRpcError:
    """Return the error that a call for this update alone would have raised.

    Its metadata has the request id of the shared call, which the server's log has.
    """
    info = ErrorInfo(reason=error.reason, metadata={**error.metadata, "request_id": request_id})
    violations = [
        BadRequest.FieldViolation(field=violation.field, description=violation.description)
        for violation in error.violations
    ]
    status = Status(code=error.code, message=error.message)
    for detail in (info, BadRequest(field_violations=violations)):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    code = next((code for code in grpc.StatusCode if code.value[0] == error.code), grpc.StatusCode.UNKNOWN)
    return call_error(code, error.message, status.SerializeToString())


def call_error(code: grpc.StatusCode, details: str, status: bytes = b"") -> grpc.aio.AioRpcError:
    """Return an error like that of a call, optionally with a serialized status."""
    trailers = grpc.aio.Metadata(*([(_DETAILS_HEADER, status)] if status else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details=details)


def log_unavailable(logger: Any, event: str, error: grpc.aio.AioRpcError) -> None:
    """Log a call that the sender should retry.

    The level is ERROR if an operator has to change the token, else WARNING.
    """
    code, (info, _) = error.code(), error_details(error)
    if code in ACCESS_DENIED:
        logger.error("the gRPC server denied access: check POINTBOOK_TOKEN", code=code.name)
    else:
        request_id = info.metadata.get("request_id")
        logger.warning(event, code=code.name, cause=info.reason, server_request_id=request_id)
