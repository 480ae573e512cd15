"""Problem bodies (RFC 9457): what the shim answers where it does not answer 200."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Problem:
    """One way in which a request can fail, told to its caller.

    `kind` ends the problem's type, `urn:pointbook:problem:<kind>`. Nothing of the request is repeated, as it may be
    personal data or somebody's guess of a digest.
    """

    status: int
    kind: str
    title: str
    detail: str

    def body(self) -> bytes:
        """Write the problem as JSON in UTF-8."""
        members = {
            "type": f"urn:pointbook:problem:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        return json.dumps(members, ensure_ascii=False).encode()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Make the problem an HTTP answer, with `headers` beside its own."""
        return Response(self.body(), status_code=self.status, headers=headers, media_type=MEDIA_TYPE)
