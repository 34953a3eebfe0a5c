"""Feature maps: the public, frozen function from a record's embedding to a unit vector (docs/protocol.md 2).

A map is a value: a manifest of public statistics with one canonical byte form.  Its SHA-256 is the `map_id` in every message;
different ids are never compared.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.codec import decode, domain_tag, encode, format_decimal, parse_decimal, parse_hex, take
from protocol.errors import FormatError, UsageError

MAGIC = domain_tag("map", 2)
CENTRE_SCALE = 1 << 20  # grid of the public task mean g: integers make the scalars of the catalogue exact
VIEWS = ("prompt", "response")
TEMPLATE = "smollm2-two-views/1"
MAX_WIDTH, MAX_DIMENSION = 1 << 16, 4096
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # it is printed: no control characters
SANE = 1e6  # no variance, norm or threshold of unit vectors comes near it


class EmbeddingKind(StrEnum):
    """What a record's two vectors are made of (docs/protocol.md 2.3)."""

    HIDDEN_STATES = "hidden-states"  # means of the states after a layer, over the tokens of each view
    LORA_GRADIENTS = "lora-gradients"  # gradients of each view's loss with respect to a layer's LoRA factor B at its start


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Public statistics of one view.

    Linear: e -> unit(U^T(unit((e - mean)/scale) - centre)).  With frequencies W, the characteristic variant: y = U^T(...) as before
    but not normalised, then unit((cos Wy, sin Wy) - waves).
    """

    mean: NDArray[np.float32]  # (width,)
    scale: NDArray[np.float32]  # (width,), positive
    centre: NDArray[np.float32]  # (width,)
    axes: NDArray[np.float32]  # (width, a), orthonormal columns
    frequencies: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # (a, f); f = 0 for linear
    waves: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # (2f,), public mean of (cos, sin)

    @property
    def coordinates(self) -> int:
        """Length of the view's feature vector."""
        return 2 * int(self.frequencies.shape[1]) or int(self.axes.shape[1])

    def __call__(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return unit vectors (n, coordinates); a row that is not finite or has no direction gives zeros."""
        with np.errstate(invalid="ignore", over="ignore"):
            projected = self.project(embeddings)
            directions = _unit(waves_of(projected, self.frequencies) - self.waves if self.frequencies.size else projected)
        # A zero row (the view is absent) stands for "nothing known", never for the point -mean/scale.
        usable = np.isfinite(directions).all(axis=1) & (np.abs(embeddings).max(axis=1, initial=0) > 0)
        return np.where(usable[:, None], directions, 0.0)

    def project(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return U^T(unit((e - mean)/scale) - centre): (n, width) to (n, a)."""
        standardised = embeddings.astype(np.float64)
        standardised -= self.mean
        standardised /= self.scale
        standardised = _unit(standardised)
        standardised -= self.centre
        projected: NDArray[np.float64] = standardised @ self.axes.astype(np.float64)
        return projected


def waves_of(projected: NDArray[np.float64], frequencies: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the random Fourier features (cos Wy, sin Wy) of norm 1: (n, a) to (n, 2f).  Source: Rahimi and Recht 2007."""
    phases = projected @ frequencies.astype(np.float64)
    waves: NDArray[np.float64] = np.concatenate([np.cos(phases), np.sin(phases)], axis=1) / math.sqrt(frequencies.shape[1])
    return waves


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
    return x / np.where(norm > 0, norm, 1.0)


@dataclass(frozen=True, slots=True)
class ScoringConstants:
    """What public tasks say about task means and the records around them (docs/protocol.md 5)."""

    between: float  # tau^2: variance of task means, a coordinate
    within: float  # w^2: variance of records around their task mean, a coordinate
    norm: float  # mean of ||mu||^2 over tasks
    norm_std: float  # its spread, mixtures of tasks included
    drift: float  # how far owner's and user's texts of one task lie apart, as a share of the within-task variance
    related: float  # two tasks nearer than this share of 2 D tau^2 are siblings: no two of the public tasks are
    threshold: float  # largest d2/sd0 of the best match; rejects 2 % of true public pairs

    def __post_init__(self) -> None:
        numbers = [getattr(self, one.name) for one in fields(self)]
        if not all(1 / SANE**2 < number < SANE for number in numbers):  # so written, NaN is refused as well
            raise FormatError("scoring constants: expected positive finite numbers of a size that unit vectors can have")


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A public, frozen map from embeddings to unit vectors, with the constants that scoring needs.

    Records have two views of equally many coordinates; a query of prompts alone is scored on the first view only.
    """

    name: str
    base_model: str  # identity of the base model, hexadecimal
    embedding: EmbeddingKind
    layer: int
    token_limits: tuple[int, int]  # prompt, response
    views: tuple[View, View]
    centre: NDArray[np.int64]  # (D,), public task mean g in units of 1/CENTRE_SCALE
    full: ScoringConstants
    prompt_only: ScoringConstants
    fitted_on: tuple[str, ...]  # names of the public tasks; never used to score the map

    @property
    def view_dimension(self) -> int:
        """Coordinates of one view."""
        return self.views[0].coordinates

    @property
    def dimension(self) -> int:
        """Number of coordinates D of a feature vector."""
        return len(self.views) * self.view_dimension

    @property
    def width(self) -> int:
        """Length of an embedding's view."""
        return len(self.views[0].mean)

    @property
    def task_mean(self) -> NDArray[np.float64]:
        """The public task mean g, (D,)."""
        return self.centre / CENTRE_SCALE

    def __call__(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the features z(x): embeddings (n, 2, width) to (n, D), each row of norm at most 1."""
        if embeddings.ndim != 3 or embeddings.shape[1:] != (len(self.views), self.width):
            raise FormatError(f"embeddings: expected shape (n, {len(self.views)}, {self.width}), got {embeddings.shape}")
        return np.concatenate([view(embeddings[:, k]) for k, view in enumerate(self.views)], axis=1) / math.sqrt(len(self.views))

    @cached_property
    def manifest(self) -> bytes:
        """The canonical bytes of the map."""
        metadata: dict[str, Any] = {
            "axes": self.views[0].axes.shape[1],
            "base_model": self.base_model,
            "embedding": self.embedding.value,
            "fitted_on": list(self.fitted_on),
            "frequencies": self.views[0].frequencies.shape[1],
            "layer": self.layer,
            "name": self.name,
            "scoring": {"full": _constants_to_text(self.full), "prompt_only": _constants_to_text(self.prompt_only)},
            "template": TEMPLATE,
            "token_limits": list(self.token_limits),
            "width": self.width,
        }
        arrays = [array for view in self.views for array in _arrays_of(view)]
        payload = b"".join(np.ascontiguousarray(a, "<f4").tobytes() for a in arrays) + self.centre.astype("<i8").tobytes()
        return encode(MAGIC, metadata, payload)

    @cached_property
    def map_id(self) -> bytes:
        """SHA-256 of the manifest; maps are compared by this alone."""
        return hashlib.sha256(self.manifest).digest()


def _arrays_of(view: View) -> tuple[NDArray[np.float32], ...]:
    return view.mean, view.scale, view.centre, view.axes, view.frequencies, view.waves


def _constants_to_text(constants: ScoringConstants) -> dict[str, str]:
    return {one.name: format_decimal(getattr(constants, one.name)) for one in fields(constants)}


def _constants_from_text(value: Any, what: str) -> ScoringConstants:
    names = [one.name for one in fields(ScoringConstants)]
    texts = take(value, dict.fromkeys(names, str), what)
    return ScoringConstants(*(parse_decimal(text, f"{what}.{name}") for name, text in zip(names, texts, strict=True)))


def load_map(manifest: bytes) -> FeatureMap:
    """Return the feature map of a manifest; raise FormatError unless its bytes are canonical and its numbers usable."""
    metadata, payload = decode(MAGIC, manifest)
    expected_fields = {
        "axes": int, "base_model": str, "embedding": str, "fitted_on": list, "frequencies": int, "layer": int, "name": str,
        "scoring": dict, "template": str, "token_limits": list, "width": int,
    }  # fmt: skip
    axes, base_model, embedding, fitted_on, frequencies, layer, name, scoring, template, limits, width = take(
        metadata, expected_fields, "map"
    )
    parse_hex(base_model, 32, "map.base_model")
    if template != TEMPLATE:
        raise FormatError(f"map.template: expected {TEMPLATE}")
    if embedding not in set(EmbeddingKind):
        raise FormatError(f"map.embedding: expected one of {', '.join(EmbeddingKind)}")
    if not (0 < width <= MAX_WIDTH and 0 < axes <= width and frequencies >= 0 and layer > 0):
        raise FormatError("map: width, axes, frequencies or layer out of range")
    coordinates = 2 * frequencies or axes
    dimension = len(VIEWS) * coordinates
    if dimension > MAX_DIMENSION:
        raise FormatError(f"map: expected at most {MAX_DIMENSION} coordinates, got {dimension}")
    if len(limits) != len(VIEWS) or not all(isinstance(n, int) and 0 < n <= 4096 for n in limits):
        raise FormatError("map.token_limits: expected two positive integers")
    if not NAME.fullmatch(name) or not all(isinstance(task, str) and NAME.fullmatch(task) for task in fitted_on):
        raise FormatError("map: expected names of letters, digits, '.', '_' and '-'")
    # A linear map has no frequencies at all, so that it has one form only.
    waves = [(axes, frequencies), (2 * frequencies,)] if frequencies else [(0, 0), (0,)]
    shapes: list[tuple[int, ...]] = [(width,), (width,), (width,), (width, axes), *waves] * len(VIEWS)
    expected = 4 * sum(math.prod(shape) for shape in shapes) + 8 * dimension
    if len(payload) != expected:
        raise FormatError(f"map: expected {expected} bytes of statistics, got {len(payload)}")
    floats = np.frombuffer(payload[: expected - 8 * dimension], "<f4")
    if not np.isfinite(floats).all():
        raise FormatError("map: expected finite statistics")
    arrays, start = [], 0
    for shape in shapes:
        arrays.append(floats[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)
    views = (View(*arrays[:6]), View(*arrays[6:]))
    if min(float(view.scale.min()) for view in views) <= 0:
        raise FormatError("map: expected positive scales")
    centre = np.frombuffer(payload[expected - 8 * dimension :], "<i8")
    if (centre > CENTRE_SCALE).any() or (centre < -CENTRE_SCALE).any():
        raise FormatError("map.centre: expected a mean of unit vectors")
    full, prompt_only = take(scoring, {"full": dict, "prompt_only": dict}, "map.scoring")
    return FeatureMap(
        name, base_model, EmbeddingKind(embedding), layer, (limits[0], limits[1]), views, centre,
        _constants_from_text(full, "map.scoring.full"), _constants_from_text(prompt_only, "map.scoring.prompt_only"), tuple(fitted_on),
    )  # fmt: skip


DEFAULT_MAP = "kme-lin-96"


def shipped_maps() -> tuple[str, ...]:
    """Return the names of the maps that ship with the protocol, the default first."""
    from importlib.resources import files

    names = sorted(file.name.removesuffix(".map") for file in (files("protocol") / "maps").iterdir() if file.name.endswith(".map"))
    return DEFAULT_MAP, *(name for name in names if name != DEFAULT_MAP)


def shipped_map(name: str) -> FeatureMap:
    """Return a map that ships with the protocol; raise UsageError for a name that is none of `shipped_maps()`."""
    from importlib.resources import files

    if name not in shipped_maps():
        raise UsageError(f"map: expected one of {', '.join(shipped_maps())}, got another name")
    return load_map((files("protocol") / "maps" / f"{name}.map").read_bytes())


def open_map(which: str) -> FeatureMap:
    """Return the map in a file, or the shipped one of that name; raise UsageError if it is neither."""
    if which in shipped_maps():
        return shipped_map(which)
    try:
        return load_map(Path(which).read_bytes())
    except OSError as error:
        raise UsageError(f"{which}: expected a map's file or one of {', '.join(shipped_maps())}: {error.strerror}") from None


def default_map() -> FeatureMap:
    """Return the default map."""
    return shipped_map(DEFAULT_MAP)
