"""A developer's terminal, with the programs that the documentation uses."""

import os
import re
import shutil
from pathlib import Path

from support.processes import BIN, clean_environment

_GRPCURL_CALL = re.compile(r"grpcurl -plaintext (-d '.*') (\S+) (\S+)")


def find_grpcurl() -> str | None:
    """Return the path of grpcurl, on PATH or where Go installs programs."""
    return shutil.which("grpcurl", path=_path_with_go())


def as_buf_curl(line: str) -> str | None:
    """Return the buf command for a grpcurl command.

    Return None if it makes no call.
    """
    if (call := _GRPCURL_CALL.fullmatch(line)) is None:
        return None
    request, address, method = call.groups()
    return f"{BIN}/buf curl --protocol grpc --http2-prior-knowledge {request} http://{address}/{method}"


def shell_environment() -> dict[str, str]:
    """Return the environment of a developer's terminal, whose PATH has grpcurl."""
    return clean_environment({}) | {"PATH": _path_with_go()}


def _path_with_go() -> str:
    folders = [os.environ.get("GOBIN"), *(f"{path}/bin" for path in os.environ.get("GOPATH", "").split(":") if path)]
    return os.pathsep.join([os.environ["PATH"], *filter(None, folders), str(Path.home() / "go" / "bin")])
