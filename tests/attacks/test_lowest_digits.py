"""T4 and T5: whoever knows all records but one looks at the lowest digits of what is published; and where randomness may come from."""

import ast
from pathlib import Path

import numpy as np
import pytest

from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.specification import estimate, quantise
from tests.protocol.worlds import DIMENSION, features

ROOT = Path(__file__).parent.parent.parent
ONE, RELEASES = Guarantee(1.0, 1e-6), 40
WITH = features(50, seed=7)
WITHOUT = WITH[:-1]  # the attacker knows all of these, and asks whether the last record is in


def single_precision(rows: np.ndarray) -> np.ndarray:
    """A broken build: real sums, and noise as a usual generator draws it, on the grid of single precision."""
    noise = np.random.default_rng().normal(0, 4.4, DIMENSION).astype(np.float32)
    return rows.sum(axis=0) + noise


def ours(rows: np.ndarray) -> np.ndarray:
    return estimate(quantise(rows), bytes(32), ONE, operating_system()).noisy_sums[1:].astype(np.int64)


def on_the_grid_of_floats(published: np.ndarray, sums: np.ndarray) -> bool:
    """Return whether what was published could be these sums and noise of single precision; 2^-40 is what the addition rounds."""
    noise = published - sums
    return bool((np.abs(noise - noise.astype(np.float32)) < 2.0**-40).all())


def on_the_grid_of_integers(published: np.ndarray, sums: np.ndarray) -> bool:
    return bool((published - sums == np.rint(published - sums)).all())


def exact(rows: np.ndarray) -> np.ndarray:
    return quantise(rows).rows[:, 1:].sum(axis=0)


def test_both_neighbours_can_give_every_release():
    for data in (WITH, WITHOUT):
        for _ in range(RELEASES):
            published = ours(data)
            assert on_the_grid_of_integers(published, exact(WITH))
            assert on_the_grid_of_integers(published, exact(WITHOUT))


def test_noise_of_single_precision_tells_the_neighbours_apart_every_time():
    """The control: the noise is large enough, and one look at its lowest digits is still as good as the record."""
    for data, other in ((WITH, WITHOUT), (WITHOUT, WITH)):
        for _ in range(RELEASES):
            published = single_precision(data)
            assert on_the_grid_of_floats(published, data.sum(axis=0))
            assert not on_the_grid_of_floats(published, other.sum(axis=0))


# Where randomness comes from ---------------------------------------------------------------------------------------------

DRAWS = [*sorted((ROOT / "protocol").rglob("*.py")), *sorted((ROOT / "nodes").glob("guard*.py"))]
DRAWS += [ROOT / "nodes" / name for name in ("ledger.py", "private_noise.py", "populations.py")]
SEEDED = {"default_rng", "RandomState", "manual_seed", "randn", "randn_like", "rand", "normal_", "standard_normal", "Generator", "seed"}


def predictable(source: str) -> list[str]:
    """Return the generators in `source` that a seed reaches."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(name.name.split(".")[0] == "random" for name in names):
                found.append("random")
            case ast.ImportFrom(module="random" | "numpy.random" | "torch.random"):
                found.append(node.module or "")
            case ast.Attribute(value=ast.Name(id="np" | "numpy" | "torch"), attr="random" | "normal" | "randint" | "bernoulli" as name):
                found.append(name)
            case ast.Attribute(attr=name) if name in SEEDED:
                found.append(name)
    return found


@pytest.mark.parametrize("path", DRAWS, ids=[str(path.relative_to(ROOT)) for path in DRAWS])
def test_no_seed_reaches_what_makes_releases(path):
    assert predictable(path.read_text()) == []


PREDICTABLE = (
    "import random", "from random import gauss", "x = np.random.normal(0, s)", "x = torch.normal(0.0, s)", "torch.manual_seed(1)",
    "x.normal_()",
)  # fmt: skip


@pytest.mark.parametrize("line", PREDICTABLE)
def test_a_generator_that_a_seed_reaches_would_be_seen(line):
    assert predictable(f"def noise(x, s):\n    {line}\n")
