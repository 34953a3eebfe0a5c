"""An adapter's bytes: one canonical form, everything else is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from nodes.adapter import MAX_BYTES, MODULES, Adapter, tensor_name
from protocol.errors import InvalidAdapter

BASE = "ab" * 32
WIDTHS = {"q": (12, 12), "k": (12, 4), "v": (12, 4), "o": (12, 12), "gate": (12, 20), "up": (12, 20), "down": (20, 12)}  # in, out


def tensors(rank: int = 2, layers: range = range(3, 5), dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random, made = np.random.default_rng(1), {}
    for layer in layers:
        for module in MODULES:
            into, out = WIDTHS[module.split(".")[1].removesuffix("_proj")]
            made[tensor_name(layer, module, "A")] = random.normal(size=(rank, into)).astype(dtype)
            made[tensor_name(layer, module, "B")] = random.normal(size=(out, rank)).astype(dtype)
    return made


def adapter(**changes: Any) -> Adapter:
    fields = {"tensors": tensors(), "base_model": BASE, "rank": 2, "alpha": 4, "first_layer": 3, "last_layer": 4}
    return Adapter(**{**fields, **changes})


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | str, payload: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"), sort_keys=True)
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


GOOD = adapter().to_bytes()
NAME = tensor_name(3, "mlp.down_proj", "A")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bytes_and_adapter_are_the_same_thing(dtype: Any) -> None:
    one = adapter(tensors=tensors(dtype=dtype))
    data = one.to_bytes()
    again = Adapter.from_bytes(data, base_model=BASE)
    assert again.to_bytes() == data
    assert again.digest == one.digest
    assert (again.rank, again.alpha, again.first_layer, again.last_layer, again.guarantee) == (2, 4, 3, 4, "none")
    assert all(np.array_equal(again.tensors[name], one.tensors[name]) for name in one.tensors)


def test_bytes_do_not_depend_on_the_order_of_the_tensors() -> None:
    assert adapter(tensors=dict(reversed(list(tensors().items())))).to_bytes() == GOOD


def test_the_safetensors_library_reads_the_same_tensors() -> None:
    from safetensors.numpy import load

    read = load(GOOD)
    assert set(read) == set(tensors())
    assert all(np.array_equal(read[name], array) for name, array in tensors().items())


def test_an_adapter_cannot_be_changed() -> None:
    one = adapter()
    with pytest.raises(ValueError, match="read-only"):
        one.tensors[NAME][0, 0] = 1.0
    with pytest.raises(TypeError):
        one.tensors[NAME] = np.zeros((2, 20), np.float32)  # type: ignore[index]


def forge(change: Any) -> bytes:
    header, payload = parts(GOOD)
    changed = change(header, payload)
    return changed if isinstance(changed, bytes) else joined(header, payload)


def nan_weight(header: dict[str, Any], payload: bytes) -> bytes:
    return joined(header, np.float32(np.nan).tobytes() + payload[4:])


def twice(header: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":"), sort_keys=True)
    entry = json.dumps(header[NAME], separators=(",", ":"), sort_keys=True)
    return joined(text[:-1] + f',"{NAME}":{entry}}}', payload)


def extra_tensor(header: dict[str, Any], payload: bytes) -> bytes:
    header["base_model.model.model.embed_tokens.weight"] = {
        "dtype": "F32",
        "shape": [1, 1],
        "data_offsets": [len(payload), len(payload) + 4],
    }
    return joined(header, payload + bytes(4))


def transposed(header: dict[str, Any], payload: bytes) -> None:
    header[NAME]["shape"].reverse()


def manifest(**changes: str) -> Any:
    return lambda header, payload: header["__metadata__"].update(changes)


WAYS_TO_CHEAT = {
    "a weight that is not a number": nan_weight,
    "a key twice": twice,
    "one tensor more": extra_tensor,
    "one byte more": lambda h, p: GOOD + b"\0",
    "one byte less": lambda h, p: GOOD[:-1],
    "a shape the other way round": transposed,
    "another base model": manifest(base_model="cd" * 32),
    "another rank": manifest(rank="1"),
    "a huge rank": manifest(rank="65"),
    "a rank that is no number": manifest(rank="2.0"),
    "a rank with a leading zero": manifest(rank="02"),
    "an alpha of zero": manifest(alpha="0"),
    "one layer more": manifest(last_layer="5"),
    "layers moved down": manifest(first_layer="0", last_layer="1"),
    "layers the wrong way round": manifest(first_layer="4", last_layer="3"),
    "a guarantee that was never given": manifest(guarantee="epsilon=1"),
    "another format": manifest(format="pt"),
    "one manifest field more": manifest(note="hello"),
    "no manifest": lambda h, p: h.pop("__metadata__") and None,
    "integer weights": lambda h, p: h[NAME].update(dtype="I32"),
    "overlapping tensors": lambda h, p: h[tensor_name(3, "mlp.down_proj", "B")].update(data_offsets=[0, 96]),
    "a header with other spacing": lambda h, p: joined(json.dumps(h, sort_keys=True), p),
    "a header that is a list": lambda h, p: joined("[]", p),
    "a header that is no JSON": lambda h, p: joined("{", p),
    "a header that nests deeply": lambda h, p: joined("[" * 100_000, p),
    "a header longer than the file": lambda h, p: (1 << 40).to_bytes(8, "little") + GOOD[8:],
    "nothing": lambda h, p: b"",
    "too large a file": lambda h, p: bytes(MAX_BYTES + 1),
    "a pickle": lambda h, p: b"\x80\x04N.",
}  # fmt: skip


@pytest.mark.parametrize("change", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_forged_bytes_are_refused(change: Any) -> None:
    Adapter.from_bytes(GOOD, base_model=BASE)
    with pytest.raises(InvalidAdapter):
        Adapter.from_bytes(forge(change), base_model=BASE)


def test_one_layer_of_another_width_is_refused() -> None:
    odd = tensors() | {tensor_name(4, "mlp.up_proj", "B"): np.zeros((21, 2), np.float32)}
    with pytest.raises(InvalidAdapter, match="expected shape"):
        adapter(tensors=odd)


def test_double_precision_is_refused() -> None:
    with pytest.raises(InvalidAdapter, match="float32 or float16"):
        adapter(tensors=tensors(dtype=np.float64))
