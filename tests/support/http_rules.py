"""The HTTP rules of the contract's methods."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from support.message_fuzzing import METHODS

VARIABLE = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True)
class Binding:
    """One way to call a method over HTTP."""

    method: MethodDescriptor
    verb: str
    template: str
    body: str

    @property
    def variables(self) -> list[str]:
        """The paths of the fields in the template."""
        return VARIABLE.findall(self.template)

    @property
    def segments(self) -> list[str]:
        """The segments of the template with `*` for a variable, and the custom verb."""
        path, _, verb = VARIABLE.sub("*", self.template).partition(":")
        return [*path.split("/"), f":{verb}"]

    def fields(self, path: str) -> Iterator[FieldDescriptor]:
        """Yield the fields that a path leads through."""
        message: Descriptor | None = self.method.input_type
        for name in path.split("."):
            assert message is not None
            item = message.fields_by_name[name]
            yield item
            message = item.message_type


def bindings_of(method: MethodDescriptor) -> list[Binding]:
    """Return the bindings of a method, its main one first."""
    rule: Any = method.GetOptions().Extensions[annotations_pb2.http]
    rules = (rule, *rule.additional_bindings)
    return [
        Binding(method, verb, getattr(each, verb), each.body) for each in rules if (verb := each.WhichOneof("pattern"))
    ]


BINDINGS = [binding for method in METHODS for binding in bindings_of(method)]
