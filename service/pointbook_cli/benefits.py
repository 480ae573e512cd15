"""`pointbook benefits import`: what SHOPLINE answers for a level, put into a server, and what is different of it."""

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

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import Progress

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_cli.benefits_file import (
    FILE_BYTES_MAX,
    BenefitsFileError,
    Translated,
    read_answer,
    translate,
    translate_privilege,
)
from pointbook_cli.health import local_address
from pointbook_cli.progress import counted
from pointbook_cli.quarantine import explain, printable
from pointbook_server.benefits.messages import ENUM_NAMES, ENUM_NUMBERS
from pointbook_server.benefits.model import CONTEXT_FIELDS
from pointbook_server.errors import PointbookError
from shopline_shim.grpc_channel import open_channel
from shopline_shim.grpc_errors import error_details
from shopline_shim.settings import ShimSettings

M = TypeVar("M", bound=Message)
CALL_SECONDS = 30.0
PAGE_SIZE = 1_000
ATTEMPTS_MAX = 5
"""How often an item is read and put again that others keep changing meanwhile."""
VALUE_LENGTH_SHOWN = 80
EXIT_REFUSED = 1
OUTCOMES = ("created", "changed", "unchanged", "refused")


class RefusedError(Exception):
    """An item of the file that cannot be kept; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to import, and how."""

    file: Path
    merchant_id: str
    level_code: str
    membership_type: str
    prune: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item of the file, and the lines that are printed below it."""

    what: str
    lines: tuple[str, ...] = ()


class Catalogue(ABC, Generic[M]):
    """What a merchant has of one kind on a server: benefits or custom privileges of a level.

    An item of a file has no name of its own, so that it is named by its place.
    """

    nouns: tuple[str, str]
    path: str
    mark: str
    missing: str

    def __init__(self, channel: grpc.Channel, token: str, plan: Plan) -> None:
        self._stub = benefits_pb2_grpc.BenefitsServiceStub(channel)
        self._options: dict[str, Any] = {
            "timeout": CALL_SECONDS,
            "metadata": (("authorization", f"Bearer {token}"),) if token else (),
        }
        self._plan = plan

    def item_id(self, number: int) -> str:
        """Return the id of an item of the file, counted from 1."""
        return f"{self._plan.level_code}:{self.mark}{number}"

    def get(self, item_id: str) -> tuple[M, str] | None:
        """Read an item and its etag; None where there is none."""
        try:
            return self._get(item_id)
        except grpc.RpcError as error:
            if error_details(error)[0].reason == self.missing:
                return None
            raise

    def put(self, item: M, etag: str) -> bool:
        """Put an item; False where it has changed since its etag was read. Raises RefusedError."""
        try:
            self._put(item, etag)
        except grpc.RpcError as error:
            # What is too big as a message is refused by gRPC itself, without a reason of ours.
            is_too_big = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not error_details(error)[0].reason
            if is_too_big or error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise RefusedError(explain(error)) from None
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            return False
        return True

    def delete(self, item_id: str) -> None:
        """Delete an item; one that is gone already is none to delete."""
        try:
            self._delete(item_id)
        except grpc.RpcError as error:
            if error_details(error)[0].reason != self.missing:
                raise

    def vanished(self, count: int) -> list[str]:
        """Return which items of an earlier file are not among the first, in their order; others have other ids."""
        form = re.compile(rf"{re.escape(f'{self._plan.level_code}:{self.mark}')}([1-9][0-9]*)")
        numbers = [int(found[1]) for found in map(form.fullmatch, self._ids()) if found]
        return [self.item_id(number) for number in sorted(numbers) if number > count]

    def _ids(self) -> Iterator[str]:
        """List the items of the level by their ids, through all pages."""
        page_token = ""
        while True:
            ids, page_token = self._page(page_token)
            yield from ids
            if not page_token:
                return

    @abstractmethod
    def translate(self, index: int, item: object, kept: M | None) -> Translated[M]:
        """Translate an item of the file, beside the one that is kept. Raises INVALID_FIELDS."""

    @abstractmethod
    def _get(self, item_id: str) -> tuple[M, str]: ...

    @abstractmethod
    def _put(self, item: M, etag: str) -> None: ...

    @abstractmethod
    def _page(self, page_token: str) -> tuple[list[str], str]: ...

    @abstractmethod
    def _delete(self, item_id: str) -> None: ...


class Benefits(Catalogue[benefits_pb2.Benefit]):
    """The benefits of a level."""

    nouns = ("benefit", "benefits")
    path = "benefitsInfo"
    mark = ""
    missing = "BENEFIT_NOT_FOUND"

    def translate(
        self, index: int, item: object, kept: benefits_pb2.Benefit | None
    ) -> Translated[benefits_pb2.Benefit]:
        """Translate a benefit.

        What the file does not contain stays as it is: stores, scene, and the membership type unless the plan names one.
        """
        context = _context(self._plan, self.item_id(index + 1), kept or benefits_pb2.Benefit())
        return translate(f"{self.path}[{index}]", item, context)

    def _get(self, item_id: str) -> tuple[benefits_pb2.Benefit, str]:
        request = benefits_pb2.GetBenefitRequest(merchant_id=self._plan.merchant_id, benefit_id=item_id)
        answer = self._stub.GetBenefit(request, **self._options)
        return answer.benefit, answer.etag

    def _put(self, item: benefits_pb2.Benefit, etag: str) -> None:
        self._stub.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=item, etag=etag), **self._options)

    def _page(self, page_token: str) -> tuple[list[str], str]:
        request = benefits_pb2.ListBenefitsRequest(
            merchant_id=self._plan.merchant_id,
            level_code=self._plan.level_code,
            page_size=PAGE_SIZE,
            page_token=page_token,
        )
        page = self._stub.ListBenefits(request, **self._options)
        return [benefit.benefit_id for benefit in page.benefits], page.next_page_token

    def _delete(self, item_id: str) -> None:
        request = benefits_pb2.DeleteBenefitRequest(merchant_id=self._plan.merchant_id, benefit_id=item_id)
        self._stub.DeleteBenefit(request, **self._options)


class CustomPrivileges(Catalogue[benefits_pb2.CustomPrivilege]):
    """The custom privileges of a level."""

    nouns = ("custom privilege", "custom privileges")
    path = "customPrivileges"
    mark = "p"
    missing = "CUSTOM_PRIVILEGE_NOT_FOUND"

    def translate(
        self, index: int, item: object, kept: benefits_pb2.CustomPrivilege | None
    ) -> Translated[benefits_pb2.CustomPrivilege]:
        """Translate a custom privilege; the file contains all of it."""
        del kept
        context = benefits_pb2.CustomPrivilege(
            merchant_id=self._plan.merchant_id,
            privilege_id=self.item_id(index + 1),
            level_code=self._plan.level_code,
        )
        return translate_privilege(f"{self.path}[{index}]", item, context)

    def _get(self, item_id: str) -> tuple[benefits_pb2.CustomPrivilege, str]:
        request = benefits_pb2.GetCustomPrivilegeRequest(merchant_id=self._plan.merchant_id, privilege_id=item_id)
        answer = self._stub.GetCustomPrivilege(request, **self._options)
        return answer.custom_privilege, answer.etag

    def _put(self, item: benefits_pb2.CustomPrivilege, etag: str) -> None:
        request = benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=item, etag=etag)
        self._stub.PutCustomPrivilege(request, **self._options)

    def _page(self, page_token: str) -> tuple[list[str], str]:
        request = benefits_pb2.ListCustomPrivilegesRequest(
            merchant_id=self._plan.merchant_id,
            level_code=self._plan.level_code,
            page_size=PAGE_SIZE,
            page_token=page_token,
        )
        page = self._stub.ListCustomPrivileges(request, **self._options)
        return [privilege.privilege_id for privilege in page.custom_privileges], page.next_page_token

    def _delete(self, item_id: str) -> None:
        request = benefits_pb2.DeleteCustomPrivilegeRequest(merchant_id=self._plan.merchant_id, privilege_id=item_id)
        self._stub.DeleteCustomPrivilege(request, **self._options)


def run_import(settings: ShimSettings, plan: Plan) -> int:
    """Import a file, print what is different, and return the exit code. Raises OSError."""
    try:
        answer = read_answer(_read(plan.file))
    except BenefitsFileError as error:
        raise OSError(f"{plan.file}: the file {error}") from error
    token = settings.token.get_secret_value()
    with _channel(settings) as channel:
        is_whole = _import(Benefits(channel, token, plan), answer.benefits, prune=plan.prune)
        if answer.custom_privileges is not None:
            privileges = CustomPrivileges(channel, token, plan)
            is_whole = _import(privileges, answer.custom_privileges, prune=plan.prune) and is_whole
    return 0 if is_whole else EXIT_REFUSED


def _import(catalogue: Catalogue[M], items: list[object], *, prune: bool) -> bool:
    """Import all items of one kind; return whether none was refused."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for index in progress.track(range(len(items)), description=f"Importing {catalogue.nouns[1]}"):
            outcome = import_one(catalogue, index, items[index])
            counts[outcome.what] += 1
            _print(console, catalogue.item_id(index + 1), outcome)
        vanished = catalogue.vanished(len(items))
        for item_id in vanished:
            if prune:
                catalogue.delete(item_id)
            note = "it is not in the file" if prune else "it is not in the file; --prune deletes it"
            _print(console, item_id, Outcome("deleted" if prune else "vanished", (note,)))
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    ending = f"{len(vanished):,} {'deleted' if prune else 'vanished'}"
    console.print(f"{counted(len(items), *catalogue.nouns)}: {told}; {ending}.")
    return not counts["refused"]


