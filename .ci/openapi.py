"""Write the OpenAPI document of the contract's HTTP rules, from its comments.

Usage: openapi.py IMAGE FILE. IMAGE is a descriptor set with source information, as `buf build` writes it.
"""
# ruff: noqa: INP001 - a script

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contract import (
    ENUM_VALUES,
    FILE_SERVICES,
    MESSAGE_FIELDS,
    MESSAGE_ONEOFS,
    PACKAGE,
    SERVICE_METHODS,
    ElementPath,
    HttpBinding,
    Page,
    bindings_of,
    read_page,
)
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

Schema = dict[str, Any]
"""A JSON Schema, or another object of the document."""

DESCRIPTION = """Pointbook over HTTP and JSON, behind Envoy's gRPC-JSON transcoder. docs/http-json.md describes it.

- Ids in a path are percent-encoded.
- 64-bit integers are strings in answers; requests may have numbers.
- Names of fields are those of the protos. Requests may use lowerCamelCase too.
- Fields of a request that the document does not list are ignored in a body, and refused in a query."""
CUSTOMER_REF = f".{PACKAGE}.CustomerRef"
DETAILS = ("ErrorInfo", "BadRequest", "ResourceInfo", "RetryInfo")
"""The details of errors, of package google.rpc."""
DETAIL_COMMENTS = {
    "ErrorInfo": "The reason of the error: a name of ErrorReason without its prefix.",
    "BadRequest": "The invalid fields, all of them.",
    "ResourceInfo": "The resource that was not found, or that exists already.",
    "RetryInfo": "When to repeat the request.",
}
_INT64: Schema = {"type": "string", "format": "int64", "pattern": "^-?[0-9]+$"}
SCALARS: dict[int, Schema] = {
    FieldDescriptorProto.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptorProto.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptorProto.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptorProto.TYPE_INT64: _INT64,
    FieldDescriptorProto.TYPE_STRING: {"type": "string"},
}
WELL_KNOWN: dict[str, Schema] = {
    ".google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?s$"},
    ".google.protobuf.Struct": {"type": "object"},
    ".google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
}
_REQUIRED = re.compile(r"(?:^|\s)Required\.(?:\s|$)")
_SENTENCE = re.compile(r"(?<=\.)\s")


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message, with its comment; `choice` is the index of its oneof."""

    proto: FieldDescriptorProto
    message: DescriptorProto
    comment: str

    @property
    def choice(self) -> int | None:
        """The index of the oneof, of which the field is one of several members."""
        is_member = self.proto.HasField("oneof_index") and not self.proto.proto3_optional
        return self.proto.oneof_index if is_member else None

    @property
    def is_required(self) -> bool:
        """Whether the comment states that the field is required, by itself."""
        return self.choice is None and _REQUIRED.search(self.comment) is not None


def main() -> None:
    """Read the image, and write the document."""
    image, file = map(Path, sys.argv[1:])
    pages = [read_page(proto) for proto in FileDescriptorSet.FromString(image.read_bytes()).file]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(Document(pages).build(), indent=1, ensure_ascii=False) + "\n")


class Document:
    """The OpenAPI document of a contract."""

    def __init__(self, pages: list[Page]) -> None:
        self._services = [page for page in pages if page.proto.package == PACKAGE and page.proto.service]
        self._messages: dict[str, tuple[Page, ElementPath, DescriptorProto]] = {}
        self._enums: dict[str, tuple[Page, ElementPath, EnumDescriptorProto]] = {}
        for page in pages:
            self._messages |= {name: (page, *found) for name, found in page.messages.items()}
            self._enums |= {name: (page, *found) for name, found in page.enums.items()}
        self._schemas: dict[str, Schema] = {}
        self._bound = {
            (owner, name)
            for _, _, method in self._methods()
            for binding in bindings_of(method)
            for path in binding.variables
            for owner, name in [self._owner(method.input_type, path)]
        }
        """The messages and fields that paths contain, so that bodies may lack them."""

    def build(self) -> Schema:
        """Return the document."""
        paths: dict[str, Schema] = {}
        for service, comment, method in self._methods():
            for index, binding in enumerate(bindings_of(method)):
                operation = self._operation(service, comment, method, binding, is_main=index == 0)
                paths.setdefault(_path(binding), {})[binding.verb] = operation
        errors = self._error_schemas()
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "Pointbook",
                "version": PACKAGE.rpartition(".")[2],
                "description": DESCRIPTION,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "https://{host}", "variables": {"host": {"default": "localhost:8444"}}}],
            "security": [{"token": []}],
            "tags": [
                {"name": service.name, "description": page.comment((FILE_SERVICES, index))}
                for page in self._services
                for index, service in enumerate(page.proto.service)
            ],
            "paths": paths,
            "components": {
                "schemas": dict(sorted((self._schemas | errors).items())),
                "responses": {
                    "Error": {
                        "description": "An error. Its HTTP status follows from the code of gRPC.",
                        "content": _json({"$ref": "#/components/schemas/Status"}),
                    }
                },
                "securitySchemes": {
                    "token": {"type": "http", "scheme": "bearer", "description": "A token of `pointbook token create`."}
                },
            },
        }

    def _methods(self) -> Iterator[tuple[ServiceDescriptorProto, str, MethodDescriptorProto]]:
        for page in self._services:
            for number, service in enumerate(page.proto.service):
                for index, method in enumerate(service.method):
                    yield service, page.comment((FILE_SERVICES, number, SERVICE_METHODS, index)), method

    def _operation(
        self,
        service: ServiceDescriptorProto,
        comment: str,
        method: MethodDescriptorProto,
        binding: HttpBinding,
        *,
        is_main: bool,
    ) -> Schema:
        summary, *rest = _SENTENCE.split(comment, maxsplit=1)
        operation: Schema = {
            "operationId": method.name if is_main else f"{method.name}By{_camel(_key(binding))}",
            "tags": [service.name],
            "summary": summary.replace("\n", " "),
            "description": "".join(rest).strip(),
        }
        if parameters := [*self._path_parameters(method, binding), *self._query_parameters(method, binding)]:
            operation["parameters"] = parameters
        if binding.body:
            operation["requestBody"] = {"required": True, "content": _json(self._body(method, binding))}
        operation["responses"] = {
            "200": {"description": "The response.", "content": _json(self._reference(method.output_type))},
            "default": {"$ref": "#/components/responses/Error"},
        }
        return operation

    def _path_parameters(self, method: MethodDescriptorProto, binding: HttpBinding) -> Iterator[Schema]:
        for path in binding.variables:
            owner, name = self._owner(method.input_type, path)
            field = next(each for each in self._fields(owner) if each.proto.name == name)
            yield {"name": name, "in": "path", "required": True, **self._described_parameter(field)}

    def _query_parameters(self, method: MethodDescriptorProto, binding: HttpBinding) -> Iterator[Schema]:
        """Yield the parameters of a query, in which customers must not be named."""
        if binding.body == "*":
            return
        for field in self._free_fields(method, binding):
            if field.proto.name != binding.body and field.proto.type_name != CUSTOMER_REF:
                required = {"required": True} if field.is_required else {}
                yield {"name": field.proto.name, "in": "query", **required, **self._described_parameter(field)}

    def _described_parameter(self, field: Field) -> Schema:
        return {"description": field.comment, "schema": self._schema(field)}

    def _body(self, method: MethodDescriptorProto, binding: HttpBinding) -> Schema:
        if binding.body != "*":
            field = next(each for each in self._fields(method.input_type) if each.proto.name == binding.body)
            return self._reference(field.proto.type_name)
        return self._object([*self._free_fields(method, binding)])

    def _free_fields(self, method: MethodDescriptorProto, binding: HttpBinding) -> Iterator[Field]:
        """Yield the fields of a request that its path neither contains nor excludes."""
        fields = self._fields(method.input_type)
        in_path = [each for each in fields if each.proto.name in binding.variables]
        choices = {each.choice for each in in_path} - {None}
        for field in fields:
            if field not in in_path and field.choice not in choices:
                yield field

    def _object(self, fields: list[Field], owner: str = "") -> Schema:
        described = {field.proto.name: self._described(field) for field in fields}
        required = [
            each.proto.name for each in fields if each.is_required and (owner, each.proto.name) not in self._bound
        ]
        return {"type": "object", "properties": described, **({"required": required} if required else {})}

    def _described(self, field: Field) -> Schema:
        return {**self._schema(field), **({"description": field.comment} if field.comment else {})}

    def _schema(self, field: Field) -> Schema:
        proto = field.proto
        nested = next((each for each in field.message.nested_type if proto.type_name.endswith(f".{each.name}")), None)
        if nested is not None and nested.options.map_entry:
            return {"type": "object", "additionalProperties": self._type(nested.field[1])}
        single = self._type(proto)
        is_repeated = proto.label == FieldDescriptorProto.LABEL_REPEATED
        return {"type": "array", "items": single} if is_repeated else single

    def _type(self, proto: FieldDescriptorProto) -> Schema:
        if not proto.type_name:
            return SCALARS[proto.type]
        return WELL_KNOWN.get(proto.type_name) or self._reference(proto.type_name)

    def _reference(self, name: str) -> Schema:
        """Return a reference to the schema of a message or an enum."""
        short = name.removeprefix(f".{PACKAGE}.").removeprefix(".google.rpc.")
        if short not in self._schemas:
            self._schemas[short] = {}  # Messages may contain themselves.
            self._schemas[short] = self._enum(name) if name in self._enums else self._message(name)
        return {"$ref": f"#/components/schemas/{short}"}

    def _message(self, name: str) -> Schema:
        page, path, _ = self._messages[name]
        described = {"description": page.comment(path)} if page.proto.package == PACKAGE else {}
        return {**described, **self._object(self._fields(name), name)}

    def _enum(self, name: str) -> Schema:
        page, path, enum = self._enums[name]
        values = [
            f"- {page.comment((*path, ENUM_VALUES, index)) or value.name}" for index, value in enumerate(enum.value)
        ]
        names = [value.name for value in enum.value]
        return {"description": "\n".join([page.comment(path), "", *values]), "type": "string", "enum": names}

    def _fields(self, name: str) -> list[Field]:
        page, path, message = self._messages[name]
        fields = [
            Field(proto, message, page.comment((*path, MESSAGE_FIELDS, index)))
            for index, proto in enumerate(message.field)
        ]
        if page.proto.package != PACKAGE:
            return [replace(field, comment="") for field in fields]
        for index, field in enumerate(fields):
            if field.choice is not None:
                choice = f"{field.comment}\n\nOne of {page.comment((*path, MESSAGE_ONEOFS, field.choice))}"
                fields[index] = replace(field, comment=choice)
        return fields

    def _owner(self, message: str, path: str) -> tuple[str, str]:
        """Return the message that has the last field of a path, and the field's name."""
        *parents, name = path.split(".")
        for parent in parents:
            message = next(each.proto.type_name for each in self._fields(message) if each.proto.name == parent)
        return message, name

    def _error_schemas(self) -> dict[str, Schema]:
        """Return the schemas of google.rpc.Status and of its details."""
        for name in DETAILS:
            self._reference(f".google.rpc.{name}")
        details = {
            name: {
                "description": DETAIL_COMMENTS[name],
                **self._schemas[name],
                "properties": {
                    "@type": {"const": f"type.googleapis.com/google.rpc.{name}"},
                    **self._schemas[name]["properties"],
                },
                "required": ["@type"],
            }
            for name in DETAILS
        }
        status: Schema = {
            "description": "An error. Errors of Envoy itself have no details.",
            "type": "object",
            "properties": {
                "code": {"type": "integer", "description": "The code of gRPC."},
                "message": {"type": "string", "description": "What is wrong, in English, for developers."},
                "details": {
                    "type": "array",
                    "items": {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in DETAILS]},
                },
            },
            "required": ["code", "message", "details"],
        }
        return details | {"Status": status}


def _path(binding: HttpBinding) -> str:
    """Return a template with the names of fields alone."""
    return re.sub(r"\{[^}]*\.", "{", binding.template)


def _key(binding: HttpBinding) -> str:
    """Return what identifies the resource in a further binding."""
    return "customer" if binding.body == "*" and "/references/" not in binding.template else binding.variables[-1]


def _camel(name: str) -> str:
    return "".join(part.title() for part in name.split("_"))


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


if __name__ == "__main__":
    main()
