"""Random and coverage-guided bytes for all that reads what strangers send, without any server."""

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import parser_targets
from support.parser_targets import SEEDS, TARGETS
from support.processes import clean_environment, finish

GUIDED_SECONDS = 90
CHANGES_MAX = 4
PIECES = (
    b"\x00",
    b"\xff",
    b'"',
    b"\\ud800",
    b"1e999",
    b"\xe2\x80\x8d",
    b"[",
    b"{",
    b"%00",
    b"+",
    b"@",
    b"9" * 30,
    b"-",
)


@pytest.mark.parametrize("inputs", [3_000, pytest.param(200_000, marks=pytest.mark.soak)])
def test_changed_inputs_break_no_parser(inputs: int) -> None:
    """What is valid, changed in a few places, is read or refused."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it where the test fails
    source = random.Random(seed)  # noqa: S311 - it is to be repeatable
    for _ in range(inputs):
        data = bytearray(source.choice(SEEDS))
        for _ in range(source.randint(1, CHANGES_MAX)):
            start = source.randrange(len(data) + 1)
            data[start : start + source.randrange(4)] = source.choice(PIECES)
        source.choice(TARGETS)(bytes(data))


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
async def test_guided_inputs_break_no_parser(tmp_path: Path, figure: Callable[[str, float | str, str], None]) -> None:
    """A fuzzer that sees which lines an input reaches finds no exception either."""
    environment = clean_environment({}) | {"PYTHONPATH": str(Path(parser_targets.__file__).parents[1])}
    command = (sys.executable, parser_targets.__file__, f"-max_total_time={GUIDED_SECONDS}", "-max_len=600", tmp_path)
    fuzzed = await finish(*command, environment=environment, cwd=tmp_path, seconds=3 * GUIDED_SECONDS)
    assert fuzzed.exit_code == 0, fuzzed.err[-4_000:]
    done = next((line for line in fuzzed.err.splitlines() if "DONE" in line), "")
    figure("coverage-guided fuzzing of what reads texts", done, "no exception")
