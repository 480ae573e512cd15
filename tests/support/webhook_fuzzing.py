"""Random webhooks with defects for the shim, half of them correctly signed."""

import base64
import hmac
import json
import random
from dataclasses import dataclass
from typing import Any

TOPICS = (
    "app_memberSystem_points/challenged",
    "customers/create",
    "customers/update",
    "customers/delete",
    "customers/redact",
    "merchants/redact",
)
OTHER_TOPICS = (
    "orders/create",
    "",
    "app_memberSystem_points/update",
    "CUSTOMERS/UPDATE",
    "customers/update,orders/create",
)
SCENES = ("SUCCESSFUL_ORDERS", "REDEEM_COUPON", "A_NEW_SCENE", "POINTS_EXPIRED", "x" * 65, "é", "")
LITERALS = (
    "null",
    "true",
    "-0",
    "0.5",
    "1.721829526566e+12",
    "1e999999999",
    "-1e-999999999",
    "NaN",
    "Infinity",
    "9" * 5_000,
    "9223372036854775807",
    "9223372036854775808",
    "-1",
    '"1721829526566"',
    '"1e3"',
    '"\\ud800"',
    '"\\u0000"',
    '"\\udfff\\ud800"',
    '"\\uD83D\\uDE00"',
    '"increase"',
    '"\u0130NCREASE"',
    '"\uff12\uff14"',
    '""',
    '" "',
    '"2099-12-31T15:59:59Z"',
    '"2026-01-01T00:00:00+25:00"',
    '"0001-01-01T00:00:00-23:59"',
    '"9999-12-31T23:59:59.999999+00:00"',
    "[]",
    "{}",
    '{"id": {"id": {}}}',
    "[" * 3_000,
    '{"a":' * 3_000,
    '"' + "x" * 70_000 + '"',
    "\x00",
    "\ufeff1",
)
HEADER_VALUES = ("", " ", "x" * 65, "x" * 8_000, "a,b", "null", "\xff\xfe", "%00", "2000001234", "../..")
EXPECTED_STATUSES = {200, 400, 401, 404, 408, 413, 431}
"""The statuses that a request alone may cause. Source: docs/reference/shopline-webhooks.md#answers"""
CHUNK_BYTES = 1_000


@dataclass(frozen=True, slots=True)
class FuzzedRequest:
    """An encoded request, whether it is correctly signed, and the signature."""

    raw: bytes
    signed: bool
    digest: str


