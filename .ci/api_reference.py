"""Write the API reference: a Markdown page for each proto, from its comments.

Usage: api_reference.py IMAGE FOLDER. IMAGE is a descriptor set with source information, as `buf build` writes it.
"""
# ruff: noqa: INP001 - a script

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from contract import (
    ENUM_VALUES,
    FILE_SERVICES,
    MESSAGE_FIELDS,
    MESSAGE_ONEOFS,
    PACKAGE,
    SERVICE_METHODS,
    ElementPath,
    Page,
    bindings_of,
    read_page,
)
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

ERRORS_PAGE = "errors"
REASON_PREFIX = "ERROR_REASON_"
TITLES = {"identity": "Customer references", ERRORS_PAGE: "Error reasons"}
"""The titles of the pages without a service."""
NOTICE = "<!-- Generated from proto/ by `make gen`. Do not edit. -->\n"
SCALARS = {value: name.removeprefix("TYPE_").lower() for name, value in FieldDescriptorProto.Type.items()}
_CODE = re.compile(r"(`[^`]*`)")
_DOCS = re.compile(r"docs/(?P<page>[\w/-]+\.md)(?:#(?P<anchor>[\w-]+))?")
_NAME = re.compile(r"\b(?:[A-Z]\w*Service\.)?[A-Z][a-z0-9]+[A-Z]\w*(?:\.[a-z]\w+)?\b|\b[A-Z]+_[A-Z_]+\b")
_OPENING = re.compile(r"\w+ is the (?:request|response) of [\w.]+\.\s*")


class DuplicateAnchorError(Exception):
    """Two headings of one page would get the same anchor."""


def main() -> None:
    """Read the image, and write the pages into the folder."""
    image, folder = map(Path, sys.argv[1:])
    pages = [read_page(proto) for proto in FileDescriptorSet.FromString(image.read_bytes()).file]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in Reference([page for page in pages if page.proto.package == PACKAGE]).pages():
        (folder / f"{name}.md").write_text(text)


