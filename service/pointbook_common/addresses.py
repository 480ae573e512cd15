"""HOST:PORT addresses of settings."""

from ipaddress import ip_address


def is_loopback(address: str) -> bool:
    """Return whether a HOST:PORT address is reachable from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
