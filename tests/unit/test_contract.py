"""The API contract: changes that lint refuses, and the code generated from it."""

import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pointbook.v1 import points_pb2

ROOT = Path(__file__).parents[2]
BUF = str(Path(sys.executable).parent / "buf")
TEMPLATES = sorted(ROOT.glob("examples/*/buf.gen.yaml"))
STUB_PLUGIN = f"""#!{sys.executable}
import sys
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse

request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
for name in request.file_to_generate:
    response.file.add(name=name)
sys.stdout.buffer.write(response.SerializeToString())
"""
"""A plugin that writes an empty file for each proto, with its name."""


def breaking_changes(folder: Path) -> str:
    """Return the breaking changes of a copy of the protos."""
    command = (BUF, "breaking", str(folder / "proto"), "--against", str(folder / "proto/released.binpb"))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    """A copy of the protos and of buf's settings."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / ".venv/protos", tmp_path / ".venv/protos")
    return tmp_path


def test_a_removed_field_breaks_the_released_contract(contract: Path) -> None:
    access = contract / "proto/pointbook/v1/access.proto"
    access.write_text(access.read_text().replace("  repeated string scopes = 3;\n", ""))

    assert 'Previously present field "3" with name "scopes"' in breaking_changes(contract)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.parent.name)
def test_templates_of_examples_generate_the_whole_contract(template: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(STUB_PLUGIN)
    plugin.chmod(stat.S_IRWXU)
    settings = yaml.safe_load(template.read_text())
    outs = [f"plugin-{number}" for number in range(len(settings["plugins"]))]
    settings["plugins"] = [{"local": str(plugin), "out": out} for out in outs]
    command = (BUF, "generate", "--template", json.dumps(settings), "-o", str(tmp_path))

    subprocess.run(command, cwd=template.parent, check=True)

    contract = {path.name for path in (ROOT / "proto/pointbook/v1").glob("*.proto")}
    for out in outs:
        assert {path.name for path in (tmp_path / out / "pointbook/v1").glob("*.proto")} == contract


def test_the_reference_lists_every_scene() -> None:
    page = (ROOT / "docs/reference/shopline-webhooks.md").read_text()
    names = [
        name.removeprefix("POINTS_UPDATE_SCENE_") for name, number in points_pb2.PointsUpdateScene.items() if number
    ]

    assert re.findall(r"(?m)^\| `?([A-Z_]+)`? \| (?:increase|decrease) \|", page) == names
