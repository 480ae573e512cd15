"""The check of POINTBOOK_DATABASE_URL: its form, and when it must require TLS."""

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

FORM = "must be postgresql://USER:PASSWORD@HOST:PORT/NAME"
VERIFYING_MODE = "verify-full"
"""The only sslmode that neither falls back to plaintext nor accepts an unverified server."""
_SCHEMES = frozenset({"postgresql", "postgres", "postgresql+asyncpg"})
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_PORT_MAX = 65_535


def check_database_url(url: str, *, allow_plaintext: bool, environment: Mapping[str, str] = os.environ) -> str:
    """Return a database URL with the scheme postgresql.

    Beyond loopback and Unix sockets the URL must require a verified server, unless plaintext is allowed. The driver
    reads what the URL omits from PG* variables, and the addresses of a service from a file. Raises ValueError, whose
    message never quotes the URL.
    """
    scheme, _, rest = url.partition("://")
    try:
        parts = urlsplit(f"postgresql://{rest}")
        query = {name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
        hosts = _hosts(parts.netloc, query, environment)
        # One port, or one per host; the driver checks that the numbers match.
        for port in (query.get("port") or environment.get("PGPORT") or "0").split(","):
            _check_port(port)
    except ValueError:
        raise ValueError(FORM) from None
    if scheme not in _SCHEMES:
        raise ValueError(FORM)
    for name in _FILES:
        if name in query and not (Path(query[name]).is_file() and os.access(query[name], os.R_OK)):
            raise ValueError(f"names a file in {name} that cannot be read")
    if not allow_plaintext and query.get("sslmode") != VERIFYING_MODE and not all(map(_is_local, hosts)):
        raise ValueError(
            "is beyond loopback: add ?sslmode=verify-full&sslrootcert=FILE, or set POINTBOOK_ALLOW_PLAINTEXT=true if "
            "the network encrypts traffic itself"
        )
    return f"postgresql://{rest}"


def _hosts(netloc: str, query: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """Return the hosts that the driver will try, none for its default Unix socket.

    Raises ValueError.
    """
    # Like the driver: split at the first @, and percent-decode only these hosts.
    if hosts := netloc.partition("@")[2] if "@" in netloc else netloc:
        return [unquote(_host(each)) for each in hosts.split(",")]
    hosts = query.get("host", "")
    if not hosts and (service := query.get("service") or environment.get("PGSERVICE")):
        return [f"service {service}"]
    hosts = hosts or environment.get("PGHOST", "")
    return [_host(each) for each in hosts.split(",")] if hosts else []


def _host(text: str) -> str:
    """Return the host of HOST, HOST:PORT or [IPv6]:PORT. Raises ValueError.

    A directory of Unix sockets is returned unchanged.
    """
    if not text:
        raise ValueError
    if text.startswith("/"):
        return text
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    if port:
        _check_port(port)
    return host


def _check_port(text: str) -> None:
    """Raise ValueError if a text is not a port number."""
    if not (text.isascii() and text.isdigit() and int(text) <= _PORT_MAX):
        raise ValueError


def _is_local(host: str) -> bool:
    """Return whether a host is a directory of Unix sockets or a loopback address."""
    if host.startswith("/") or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
