"""A developer's terminal, with the programs that the documentation uses."""

import os
import shutil
from pathlib import Path

from support.processes import clean_environment


def find_grpcurl() -> str | None:
    """Return the path of grpcurl, on PATH or where Go installs programs."""
    return shutil.which("grpcurl", path=_path_with_go())


def shell_environment() -> dict[str, str]:
    """Return the environment of a developer's terminal, whose PATH has grpcurl."""
    return clean_environment({}) | {"PATH": _path_with_go()}


def _path_with_go() -> str:
    folders = [os.environ.get("GOBIN"), *(f"{path}/bin" for path in os.environ.get("GOPATH", "").split(":") if path)]
    return os.pathsep.join([os.environ["PATH"], *filter(None, folders), str(Path.home() / "go" / "bin")])
