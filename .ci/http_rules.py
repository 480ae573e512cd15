"""The HTTP rules of methods, `google.api.http`."""
# ruff: noqa: INP001 - a module of scripts

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import MethodDescriptorProto

_VARIABLE = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class HttpBinding:
    """One way to call a method over HTTP."""

    verb: str
    """In lower case, such as `post`."""
    template: str
    body: str
    """The field that the body is; `*` for the whole request, empty for no body."""

    @property
    def variables(self) -> list[str]:
        """The paths of the fields in the template."""
        return _VARIABLE.findall(self.template)


def bindings_of(method: MethodDescriptorProto) -> Iterator[HttpBinding]:
    """Yield the bindings of a method, its main one first."""
    rule: Any = method.options.Extensions[annotations_pb2.http]
    for each in (rule, *rule.additional_bindings):
        verb = each.WhichOneof("pattern")
        yield HttpBinding(verb, getattr(each, verb), each.body)
