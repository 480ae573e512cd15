"""`pointbook benefits import`: SHOPLINE's benefits of a level, put into a server, with a report of the differences."""

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.progress import Progress

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_cli.benefits_file import FILE_BYTES_MAX, BenefitsFileError, read_answer, translate
from pointbook_cli.health import local_address
from pointbook_cli.progress import counted
from pointbook_cli.quarantine import explain, printable
from pointbook_server.benefits.messages import NAMES, NUMBERS
from pointbook_server.benefits.model import CONTEXT
from pointbook_server.errors import PointbookError
from shopline_shim.quarantine import details_of
from shopline_shim.settings import ShimSettings

CALL_SECONDS = 30.0
PAGE_SIZE = 1_000
ATTEMPTS_MAX = 5
"""How often a benefit is read and put again that others keep changing meanwhile."""
VALUE_LENGTH_SHOWN = 80
EXIT_REFUSED = 1
OUTCOMES = ("created", "changed", "unchanged", "refused")


class RefusedError(Exception):
    """A benefit of the file that cannot be kept; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to import, and how."""

    file: Path
    merchant_id: str
    level_code: str
    membership_type: str
    prune: bool

    def benefit_id(self, number: int) -> str:
        """Name a benefit of the file, which has no name of its own, by its place."""
        return f"{self.level_code}:{number}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a benefit, and what there is to say about it."""

    what: str
    lines: tuple[str, ...] = ()


