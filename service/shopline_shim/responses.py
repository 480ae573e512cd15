"""HTTP problem responses (RFC 9457) of the shim.

Source: https://www.rfc-editor.org/rfc/rfc9457
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import Response

PROBLEM_MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason why a request failed.

    The problem's type is `urn:pointbook:problem:<kind>`. No value of the request is repeated: it may be personal data,
    or a guessed signature.
    """

    status: int
    kind: str
    title: str
    detail: str

    def body(self) -> bytes:
        """Return the problem as JSON in UTF-8."""
        members = {
            "type": f"urn:pointbook:problem:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        return json.dumps(members, ensure_ascii=False).encode()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Return the problem as a response with additional headers."""
        return Response(self.body(), status_code=self.status, headers=headers, media_type=PROBLEM_MEDIA_TYPE)


BODY_INCOMPLETE = Problem(408, "body-incomplete", "Request Timeout", "The connection ended before the body did.")
BODY_TOO_LARGE = Problem(413, "body-too-large", "Content Too Large", "The body is larger than the limit.")
HEADERS_TOO_LARGE = Problem(
    431, "headers-too-large", "Request Header Fields Too Large", "The headers are larger than 64 KiB."
)
INTERNAL = Problem(500, "internal", "Internal Server Error", "An unexpected error occurred.")
NOT_FOUND = Problem(404, "not-found", "Not Found", "No resource has this path and method.")
NOT_HTTP = Problem(400, "not-http", "Bad Request", "The request is not well-formed HTTP/1.1.")
STOPPING = Problem(503, "stopping", "Service Unavailable", "The shim is stopping. Send the request again.")
TOO_SLOW = Problem(408, "too-slow", "Request Timeout", "The request took too long.")
UNAVAILABLE = Problem(
    503, "unavailable", "Service Unavailable", "The Pointbook server is not available. Send the request again."
)
WRONG_SECRET = Problem(401, "wrong-secret", "Unauthorized", "The request has no valid credentials for callbacks.")
WRONG_SIGNATURE = Problem(401, "wrong-signature", "Unauthorized", "X-Shopline-Hmac-Sha256 does not match the body.")

RETRY_AFTER = {"Retry-After": "5"}
