"""Write the client's exceptions, one for each reason, from errors.proto.

Usage: client_errors.py IMAGE FILE. IMAGE is a descriptor set with source information, as `buf build` writes it.
"""
# ruff: noqa: INP001 - a script

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

PROTO = "pointbook/v1/errors.proto"
PREFIX = "ERROR_REASON_"
WIDTH = 116
_GRPC_CODE = re.compile(r"^- gRPC code: ([A-Z_]+)\.", re.MULTILINE)
HEADER = '''"""The exceptions of calls, one for each reason.

Generated from proto/pointbook/v1/errors.proto by `make gen`. Do not edit.
"""

from pointbook_client.errors import (
{bases}
)
'''
FOOTER = '''
BY_REASON: dict[str, type[PointbookError]] = {{
{entries}
}}
"""The exception of each reason."""
'''


def main() -> None:
    """Read the image, and write the module."""
    image, module = map(Path, sys.argv[1:])
    files = FileDescriptorSet.FromString(image.read_bytes()).file
    module.write_text(render(next(file for file in files if file.name == PROTO)))


def render(proto: FileDescriptorProto) -> str:
    """Return the text of the module."""
    classes, entries, bases = [], [], {"PointbookError"}
    for reason, comment in reasons(proto):
        code = _GRPC_CODE.search(comment)
        if code is None or code[1] == "OK":
            # It is part of a response, never an error.
            continue
        name, base = f"{camel_case(reason)}Error", f"{camel_case(code[1])}Error"
        if name == base:
            # The gRPC code has this one reason.
            entries.append((reason, base))
            bases.add(base)
            continue
        bases.add(base)
        entries.append((reason, name))
        classes.append(f'\n\nclass {name}({base}):\n    """The error {reason}.\n\n{docstring(comment)}\n    """\n')
    return (
        HEADER.format(bases="\n".join(f"    {base}," for base in sorted(bases)))
        + "".join(classes)
        + "\n"
        + FOOTER.format(entries="\n".join(f'    "{reason}": {name},' for reason, name in entries))
    )


def reasons(proto: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """Yield each reason without its prefix, and its comment without the opening name."""
    (enum,) = proto.enum_type
    comments = {tuple(location.path): location.leading_comments for location in proto.source_code_info.location}
    for index, value in enumerate(enum.value):
        comment = re.sub(r"(?m)^ ", "", comments[5, 0, 2, index]).strip()
        yield value.name.removeprefix(PREFIX), comment.removeprefix(f"{value.name}: ")


def camel_case(name: str) -> str:
    """Return a name of an enum value as that of a class."""
    return "".join(word.capitalize() for word in name.split("_"))


def docstring(comment: str) -> str:
    """Return a comment as the body of a docstring: its cause, and then a list."""
    cause, _, items = comment.partition("\n\n- ")
    paragraphs = [" ".join(cause.split()), *(f"- {' '.join(item.split())}" for item in items.split("\n- ") if item)]
    first, *others = ("\n".join(wrap(paragraph)) for paragraph in paragraphs)
    return "\n\n".join([first[0:4] + first[4:5].upper() + first[5:], "\n".join(others)]).rstrip()


def wrap(paragraph: str) -> list[str]:
    """Return the lines of a paragraph, indented as in a class."""
    hanging = "      " if paragraph.startswith("- ") else "    "
    return textwrap.wrap(
        paragraph,
        WIDTH,
        initial_indent="    ",
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    main()
