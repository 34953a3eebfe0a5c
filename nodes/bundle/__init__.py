"""The thin Flower bundle, shipped as package data: `flwr run` takes this folder."""

from pathlib import Path

FOLDER = Path(__file__).parent
