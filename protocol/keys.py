"""Signing keys in files that only their owner can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import FormatError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file so that after a crash either the old or the whole new content is there; the folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_secret(path: Path) -> bytes:
    """Return the bytes of a secret file; raise UsageError if its group or anyone else may read it."""
    mode = path.stat().st_mode
    if mode & 0o077:
        raise UsageError(f"{path}: expected permissions 0600, got {mode & 0o777:04o}", hint=f"chmod 600 {path}")
    return path.read_bytes()


def signing_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in a file of 32 bytes, made there on first use."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not path.exists():
        key = Ed25519PrivateKey.generate()
        write_durably(path, key.private_bytes_raw())
        return key
    seed = read_secret(path)
    if len(seed) != 32:
        raise FormatError(f"{path}: expected a key of 32 bytes, got {len(seed)}")
    return Ed25519PrivateKey.from_private_bytes(seed)
