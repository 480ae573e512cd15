"""The place of temporary databases."""

import shutil
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private folder in it.
_MEMORY_MIN_FREE_BYTES = 4 * 1024**3


def fastest_place() -> Path | None:
    """Return a folder in memory if enough is free, else None.

    A database on a disk is cloned or written up to ten times as slowly.
    """
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _MEMORY_MIN_FREE_BYTES:
        return _MEMORY
    return None
