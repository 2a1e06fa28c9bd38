"""Small files, whole or not there."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file such that a crash at any moment leaves the old or the new one, whole; what a full disk refuses leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of this process: a dying one may still be at work
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
