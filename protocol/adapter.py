"""Adapters: LoRA weights as a value, with one strict byte form (docs/protocol.md 4).

The bytes are a safetensors file that any reader of that format opens, but only the canonical one: our own manifest, names sorted,
no gaps.  A stranger's adapter_config.json or pickle is never read; what an adapter needs beyond its tensors is in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from protocol.claims import MAX_ADAPTER_BYTES
from protocol.errors import InvalidAdapter
from protocol.privacy import GUARANTEE_TEXT

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "veilmart-adapter/1"
MAX_BYTES, MAX_HEADER_BYTES = MAX_ADAPTER_BYTES, 1_000_000
MAX_RANK, MAX_ALPHA, MAX_LAYERS, MAX_WIDTH = 64, 1024, 512, 1 << 16
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the linear modules of a decoder's layers are, and which widths are one and the same in every layer."""

    layers: str  # path of the list of layers in the causal language model
    modules: tuple[str, ...]  # in one layer, sorted
    same_width: tuple[tuple[tuple[str, str], ...], ...]  # groups of (module, "A" = what comes in or "B" = what goes out)
    transposed: bool = False  # whether the weights lie as (in, out), as in GPT-2

    def tensor_name(self, layer: int, module: str, side: str) -> str:
        """Return the name of one tensor, side "A" or "B"; layer counts from 0 in the full model, whatever part was trained."""
        return f"base_model.model.{self.layers}.{layer}.{module}.lora_{side}.weight"


