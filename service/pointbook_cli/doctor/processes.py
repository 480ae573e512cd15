"""Checks of the running server and shim, by the probes of `pointbook health`."""

import socket

from pointbook_cli.doctor.findings import Finding, Page, ok, problem, unchecked, warning
from pointbook_cli.doctor.settings import load_valid
from pointbook_cli.health_probe import ProbeSettings, probe_server, probe_shim
from pointbook_cli.server_access import local_address
from pointbook_common.errors import SettingError
from shopline_shim.settings import split_address

CONNECT_SECONDS = 2.0
READ_LOG = "read its log"


def check_server() -> Finding:
    """Check that the gRPC server in the settings is serving."""
    settings = load_valid(ProbeSettings)
    if settings is None:
        return unchecked("server", "the settings are wrong")
    address = local_address(settings.health_address or settings.grpc_address)
    if not _accepts(address):
        remedy = "start it with `pointbook serve`, or correct POINTBOOK_GRPC_ADDRESS"
        return warning("server", f"no server listens on {address}", remedy, Page.START)
    try:
        is_serving, cause = probe_server(settings)
    except SettingError as error:
        return problem("server", str(error), "correct the file", Page.CERTIFICATES)
    if is_serving:
        return ok("server", f"serving on {address}")
    text = f"the server on {address} is not serving: {cause}".removesuffix(": ")
    return problem("server", text, READ_LOG, Page.HEALTH)


def check_shim() -> Finding:
    """Check that the shim in the settings is ready, if its secrets are set here."""
    settings = load_valid(ProbeSettings)
    if settings is None:
        return unchecked("shim", "the settings are wrong")
    if not (settings.shopline_secrets or settings.shopline_endpoints):
        return unchecked("shim", "neither POINTBOOK_SHOPLINE_SECRETS nor POINTBOOK_SHOPLINE_ENDPOINTS is set here")
    address = local_address(settings.http_address)
    if not _accepts(address):
        remedy = "start it with `pointbook shim`, or correct POINTBOOK_HTTP_ADDRESS"
        return warning("shim", f"no shim listens on {address}", remedy, Page.START)
    is_ready, cause = probe_shim(settings)
    if is_ready:
        return ok("shim", f"ready on {address}")
    text = f"the shim on {address} is not ready: {cause}".removesuffix(": ")
    return problem("shim", text, READ_LOG, Page.SYMPTOMS)


def _accepts(address: str) -> bool:
    """Return whether connections to an address are accepted."""
    try:
        with socket.create_connection(split_address(address), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False
