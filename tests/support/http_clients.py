"""HTTP clients."""

import base64
import ssl
from typing import Any

import httpx

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def http_client(**options: Any) -> httpx.AsyncClient:
    """Return a client for plain HTTP. Loading no certificates saves 20 ms of CPU."""
    return httpx.AsyncClient(verify=_NO_TLS, trust_env=False, **options)


def basic_authorization(user: str, password: str) -> str:
    """Return the Authorization header for the user and password of a URL."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
