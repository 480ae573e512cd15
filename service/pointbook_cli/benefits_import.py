"""`pointbook benefits import`: put SHOPLINE's benefits into a server.

It prints what changed.
"""

import contextlib
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

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import Progress

from pointbook.v1 import benefits_pb2
from pointbook_cli.benefits_file import (
    FILE_BYTES_MAX,
    BenefitsFileError,
    Translation,
    read_level,
    translate,
    translate_privilege,
)
from pointbook_cli.exit_codes import EXIT_PROBLEMS
from pointbook_cli.server_access import describe_error, open_client
from pointbook_cli.terminal import count_of, escape_unprintable, plain_console
from pointbook_client import AbortedError, InvalidArgumentError, PointbookError, ResourceExhaustedError, reasons
from pointbook_client.sync import PointbookClient
from pointbook_server import errors as server_errors
from pointbook_server.benefits.messages import ENUM_NAMES, ENUM_NUMBERS
from pointbook_server.benefits.model import CONTEXT_FIELDS
from shopline_shim.settings import ShimSettings

M = TypeVar("M", bound=Message)
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
    not_found: type[PointbookError]

    def __init__(self, client: PointbookClient, options: BenefitsImportOptions) -> None:
        self._client = client
        self._stub = client.benefits
        self._import_options = options

    def item_id(self, number: int) -> str:
        """Return the id of an item by its position in the file, from 1."""
        return f"{self._import_options.level_code}:{self.id_prefix}{number}"

    def get(self, item_id: str) -> tuple[M, str] | None:
        """Read an item and its etag; None if there is none."""
        try:
            return self._get(item_id)
        except self.not_found:
            return None

    def put(self, item: M, etag: str) -> bool:
        """Put an item; return False if it has changed since its etag was read.

        Raises RefusedError.
        """
        try:
            self._put(item, etag)
        except AbortedError:
            return False
        except (InvalidArgumentError, ResourceExhaustedError) as error:
            # gRPC itself refuses messages that are too large, without one of our reasons.
            if isinstance(error, ResourceExhaustedError) and error.reason:
                raise
            raise RefusedError(describe_error(error)) from None
        return True

    def delete(self, item_id: str) -> None:
        """Delete an item, unless it is deleted already."""
        with contextlib.suppress(self.not_found):
            self._delete(item_id)

    def vanished(self, count: int) -> list[str]:
        """Return the ids of items from an earlier, longer file, by position.

        Items with other ids are ignored.
        """
        pattern = re.compile(rf"{re.escape(f'{self._import_options.level_code}:{self.id_prefix}')}([1-9][0-9]*)")
        numbers = [int(match[1]) for match in map(pattern.fullmatch, self._list_ids()) if match]
        return [self.item_id(number) for number in sorted(numbers) if number > count]

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
    def _list_ids(self) -> Iterator[str]: ...

    @abstractmethod
    def _delete(self, item_id: str) -> None: ...


class LevelBenefits(LevelItems[benefits_pb2.Benefit]):
    """The benefits of a level."""

    nouns = ("benefit", "benefits")
    path = "benefitsInfo"
    id_prefix = ""
    not_found = reasons.BenefitNotFoundError

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
        response = self._stub.GetBenefit(request)
        return response.benefit, response.etag

    def _put(self, item: benefits_pb2.Benefit, etag: str) -> None:
        self._stub.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=item, etag=etag))

    def _list_ids(self) -> Iterator[str]:
        request = benefits_pb2.ListBenefitsRequest(
            merchant_id=self._import_options.merchant_id,
            level_code=self._import_options.level_code,
            page_size=PAGE_SIZE,
        )
        for page in self._client.pages(self._stub.ListBenefits, request):
            yield from (benefit.benefit_id for benefit in page.benefits)

    def _delete(self, item_id: str) -> None:
        request = benefits_pb2.DeleteBenefitRequest(merchant_id=self._import_options.merchant_id, benefit_id=item_id)
        self._stub.DeleteBenefit(request)


class LevelPrivileges(LevelItems[benefits_pb2.CustomPrivilege]):
    """The custom privileges of a level."""

    nouns = ("custom privilege", "custom privileges")
    path = "customPrivileges"
    id_prefix = "p"
    not_found = reasons.CustomPrivilegeNotFoundError

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
        response = self._stub.GetCustomPrivilege(request)
        return response.custom_privilege, response.etag

    def _put(self, item: benefits_pb2.CustomPrivilege, etag: str) -> None:
        request = benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=item, etag=etag)
        self._stub.PutCustomPrivilege(request)

    def _list_ids(self) -> Iterator[str]:
        request = benefits_pb2.ListCustomPrivilegesRequest(
            merchant_id=self._import_options.merchant_id,
            level_code=self._import_options.level_code,
            page_size=PAGE_SIZE,
        )
        for page in self._client.pages(self._stub.ListCustomPrivileges, request):
            yield from (privilege.privilege_id for privilege in page.custom_privileges)

    def _delete(self, item_id: str) -> None:
        request = benefits_pb2.DeleteCustomPrivilegeRequest(
            merchant_id=self._import_options.merchant_id, privilege_id=item_id
        )
        self._stub.DeleteCustomPrivilege(request)


def run_import(settings: ShimSettings, options: BenefitsImportOptions) -> int:
    """Import a file, print what changed, and return the exit code. Raises OSError."""
    try:
        level = read_level(_read(options.file))
    except BenefitsFileError as error:
        raise OSError(f"{options.file}: the file {error}") from error
    with open_client(settings) as client:
        is_complete = _import_items(LevelBenefits(client, options), level.benefits, prune=options.prune)
        if level.custom_privileges is not None:
            privileges = LevelPrivileges(client, options)
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
        except server_errors.PointbookError as error:
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
