"""Mutated and coverage-guided inputs for the parsers of untrusted input."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import parser_targets
from support.parser_targets import CORPUS, TARGETS
from support.processes import clean_environment, finish
from support.randomness import printed_random

GUIDED_SECONDS = 90
MUTATIONS_MAX = 4
FRAGMENTS = (
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
def test_mutated_inputs_break_no_parser(inputs: int) -> None:
    generator = printed_random()
    for _ in range(inputs):
        data = bytearray(generator.choice(CORPUS))
        for _ in range(generator.randint(1, MUTATIONS_MAX)):
            start = generator.randrange(len(data) + 1)
            data[start : start + generator.randrange(4)] = generator.choice(FRAGMENTS)
        generator.choice(TARGETS)(bytes(data))


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
async def test_coverage_guided_inputs_break_no_parser(
    tmp_path: Path, figure: Callable[[str, float | str, str], None]
) -> None:
    environment = clean_environment({}) | {"PYTHONPATH": str(Path(parser_targets.__file__).parents[1])}
    command = (sys.executable, parser_targets.__file__, f"-max_total_time={GUIDED_SECONDS}", "-max_len=600", tmp_path)
    fuzzed = await finish(*command, environment=environment, cwd=tmp_path, seconds=3 * GUIDED_SECONDS)
    assert fuzzed.exit_code == 0, fuzzed.err[-4_000:]
    done = next((line for line in fuzzed.err.splitlines() if "DONE" in line), "")
    figure("coverage-guided fuzzing of the parsers", done, "no exception")
