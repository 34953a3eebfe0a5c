"""The home: the folder of everything that veilmart keeps on this machine (models, keys, ledger, receipts, copies)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

DEFAULT_MODEL = "smollm2-135m"  # as `veilmart model import` names it


def default_home() -> Path:
    """Return the home where nothing else names one: VEILMART_HOME, or the user's data folder."""
    import platformdirs

    named = os.environ.get("VEILMART_HOME")
    return Path(named) if named else platformdirs.user_data_path("veilmart")


def model_directory(home: Path, base: Path | None = None) -> Path:
    """Return the directory of a model: `base` itself, or a name that `model list` shows; by default the imported one."""
    directory = base or home / "models" / DEFAULT_MODEL
    if not directory.is_dir() and directory.name == str(directory) and (home / "models" / directory).is_dir():
        return home / "models" / directory
    return directory


def open_model(home: Path, base: Path | None = None, device: str = "cpu") -> BaseModel:
    """Return the model of `model_directory`; raise ModelError unless it is one."""
    from nodes.base_model import BaseModel

    return BaseModel.open(model_directory(home, base), device=device)