# Llama, Mistral, Qwen: one layout.
LLAMA = Layout(
    "model.layers",
    (
        "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    ),
    (
        (
            ("self_attn.q_proj", "A"), ("self_attn.k_proj", "A"), ("self_attn.v_proj", "A"), ("self_attn.o_proj", "B"),
            ("mlp.gate_proj", "A"), ("mlp.up_proj", "A"), ("mlp.down_proj", "B"),
        ),
        (("mlp.gate_proj", "B"), ("mlp.up_proj", "B"), ("mlp.down_proj", "A")),
        (("self_attn.q_proj", "B"), ("self_attn.o_proj", "A")),
        (("self_attn.k_proj", "B"), ("self_attn.v_proj", "B")),
    ),
)  # fmt: skip
GPT2 = Layout(
    "transformer.h",
    ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    (
        (("attn.c_attn", "A"), ("attn.c_proj", "A"), ("attn.c_proj", "B"), ("mlp.c_fc", "A"), ("mlp.c_proj", "B")),
        (("attn.c_attn", "B"),),
        (("mlp.c_fc", "B"), ("mlp.c_proj", "A")),
    ),
    transposed=True,
)
LAYOUTS = (LLAMA, GPT2)


@dataclass(frozen=True, slots=True)
class Frame:
    """How many layers a base model has, and its widths: one for each group of its layout's `same_width`."""

    layout: Layout
    layers: int
    widths: tuple[int, ...]


# Base models that everybody knows by their identity: what is made for one of them has to fit it.  Any other is known to who loads it.
FRAMES = {"2f93fd546ad8ae36a87e7c1ccbde1b277aa021f57926a6f611a1aff4ae0b1bde": Frame(LLAMA, 30, (576, 1536, 576, 192))}  # SmolLM2-135M
MODULES, tensor_name = LLAMA.modules, LLAMA.tensor_name  # of the default base model


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA weights for consecutive layers of a base model; valid from birth, else InvalidAdapter.

    tensors: `Layout.tensor_name` to float32 or float16, lora_A (rank, in) and lora_B (out, rank), for every linear module of
    every layer from first_layer to last_layer inclusive, counted from 0 in the full model.  Names tell the layout.
    """

    tensors: Mapping[str, NDArray[Any]]
    base_model: str  # identity of the base model, hexadecimal
    rank: int
    alpha: int  # the update is alpha / rank * B A
    first_layer: int
    last_layer: int
    guarantee: str = "none"  # of the training, as people read it; what counts is the one in the signed release

    def __post_init__(self) -> None:
        _check_manifest(self)
        layout = self.layout
        names = {
            (layer, module, side): layout.tensor_name(layer, module, side)
            for layer in range(self.first_layer, self.last_layer + 1)
            for module in layout.modules
            for side in "AB"
        }
        if set(self.tensors) != set(names.values()):
            odd = len(set(self.tensors) ^ set(names.values()))
            raise InvalidAdapter(f"adapter: expected {len(names)} tensors for layers {self.first_layer} to {self.last_layer}, {odd} differ")
        frozen = {}
        for name in sorted(self.tensors):
            array = np.array(self.tensors[name], order="C")
            if array.dtype not in DTYPES.values():
                raise InvalidAdapter(f"adapter, {name}: expected float32 or float16, got {array.dtype}")
            if not np.isfinite(array).all():
                raise InvalidAdapter(f"adapter, {name}: expected finite weights")
            array.setflags(write=False)
            frozen[name] = array
        object.__setattr__(self, "tensors", MappingProxyType(frozen))
        for layer, module, side in names:
            self._check_shape(layer, module, side)
        if (frame := FRAMES.get(self.base_model)) is not None:
            self._check_frame(frame)

    @property
    def layout(self) -> Layout:
        """The layout that the tensors' names are of; that of Llama if they are of none."""
        return next((layout for layout in LAYOUTS if any(f".{layout.layers}." in name for name in self.tensors)), LLAMA)

    def _check_shape(self, layer: int, module: str, side: str) -> None:
        layout = self.layout
        name = layout.tensor_name(layer, module, side)
        shape = self.tensors[name].shape
        group = next(group for group in layout.same_width if (module, side) in group)
        twin = self.tensors[layout.tensor_name(self.first_layer, *group[0])].shape
        width = (twin[1] if group[0][1] == "A" else twin[0]) if len(twin) == 2 else 0
        expected = (self.rank, width) if side == "A" else (width, self.rank)
        if shape != expected or not 0 < width <= MAX_WIDTH:
            raise InvalidAdapter(f"adapter, {name}: expected shape {expected}, got {shape}")

    def _check_frame(self, frame: Frame) -> None:
        layout = self.layout
        firsts = [group[0] for group in layout.same_width]
        shapes = [self.tensors[layout.tensor_name(self.first_layer, *first)].shape for first in firsts]
        widths = tuple(shape[1] if side == "A" else shape[0] for (_, side), shape in zip(firsts, shapes, strict=True))
        if (layout, widths) != (frame.layout, frame.widths) or self.last_layer >= frame.layers:
            raise InvalidAdapter(
                f"adapter: expected layers below {frame.layers} of widths {frame.widths}, which its base model has, "
                f"got up to {self.last_layer} of {widths}"
            )

    def to_bytes(self) -> bytes:
        """Return the canonical safetensors bytes; equal adapters give equal bytes."""
        header: dict[str, Any] = {
            "__metadata__": {
                "alpha": str(self.alpha),
                "base_model": self.base_model,
                "first_layer": str(self.first_layer),
                "format": FORMAT,
                "guarantee": self.guarantee,
                "last_layer": str(self.last_layer),
                "rank": str(self.rank),
            }
        }
        spelling = {dtype: name for name, dtype in DTYPES.items()}
        chunks, offset = [], 0
        for name, array in self.tensors.items():
            chunk = array.tobytes()
            header[name] = {"data_offsets": [offset, offset + len(chunk)], "dtype": spelling[array.dtype], "shape": list(array.shape)}
            chunks.append(chunk)
            offset += len(chunk)
        text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
        text += b" " * (-len(text) % 8)  # the format wants tensors aligned
        return b"".join([len(text).to_bytes(8, "little"), text, *chunks])

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(array.nbytes for array in self.tensors.values())

    @classmethod
    def from_bytes(cls, data: bytes, *, base_model: str | None) -> Adapter:
        """Return the adapter of canonical bytes made for `base_model`, None for any; raise InvalidAdapter for anything else."""
        if len(data) > MAX_BYTES:
            raise InvalidAdapter(f"adapter: expected at most {MAX_BYTES} bytes, got {len(data)}")
        header, payload = _split_header(data)
        manifest = _take_manifest(header.pop("__metadata__", None))
        if base_model is not None and manifest["base_model"] != base_model:
            raise InvalidAdapter(f"adapter: expected one for base model {base_model[:16]}, got one for another")
        tensors, end = {}, 0
        for name, entry in header.items():
            tensors[name], stop = _tensor(entry, payload, end)
            end = stop
        if end != len(payload):
            raise InvalidAdapter(f"adapter: expected {end} bytes of weights, got {len(payload)}")
        rank, alpha, first, last = (_number(manifest[key], key) for key in ("rank", "alpha", "first_layer", "last_layer"))
        adapter = cls(tensors, manifest["base_model"], rank, alpha, first, last, manifest["guarantee"])
        if adapter.to_bytes() != data:  # one adapter, one digest
            raise InvalidAdapter("adapter: the bytes are not in canonical form")
        return adapter


def _check_manifest(adapter: Adapter) -> None:
    limits = {
        "rank": (adapter.rank, 1, MAX_RANK),
        "alpha": (adapter.alpha, 1, MAX_ALPHA),
        "first_layer": (adapter.first_layer, 0, MAX_LAYERS),
        "last_layer": (adapter.last_layer, adapter.first_layer, MAX_LAYERS),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise InvalidAdapter(f"adapter, {name}: expected {low} to {high}, got {value}")
    if not re.fullmatch(r"[0-9a-f]{64}", adapter.base_model):
        raise InvalidAdapter("adapter, base_model: expected 64 lower-case hexadecimal digits")
    if not GUARANTEE_TEXT.fullmatch(adapter.guarantee):
        raise InvalidAdapter("adapter, guarantee: expected 'none' or an epsilon with its delta and unit")


def _split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise InvalidAdapter(f"adapter: expected a header of at most {MAX_HEADER_BYTES} bytes inside {len(data)} bytes")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise InvalidAdapter("adapter: a key occurs twice in the header")
        return dict(pairs)

    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise InvalidAdapter("adapter: the header is not JSON") from None
    if not isinstance(header, dict):
        raise InvalidAdapter("adapter: the header is not an object")
    return header, data[8 + length :]


def _take_manifest(manifest: object) -> dict[str, str]:
    fields = {"alpha", "base_model", "first_layer", "format", "guarantee", "last_layer", "rank"}
    if not isinstance(manifest, dict) or set(manifest) != fields or not all(isinstance(value, str) for value in manifest.values()):
        raise InvalidAdapter(f"adapter: expected a manifest of the strings {sorted(fields)}")
    if manifest["format"] != FORMAT:
        raise InvalidAdapter(f"adapter: expected format {FORMAT}")
    return manifest


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,5}", text):
        raise InvalidAdapter(f"adapter, {what}: expected a whole number")
    return int(text)


def _tensor(entry: Any, payload: bytes, begin: int) -> tuple[NDArray[Any], int]:
    """Return the tensor of one header entry, which must begin at `begin`, and where it ends."""
    match entry:
        case {"dtype": str(dtype), "shape": [int(rows), int(columns)], "data_offsets": [int(start), int(stop)]} if len(entry) == 3:
            pass
        case _:
            raise InvalidAdapter("adapter: expected dtype, a shape of two numbers and data_offsets for every tensor")
    if dtype not in DTYPES:
        raise InvalidAdapter(f"adapter: expected {' or '.join(DTYPES)} weights")
    if not (0 < rows <= MAX_WIDTH and 0 < columns <= MAX_WIDTH):
        raise InvalidAdapter(f"adapter: expected shapes from 1 to {MAX_WIDTH}, got {rows} x {columns}")
    if start != begin or stop != start + rows * columns * DTYPES[dtype].itemsize or stop > len(payload):
        raise InvalidAdapter("adapter: the tensors do not lie one behind the other")
    return np.frombuffer(payload[start:stop], DTYPES[dtype]).reshape(rows, columns), stop
