"""Every line that the README shows with a prompt, run as printed but for the ports, and its printed answer."""

import json
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.processes import (
    ROOT,
    Finished,
    Running,
    find_grpcurl,
    finish,
    free_port,
    http_get,
    running,
    shell_environment,
)

README = (ROOT / "README.md").read_text()
ASSIGNMENT = re.compile(r"([A-Z]+)=(.*)")
VOLATILE = re.compile(r"(as_of|.*_time|settle_by|challenge_id|redemption_id|event_id|external_reference_number)")
"""Fields whose values are others in every run."""
SHOWN_CODE = "364862"
"""The code that the README shows, in place of which a reader types their own."""
REFUSED_FIELDS = ("event_id", "update_type", "updated_at", "store_id", "buyer_id", "updated_value")


@dataclass(frozen=True)
class Line:
    """A line to paste, and what the README prints below it; empty where it prints nothing."""

    command: str
    printed: str


def lines_of(text: str) -> list[Line]:
    """Return the lines that a text shows with a prompt, in their order."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for item in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = item.partition("\n")
            found.append(Line(command, printed.strip()))
    return found


TOUR = lines_of(README[README.index("## A tour") : README.index("## The API")])
LINES = lines_of(README)


@dataclass
class Terminal:
    """A shell in which a reader pastes line after line, beside a `pointbook dev`."""

    dev: Running
    grpc_port: int
    http_port: int
    variables: dict[str, str] = field(default_factory=dict)
    skipped: int = 0

    async def paste(self, line: Line) -> Finished | None:
        """Run a line; None where it only sets a variable, or where grpcurl is not installed."""
        assignment = ASSIGNMENT.fullmatch(line.command)
        if assignment is not None:
            name, value = assignment.groups()
            self.variables[name] = value.replace(SHOWN_CODE, self.code()) if SHOWN_CODE in value else await echo(value)
            return None
        if line.command.startswith("grpcurl") and find_grpcurl() is None:
            self.skipped += 1
            return None
        here = line.command.replace("127.0.0.1:50051", f"127.0.0.1:{self.grpc_port}")
        here = here.replace("127.0.0.1:8080", f"127.0.0.1:{self.http_port}")
        environment = shell_environment() | {
            "POINTBOOK_HTTP_ADDRESS": f"127.0.0.1:{self.http_port}",
            "POINTBOOK_GRPC_ADDRESS": f"127.0.0.1:{self.grpc_port}",
        }
        return await finish("bash", "-c", here, environment=environment | self.variables)

    def code(self) -> str:
        """Return the last one-time code that the console has shown; without grpcurl none was asked for."""
        codes: list[str] = re.findall(r"message \(challenge \S+\): .*?\b(\d{6})\b", self.dev.err)
        return codes[-1] if codes else SHOWN_CODE


async def echo(value: str) -> str:
    """Return what a shell makes of a value."""
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
    return {
        name: "…" if VOLATILE.fullmatch(name) or (name == "buyer_id" and str(value).isdigit()) else value
        for name, value in pairs
    }


async def paste_all(terminal: Terminal, lines: list[Line]) -> None:
    """Paste lines one after the other; each succeeds and answers what is printed below it."""
    for line in lines:
        finished = await terminal.paste(line)
        if finished is None:
            continue
        if '"updated_value":-4' in line.command:
            assert finished.exit_code != 0
            assert all(f"update.{name}" in finished.err for name in REFUSED_FIELDS)
            continue
        assert finished.exit_code == 0, (line.command, finished)
        if line.printed:
            expected = stable(line.printed, terminal.variables)
            assert expected == stable(finished.out.strip(), terminal.variables), line.command


def test_the_tour_has_lines() -> None:
    """The tour shows a webhook, an account, a question, a code, a redemption by it, and an error."""
    commands = "\n".join(line.command for line in TOUR)

    for name in ("webhook send", "GetPointsAccount", "ValidateRedemption", "IssueValidationCode", "RedeemPoints"):
        assert name in commands
    assert f"CODE={SHOWN_CODE}" in commands
    assert len([line for line in TOUR if line.printed]) >= 6


async def test_every_line_works_as_printed_and_the_tour_at_a_second_start(tmp_path: Path) -> None:
    """A newcomer who pastes what the README shows sees what it says, and on another day the tour says it again."""
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
            terminal = Terminal(process, grpc_port, http_port)
            await paste_all(terminal, lines)
            skipped += terminal.skipped
            assert (await process.stop(signal.SIGINT))[0] == 0
    if skipped:
        pytest.skip(f"grpcurl is not installed: {skipped} lines were not run; test_dev.py asks the same by buf curl")
