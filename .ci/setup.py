"""Build .venv from requirements.lock, unless it is complete.

`make` runs this before every other target. An error is one line that names the cause and what to do. It runs on any
Python 3, so that it can refuse one that is too old.
"""
# ruff: noqa: INP001, UP032 - a script, and Pythons before 3.6 have no f-strings.

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

OLDEST = (3, 11)
NEWEST_KNOWN = (3, 14)
ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
LOG = ROOT / "build" / "setup.log"
DISTRIBUTIONS = (ROOT / "gen", ROOT / "service" / "pointbook_client", ROOT)
NAMES = ("pointbook-stubs", "pointbook-client", "pointbook")
PROTOS = VENV / "protos"
WHOLE = "import importlib.metadata as m, sys; [m.version(name) for name in sys.argv[1:]]; sys.exit(0)"
POLL_SECONDS = 0.2
LINE_SECONDS = 10.0
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
COMMON_PROTOS = (
    "api/annotations.proto",
    "api/http.proto",
    "rpc/code.proto",
    "rpc/error_details.proto",
    "rpc/status.proto",
)
"""What the contract and its errors need of googleapis-common-protos."""
CAUSES = (
    (r"No space left on device", "the disk is full: free at least 1 GB"),
    (
        r"DO NOT MATCH THE HASHES",
        "a package is not the one that requirements.lock names: check which index pip uses (`pip config list`)",
    ),
    (
        r"(Connection|NameResolution|Proxy|SSL)Error|Timeout|CERTIFICATE_VERIFY|Connection (refused|reset)|unreachable",
        "pip cannot reach its package index: check the network, the proxy (HTTPS_PROXY), and `pip config list`",
    ),
    (
        r"Could not find a version that satisfies the requirement (?P<package>[^\s(]+)",
        "pip's index has no {package} for Python {version} on {system}: use Python 3.11 to 3.14, or another index",
    ),
    (
        r"Unicode(En|De)codeError",
        "the locale has no letters for the path of this folder: set LC_ALL=C.UTF-8, or move it to a path of ASCII",
    ),
)
"""Patterns of pip's output with the line to print; the first match counts."""


class SetupError(Exception):
    """The environment cannot be built: one line that names the cause and what to do."""


def main() -> int:
    """Build or update the environment, and return the exit code."""
    # A shell starts its background jobs with SIGINT ignored, and make ends what it runs by SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        check_python()
        with Turn():
            make_whole()
    except SetupError as error:
        sys.stderr.write("setup: {}\n".format(error))
        return EXIT_REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("\nsetup: stopped; the next run starts over\n")
        return EXIT_INTERRUPTED
    return 0


def check_python() -> None:
    """Raise SetupError if this Python is too old or lacks a required module."""
    if sys.version_info[:2] < OLDEST:
        raise SetupError(
            "{} is Python {}, and Pointbook needs 3.11 or later: {}".format(
                sys.executable, platform.python_version(), newer_python()
            )
        )
    for module in ("venv", "ensurepip", "ssl", "sqlite3"):
        try:
            __import__(module)
        except ImportError:
            package = "python{}.{}-venv".format(*sys.version_info[:2])
            cure = "on Debian and Ubuntu `apt install {}`".format(package) if module in {"venv", "ensurepip"} else ""
            raise SetupError(
                "{} has no module {}: install it{}, or name another Python with PYTHON=/path/to/python3".format(
                    sys.executable, module, cure and " (" + cure + ")"
                )
            ) from None


def newer_python() -> str:
    """Return how to use a newer Python: one that is on the path, or one to install."""
    for minor in range(NEWEST_KNOWN[1], OLDEST[1] - 1, -1):
        if shutil.which("python3.{}".format(minor)):
            return "add PYTHON=python3.{} to the command".format(minor)
    return "install one, and add PYTHON=/path/to/python3 to the command if it is not `python3`"


