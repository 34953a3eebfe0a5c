"""Small synthetic values that several tests build on: a map of width 8 and D = 4, signed releases under it."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.adapter import MODULES, Adapter, tensor_name
from protocol.features import EmbeddingKind, FeatureMap, ScoringConstants, View
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.release import AdapterReference, Card, Release, sign_release
from protocol.specification import estimate, quantise
from protocol.window import ALWAYS, Window

WIDTH, DIMENSION = 8, 4
CONSTANTS = ScoringConstants(between=0.01, within=0.2, norm=0.5, norm_std=0.2, drift=0.001, related=0.5, threshold=2.5)
ONE = Guarantee(1.0, 1e-6)


def small_map(name: str = "small", seed: int = 0) -> FeatureMap:
    rng = np.random.default_rng(seed)

    def view() -> View:
        axes = np.linalg.qr(rng.standard_normal((WIDTH, DIMENSION // 2)))[0].astype(np.float32)
        return View(*(rng.uniform(0.1, 1, WIDTH).astype(np.float32) for _ in range(3)), axes)

    constants = CONSTANTS
    centre = rng.integers(-50_000, 50_000, DIMENSION)
    return FeatureMap(
        name, "ab" * 32, EmbeddingKind.HIDDEN_STATES, 6, (60, 40), (view(), view()), centre, constants, constants, ("public-a", "public-b")
    )


def public(key) -> bytes:
    return key.public_key().public_bytes_raw()


def features(count: int, seed: int, dimension: int = DIMENSION) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal(dimension) * 2 + rng.standard_normal((count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def release_of(
    feature_map: FeatureMap,
    key: Ed25519PrivateKey,
    *,
    number: int = 1,
    seed: int = 0,
    simulated: bool = False,
    adapter=None,
    guarantee: Guarantee = ONE,
    count: int = 300,
    window: Window = ALWAYS,
) -> Release:
    specification = estimate(quantise(features(count, seed, feature_map.dimension)), feature_map.map_id, guarantee, operating_system())
    previous = b"" if number == 1 else bytes([1]) * 32
    base = bytes.fromhex(feature_map.base_model)
    card = Card(f"owner-{seed}")
    return Release(public(key), number, previous, base, specification, adapter, card, simulated, window)


def envelope_of(feature_map: FeatureMap, key: Ed25519PrivateKey, **how) -> bytes:
    return sign_release(release_of(feature_map, key, **how), key)


def adapter_bytes(alpha: int = 1, width: int = 4, rank: int = 2) -> bytes:
    """Return the bytes of an adapter that changes nothing, 14 * 4 * rank * width and a header; another alpha gives other bytes."""
    shapes = {"A": (rank, width), "B": (width, rank)}
    tensors = {tensor_name(0, module, side): np.zeros(shapes[side], np.float32) for module in MODULES for side in "AB"}
    return Adapter(tensors, "ab" * 32, rank, alpha, 0, 0).to_bytes()


ADAPTER = AdapterReference(bytes(range(32)), 1000)
