"""Errors of gRPC calls: their rich details, and how they are logged."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_status import rpc_status

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


def log_unavailable(logger: Any, event: str, error: grpc.aio.AioRpcError) -> None:
    """Log a call that the sender should retry.

    The level is ERROR if an operator has to change the token, else WARNING.
    """
    code, (info, _) = error.code(), error_details(error)
    if code in ACCESS_DENIED:
        logger.error("the gRPC server denied access: check POINTBOOK_TOKEN", code=code.name)
    else:
        logger.warning(event, code=code.name, cause=info.reason)