class Reference:
    """The pages of a contract, with links between them."""

    def __init__(self, contract: list[Page]) -> None:
        self._contract = sorted(contract, key=lambda page: (not page.proto.service, page.name))
        self._links: dict[str, str] = {}
        """The address of every message, enum, method and reason, by its name without the package."""
        self._arguments: set[str] = set()
        """The messages that stand under their method."""
        for page in self._contract:
            for service in page.proto.service:
                for method in service.method:
                    self._link(page, f"{service.name}.{method.name}", method.name)
                    self._link(page, method.name, method.name)
                    for argument in (method.input_type, method.output_type):
                        self._arguments.add(argument)
                        self._link(page, _short(argument), method.name)
        for page in self._contract:
            for name in page.messages:
                self._link(page, _short(name), _short(name))
            for name in page.enums:
                self._link(page, _short(name), _title(page) if page.name == ERRORS_PAGE else _short(name))
            if page.name == ERRORS_PAGE:
                for reason in _reasons(page):
                    self._link(page, reason, reason)

    def pages(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the text of every page."""
        yield "index", self._index()
        for page in self._contract:
            text = f"{NOTICE}\n" + "\n\n".join(self._page(page)) + "\n"
            _check_anchors(page.name, text)
            yield page.name, text

    def _link(self, page: Page, name: str, heading: str) -> None:
        self._links.setdefault(name, f"{page.name}.md#{_anchor(heading)}")

    def _index(self) -> str:
        lines = [
            NOTICE,
            "# API reference",
            "",
            f"The methods, messages and enums of package `{PACKAGE}`.",
            "For authentication, errors, retries and paging, see [Using the API](../api.md).",
        ]
        for page in self._contract:
            for number, service in enumerate(page.proto.service):
                lines += ["", f"## [{service.name}]({page.name}.md)", "", "| Method | |", "|---|---|"]
                for index, method in enumerate(service.method):
                    comment = page.comment((FILE_SERVICES, number, SERVICE_METHODS, index))
                    sentence = re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]
                    address = self._links[f"{service.name}.{method.name}"]
                    lines.append(f"| [{method.name}]({address}) | {self._cell(sentence, 'index')} |")
        lines += ["", "## Shared types", ""]
        lines += [f"- [{_title(page)}]({page.name}.md)" for page in self._contract if not page.proto.service]
        return "\n".join(lines) + "\n"

    def _page(self, page: Page) -> Iterator[str]:
        yield f"# {_title(page)}"
        for number, service in enumerate(page.proto.service):
            yield self._text(page.comment((FILE_SERVICES, number)), page.name)
            yield "## Methods"
            for index, method in enumerate(service.method):
                yield from self._method(page, service, method, (FILE_SERVICES, number, SERVICE_METHODS, index))
        if page.name == ERRORS_PAGE:
            yield from self._errors(page)
            return
        messages = [name for name in page.messages if name not in self._arguments]
        if messages:
            yield "## Messages"
        for name in messages:
            path, message = page.messages[name]
            yield f"### {_short(name)}"
            yield self._text(page.comment(path), page.name)
            yield self._fields(page, path, message)
        if page.enums:
            yield "## Enums"
        for name in page.enums:
            yield from self._enum(page, name)

    def _method(
        self, page: Page, service: ServiceDescriptorProto, method: MethodDescriptorProto, path: ElementPath
    ) -> Iterator[str]:
        yield f"### {method.name}"
        yield self._text(page.comment(path), page.name)
        addresses = [f"{each.verb.upper()} {each.template}" for each in bindings_of(method)]
        yield "<br>\n".join(f"`{address}`" for address in (f"/{PACKAGE}.{service.name}/{method.name}", *addresses))
        for label, name in (("Request", method.input_type), ("Response", method.output_type)):
            message_path, message = page.messages[name]
            yield f"**{label}** `{message.name}`"
            if rest := _OPENING.sub("", page.comment(message_path)):
                yield self._text(rest, page.name)
            yield self._fields(page, message_path, message)

    def _fields(self, page: Page, path: ElementPath, message: DescriptorProto) -> str:
        if not message.field:
            return "No fields."
        lines = ["| Field | Type | Description |", "|---|---|---|"]
        choice = ""
        for index, item in enumerate(message.field):
            mark = ""
            if item.HasField("oneof_index") and not item.proto3_optional:
                mark = "&nbsp;&nbsp;"
                if choice != (choice := message.oneof_decl[item.oneof_index].name):
                    comment = page.comment((*path, MESSAGE_ONEOFS, item.oneof_index))
                    lines.append(f"| `{choice}` | one of | {self._cell(comment, page.name)} |")
            comment = page.comment((*path, MESSAGE_FIELDS, index))
            kind = self._type(page.name, message, item)
            lines.append(f"| {mark}`{item.name}` | {kind} | {self._cell(comment, page.name)} |")
        return "\n".join(lines)

    def _type(self, page: str, message: DescriptorProto, item: FieldDescriptorProto) -> str:
        entry = next((nested for nested in message.nested_type if item.type_name.endswith(f".{nested.name}")), None)
        if entry is not None and entry.options.map_entry:
            key, value = entry.field
            return f"map of {self._type(page, message, key)} to {self._type(page, message, value)}"
        name = item.type_name.removeprefix(".google.protobuf.")
        if item.type_name.startswith(f".{PACKAGE}."):
            name = f"[{_short(item.type_name)}]({self._address(_short(item.type_name), page)})"
        if not name:
            name = SCALARS[item.type]
        if item.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {name}"
        return f"optional {name}" if item.proto3_optional else name

    def _enum(self, page: Page, name: str) -> Iterator[str]:
        path, enum = page.enums[name]
        yield f"### {_short(name)}"
        yield self._text(page.comment(path), page.name)
        comments = [page.comment((*path, ENUM_VALUES, index)) for index in range(len(enum.value))]
        lines = ["| Value | Number | Description |", "|---|---|---|"]
        lines += [
            f"| `{value.name}` | {value.number} | {self._cell(_without_name(comment, value.name), page.name)} |"
            for value, comment in zip(enum.value, comments, strict=True)
        ]
        yield "\n".join(lines)

    def _errors(self, page: Page) -> Iterator[str]:
        ((path, enum),) = page.enums.values()
        yield self._text(page.comment(path), page.name)
        for index, value in enumerate(enum.value):
            if value.number:
                comment = page.comment((*path, ENUM_VALUES, index))
                yield f"## {value.name.removeprefix(REASON_PREFIX)}"
                yield f"{self._text(_without_name(comment, value.name), page.name)}\n- Number: {value.number}."

    def _cell(self, comment: str, page: str) -> str:
        """Convert a comment to the one line of a table's cell."""
        text = self._text(comment, page).replace("|", "\\|")
        text = re.sub(r"\n\n?- ", "<br>• ", text)
        return re.sub(r"\n\n", "<br><br>", text).replace("\n", " ")

    def _text(self, comment: str, page: str) -> str:
        """Convert a comment to Markdown, with links to pages and to other elements."""
        parts = _CODE.split(re.sub(r"\n +", "\n  ", comment))
        return "".join(part if part.startswith("`") else self._prose(part, page) for part in parts)

    def _prose(self, text: str, page: str) -> str:
        pieces = []
        end = 0
        for found in _DOCS.finditer(text):
            pieces += [self._named(text[end : found.start()], page), _document(found["page"], found["anchor"] or "")]
            end = found.end()
        return "".join([*pieces, self._named(text[end:], page)])

    def _named(self, text: str, page: str) -> str:
        def link(found: re.Match[str]) -> str:
            name = found[0]
            address = self._address(name, page) or self._address(name.rpartition(".")[0], page)
            if not found.start():
                return name  # A comment opens with the name of its own element.
            return f"[{name}]({address})" if address else name

        return _NAME.sub(link, re.sub(r"([*<\[\]])", r"\\\1", text))

    def _address(self, name: str, page: str) -> str:
        address = self._links.get(name, "")
        return address.removeprefix(f"{page}.md")


def _document(page: str, anchor: str) -> str:
    """Return a link to a page of the documentation, named by its anchor."""
    title = (anchor or Path(page).stem).replace("-", " ").replace("grpc", "gRPC")
    title = title if title.startswith("gRPC") else title[0].upper() + title[1:]
    return f"[{title}](../{page}{'#' * bool(anchor)}{anchor})"


def _reasons(page: Page) -> list[str]:
    return [value.name.removeprefix(REASON_PREFIX) for _, enum in page.enums.values() for value in enum.value]


def _title(page: Page) -> str:
    return page.proto.service[0].name if page.proto.service else TITLES[page.name]


def _short(name: str) -> str:
    return name.removeprefix(f".{PACKAGE}.")


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "").replace(" ", "-")


def _without_name(comment: str, name: str) -> str:
    """Return the comment of an enum value without the value's name and its colon."""
    text = comment.removeprefix(f"{name}: ")
    return comment if text == comment else text[0].upper() + text[1:]


def _check_anchors(name: str, text: str) -> None:
    """Raise DuplicateAnchorError if two headings of a page have the same anchor."""
    anchors = [_anchor(heading) for heading in re.findall(r"(?m)^#+ (.+)$", text)]
    repeated = {anchor for anchor in anchors if anchors.count(anchor) > 1}
    if repeated:
        raise DuplicateAnchorError(f"{name}.md has several headings {', '.join(sorted(repeated))}")


if __name__ == "__main__":
    main()