def import_one(catalogue: Catalogue[M], index: int, item: object) -> Outcome:
    """Put an item of the file where it differs from the one that is kept; others may be changing that."""
    item_id = catalogue.item_id(index + 1)
    for _ in range(ATTEMPTS_MAX):
        found = catalogue.get(item_id)
        kept, etag = found or (None, "")
        try:
            translated = catalogue.translate(index, item, kept)
            if translated.message == kept:
                return Outcome("unchanged", translated.notes)
            if catalogue.put(translated.message, etag):
                differences = () if kept is None else _differences(kept, translated.message)
                return Outcome("created" if kept is None else "changed", (*differences, *translated.notes))
        except PointbookError as error:
            return Outcome("refused", tuple(f"{each.field} {each.description}" for each in error.violations))
        except RefusedError as error:
            return Outcome("refused", (str(error),))
    raise OSError(f"{item_id} is being changed by others all the time; import again")


def _context(plan: Plan, benefit_id: str, kept: benefits_pb2.Benefit) -> benefits_pb2.Benefit:
    """Return what the file does not contain: whose benefit it is, and what was set elsewhere."""
    context = benefits_pb2.Benefit(
        merchant_id=plan.merchant_id,
        benefit_id=benefit_id,
        level_code=plan.level_code,
        store_ids=kept.store_ids,
        membership_type=kept.membership_type,
        reward_scene=kept.reward_scene,
        unrecognized_values={
            name: kept.unrecognized_values[name] for name in CONTEXT_FIELDS & set(kept.unrecognized_values)
        },
    )
    if plan.membership_type:
        context.membership_type = ENUM_NUMBERS["membership_type"][plan.membership_type]  # type: ignore[assignment] # the table has plain numbers
        context.unrecognized_values.pop("membership_type", None)
    return context


