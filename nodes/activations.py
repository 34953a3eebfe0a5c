"""The cache of hidden states between the two halves of training: in memory while it is small, in a file without a name beyond that.

The states are private data, as much as the records.  The file is readable by its owner alone and loses its name as soon as it is open: the
system frees it when the process ends, however it ends, and nobody can find it before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nodes.base_model import Activations, BaseModel, Embedding
from nodes.records import Record
from protocol.errors import UsageError

if TYPE_CHECKING:
    import torch

RECORDS_AT_ONCE = 64  # passed through the lower layers before their states are put away
MEMORY_BYTES = 256 << 20  # of states kept in memory; about 3 000 short records of the default model


def cached_pass(
    model: BaseModel,
    records: Sequence[Record],
    split: int,
    layer: int,
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 2,
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[Embedding, list[Activations]]:
    """Return what `BaseModel.prefix_pass` returns, the states beyond `memory_bytes` in a nameless file in `folder`.

    Raises UsageError, before the first pass, if the disk has no room for them.
    """
    encoded = [model.encode(record) for record in records]
    need = sum(len(one.tokens) for one in encoded) * model.width * model.dtype.itemsize
    store = None
    if need > memory_bytes:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(folder).free
        if need > free:
            raise UsageError(
                f"training: its states need {need / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free",
                hint="free some of the disk, or take fewer records (--limit)",
            )
        store = _nameless(folder, need)
    embeddings, activations, offset = [], [], 0
    for start in range(0, len(records), RECORDS_AT_ONCE):

        def report(done: int, of: int, start: int = start) -> None:
            if on_progress is not None:
                on_progress(start + done, len(records))

        embedding, part = model.prefix_pass(records[start : start + RECORDS_AT_ONCE], split, workers, report, layer=layer)
        embeddings.append(embedding)
        for one in part:
            if store is not None:
                size = one.hidden.numel() * one.hidden.element_size()
                place = store[offset : offset + size].view(one.hidden.dtype).view(one.hidden.shape)
                place.copy_(one.hidden)
                one, offset = replace(one, hidden=place), offset + size
            activations.append(one)
    return np.concatenate(embeddings), activations


def _nameless(folder: Path, size: int) -> torch.Tensor:
    """Return bytes that lie in a file which no folder lists."""
    import mmap

    import torch

    path = folder / f".states-{os.urandom(8).hex()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        path.unlink()
        os.truncate(descriptor, size)
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)
