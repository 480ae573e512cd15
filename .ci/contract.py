"""The contract as scripts read it: elements, comments and HTTP rules."""
# ruff: noqa: INP001 - a module of scripts

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    MethodDescriptorProto,
)

PACKAGE = "pointbook.v1"
FILE_MESSAGES, FILE_ENUMS, FILE_SERVICES = 4, 5, 6
MESSAGE_FIELDS, MESSAGE_MESSAGES, MESSAGE_ENUMS, MESSAGE_ONEOFS = 2, 3, 4, 8
ENUM_VALUES = SERVICE_METHODS = 2
"""Field numbers of descriptor.proto, of which the paths of comments consist."""
_VARIABLE = re.compile(r"\{([^}]*)\}")

ElementPath = tuple[int, ...]
"""The field numbers and indexes that lead to an element, as in SourceCodeInfo."""


@dataclass(slots=True)
class Page:
    """One proto: its comments by path, and its messages and enums by full name."""

    proto: FileDescriptorProto
    name: str
    comments: dict[ElementPath, str]
    messages: dict[str, tuple[ElementPath, DescriptorProto]] = field(default_factory=dict)
    enums: dict[str, tuple[ElementPath, EnumDescriptorProto]] = field(default_factory=dict)

    def comment(self, path: ElementPath) -> str:
        """Return the comment of an element, or an empty string."""
        return self.comments.get(path, "")


def read_page(proto: FileDescriptorProto) -> Page:
    """Collect the comments, messages and enums of a proto."""
    comments = {
        tuple(location.path): re.sub(r"(?m)^ ", "", location.leading_comments).strip()
        for location in proto.source_code_info.location
    }
    page = Page(proto, Path(proto.name).stem, comments)

    def collect(path: ElementPath, prefix: str, message: DescriptorProto) -> None:
        name = f"{prefix}.{message.name}"
        page.messages[name] = (path, message)
        for index, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                collect((*path, MESSAGE_MESSAGES, index), name, nested)
        for index, enum in enumerate(message.enum_type):
            page.enums[f"{name}.{enum.name}"] = ((*path, MESSAGE_ENUMS, index), enum)

    prefix = f".{proto.package}"
    for index, message in enumerate(proto.message_type):
        collect((FILE_MESSAGES, index), prefix, message)
    for index, enum in enumerate(proto.enum_type):
        page.enums[f"{prefix}.{enum.name}"] = ((FILE_ENUMS, index), enum)
    return page


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
