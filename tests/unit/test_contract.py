"""The API contract: changes that lint refuses, and clients of buf.gen.yaml."""

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pointbook.v1 import points_pb2

ROOT = Path(__file__).parents[2]
BUF = str(Path(sys.executable).parent / "buf")
REMOTE_PLUGIN = re.compile(r"remote: buf\.build/(\w+)/(\w+)")
STUB_PLUGIN = f"""#!{sys.executable}
import sys
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse

request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
protos = [proto for proto in request.proto_file if proto.package in ("google.api", "pointbook.v1")]
packages = {{(proto.package, proto.options.go_package, proto.options.java_package) for proto in protos}}
(folder,) = {{name.rpartition("/")[0] for name in request.file_to_generate}}
name = sys.argv[0].rpartition("/")[2]
response.file.add(name=f"{{folder}}/{{name}}.txt", content=str(sorted(packages)))
sys.stdout.buffer.write(response.SerializeToString())
"""
"""A plugin that writes the Go and Java packages into one file for each folder, named after itself."""


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


def test_buf_generates_code_in_four_languages(tmp_path: Path) -> None:
    template = (ROOT / "buf.gen.yaml").read_text()
    for owner, name in REMOTE_PLUGIN.findall(template):
        plugin = tmp_path / f"{owner}-{name}"
        plugin.write_text(STUB_PLUGIN)
        plugin.chmod(stat.S_IRWXU)
    local = tmp_path / "buf.gen.yaml"
    local.write_text(REMOTE_PLUGIN.sub(rf"local: {tmp_path}/\1-\2", template))

    subprocess.run((BUF, "generate", "--template", str(local), "-o", str(tmp_path)), cwd=ROOT, check=True)

    clients = tmp_path / "build/clients"
    written = {str(path.parent.relative_to(clients)): path.read_text() for path in clients.rglob("*.txt")}
    google = ("google.api", "google.golang.org/genproto/googleapis/api/annotations;annotations", "com.google.api")
    ours = ("pointbook.v1", "example.com/pointbook-client/pointbook/v1;pointbookv1", "com.pointbook.v1")
    assert written == {
        **{f"{language}/pointbook/v1": str([google, ours]) for language in ("go", "java", "python", "typescript")},
        "typescript/google/api": str([google]),
    }


def test_the_reference_lists_every_scene() -> None:
    page = (ROOT / "docs/reference/shopline-webhooks.md").read_text()
    names = [
        name.removeprefix("POINTS_UPDATE_SCENE_") for name, number in points_pb2.PointsUpdateScene.items() if number
    ]

    assert re.findall(r"(?m)^\| `?([A-Z_]+)`? \| (?:increase|decrease) \|", page) == names