class Turn:
    """A lock for one set-up at a time.

    `make run` and `make test` may be started together on a fresh clone.
    """

    def __enter__(self) -> None:
        """Wait until no other set-up of this folder runs."""
        import fcntl  # noqa: PLC0415 - not before it is known that this Python is one to use

        LOG.parent.mkdir(exist_ok=True)
        self._lock = (LOG.parent / "setup.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._lock.close()


def make_whole() -> None:
    """Update an environment with other packages, and rebuild an incomplete one."""
    usable = is_usable()
    if usable and read_stamp()["packages"] == stamp()["packages"]:
        return
    began = time.monotonic()
    if usable:
        STAMP.unlink()
    else:
        if VENV.is_symlink() or VENV.exists():
            say("rebuilding .venv: it is incomplete, or of another Python")
            remove()
        say("making .venv with Python {}; the packages take about a minute, once".format(platform.python_version()))
    try:
        if not usable:
            run("making the environment", base_python(), "-m", "venv", str(VENV))
        install()
    except BaseException as error:
        if usable and isinstance(error, SetupError):
            # Where pip fails, such as without a network, it leaves the packages as they were.
            write_stamp(dict(stamp(), packages=[]))
        else:
            remove()
        raise
    write_stamp(stamp())
    say("done in {:.0f} s".format(time.monotonic() - began))


def base_python() -> str:
    """Return the base Python of this one.

    This one may belong to the environment that is rebuilt.
    """
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return str(Path(sys.base_prefix) / "bin" / "python{}.{}".format(*sys.version_info[:2]))


def is_usable() -> bool:
    """Return whether the environment is complete, for this Python and folder.

    Its Python must also start.
    """
    finished = read_stamp()
    if finished["maker"] != stamp()["maker"] or not set(finished["contents"]) <= set(contents()):
        return False
    try:
        check = subprocess.run([str(PYTHON), "-I", "-c", WHOLE, *NAMES], check=False, stderr=subprocess.DEVNULL)  # noqa: S603 - our own command
    except OSError:
        return False
    return check.returncode == 0


def stamp() -> "dict[str, list[str]]":
    """Return what an environment depends on: Python, folder and packages."""
    maker = ["{}.{}".format(*sys.version_info[:2]), os.path.realpath(sys.base_prefix), str(VENV)]
    files = (LOCK, *(folder / "pyproject.toml" for folder in DISTRIBUTIONS))
    return {"maker": maker, "packages": [str(zlib.crc32(file.read_bytes())) for file in files]}


def contents() -> "list[str]":
    """Return the names of what is installed: packages, modules and their metadata."""
    return sorted(path.name for path in VENV.glob("lib/python*/site-packages/*") if path.name != "__pycache__")


def read_stamp() -> "dict[str, list[str]]":
    """Return what the last completed set-up wrote; empty lists without one."""
    names = ("maker", "packages", "contents")
    try:
        found = json.loads(STAMP.read_text())
        return {name: list(found.get(name, ())) for name in names}
    except (OSError, ValueError, TypeError, AttributeError):
        return {name: [] for name in names}


def write_stamp(made_of: "dict[str, list[str]]") -> None:
    """Write what the environment is made of, and what is installed in it."""
    STAMP.write_text(json.dumps(dict(made_of, contents=contents())))


def remove() -> None:
    """Remove the environment; of a link, the link alone."""
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    else:
        shutil.rmtree(str(VENV), ignore_errors=True)


def install() -> None:
    """Install the packages of the lock, and then this project's own."""
    pip = (str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--retries", "2")
    run("installing packages", *pip, "--require-hashes", "-r", str(LOCK))
    own = [argument for folder in DISTRIBUTIONS for argument in ("-e", str(folder))]
    run("installing Pointbook", *pip, "--no-deps", "--no-build-isolation", *own)
    copy_protos()


def copy_protos() -> None:
    """Copy the protos of Google's common types to where buf.yaml and protoc read them."""
    shutil.rmtree(str(PROTOS), ignore_errors=True)
    for package in VENV.glob("lib/python*/site-packages/google"):
        for name in COMMON_PROTOS:
            target = PROTOS / "google" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(package / name), str(target))


def run(what: str, *command: str) -> None:
    """Run a program with its output in the log, and show its progress.

    Raises SetupError if it fails.
    """
    with LOG.open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
        try:
            progress = Progress(what)
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                progress.show()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            progress.end()
    if process.returncode != 0:
        raise SetupError(cause_of(LOG.read_text(errors="replace"), what))


def cause_of(output: str, what: str) -> str:
    """Return the line that says why a program failed, by its output."""
    names = {"version": platform.python_version(), "system": platform.system()}
    for pattern, line in CAUSES:
        match = re.search(pattern, output)
        if match is not None:
            return line.format(**dict(names, **match.groupdict()))
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    return "{} failed: {} (all of it: {})".format(what, last.strip(), LOG.relative_to(ROOT))


class Progress:
    """Shows how many of the lock's packages are fetched and installed.

    In place on a terminal, in lines elsewhere.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._total = len(re.findall(r"^[\w.-]+==", LOCK.read_text(), re.MULTILINE))
        self._is_terminal = sys.stderr.isatty()
        self._said_at = time.monotonic()
        self._began = time.monotonic()

    def show(self) -> None:
        """Print the progress, on other outputs than a terminal every LINE_SECONDS."""
        if not self._is_terminal and time.monotonic() - self._said_at < LINE_SECONDS:
            return
        self._said_at = time.monotonic()
        fetched = LOG.read_text(errors="replace").count("Collecting ")
        installed = sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))
        counts = "{} of about {} fetched, {} installed".format(fetched, self._total, installed) if fetched else ""
        text = "{}, {:.0f} s{}".format(self._what, time.monotonic() - self._began, counts and ": " + counts)
        if self._is_terminal:
            sys.stderr.write("\r\033[Ksetup: {}".format(text))
            sys.stderr.flush()
        else:
            say(text)

    def end(self) -> None:
        """Clear the line of the terminal."""
        if self._is_terminal:
            sys.stderr.write("\r\033[K")


def say(text: str) -> None:
    """Print a line."""
    sys.stderr.write("setup: {}\n".format(text))
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