class Catalogue:
    """A merchant's benefits on a server."""

    def __init__(self, channel: grpc.Channel, token: str, merchant_id: str) -> None:
        self._benefits = benefits_pb2_grpc.BenefitsServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._merchant_id = merchant_id

    def get(self, benefit_id: str) -> tuple[benefits_pb2.Benefit, str] | None:
        """Read a benefit and its etag; None where there is none."""
        request = benefits_pb2.GetBenefitRequest(merchant_id=self._merchant_id, benefit_id=benefit_id)
        try:
            answer = self._benefits.GetBenefit(request, timeout=CALL_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            if details_of(error)[0].reason == "BENEFIT_NOT_FOUND":
                return None
            raise
        return answer.benefit, answer.etag

    def put(self, benefit: benefits_pb2.Benefit, etag: str) -> bool:
        """Put a benefit; False where it has changed since its etag was read. Raises RefusedError."""
        request = benefits_pb2.PutBenefitRequest(benefit=benefit, etag=etag)
        try:
            self._benefits.PutBenefit(request, timeout=CALL_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            # What is too big as a message is refused by gRPC itself, without a reason of ours.
            is_too_big = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not details_of(error)[0].reason
            if is_too_big or error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise RefusedError(explain(error)) from None
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            return False
        return True

    def of_level(self, level_code: str) -> Iterator[str]:
        """List the benefits of a level by their ids, through all pages."""
        request = benefits_pb2.ListBenefitsRequest(
            merchant_id=self._merchant_id, level_code=level_code, page_size=PAGE_SIZE
        )
        while True:
            page = self._benefits.ListBenefits(request, timeout=CALL_SECONDS, metadata=self._metadata)
            yield from (benefit.benefit_id for benefit in page.benefits)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete(self, benefit_id: str) -> None:
        """Delete a benefit; one that is gone already is none to delete."""
        request = benefits_pb2.DeleteBenefitRequest(merchant_id=self._merchant_id, benefit_id=benefit_id)
        try:
            self._benefits.DeleteBenefit(request, timeout=CALL_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            if details_of(error)[0].reason != "BENEFIT_NOT_FOUND":
                raise


def run_import(settings: ShimSettings, plan: Plan) -> int:
    """Import a file, print what is different, and answer the exit code. Raises OSError."""
    try:
        items = read_answer(_read(plan.file))
    except BenefitsFileError as error:
        raise OSError(f"{plan.file}: the file {error}") from error
    with _opened(settings, plan.merchant_id) as catalogue:
        return _import(catalogue, plan, items)


def _import(catalogue: Catalogue, plan: Plan, items: list[object]) -> int:
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for index in progress.track(range(len(items)), description="Importing"):
            outcome = import_one(catalogue, plan, index, items[index])
            counts[outcome.what] += 1
            _print(console, plan.benefit_id(index + 1), outcome)
        vanished = _vanished(plan, catalogue.of_level(plan.level_code), len(items))
        for benefit_id in vanished:
            if plan.prune:
                catalogue.delete(benefit_id)
            what = "deleted" if plan.prune else "vanished"
            note = "it is not in the file" if plan.prune else "it is not in the file; --prune deletes it"
            _print(console, benefit_id, Outcome(what, (note,)))
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    ending = f"{len(vanished):,} {'deleted' if plan.prune else 'vanished'}"
    console.print(f"{counted(len(items), 'benefit', 'benefits')}: {told}; {ending}.")
    return EXIT_REFUSED if counts["refused"] else 0


def import_one(catalogue: Catalogue, plan: Plan, index: int, item: object) -> Outcome:
    """Put a benefit of the file where it differs from the one that is kept; others may be changing that.

    What the file does not tell stays as it is: stores, scene, and the membership type unless the plan names one.
    """
    path = f"benefitsInfo[{index}]"
    for _ in range(ATTEMPTS_MAX):
        found = catalogue.get(plan.benefit_id(index + 1))
        kept, etag = found or (None, "")
        try:
            translated = translate(path, item, _context(plan, plan.benefit_id(index + 1), kept))
            if translated.benefit == kept:
                return Outcome("unchanged", translated.notes)
            if catalogue.put(translated.benefit, etag):
                differences = () if kept is None else _differences(kept, translated.benefit)
                return Outcome("created" if kept is None else "changed", (*differences, *translated.notes))
        except PointbookError as error:
            return Outcome("refused", tuple(f"{each.field} {each.description}" for each in error.violations))
        except RefusedError as error:
            return Outcome("refused", (str(error),))
    raise OSError(f"{plan.benefit_id(index + 1)} is being changed by others all the time; import again")


def _context(plan: Plan, benefit_id: str, kept: benefits_pb2.Benefit | None) -> benefits_pb2.Benefit:
    """Tell what the file does not: whose benefit it is, and what was said of it elsewhere."""
    kept = kept or benefits_pb2.Benefit()
    context = benefits_pb2.Benefit(
        merchant_id=plan.merchant_id,
        benefit_id=benefit_id,
        level_code=plan.level_code,
        store_ids=kept.store_ids,
        membership_type=kept.membership_type,
        reward_scene=kept.reward_scene,
        unrecognized_values={name: kept.unrecognized_values[name] for name in CONTEXT & set(kept.unrecognized_values)},
    )
    if plan.membership_type:
        context.membership_type = NUMBERS["membership_type"][plan.membership_type]  # type: ignore[assignment] # the table has plain numbers
        context.unrecognized_values.pop("membership_type", None)
    return context


def _differences(kept: benefits_pb2.Benefit, wanted: benefits_pb2.Benefit) -> Iterator[str]:
    """Tell each field that is different, before and after."""
    before, after = _shown(kept), _shown(wanted)
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, ""), after.get(name, "")
        if old != new:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
            begin = same - VALUE_LENGTH_SHOWN // 2 if same >= VALUE_LENGTH_SHOWN else 0
            yield f"{name}: {_short(old, begin)} -> {_short(new, begin)}"


def _shown(benefit: benefits_pb2.Benefit) -> dict[str, str]:
    """Write the values of a benefit for people, enums by SHOPLINE's names."""
    values: dict[str, Any] = MessageToDict(benefit, preserving_proto_field_name=True)
    unrecognized, aside = values.pop("unrecognized_values", {}), values.pop("irrelevant_values", {})
    shown = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    shown |= {name: NAMES[name][getattr(benefit, name)] for name in NAMES.keys() & shown.keys()}
    shown |= unrecognized
    return shown | {f"{name}, set aside": json.dumps(value, ensure_ascii=False) for name, value in aside.items()}


def _short(text: str, begin: int) -> str:
    """Show a part of a text, and where others are cut off."""
    end = begin + VALUE_LENGTH_SHOWN
    return f"{'…' if begin else ''}{text[begin:end]}{'…' if len(text) > end else ''}" or "nothing"


def _vanished(plan: Plan, benefit_ids: Iterable[str], count: int) -> list[str]:
    """Tell which benefits of an earlier file are not in this one, in their order; others have other ids."""
    numbers = (re.fullmatch(rf"{re.escape(plan.level_code)}:([1-9][0-9]*)", benefit_id) for benefit_id in benefit_ids)
    return [plan.benefit_id(number) for number in sorted(int(form[1]) for form in numbers if form) if number > count]


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
def _opened(settings: ShimSettings, merchant_id: str) -> Iterator[Catalogue]:
    """Open a merchant's benefits on the server that the settings name. Raises OSError with what the server says."""
    options = (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(local_address(settings.grpc_address), options=options) as channel:
        try:
            yield Catalogue(channel, settings.token.get_secret_value(), merchant_id)
        except grpc.RpcError as error:
            raise OSError(explain(error)) from error
