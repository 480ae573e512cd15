"""A signed webhook, sent as SHOPLINE sends it."""

import secrets
import ssl
from base64 import b64encode
from dataclasses import dataclass

import httpx

from shopline_shim.signature import sign

DEV_SECRET = "dev-secret"  # noqa: S105 - public, and only valid on loopback
"""The app secret of `pointbook dev`."""
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """The sender and the signature of a webhook."""

    merchant_id: str
    store_id: str
    secret: str
    base64: bool = False


def send(url: str, body: bytes, delivery: Delivery) -> tuple[int, str]:
    """Sign a body and post it; return the HTTP status and text.

    Raises OSError if there is no response.
    """
    signature = sign(delivery.secret, body)
    if delivery.base64:
        signature = b64encode(bytes.fromhex(signature)).decode()
    headers = {
        "Content-Type": "application/json",
        "X-Shopline-Topic": "app_memberSystem_points/challenged",
        "X-Shopline-Hmac-Sha256": signature,
        "X-Shopline-Shop-Domain": "example.myshopline.com",
        "X-Shopline-Shop-Id": delivery.store_id,
        "X-Shopline-Merchant-Id": delivery.merchant_id,
        "X-Shopline-API-Version": "v20250601",
        "X-Shopline-Webhook-Id": secrets.token_hex(12),
    }
    try:
        # Python's default context uses the system's certificates, and SSL_CERT_FILE.
        response = httpx.post(
            url,
            content=body,
            headers=headers,
            timeout=TIMEOUT_SECONDS,
            trust_env=False,
            verify=ssl.create_default_context(),
        )
    except httpx.HTTPError as error:
        raise OSError(f"no response from {url}: {error or type(error).__name__}") from error
    return response.status_code, response.text
