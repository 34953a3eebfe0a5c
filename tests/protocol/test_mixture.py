import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.mixture import mixture_weights, simplex_least_squares
from protocol.scoring import sketch_of
from tests.protocol.worlds import features, release_of, small_map

MAP, OWNER = small_map(), Ed25519PrivateKey.generate()


def test_the_weights_solve_the_constrained_problem():
    """Karush-Kuhn-Tucker: the gradient is one constant where a weight is positive, and no smaller where it is zero."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        x = rng.standard_normal((8, 5))
        gram, products = x @ x.T, x @ rng.standard_normal(5)
        w = simplex_least_squares(gram, products)
        gradient = gram @ w - products
        level = gradient[w > 1e-7].mean()
        assert w.sum() == pytest.approx(1)
        assert w.min() >= 0
        assert gradient[w > 1e-7] == pytest.approx(level, abs=1e-5)
        assert gradient[w <= 1e-7].min(initial=np.inf) > level - 1e-5


def test_a_task_made_of_two_owners_gets_both():
    releases = [release_of(MAP, OWNER, seed=seed).specification for seed in range(4)]
    mixed = np.concatenate([features(300, 1)[:140], features(300, 2)[:60]])
    weights = mixture_weights(releases, sketch_of(mixed, MAP, 2), MAP)
    assert weights[[1, 2]] == pytest.approx([0.7, 0.3], abs=0.15)
    assert len(mixture_weights([], sketch_of(mixed, MAP, 2), MAP)) == 0
    assert mixture_weights(releases[:1], sketch_of(mixed, MAP, 2), MAP) == pytest.approx([1.0])
