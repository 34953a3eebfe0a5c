from dataclasses import replace

import numpy as np
import pytest

from protocol.errors import FormatError, UsageError
from protocol.features import default_map, load_map, open_map, shipped_map, shipped_maps, waves_of
from protocol.specification import quantise
from tests.protocol.worlds import WIDTH, small_map

MAP = small_map()


def embeddings(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 2, WIDTH)).astype(np.float32)


def test_features_are_unit_vectors():
    assert np.linalg.norm(MAP(embeddings(50)), axis=1) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_a_view_that_is_not_finite_or_absent_becomes_zero(broken):
    x = embeddings(3)
    x[1, 1] = broken
    z = MAP(x)
    assert (z[1, MAP.view_dimension :] == 0).all()
    assert np.isfinite(z).all()
    assert np.linalg.norm(z[0]) == pytest.approx(1.0)


def test_a_feature_is_a_function_of_its_own_record():
    x = embeddings(20)
    assert (MAP(x)[[3, 7]] == MAP(x[[3, 7]])).all()


def test_a_map_reads_back_to_the_same_id():
    again = load_map(MAP.manifest)
    assert again.map_id == MAP.map_id
    assert (again(embeddings(5)) == MAP(embeddings(5))).all()


def test_every_changed_byte_of_a_manifest_is_another_map_or_refused():
    for position in range(0, len(MAP.manifest), 7):
        forged = bytearray(MAP.manifest)
        forged[position] ^= 1
        try:
            assert load_map(bytes(forged)).map_id != MAP.map_id
        except FormatError:
            continue


@pytest.mark.parametrize("cut", [0, 10, 200, -1])
def test_a_cut_manifest_is_refused(cut):
    with pytest.raises(FormatError):
        load_map(MAP.manifest[:cut])


def test_the_shipped_map_is_the_documented_one():
    shipped = default_map()
    assert (shipped.dimension, shipped.layer, shipped.token_limits, shipped.width) == (96, 6, (60, 40), 576)
    assert len(shipped.fitted_on) == 10


@pytest.mark.parametrize("name", shipped_maps())
def test_every_shipped_map_gives_features_that_the_mechanism_takes(name):
    shipped = shipped_map(name)
    x = np.random.default_rng(2).standard_normal((20, 2, shipped.width)).astype(np.float32) * shipped.views[0].scale
    x[3, 1] = 0  # a record without a response
    z = shipped(x)
    assert z.shape == (20, shipped.dimension)
    assert np.linalg.norm(np.delete(z, 3, axis=0), axis=1) == pytest.approx(1.0, abs=1e-9)
    assert np.linalg.norm(z[3]) == pytest.approx(0.5**0.5)
    assert len(quantise(z).rows) == 20  # the exact integer bound holds for every kind of map
    assert load_map(shipped.manifest).map_id == shipped.map_id


@pytest.mark.parametrize(
    "wrong",
    [{"centre": np.full(4, 2**30)}, {"name": "a\x1b[2J"}, {"name": ""}, {"fitted_on": ("a\nb",)}],
    ids=["a centre that no unit vectors have", "an escape in the name", "no name", "a line break in a task"],
)
def test_a_map_with_absurd_contents_is_refused(wrong):
    with pytest.raises(FormatError):
        load_map(replace(MAP, **wrong).manifest)


@pytest.mark.parametrize("number", [np.nan, np.inf, 0.0, -1.0, 1e-300, 1e300])
def test_a_scoring_constant_is_a_plausible_number(number):
    with pytest.raises(FormatError):
        replace(MAP.full, norm=number)


def test_a_map_is_opened_by_name_or_file(tmp_path):
    assert open_map("kme-lin-96").map_id == default_map().map_id
    (tmp_path / "own.map").write_bytes(MAP.manifest)
    assert open_map(str(tmp_path / "own.map")).map_id == MAP.map_id
    with pytest.raises(UsageError, match="kme-lin-96"):
        open_map("no-such-map")


def test_waves_are_those_of_a_shift_invariant_kernel():
    """<phi(x), phi(y)> approaches exp(-|x - y|^2 / 2) (Rahimi and Recht 2007)."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 50, 4)) * 0.7
    frequencies = rng.standard_normal((4, 20_000)).astype(np.float32)
    kernel = (waves_of(x, frequencies) * waves_of(y, frequencies)).sum(axis=1)
    assert kernel == pytest.approx(np.exp(-((x - y) ** 2).sum(axis=1) / 2), abs=0.04)
