"""Shell lines of README.md and docs/, run as printed except for the ports."""

import asyncio
import json
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pointbook_client.testing.ports import free_port
from support.docs_pages import README, ShellLine, pages, shell_lines_of
from support.probes import http_get
from support.processes import Finished, Running, finish, running
from support.shell import as_buf_curl, find_grpcurl, shell_environment

ASSIGNMENT = re.compile(r"([A-Z]+)=(.*)")
CAPITAL = re.compile(r"(?<!^)[A-Z]")
VOLATILE = re.compile(r"(as_of|.*_time|settle_by|challenge_id|redemption_id|event_id|external_reference_number)")
"""Fields whose values are others in every run."""
SHOWN_CODE = "364862"
"""The code that README.md shows, in place of which a reader types their own."""
REFUSED_FIELDS = ("event_id", "update_type", "updated_at", "store_id", "buyer_id", "updated_value")
TOUR_CALLS = ("webhook send", "GetPointsAccount", "ValidateRedemption", "IssueValidationCode", "RedeemPoints")
TOUR = shell_lines_of(README.read_text())
LINES = [line for page in pages() for line in shell_lines_of(page.read_text())]


@dataclass
class Terminal:
    """A shell in which a reader pastes line after line, next to a `pointbook dev`."""

    dev: Running
    grpc_port: int
    http_port: int
    database_url: str
    variables: dict[str, str] = field(default_factory=dict)
    skipped: int = 0

    async def paste(self, line: ShellLine) -> Finished | None:
        """Run a line, by buf if grpcurl is missing.

        Return None for a variable, and for a line that buf cannot run.
        """
        assignment = ASSIGNMENT.fullmatch(line.command)
        if assignment is not None:
            await self._assign(*assignment.groups())
            return None
        command: str | None = line.command
        if line.command.startswith("grpcurl") and find_grpcurl() is None:
            command = as_buf_curl(line.command)
        if command is None:
            self.skipped += 1
            return None
        here = command.replace("127.0.0.1:50051", f"127.0.0.1:{self.grpc_port}")
        here = here.replace("127.0.0.1:8080", f"127.0.0.1:{self.http_port}")
        environment = shell_environment() | {
            "POINTBOOK_HTTP_ADDRESS": f"127.0.0.1:{self.http_port}",
            "POINTBOOK_GRPC_ADDRESS": f"127.0.0.1:{self.grpc_port}",
            "POINTBOOK_DATABASE_URL": self.database_url,
        }
        return await finish("bash", "-c", here, environment=environment | self.variables)

    async def _assign(self, name: str, value: str) -> None:
        """Set a variable.

        Readers need more than a second for a page, so `date +%s` gives each page another buyer.
        """
        if SHOWN_CODE in value:
            self.variables[name] = value.replace(SHOWN_CODE, self.code())
            return
        expanded = await echo(value)
        # The time must be another one than that of the variable's last use, and its unit is the second.
        while "date +%s" in value and expanded == self.variables.get(name):
            await asyncio.sleep(0.05)
            expanded = await echo(value)
        self.variables[name] = expanded

    def code(self) -> str:
        """Return the last code on the console."""
        codes: list[str] = re.findall(r"message \(challenge \S+\): .*?\b(\d{6})\b", self.dev.err)
        return codes[-1]


async def echo(value: str) -> str:
    """Return the value as a shell expands it."""
    return (await finish("bash", "-c", f"echo {value}", environment=shell_environment())).out.strip()


def stable(printed: str, variables: dict[str, str]) -> Any:
    """Return an answer without what differs between runs."""
    if printed.startswith("{"):
        decoder, answers = json.JSONDecoder(object_pairs_hook=_stable_fields), []
        while printed:
            answer, end = decoder.raw_decode(printed)
            answers.append(answer)
            printed = printed[end:].strip()
        return answers
    return re.sub(r"\d+ a second", "", printed.replace(variables.get("BUYER", ""), "BUYER"))


def _stable_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {}
    for printed_name, value in pairs:
        name = CAPITAL.sub(r"_\g<0>", printed_name).lower()  # buf prints the names of JSON, grpcurl those of the proto
        is_volatile = VOLATILE.fullmatch(name) or (name == "buyer_id" and str(value).isdigit())
        fields[name] = "…" if is_volatile else value
    return fields


async def paste_all(terminal: Terminal, lines: list[ShellLine]) -> None:
    """Run lines in order; each succeeds and prints what the page prints below it."""
    for line in lines:
        finished = await terminal.paste(line)
        if finished is None:
            continue
        if '"updated_value":-4' in line.command:
            assert finished.exit_code != 0
            # buf does not decode the details of an error.
            assert find_grpcurl() is None or all(f"update.{name}" in finished.err for name in REFUSED_FIELDS)
            continue
        assert finished.exit_code == 0, (line.command, finished)
        if line.printed:
            expected = stable(line.printed, terminal.variables)
            assert expected == stable(finished.out.strip(), terminal.variables), line.command


def test_the_tour_has_five_calls_with_their_output() -> None:
    commands = "\n".join(line.command for line in TOUR)

    assert [name for name in TOUR_CALLS if name not in commands] == []
    assert f"CODE={SHOWN_CODE}" in commands
    assert len([line for line in TOUR if line.printed]) >= len(TOUR_CALLS)


async def test_every_line_works_as_printed_and_the_tour_at_a_second_start(tmp_path: Path) -> None:
    grpc_port, http_port = free_port(), free_port()
    settings = {
        "DATA_DIR": str(tmp_path / "data"),
        "GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
        "HTTP_ADDRESS": f"127.0.0.1:{http_port}",
    }
    skipped = 0
    for lines in (LINES, TOUR):
        async with running("dev", folder=tmp_path, settings=settings) as process:

            async def ready() -> bool:
                return await http_get(f"http://127.0.0.1:{http_port}/readyz") == 200

            await process.until(ready)
            await process.printed("Paste next")
            (database_url,) = re.findall(r"database +embedded, (\S+)", process.out)
            terminal = Terminal(process, grpc_port, http_port, database_url)
            await paste_all(terminal, lines)
            skipped += terminal.skipped
            assert (await process.stop(signal.SIGINT))[0] == 0
    if skipped:
        pytest.skip(f"grpcurl is not installed: {skipped} lines that buf cannot run were not run")
