"""Feature maps: the public, frozen function from a record's embedding to a unit vector (docs/protocol.md 2).

A map is a value: a manifest of public statistics with one canonical byte form.  Its SHA-256 is the `map_id` in every message;
different ids are never compared.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.codec import decode, domain_tag, encode, format_decimal, parse_decimal, parse_hex, take
from protocol.errors import FormatError

MAGIC = domain_tag("map", 1)
CENTRE_SCALE = 1 << 20  # grid of the public task mean g: integers make the scalars of the catalogue exact
VIEWS = ("prompt", "response")


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Public statistics of one view: e -> unit(U^T(unit((e - mean)/scale) - centre))."""

    mean: NDArray[np.float32]  # (width,)
    scale: NDArray[np.float32]  # (width,), positive
    centre: NDArray[np.float32]  # (width,)
    axes: NDArray[np.float32]  # (width, coordinates), orthonormal columns

    def __call__(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return unit vectors (n, coordinates); a row that is not finite or has no direction gives zeros."""
        with np.errstate(invalid="ignore", over="ignore"):
            standardised = _unit((embeddings.astype(np.float64) - self.mean) / self.scale)
            directions = _unit((standardised - self.centre) @ self.axes.astype(np.float64))
        # A zero row (the view is absent) stands for "nothing known", never for the point -mean/scale.
        usable = np.isfinite(directions).all(axis=1) & (np.abs(embeddings).max(axis=1, initial=0) > 0)
        return np.where(usable[:, None], directions, 0.0)


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1.0)


@dataclass(frozen=True, slots=True)
class ScoringConstants:
    """Variances of task means and of records around them, a coordinate, on public tasks."""

    between: float  # tau^2
    within: float  # w^2
    threshold: float  # largest d2/sd0 of the best match; rejects 2 % of true public pairs


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A public, frozen map from embeddings to unit vectors, with the constants that scoring needs.

    Records have two views of `coordinates` each; a query of prompts alone is scored on the first view only.
    """

    name: str
    base_model: str  # identity of the base model, hexadecimal
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
        return int(self.views[0].axes.shape[1])

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
            "base_model": self.base_model,
            "dimension": self.dimension,
            "fitted_on": list(self.fitted_on),
            "layer": self.layer,
            "name": self.name,
            "scoring": {"full": _constants_to_text(self.full), "prompt_only": _constants_to_text(self.prompt_only)},
            "template": "smollm2-two-views/1",
            "token_limits": list(self.token_limits),
            "width": self.width,
        }
        arrays: Sequence[NDArray[Any]] = [a for v in self.views for a in (v.mean, v.scale, v.centre, v.axes)]
        payload = b"".join(np.ascontiguousarray(a, "<f4").tobytes() for a in arrays) + self.centre.astype("<i8").tobytes()
        return encode(MAGIC, metadata, payload)

    @cached_property
    def map_id(self) -> bytes:
        """SHA-256 of the manifest; maps are compared by this alone."""
        return hashlib.sha256(self.manifest).digest()


def _constants_to_text(constants: ScoringConstants) -> dict[str, str]:
    return {name: format_decimal(getattr(constants, name)) for name in ("between", "within", "threshold")}


def _constants_from_text(value: Any, what: str) -> ScoringConstants:
    names = ("between", "within", "threshold")
    numbers = [
        parse_decimal(text, f"{what}.{name}") for name, text in zip(names, take(value, dict.fromkeys(names, str), what), strict=True)
    ]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise FormatError(f"{what}: expected positive finite numbers")
    return ScoringConstants(*numbers)


def load_map(manifest: bytes) -> FeatureMap:
    """Return the feature map of a manifest; raise FormatError unless its bytes are canonical and its numbers usable."""
    metadata, payload = decode(MAGIC, manifest)
    fields = {
        "base_model": str, "dimension": int, "fitted_on": list, "layer": int, "name": str, "scoring": dict,
        "template": str, "token_limits": list, "width": int,
    }  # fmt: skip
    base_model, dimension, fitted_on, layer, name, scoring, template, limits, width = take(metadata, fields, "map")
    parse_hex(base_model, 32, "map.base_model")
    if template != "smollm2-two-views/1":
        raise FormatError("map.template: expected smollm2-two-views/1")
    if not (0 < width <= 1 << 16 and 0 < dimension <= 4096 and dimension % 2 == 0 and layer > 0):
        raise FormatError("map: width, dimension or layer out of range")
    if len(limits) != 2 or not all(isinstance(n, int) and 0 < n <= 4096 for n in limits):
        raise FormatError("map.token_limits: expected two positive integers")
    if not all(isinstance(task, str) for task in fitted_on):
        raise FormatError("map.fitted_on: expected names of tasks")
    coordinates = dimension // 2
    shapes = [(width,), (width,), (width,), (width, coordinates)] * 2
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
    views = (View(*arrays[:4]), View(*arrays[4:]))
    if min(float(view.scale.min()) for view in views) <= 0:
        raise FormatError("map: expected positive scales")
    centre = np.frombuffer(payload[expected - 8 * dimension :], "<i8")
    full, prompt_only = take(scoring, {"full": dict, "prompt_only": dict}, "map.scoring")
    return FeatureMap(
        name, base_model, layer, (limits[0], limits[1]), views, centre,
        _constants_from_text(full, "map.scoring.full"), _constants_from_text(prompt_only, "map.scoring.prompt_only"), tuple(fitted_on),
    )  # fmt: skip


def default_map() -> FeatureMap:
    """Return the map that ships with the protocol."""
    from importlib.resources import files

    return load_map((files("protocol") / "maps" / "kme-lin-64.map").read_bytes())
