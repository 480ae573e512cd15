"""Build the source distribution and the wheel of each distribution into a folder.

Usage: dist.py FOLDER. The same commit and tools give the same bytes: files have the time of the commit, or that of
SOURCE_DATE_EPOCH. Only what git tracks is built, so that no output of an earlier build gets in.
"""
# ruff: noqa: INP001 - a script

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("gen", "service/pointbook_client", ".")
UV = Path(sys.executable).parent / "uv"
# The setuptools of requirements.lock, without a network.
BUILD = (
    UV,
    "build",
    "--quiet",
    "--offline",
    "--no-build-isolation",
    "--no-create-gitignore",
    "--python",
    sys.executable,
)


def main() -> None:
    """Build into the folder of the command line."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - the script and its argument
        sys.exit(__doc__)
    out = Path(sys.argv[1]).resolve()
    built_at = os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct").strip()
    # Wheels have the permissions of the files.
    os.umask(0o022)
    with tempfile.TemporaryDirectory() as folder:
        copy_sources(Path(folder))
        for distribution in DISTRIBUTIONS:
            # The wheel is built from the source distribution, which is thereby known to be complete.
            subprocess.run(  # noqa: S603 - our own command
                (*BUILD, "--out-dir", out, Path(folder, distribution)),
                check=True,
                env={**os.environ, "SOURCE_DATE_EPOCH": built_at},
            )
    for path in sorted(out.glob("*.tar.gz")):
        path.write_bytes(with_times(path.read_bytes(), int(built_at)))


def git(*arguments: str) -> str:
    """Return the output of a git command in this repository."""
    return subprocess.run(("git", "-C", ROOT, *arguments), check=True, capture_output=True, text=True).stdout  # noqa: S603, S607 - our own command; git has no fixed place


def copy_sources(folder: Path) -> None:
    """Copy the files that git tracks, as they are now."""
    for name in git("ls-files", "-z").split("\0")[:-1]:
        source, target = ROOT / name, folder / name
        if source.exists():  # Else it was deleted, and that is not committed yet.
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def with_times(archive: bytes, seconds: int) -> bytes:
    """Return a .tar.gz with its files in order, with this time and without a user.

    setuptools sets the times of wheels alone.
    """
    rewritten = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        gzip.GzipFile("", "wb", fileobj=rewritten, mtime=seconds) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            mode = 0o755 if member.isdir() else 0o644
            changed = member.replace(mtime=seconds, mode=mode, uid=0, gid=0, uname="", gname="")
            changed.pax_headers = {}
            new.addfile(changed, old.extractfile(member) if member.isfile() else None)
    return rewritten.getvalue()


if __name__ == "__main__":
    main()
