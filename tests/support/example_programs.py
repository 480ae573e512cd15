"""The programs of examples/: how they are built, and dialogues with them."""

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.processes import ROOT, Finished, clean_environment, finish

BUILD_SECONDS_MAX = 300.0
DIALOGUE_SECONDS_MAX = 60.0
OUT = ROOT / "build" / "examples"
QUICK_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""Options of Java for short runs: they end before optimized code pays off."""
_UNREACHABLE = re.compile(
    r"dial tcp|no such host|connection refused|i/o timeout|TLS handshake timeout|network is unreachable|"
    r"ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|ENETUNREACH|ERR_SOCKET_TIMEOUT|network timeout|"
    r"Could not transfer|failed to transfer|Unknown host"
)
"""What `go`, `npm` and `mvn` print if they cannot reach a registry."""


@dataclass(frozen=True)
class BuildStep:
    """A command of a build; one that downloads may lack the network."""

    command: tuple[str, ...]
    downloads: bool = False


@dataclass(frozen=True)
class Example:
    """The programs of one language."""

    name: str
    tools: tuple[str, ...]
    steps: tuple[BuildStep, ...]
    checkout: tuple[str, ...]
    timeout: tuple[str, ...]
    """The option for the deadline of each call, with its seconds as {}."""

    @property
    def folder(self) -> Path:
        """The folder of its sources."""
        return ROOT / "examples" / self.name


GO = Example(
    name="go",
    tools=("go",),
    steps=(
        BuildStep(("go", "mod", "download"), downloads=True),
        BuildStep(("go", "generate")),
        BuildStep(("go", "build", "-o", f"{OUT}/go/", "./...")),
        BuildStep(("go", "vet", "./...")),
    ),
    checkout=(f"{OUT}/go/checkout",),
    timeout=("--timeout={}s",),
)
TYPESCRIPT = Example(
    name="typescript",
    tools=("node", "npm"),
    steps=(
        BuildStep(("npm", "ci", "--no-audit", "--prefer-offline"), downloads=True),
        BuildStep(("npm", "run", "build")),
    ),
    checkout=("node", f"{ROOT}/examples/typescript/dist/src/checkout.js"),
    timeout=("--timeout-ms={}000",),
)
JAVA = Example(
    name="java",
    tools=("mvn", "java"),
    # Maven fetches what each of its steps needs.
    steps=(BuildStep(("mvn", "--quiet", "--batch-mode", "package"), downloads=True),),
    checkout=("java", *QUICK_JVM, "-jar", f"{ROOT}/examples/java/target/checkout.jar"),
    timeout=("--timeout", "{}"),
)


async def build_example(example: Example) -> None:
    """Build the programs of a language, once for all processes of a test run.

    Skips the test if a tool or the network is missing.
    """
    missing = [tool for tool in example.tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} of the example in {example.name} not installed")
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    stamp = OUT / f"{example.name}.run"
    with _lock(example.name):
        if stamp.is_file() and stamp.read_text() == run:
            return
        for step in example.steps:
            await _run(example, step)
        stamp.write_text(run)


async def _run(example: Example, step: BuildStep) -> None:
    environment = dict(os.environ)  # Settings of registries and proxies.
    environment["MAVEN_OPTS"] = " ".join((environment.get("MAVEN_OPTS", ""), *QUICK_JVM)).strip()
    try:
        finished = await finish(*step.command, environment=environment, cwd=example.folder, seconds=BUILD_SECONDS_MAX)
    except TimeoutError:
        if step.downloads:
            pytest.skip(f"{' '.join(step.command)} did not finish within {BUILD_SECONDS_MAX} s")
        raise
    if finished.exit_code != 0 and step.downloads and (cause := _UNREACHABLE.search(finished.out + finished.err)):
        pytest.skip(f"{' '.join(step.command)} needs the network: {cause.group()}")
    assert finished.exit_code == 0, finished


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Wait until no other process of the test run builds the same example."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class Dialogue:
    """A running program that reads from its terminal."""

    process: Process
    out: str = ""
    errors: asyncio.Task[bytes] = field(init=False)

    def __post_init__(self) -> None:
        """Read the errors, so that the program never waits for a reader."""
        assert self.process.stderr is not None
        self.errors = asyncio.create_task(self.process.stderr.read())

    async def printed(self, pattern: str) -> str:
        """Wait until the output matches a pattern, and return its group."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DIALOGUE_SECONDS_MAX):
            while (match := re.search(pattern, self.out)) is None:
                chunk = await self.process.stdout.read(4096)
                assert chunk, f"no {pattern} in {self.out}: {await self.errors!r}"
                self.out += chunk.decode()
        return match.group(1)

    async def type(self, line: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        await self.process.stdin.drain()

    async def end(self) -> Finished:
        """Wait for the end, and return the exit code and the whole output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DIALOGUE_SECONDS_MAX):
            self.out += (await self.process.stdout.read()).decode()
            exit_code = await self.process.wait()
            return Finished(exit_code, self.out, (await self.errors).decode())


@contextlib.asynccontextmanager
async def dialogue(*command: str, **settings: str) -> AsyncIterator[Dialogue]:
    """Run a program during the block, with settings as for `pointbook`, then kill it."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=clean_environment(settings)
    )
    running = Dialogue(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await running.errors
