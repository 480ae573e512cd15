"""Asking a running process how it is, as container health checks do."""

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_SECONDS = 3.0


def server_is_serving(address: str) -> bool:
    """Ask a gRPC server by the standard health protocol."""
    with grpc.insecure_channel(local_address(address)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def shim_state(address: str) -> tuple[bool, str]:
    """Return whether a shim is ready, and its own words where it is not; no words where it does not answer."""
    try:
        answer = httpx.get(f"http://{local_address(address)}/readyz", timeout=TIMEOUT_SECONDS, trust_env=False)
        return answer.is_success, "" if answer.is_success else str(answer.json()["detail"])
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return False, ""


def local_address(address: str) -> str:
    """Turn an address that listens on every interface into one that can be called from here."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"", "0.0.0.0", "[::]", "::"} else address  # noqa: S104 - it compares
