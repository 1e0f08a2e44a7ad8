"""
Files that are complete or not there: written under a temporary name, then renamed. Hashes, JSON, free space.
"""
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


def replace_file(path, text):
    """Write under a temporary name, then move the file into place: a reader never sees half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def write_json(path, value):
    replace_file(path, json.dumps(value, indent=2) + "\n")
