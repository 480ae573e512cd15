"""What the system says that a process takes. Linux alone tells it."""

import os
from pathlib import Path

IS_TOLD = Path("/proc/self/status").exists()
MEGABYTE = 1_000_000
PARENT, FIRST_TIME = 1, 11
"""Places in /proc/PID/stat behind the name: the parent, and the first of four times.

Two are the process's own, in its program and in the kernel; the other two are those of its children that have ended.
"""


def resident_megabytes(pid: int) -> float:
    """Read how much memory a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(resident.split()[1]) * 1_024 / MEGABYTE


def parent_of(pid: int) -> int:
    """Read which process started a process."""
    return int(_stat(pid)[PARENT])


def cpu_seconds(pid: int) -> float:
    """Read how long a process and its children have computed, those that have ended included."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = _ticks(pid, times=4) + sum(_ticks(int(child), times=2) for child in children)
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int, *, times: int) -> int:
    """Add up the first of a process's times: none where it has ended meanwhile."""
    try:
        return sum(map(int, _stat(pid)[FIRST_TIME : FIRST_TIME + times]))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _stat(pid: int) -> list[str]:
    """Read what stands behind the process's name, which may have spaces of its own."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
