"""Endpoints of their own for SHOPLINE's subscriptions, each bound to a merchant, its stores, topics and secrets."""

import json
import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError, field_validator
from starlette.datastructures import Headers, MutableHeaders

from shopline_shim import translate

ENDPOINTS_MAX = 1_000
_ENDPOINT_ID = re.compile(r"[A-Za-z0-9_-]{16,128}")
_Id = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,64}$")]


class Endpoint(BaseModel):
    """What a webhook at one endpoint may be. SHOPLINE signs neither topic nor merchant, so the binding names them."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, strict=True)

    merchant_id: _Id
    store_ids: Annotated[tuple[_Id, ...], Field(min_length=1, max_length=1_000, strict=False)]
    topics: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    secrets: Annotated[tuple[SecretStr, ...], Field(min_length=1, max_length=10, strict=False)]

    @field_validator("topics")
    @classmethod
    def _check_topics(cls, topics: tuple[str, ...]) -> tuple[str, ...]:
        if not translate.TRANSLATED_TOPICS.issuperset(topics):
            raise ValueError(f"must be of {', '.join(sorted(translate.TRANSLATED_TOPICS))}")
        return topics

    def topic_of(self, named: str) -> str:
        """Return the topic of a webhook whose headers name one, or none where the binding leaves no choice."""
        return self.topics[0] if not named and len(self.topics) == 1 else named

    def complete(self, headers: Headers, topic: str) -> Headers:
        """Return headers with what the binding knows where they lack it."""
        completed = MutableHeaders(raw=list(headers.raw))
        completed.setdefault("X-Shopline-Topic", topic)
        completed.setdefault("X-Shopline-Merchant-Id", self.merchant_id)
        if len(self.store_ids) == 1:
            completed.setdefault("X-Shopline-Shop-Id", self.store_ids[0])
        return completed

    def mismatch(self, headers: Headers, topic: str) -> str:
        """Return what headers name that the endpoint is not for; empty where they fit."""
        if topic not in self.topics:
            return "X-Shopline-Topic must be a topic of the endpoint"
        # Of a repeated header, the translation reads the last.
        if any(merchant_id != self.merchant_id for merchant_id in headers.getlist("x-shopline-merchant-id")):
            return "X-Shopline-Merchant-Id must be the merchant of the endpoint"
        return ""


def parse_endpoints(text: str) -> dict[str, Endpoint]:
    """Read endpoints by their ids from a JSON object. Raises ValueError, which quotes nothing of it."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or len(given) > ENDPOINTS_MAX:
        raise ValueError(f"must be a JSON object of at most {ENDPOINTS_MAX} endpoints")
    endpoints = {}
    for number, (endpoint_id, binding) in enumerate(given.items(), start=1):
        if not _ENDPOINT_ID.fullmatch(endpoint_id):
            raise ValueError(f"endpoint {number}: the id must be 16 to 128 letters, digits, - and _, hard to guess")
        try:
            endpoints[endpoint_id] = Endpoint.model_validate(binding)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, problem["loc"])) or "the binding"
            raise ValueError(f"endpoint {number}: {field}: {problem['msg'].removeprefix('Value error, ')}") from None
    return endpoints