@dataclass
class WebhookFuzzer:
    """A generator of requests, determined by the state of `random`."""

    random: random.Random
    secret: str
    merchant_id: str
    store_id: str

    def request(self) -> FuzzedRequest:
        """Return a request: usually a webhook with a defect, sometimes one without."""
        topic = self.random.choice(TOPICS) if self.random.random() < 0.9 else self.random.choice(OTHER_TOPICS)
        body = self._body(topic)
        signed = self.random.random() < 0.5
        digest = hmac.digest(self.secret.encode(), body, "sha256")
        digest_text = digest.hex() if self.random.random() < 0.5 else base64.b64encode(digest).decode()
        headers = [
            ("Host", "shim"),
            ("X-Shopline-Topic", topic),
            ("X-Shopline-Hmac-Sha256", digest_text if signed else self._wrong_signature(digest_text)),
            ("X-Shopline-Merchant-Id", self.merchant_id),
            ("X-Shopline-Shop-Id", self.store_id),
            ("X-Shopline-Shop-Domain", "shop.myshopline.com"),
            ("X-Shopline-Api-Version", "v20250601"),
            ("X-Shopline-Webhook-Id", f"{self.random.getrandbits(64):x}"),
        ]
        return FuzzedRequest(self._encode(self._corrupt_headers(headers, signed=signed), body), signed, digest_text)

    def _body(self, topic: str) -> bytes:
        members = {name: json.dumps(value) for name, value in self._content(topic).items()}
        for _ in range(self.random.choice((0, 0, 1, 1, 2, 5))):
            name = self.random.choice([*members, "extra", "id", "\\ud800", ""])
            if self.random.random() < 0.15:
                members.pop(name, None)
            else:
                members[name] = self.random.choice(LITERALS)
        pairs = [f'"{name}": {value}' for name, value in members.items()]
        if pairs and self.random.random() < 0.05:
            pairs.append(self.random.choice(pairs))
        text = "{" + ", ".join(pairs) + "}"
        raw = text.encode("utf-8", "surrogatepass")
        return self._corrupt(raw) if self.random.random() < 0.15 else raw

    def _content(self, topic: str) -> dict[str, Any]:
        number = self.random.randrange(50)
        time_text = f"2026-05-{1 + number % 28:02}T0{number % 10}:00:00+08:00"
        if topic == "merchants/redact":
            return {"store_id": self.store_id, "store_domain": "shop.myshopline.com", "update_time": time_text}
        if topic == "customers/redact":
            customer = {"id": f"buyer-{number}", "email": f"b{number}@example.com", "phone": "+12025550100"}
            return {"customer": customer, "shop_id": self.store_id, "update_time": time_text}
        if topic.startswith("customers"):
            return {
                "id": f"buyer-{number}",
                "email": f"b{number}@example.com",
                "phone": f"001202555{number:04}",
                "first_name": "Ann",
                "updated_at": time_text,
            }
        return {
            "buyer_id": f"buyer-{number}",
            "points_balance": self.random.randrange(1_000),
            "points_expiry_time": "",
            "store_id": self.store_id,
            "update_type": self.random.choice(("INCREASE", "DECREASE", "increase")),
            "updated_at": 1_779_000_000_000 + self.random.randrange(10**9),
            "updated_scene": self.random.choice(SCENES),
            "updated_value": self.random.randrange(1_000),
        }

    def _corrupt(self, raw: bytes) -> bytes:
        position = self.random.randrange(len(raw) + 1)
        return self.random.choice(
            (
                b"",
                b"\xef\xbb\xbf" + raw,
                raw.decode("utf-8", "replace").encode("utf-16"),
                raw[:position],
                raw[:position] + self.random.randbytes(3) + raw[position:],
                raw + raw,
                self.random.randbytes(200),
                b"[" * 100_000,
                b" " * 262_145,
                b'"' + b"a" * 262_142 + b'"',
            )
        )

    def _wrong_signature(self, digest_text: str) -> str:
        return self.random.choice(
            (
                "",
                digest_text[:-1],
                digest_text[::-1],
                f"sha256={digest_text}",
                "0" * 64,
                "=" * 44,
                "\xe9" * 64,
                f"{digest_text},{digest_text}",
                base64.b64encode(self.random.randbytes(32)).decode(),
            )
        )

    def _corrupt_headers(self, headers: list[tuple[str, str]], *, signed: bool) -> list[tuple[str, str]]:
        """Sometimes change, repeat or drop a header, but keep a correct signature."""
        if self.random.random() < 0.6:
            return headers
        position = self.random.randrange(1, len(headers))
        name, _ = headers[position]
        if name == "X-Shopline-Hmac-Sha256" and signed:
            return headers
        change = self.random.randrange(3)
        if change == 0:
            return headers[:position] + headers[position + 1 :]
        if change == 1:
            return [*headers, (name, self.random.choice(HEADER_VALUES))] if not signed or position > 2 else headers
        headers[position] = (name, self.random.choice(HEADER_VALUES))
        return headers

    def _encode(self, headers: list[tuple[str, str]], body: bytes) -> bytes:
        path = "/webhooks/shopline" if self.random.random() < 0.98 else self.random.choice(("/", "/metrics/..", "/%00"))
        if self.random.random() < 0.1:
            chunks = [body[start : start + CHUNK_BYTES] for start in range(0, len(body), CHUNK_BYTES)]
            framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
            headers = [*headers, ("Transfer-Encoding", "chunked")]
        else:
            framed, headers = body, [*headers, ("Content-Length", str(len(body)))]
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace") + framed
