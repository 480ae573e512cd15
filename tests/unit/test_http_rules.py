"""The HTTP rules of the contract, of docs/decisions/0074-http-rules.md."""

import itertools
import re
from pathlib import Path

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from pointbook.v1 import identity_pb2
from support.http_rules import BINDINGS, Binding, bindings_of
from support.message_fuzzing import METHODS

ROOT = Path(__file__).parents[2]
TEMPLATE = re.compile(r"/v1(?:/(?:[a-z][A-Za-z]*|\{[a-z_.]+\}))+(?::[a-z][A-Za-z]*)?")
DECLARATION = re.compile(r"((?: *//[^\n]*\n)+) *(?:message (\w+) \{|oneof (\w+) \{|[\w. ]*?(\w+) = \d+;)")
QUERY_MESSAGES = {"google.protobuf.Timestamp"}
"""The messages that have a text of their own in a query."""
CUSTOMER_REF = identity_pb2.CustomerRef.DESCRIPTOR.full_name


by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
by_binding = pytest.mark.parametrize("binding", BINDINGS, ids=lambda each: f"{each.verb} {each.template}")


def comments() -> dict[tuple[str, str], str]:
    """Return the comments of all fields and oneofs, by message and name."""
    found, message = {}, ""
    for proto in sorted((ROOT / "proto/pointbook/v1").glob("*.proto")):
        for comment, opened, oneof, name in DECLARATION.findall(proto.read_text()):
            message = opened or message
            found[message, oneof or name] = comment
    return found


COMMENTS = comments()


@by_method
def test_method_has_one_rule(method: MethodDescriptor) -> None:
    assert method.GetOptions().HasExtension(annotations_pb2.http)
    assert bindings_of(method)


@by_method
def test_further_bindings_are_for_other_keys(method: MethodDescriptor) -> None:
    """They are for a key that has several forms, or for personal data."""
    main, *others = bindings_of(method)
    messages = {each.message_type.full_name for each in method.input_type.fields if each.message_type}
    names_customer = CUSTOMER_REF in messages
    keys = [item for item in method.input_type.fields if item.containing_oneof and item.name in main.variables]

    assert len(others) <= 1
    if main.verb == "get":
        assert names_customer == any((each.verb, each.body) == ("post", "*") for each in others)
    if others and not names_customer:
        (key,) = keys
        assert key.containing_oneof is not None
        assert {*others[0].variables} - {*main.variables} < {item.name for item in key.containing_oneof.fields}


def test_no_two_templates_match_one_request() -> None:
    for one, other in itertools.combinations(BINDINGS, 2):
        if one.verb == other.verb and len(one.segments) == len(other.segments):
            pairs = zip(one.segments, other.segments, strict=True)
            assert not all(left == right or "*" in (left, right) for left, right in pairs), (
                one.template,
                other.template,
            )


@by_binding
def test_template_is_a_path_of_required_fields(binding: Binding) -> None:
    assert TEMPLATE.fullmatch(binding.template)
    for path in binding.variables:
        *_, item = binding.fields(path)
        assert item.type in {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_INT64}
        assert not item.is_repeated
        assert item.containing_type is not None
        required = item.containing_oneof or item
        comment = COMMENTS[item.containing_type.name, required.name]
        assert re.search(r"Required\b|Exactly\s+(?://\s+)?one", comment), path


@by_binding
def test_verb_is_that_of_the_method(binding: Binding) -> None:
    prefix = re.match("[A-Z][a-z]+", binding.method.name)
    assert prefix is not None
    expected = {"Get": "get", "List": "get", "Put": "put", "Delete": "delete"}.get(prefix[0], "post")

    assert binding.verb in {expected, "post"}
    assert (binding.body != "") == (binding.verb in {"post", "put"})
    if binding.verb == "post":
        assert binding.body == "*"


@by_binding
def test_fields_outside_path_and_body_fit_a_query(binding: Binding) -> None:
    if binding.body == "*":
        return
    for item in binding.method.input_type.fields:
        if item.name in {binding.body, *binding.variables} or item.message_type is None:
            continue
        assert item.message_type.full_name in {*QUERY_MESSAGES, CUSTOMER_REF}, item.name
        assert not item.is_repeated


@by_binding
def test_body_of_put_is_the_resource_of_the_path(binding: Binding) -> None:
    if binding.verb == "put":
        assert {path.partition(".")[0] for path in binding.variables} == {binding.body}
