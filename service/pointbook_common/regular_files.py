"""Reading the small files that settings name: certificates, keys and secrets."""

import errno
import os
import stat
from pathlib import Path


def read_regular_file(path: Path, bytes_max: int) -> bytes:
    """Return a file's content. Raises OSError, also where the file is too large or no regular one.

    A pipe could be read only once, and a process reads its files again and again; one that nobody writes to would be
    waited for without end.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(errno.EFBIG, f"Larger than {bytes_max} bytes")
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
