"""Reading the small files that settings name: certificates, keys and secrets."""

import errno
import os
import stat
from pathlib import Path


def read_regular_file(path: Path, bytes_max: int) -> bytes:
    """Return a file's content.

    Raises OSError, also if the file is too large or not a regular file. Pipes are refused because they can be read only
    once, and block without a writer.
    """
    with open(path, "rb", opener=_open_without_blocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(errno.EFBIG, f"Larger than {bytes_max} bytes")
    return content


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
