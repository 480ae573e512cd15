"""The pre-commit hooks run what `make lint` runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_hooks_run_every_command_of_lint() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.findall(r"(?m)^lint: .*\n((?:\t.+\n)+)", makefile)[0]
    variables = {"BIN": ".venv/bin", "MAKE": "make", "RELEASED": "proto/released.binpb"}
    commands = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], line) for line in recipe.split("\n\t")]
    entries = re.findall(r"(?m)^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text())

    assert entries == [command.strip() for command in commands]
