"""`pointbook benefits import`: put SHOPLINE's benefits into a server.

It prints what changed.
"""

import json
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import Progress

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_cli.benefits_file import (
    FILE_BYTES_MAX,
    BenefitsFileError,
    Translation,
    read_level,
    translate,
    translate_privilege,
)
from pointbook_cli.exit_codes import EXIT_PROBLEMS
from pointbook_cli.server_channel import authorization, describe_error, open_server_channel
from pointbook_cli.terminal import count_of, escape_unprintable, plain_console
from pointbook_server.benefits.messages import ENUM_NAMES, ENUM_NUMBERS
from pointbook_server.benefits.model import CONTEXT_FIELDS
from pointbook_server.errors import PointbookError
from shopline_shim.grpc_errors import error_details
from shopline_shim.settings import ShimSettings

M = TypeVar("M", bound=Message)
CALL_TIMEOUT_SECONDS = 30.0
PAGE_SIZE = 1_000
ATTEMPTS_MAX = 5
"""The maximum number of attempts to put an item that others change concurrently."""
VALUE_LENGTH_SHOWN = 80
OUTCOMES = ("created", "changed", "unchanged", "refused")


class RefusedError(Exception):
    """An item that the server refuses; the message is the cause."""


@dataclass(frozen=True, slots=True)
class BenefitsImportOptions:
    """The file to import, its merchant and level, and how to import it."""

    file: Path
    merchant_id: str
    level_code: str
    membership_type: str
    prune: bool


@dataclass(frozen=True, slots=True)
class ItemResult:
    """The outcome of one item, and the lines printed below it."""

    outcome: str
    lines: tuple[str, ...] = ()


class LevelItems(ABC, Generic[M]):
    """The benefits or the custom privileges that a level has on a server.

    An item of a file has no id: its id is made of the level and its position.
    """

    nouns: tuple[str, str]
    path: str
    id_prefix: str
    not_found: str

    def __init__(self, channel: grpc.Channel, token: str, options: BenefitsImportOptions) -> None:
        self._stub = benefits_pb2_grpc.BenefitsServiceStub(channel)
        self._call_options: dict[str, Any] = {
            "timeout": CALL_TIMEOUT_SECONDS,
            "metadata": authorization(token),
        }
        self._import_options = options

    def item_id(self, number: int) -> str:
        """Return the id of an item by its position in the file, from 1."""
        return f"{self._import_options.level_code}:{self.id_prefix}{number}"

    def get(self, item_id: str) -> tuple[M, str] | None:
        """Read an item and its etag; None if there is none."""
        try:
            return self._get(item_id)
        except grpc.RpcError as error:
            if error_details(error)[0].reason == self.not_found:
                return None
            raise

    def put(self, item: M, etag: str) -> bool:
        """Put an item; return False if it has changed since its etag was read.

        Raises RefusedError.
        """
        try:
            self._put(item, etag)
        except grpc.RpcError as error:
            # gRPC itself refuses messages that are too large, without one of our reasons.
            is_too_big = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not error_details(error)[0].reason
            if is_too_big or error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise RefusedError(describe_error(error)) from None
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            return False
        return True

    def delete(self, item_id: str) -> None:
        """Delete an item, unless it is deleted already."""
        try:
            self._delete(item_id)
        except grpc.RpcError as error:
            if error_details(error)[0].reason != self.not_found:
                raise

    def vanished(self, count: int) -> list[str]:
        """Return the ids of items from an earlier, longer file, by position.

        Items with other ids are ignored.
        """
        pattern = re.compile(rf"{re.escape(f'{self._import_options.level_code}:{self.id_prefix}')}([1-9][0-9]*)")
        numbers = [int(match[1]) for match in map(pattern.fullmatch, self._ids()) if match]
        return [self.item_id(number) for number in sorted(numbers) if number > count]

    def _ids(self) -> Iterator[str]:
        """List the ids of the level's items, from all pages."""
        page_token = ""
        while True:
            ids, page_token = self._page(page_token)
            yield from ids
            if not page_token:
                return

    @abstractmethod
    def translate(self, index: int, item: object, stored: M | None) -> Translation[M]:
        """Translate an item of the file, with the stored one as context.

        Raises INVALID_FIELDS.
        """

    @abstractmethod
    def _get(self, item_id: str) -> tuple[M, str]: ...

    @abstractmethod
    def _put(self, item: M, etag: str) -> None: ...

    @abstractmethod
    def _page(self, page_token: str) -> tuple[list[str], str]: ...

    @abstractmethod
    def _delete(self, item_id: str) -> None: ...


