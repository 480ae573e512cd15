"""Memory and CPU time of processes, on Linux."""

import os
from pathlib import Path

IS_AVAILABLE = Path("/proc/self/status").exists()
MEGABYTE = 1_000_000
PARENT, FIRST_TIME = 1, 11
"""Fields of /proc/PID/stat after the name: the parent, and the first of four CPU times.

Two are the process's own, in user and kernel mode; the other two are those of its children that have ended.
"""


def resident_megabytes(pid: int) -> float:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(resident.split()[1]) * 1_024 / MEGABYTE


def parent_pid(pid: int) -> int:
    """Return the parent's pid of a process."""
    return int(_stat(pid)[PARENT])


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children.

    It includes children that have ended.
    """
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = _ticks(pid, times=4) + sum(_ticks(int(child), times=2) for child in children)
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int, *, times: int) -> int:
    """Return the sum of the first CPU times of a process; 0 if it has ended."""
    try:
        return sum(map(int, _stat(pid)[FIRST_TIME : FIRST_TIME + times]))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _stat(pid: int) -> list[str]:
    """Return the fields after the process's name, which may contain spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
