"""A caller of the methods over HTTP and JSON."""

import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from support.openapi import find_operation, schema_errors

STATUS = {"$ref": "#/components/schemas/Status"}
_JSON = "application/json"


def path(*segments: str, verb: str = "") -> str:
    """Return a path of segments and, if not empty, a custom verb."""
    return "/v1/" + "/".join(quote(segment, safe="") for segment in segments) + (verb and f":{verb}")


@dataclass
class JsonCaller:
    """A caller that checks requests and answers against the OpenAPI document."""

    http: httpx.AsyncClient
    token: str

    async def __call__(self, verb: str, address: str, body: Any = None, *, status: int = 200, **options: Any) -> Any:
        """Call a method, and return its answer, which must have the status."""
        authorization = {"authorization": f"Bearer {self.token}"} if self.token else {}
        options["headers"] = authorization | options.get("headers", {})
        answer = await self.http.request(verb, address, **({"json": body} if body is not None else {}), **options)
        assert answer.status_code == status, (address, answer.status_code, answer.text)
        assert answer.headers["content-type"] == _JSON
        assert schema_errors(self._schema_of_answer(verb, address, body, status), answer.json()) == []
        return answer.json()

    @staticmethod
    def _schema_of_answer(verb: str, address: str, body: Any, status: int) -> dict[str, Any]:
        """Return the schema of an answer, after a check of the request if it is valid."""
        if status != httpx.codes.OK:
            return STATUS
        operation = find_operation(verb, urlsplit(address).path)
        assert operation is not None, address
        if body is not None:
            assert schema_errors(operation["requestBody"]["content"][_JSON]["schema"], body) == []
        schema: dict[str, Any] = operation["responses"]["200"]["content"][_JSON]["schema"]
        return schema


def json_client(url: str, ca: str) -> httpx.AsyncClient:
    """Return a client that trusts one authority."""
    return httpx.AsyncClient(verify=ssl.create_default_context(cafile=ca), trust_env=False, base_url=url)


def details_of(error: Any) -> dict[str, Any]:
    """Return the details of an error by the names of their types."""
    return {detail["@type"].rpartition(".")[2]: detail for detail in error["details"]}
