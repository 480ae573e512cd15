"""Webhook endpoints that are bound to a merchant, stores, topics and secrets.

Source: docs/reference/shopline-webhooks.md#what-the-signature-does-not-cover
"""

import json
import re
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError, field_validator

from pointbook_common.shopline_webhooks import TRANSLATED_TOPICS

if TYPE_CHECKING:
    from starlette.datastructures import Headers

ENDPOINTS_MAX = 1_000
_ENDPOINT_ID = re.compile(r"[A-Za-z0-9_-]{16,128}")
_Id = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,64}$")]


class EndpointBinding(BaseModel):
    """The merchant, stores, topics and secrets of one endpoint.

    SHOPLINE signs neither the topic nor the merchant, so the binding states them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, strict=True)

    merchant_id: _Id
    store_ids: Annotated[tuple[_Id, ...], Field(min_length=1, max_length=1_000, strict=False)]
    topics: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    secrets: Annotated[tuple[SecretStr, ...], Field(min_length=1, max_length=10, strict=False)]

    @field_validator("topics")
    @classmethod
    def _check_topics(cls, topics: tuple[str, ...]) -> tuple[str, ...]:
        if not TRANSLATED_TOPICS.issuperset(topics):
            raise ValueError(f"must be of {', '.join(sorted(TRANSLATED_TOPICS))}")
        return topics

    def resolve_topic(self, header_topic: str) -> str:
        """Return the topic of the headers, or else the endpoint's only topic.

        It is empty if the endpoint has several.
        """
        return self.topics[0] if not header_topic and len(self.topics) == 1 else header_topic

    def complete_headers(self, headers: "Headers", topic: str) -> "Headers":
        """Return the headers with missing ones added from the binding."""
        completed = headers.mutablecopy()
        completed.setdefault("X-Shopline-Topic", topic)
        completed.setdefault("X-Shopline-Merchant-Id", self.merchant_id)
        if len(self.store_ids) == 1:
            completed.setdefault("X-Shopline-Shop-Id", self.store_ids[0])
        return completed

    def find_mismatch(self, headers: "Headers", topic: str) -> str:
        """Return how the headers contradict the binding; empty if they do not."""
        if topic not in self.topics:
            return "X-Shopline-Topic must be a topic of the endpoint"
        # Check every value of a repeated header, because the translation reads the last one.
        if any(merchant_id != self.merchant_id for merchant_id in headers.getlist("x-shopline-merchant-id")):
            return "X-Shopline-Merchant-Id must be the merchant of the endpoint"
        return ""


def parse_endpoint_bindings(text: str) -> dict[str, EndpointBinding]:
    """Parse a JSON object of bindings by endpoint id.

    Raises ValueError, whose message quotes no value.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict) or len(parsed) > ENDPOINTS_MAX:
        raise ValueError(f"must be a JSON object of at most {ENDPOINTS_MAX} endpoints")
    bindings = {}
    for number, (endpoint_id, value) in enumerate(parsed.items(), start=1):
        if not _ENDPOINT_ID.fullmatch(endpoint_id):
            raise ValueError(f"endpoint {number}: the id must be 16 to 128 letters, digits, - and _, hard to guess")
        try:
            bindings[endpoint_id] = EndpointBinding.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"])) or "the binding"
            raise ValueError(f"endpoint {number}: {field}: {first['msg'].removeprefix('Value error, ')}") from None
    return bindings
