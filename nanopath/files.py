"""
Files that are complete or not there: written under a temporary name, then renamed. Hashes, JSON, free space.
"""
import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need_space(folder, size, what):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"the {what} needs about {size / 1e6:,.0f} MB, {folder} has {free / 1e6:,.0f} MB")


def read_json(path):
    """The JSON object of a file as a dictionary; ValueError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def write_json(path, value):
    """Write JSON under a temporary name, then move it into place: a reader never sees half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(path):
    """Hold an exclusive lock on the file `path` (made and removed here). BlockingIOError: another process holds it.

    The operating system releases the lock when the process ends, however it ends, so a lock never becomes stale."""
    while True:
        file = open(path, "ab")
        try:
            lock_handle(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass                                                   # its last owner removed it after we had opened it
        except OSError:
            file.close()
            raise
        file.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):                         # Windows cannot remove a file that is open elsewhere
            os.unlink(path)
        file.close()


def lock_handle(file):
    """Lock an open file or raise BlockingIOError; where the file system has no locks, say so and continue without."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError(errno.EAGAIN, "another process holds the lock", file.name) from None
        print(f"{file.name}: this file system has no locks ({error.strerror}); run this command only once at a time")