class LevelBenefits(LevelItems[benefits_pb2.Benefit]):
    """The benefits of a level."""

    nouns = ("benefit", "benefits")
    path = "benefitsInfo"
    id_prefix = ""
    not_found = "BENEFIT_NOT_FOUND"

    def translate(
        self, index: int, item: object, stored: benefits_pb2.Benefit | None
    ) -> Translation[benefits_pb2.Benefit]:
        """Translate a benefit.

        Stores, scene, and membership type are not in the file: they stay as stored, unless an option sets the type.
        """
        context = _context(self._import_options, self.item_id(index + 1), stored or benefits_pb2.Benefit())
        return translate(f"{self.path}[{index}]", item, context)

    def _get(self, item_id: str) -> tuple[benefits_pb2.Benefit, str]:
        request = benefits_pb2.GetBenefitRequest(merchant_id=self._import_options.merchant_id, benefit_id=item_id)
        response = self._stub.GetBenefit(request, **self._call_options)
        return response.benefit, response.etag

    def _put(self, item: benefits_pb2.Benefit, etag: str) -> None:
        self._stub.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=item, etag=etag), **self._call_options)

    def _page(self, page_token: str) -> tuple[list[str], str]:
        request = benefits_pb2.ListBenefitsRequest(
            merchant_id=self._import_options.merchant_id,
            level_code=self._import_options.level_code,
            page_size=PAGE_SIZE,
            page_token=page_token,
        )
        page = self._stub.ListBenefits(request, **self._call_options)
        return [benefit.benefit_id for benefit in page.benefits], page.next_page_token

    def _delete(self, item_id: str) -> None:
        request = benefits_pb2.DeleteBenefitRequest(merchant_id=self._import_options.merchant_id, benefit_id=item_id)
        self._stub.DeleteBenefit(request, **self._call_options)


class LevelPrivileges(LevelItems[benefits_pb2.CustomPrivilege]):
    """The custom privileges of a level."""

    nouns = ("custom privilege", "custom privileges")
    path = "customPrivileges"
    id_prefix = "p"
    not_found = "CUSTOM_PRIVILEGE_NOT_FOUND"

    def translate(
        self, index: int, item: object, stored: benefits_pb2.CustomPrivilege | None
    ) -> Translation[benefits_pb2.CustomPrivilege]:
        """Translate a custom privilege; the file contains all of it."""
        del stored
        context = benefits_pb2.CustomPrivilege(
            merchant_id=self._import_options.merchant_id,
            privilege_id=self.item_id(index + 1),
            level_code=self._import_options.level_code,
        )
        return translate_privilege(f"{self.path}[{index}]", item, context)

    def _get(self, item_id: str) -> tuple[benefits_pb2.CustomPrivilege, str]:
        request = benefits_pb2.GetCustomPrivilegeRequest(
            merchant_id=self._import_options.merchant_id, privilege_id=item_id
        )
        response = self._stub.GetCustomPrivilege(request, **self._call_options)
        return response.custom_privilege, response.etag

    def _put(self, item: benefits_pb2.CustomPrivilege, etag: str) -> None:
        request = benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=item, etag=etag)
        self._stub.PutCustomPrivilege(request, **self._call_options)

    def _page(self, page_token: str) -> tuple[list[str], str]:
        request = benefits_pb2.ListCustomPrivilegesRequest(
            merchant_id=self._import_options.merchant_id,
            level_code=self._import_options.level_code,
            page_size=PAGE_SIZE,
            page_token=page_token,
        )
        page = self._stub.ListCustomPrivileges(request, **self._call_options)
        return [privilege.privilege_id for privilege in page.custom_privileges], page.next_page_token

    def _delete(self, item_id: str) -> None:
        request = benefits_pb2.DeleteCustomPrivilegeRequest(
            merchant_id=self._import_options.merchant_id, privilege_id=item_id
        )
        self._stub.DeleteCustomPrivilege(request, **self._call_options)


def run_import(settings: ShimSettings, options: BenefitsImportOptions) -> int:
    """Import a file, print what changed, and return the exit code. Raises OSError."""
    try:
        level = read_level(_read(options.file))
    except BenefitsFileError as error:
        raise OSError(f"{options.file}: the file {error}") from error
    token = settings.token.get_secret_value()
    with open_server_channel(settings) as channel:
        is_complete = _import_items(LevelBenefits(channel, token, options), level.benefits, prune=options.prune)
        if level.custom_privileges is not None:
            privileges = LevelPrivileges(channel, token, options)
            is_complete = _import_items(privileges, level.custom_privileges, prune=options.prune) and is_complete
    return 0 if is_complete else EXIT_PROBLEMS


