"""Processors of processes, so that a load and its server do not compete."""

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from support.probes import children_of

CAN_PIN = hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()


def pin(pid: int, processors: Collection[int]) -> None:
    """Run all threads of a process and of its descendants on some processors.

    Threads and processes that these start later run there too.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), processors)
        for child in children_of(pid):
            pin(child, processors)


@contextlib.contextmanager
def pinned_apart(client_pid: int) -> Iterator[None]:
    """Run a client on the last processor and all else of the test on the first.

    Raises ValueError with one processor only.
    """
    processors = os.sched_getaffinity(0)
    first, *_, last = sorted(processors)
    pin(os.getpid(), {first})
    pin(client_pid, {last})
    try:
        yield
    finally:
        pin(os.getpid(), processors)
