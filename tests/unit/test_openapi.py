"""The OpenAPI document describes the contract's HTTP rules and its JSON."""

import json
import re
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from openapi_spec_validator import OpenAPIV31SpecValidator

from support.http_rules import BINDINGS, Binding, bindings_of
from support.message_fuzzing import METHODS
from support.openapi import FILE, document, find_operation, operations, schema_errors

OPERATIONS = {operation["operationId"]: operation for _, _, operation in operations()}
VALUES = {FieldDescriptor.TYPE_STRING: "text", FieldDescriptor.TYPE_BYTES: b"bytes", FieldDescriptor.TYPE_BOOL: True}
DEPTH_MAX = 5
CHOICES = 8
"""As many as the largest oneof of a response has members."""
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def test_document_is_valid() -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(json.loads(FILE.read_text())).iter_errors()] == []


def test_every_rule_is_an_operation() -> None:
    paths = [(binding.verb, re.sub(r"\{[^}]*\.", "{", binding.template)) for binding in BINDINGS]

    assert sorted(paths) == sorted((verb, path) for verb, path, _ in operations())


def set_field(message: Any, item: Any, depth: int, choice: int) -> None:
    """Set a field to a value that is not its default."""
    if item.message_type is not None and item.message_type.GetOptions().map_entry:
        getattr(message, item.name)["key"] = scalar(item.message_type.fields_by_name["value"])
    elif item.message_type is not None:
        nested = getattr(message, item.name)
        fill(nested.add() if item.is_repeated else nested, depth + 1, choice)
    elif item.is_repeated:
        getattr(message, item.name).append(scalar(item))
    else:
        setattr(message, item.name, scalar(item))


def scalar(item: Any) -> Any:
    """Return a value of a field that is no message."""
    if item.enum_type is not None:
        return item.enum_type.values[-1].number
    return VALUES.get(item.type, 7)


def fill(message: Any, depth: int = 0, choice: int = 0) -> None:
    """Set all fields, of a oneof the member that `choice` selects."""
    if message.DESCRIPTOR.full_name == "google.protobuf.Struct":
        message.update({"key": [1, None]})
        return
    message.SetInParent()
    for item in message.DESCRIPTOR.fields:
        members = item.containing_oneof.fields if item.containing_oneof else [item]
        if members[choice % len(members)] is item and depth < DEPTH_MAX:
            set_field(message, item, depth, choice)


def filled_forms(descriptor: Descriptor) -> list[dict[str, Any]]:
    """Return a message with all fields as the transcoder prints it.

    Each member of a oneof is in one of its forms; equal forms are left out.
    """
    forms: list[dict[str, Any]] = []
    for choice in range(CHOICES):
        message = GetMessageClass(descriptor)()
        fill(message, choice=choice)
        form = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        forms += [] if form in forms else [form]
    return forms


@by_method
def test_schemas_of_responses_are_those_of_the_json_of_protobuf(method: MethodDescriptor) -> None:
    schema = OPERATIONS[method.name]["responses"]["200"]["content"]["application/json"]["schema"]

    for response in filled_forms(method.output_type):
        assert schema_errors(schema, response) == [], response
    assert schema_errors(schema, {"unknown": 1}) != []


@pytest.mark.parametrize(
    "method", [each for each in METHODS if "requestBody" in OPERATIONS[each.name]], ids=lambda method: method.name
)
def test_schemas_of_bodies_are_those_of_the_json_of_protobuf(method: MethodDescriptor) -> None:
    schema = OPERATIONS[method.name]["requestBody"]["content"]["application/json"]["schema"]
    binding = bindings_of(method)[0]
    excluded = excluded_fields(method, binding)

    for request in filled_forms(method.input_type):
        body = request[binding.body] if binding.body != "*" else {n: v for n, v in request.items() if n not in excluded}
        assert schema_errors(schema, body) == [], body


def excluded_fields(method: MethodDescriptor, binding: Binding) -> set[str]:
    """Return the fields that a path contains, with the other members of their oneofs."""
    in_path = [item for item in method.input_type.fields if item.name in binding.variables]
    return {
        each.name for item in in_path for each in (item.containing_oneof.fields if item.containing_oneof else [item])
    }


@by_method
def test_parameters_are_the_fields_that_are_not_in_the_body(method: MethodDescriptor) -> None:
    binding = bindings_of(method)[0]
    parameters = OPERATIONS[method.name].get("parameters", [])
    in_path = {path.rpartition(".")[2] for path in binding.variables}
    in_query = (
        {item.name for item in method.input_type.fields} - excluded_fields(method, binding) - {binding.body, "customer"}
    )

    assert {each["name"] for each in parameters if each["in"] == "path"} == in_path
    assert {each["name"] for each in parameters if each["in"] == "query"} == (
        set() if binding.body == "*" else in_query
    )


def test_a_request_finds_its_operation() -> None:
    paths = ("redemptions/1", "redemptions/1:reverse", "redemptions:validate")
    found = [
        find_operation(verb, f"/v1/merchants/m/{path}")
        for verb, path in zip(("GET", "POST", "POST"), paths, strict=True)
    ]

    assert [each and each["operationId"] for each in found] == [
        "GetRedemption",
        "ReverseRedemption",
        "ValidateRedemption",
    ]
    assert find_operation("GET", "/v1/unknown") is None


def test_required_fields_of_a_body_are_those_that_the_path_lacks() -> None:
    schemas = document()["components"]["schemas"]
    body = OPERATIONS["RedeemPoints"]["requestBody"]["content"]["application/json"]["schema"]

    assert body["required"] == ["customer", "program_id", "external_reference_number"]
    assert "merchant_id" not in schemas["PointsUpdate"]["required"]
    assert {"event_id", "update_type", "updated_at"} <= set(schemas["PointsUpdate"]["required"])