def _import_items(items_on_server: LevelItems[M], items: list[object], *, prune: bool) -> bool:
    """Import all items of one kind; return whether none was refused."""
    console = plain_console()
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for index in progress.track(range(len(items)), description=f"Importing {items_on_server.nouns[1]}"):
            result = import_item(items_on_server, index, items[index])
            counts[result.outcome] += 1
            _print(console, items_on_server.item_id(index + 1), result)
        vanished = items_on_server.vanished(len(items))
        for item_id in vanished:
            if prune:
                items_on_server.delete(item_id)
            note = "not in the file" if prune else "not in the file; --prune deletes it"
            _print(console, item_id, ItemResult("deleted" if prune else "vanished", (note,)))
    summary = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
    ending = f"{len(vanished):,} {'deleted' if prune else 'vanished'}"
    console.print(f"{count_of(len(items), *items_on_server.nouns)}: {summary}; {ending}.")
    return not counts["refused"]


def import_item(items_on_server: LevelItems[M], index: int, item: object) -> ItemResult:
    """Put an item of the file if it differs from the stored one. Raises OSError."""
    item_id = items_on_server.item_id(index + 1)
    for _ in range(ATTEMPTS_MAX):
        stored, etag = items_on_server.get(item_id) or (None, "")
        try:
            translation = items_on_server.translate(index, item, stored)
            if translation.message == stored:
                return ItemResult("unchanged", translation.notes)
            if items_on_server.put(translation.message, etag):
                differences = () if stored is None else _differences(stored, translation.message)
                return ItemResult("created" if stored is None else "changed", (*differences, *translation.notes))
        except PointbookError as error:
            return ItemResult("refused", tuple(f"{each.field} {each.description}" for each in error.violations))
        except RefusedError as error:
            return ItemResult("refused", (str(error),))
    raise OSError(f"{item_id} is being changed concurrently; import again")


def _context(options: BenefitsImportOptions, benefit_id: str, stored: benefits_pb2.Benefit) -> benefits_pb2.Benefit:
    """Return the fields that the file does not contain.

    They are the ids, and stored values that were set elsewhere.
    """
    context = benefits_pb2.Benefit(
        merchant_id=options.merchant_id,
        benefit_id=benefit_id,
        level_code=options.level_code,
        store_ids=stored.store_ids,
        membership_type=stored.membership_type,
        reward_scene=stored.reward_scene,
        unrecognized_values={
            name: stored.unrecognized_values[name] for name in CONTEXT_FIELDS & set(stored.unrecognized_values)
        },
    )
    if options.membership_type:
        context.membership_type = ENUM_NUMBERS["membership_type"][options.membership_type]  # type: ignore[assignment] # the table has plain numbers
        context.unrecognized_values.pop("membership_type", None)
    return context


def _differences(stored: Message, new: Message) -> Iterator[str]:
    """Return a line for each changed field, with the value before and after."""
    before, after = _to_texts(stored), _to_texts(new)
    for name in sorted(before.keys() | after.keys()):
        old_text, new_text = before.get(name, ""), after.get(name, "")
        if old_text != new_text:
            pairs = zip(old_text, new_text, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            begin = same - VALUE_LENGTH_SHOWN // 2 if same >= VALUE_LENGTH_SHOWN else 0
            yield f"{name}: {_shorten(old_text, begin)} -> {_shorten(new_text, begin)}"


def _to_texts(item: Message) -> dict[str, str]:
    """Return the values of an item as text, enums by SHOPLINE's names."""
    values: dict[str, Any] = MessageToDict(item, preserving_proto_field_name=True)
    unrecognized, set_aside = values.pop("unrecognized_values", {}), values.pop("irrelevant_values", {})
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    texts |= {name: ENUM_NAMES[name][getattr(item, name)] for name in ENUM_NAMES.keys() & texts.keys()}
    texts |= unrecognized
    return texts | {f"{name}, set aside": json.dumps(value, ensure_ascii=False) for name, value in set_aside.items()}


def _shorten(text: str, begin: int) -> str:
    """Return a part of a text, with … where it is cut off."""
    end = begin + VALUE_LENGTH_SHOWN
    return f"{'…' if begin else ''}{text[begin:end]}{'…' if len(text) > end else ''}" or "nothing"


def _read(file: Path) -> bytes:
    """Read a file or standard input, up to one byte beyond the limit."""
    if str(file) == "-":
        return sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
    with file.open("rb") as source:
        return source.read(FILE_BYTES_MAX + 1)


def _print(console: Console, item_id: str, result: ItemResult) -> None:
    console.print(f"{item_id}  {result.outcome}")
    for line in result.lines:
        console.print(f"    {escape_unprintable(line)}")