def _differences(kept: Message, wanted: Message) -> Iterator[str]:
    """Tell each field that is different, before and after."""
    before, after = _shown(kept), _shown(wanted)
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, ""), after.get(name, "")
        if old != new:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
            begin = same - VALUE_LENGTH_SHOWN // 2 if same >= VALUE_LENGTH_SHOWN else 0
            yield f"{name}: {_short(old, begin)} -> {_short(new, begin)}"


def _shown(item: Message) -> dict[str, str]:
    """Write the values of an item for people, enums by SHOPLINE's names."""
    values: dict[str, Any] = MessageToDict(item, preserving_proto_field_name=True)
    unrecognized, aside = values.pop("unrecognized_values", {}), values.pop("irrelevant_values", {})
    shown = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    shown |= {name: ENUM_NAMES[name][getattr(item, name)] for name in ENUM_NAMES.keys() & shown.keys()}
    shown |= unrecognized
    return shown | {f"{name}, set aside": json.dumps(value, ensure_ascii=False) for name, value in aside.items()}


def _short(text: str, begin: int) -> str:
    """Show a part of a text, and where others are cut off."""
    end = begin + VALUE_LENGTH_SHOWN
    return f"{'…' if begin else ''}{text[begin:end]}{'…' if len(text) > end else ''}" or "nothing"


def _read(file: Path) -> bytes:
    """Read a file, or standard input, as far as it may go."""
    if str(file) == "-":
        return sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
    with file.open("rb") as source:
        return source.read(FILE_BYTES_MAX + 1)


def _print(console: Console, benefit_id: str, outcome: Outcome) -> None:
    console.print(f"{benefit_id}  {outcome.what}")
    for line in outcome.lines:
        # What stands in a file must not steer the terminal.
        console.print(f"    {printable(line)}")


@contextlib.contextmanager
def _channel(settings: ShimSettings) -> Iterator[grpc.Channel]:
    """Open a channel to the server that the settings name. Raises OSError with what the server says."""
    with open_channel(settings, local_address(settings.grpc_address)) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise OSError(explain(error)) from error
