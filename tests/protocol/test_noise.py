"""The sampler draws what it claims.  Each statistical test states its false-alarm rate; seeds are fixed, so a pass is repeatable."""

import hashlib
import importlib.util
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from protocol.hazmat.noise import NoiseSource, discrete_gaussian, operating_system

FALSE_ALARM = 1e-6


def seeded(seed: int) -> NoiseSource:
    state = [seed.to_bytes(8, "little")]

    def read(count: int) -> bytes:
        state[0] = hashlib.sha256(state[0]).digest()
        return hashlib.shake_256(state[0]).digest(count)

    return NoiseSource(read, simulated=True)


@pytest.mark.parametrize("variance", [4, 20, 300])
def test_small_variances_have_the_exact_distribution(variance):
    source = seeded(variance)
    drawn = np.array([discrete_gaussian(variance, source) for _ in range(20_000)])
    reach = math.ceil(6 * math.sqrt(variance))
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(support**2) / (2 * variance))
    expected = weights / weights.sum() * len(drawn)
    observed = np.array([(drawn == k).sum() for k in support])
    usual = expected > 5
    chosen, rest = expected[usual], max(expected[~usual].sum(), 1e-9)
    seen = np.append(observed[usual], len(drawn) - observed[usual].sum())
    chi2 = ((seen - np.append(chosen, rest)) ** 2 / np.append(chosen, rest)).sum()
    assert stats.chi2.sf(chi2, len(chosen)) > FALSE_ALARM


def test_the_variance_of_a_release_is_gaussian():
    source, variance = seeded(7), 17_837**2
    drawn = np.array([discrete_gaussian(variance, source) for _ in range(4_000)]) / math.sqrt(variance)
    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM


def test_a_noise_too_small_is_noticed_by_that_test():
    source, variance = seeded(7), 17_837**2
    drawn = np.array([discrete_gaussian(variance, source) for _ in range(4_000)]) / math.sqrt(variance) * 0.8
    assert stats.kstest(drawn, "norm").pvalue < FALSE_ALARM


def test_uniform_integers_are_not_biased():
    source, bound = seeded(3), 3 << 61  # a remainder of 64 bits would hit the lower third twice as often
    share = np.mean([source.below(bound) < bound // 3 for _ in range(20_000)])
    assert abs(share - 1 / 3) < 5.5 * math.sqrt(2 / 9 / 20_000)  # 5.5 standard deviations: 4e-8


DRAW = "from protocol.hazmat.noise import *; s = operating_system(); print([discrete_gaussian(10**9, s) for _ in range(8)])"
SEEDED = """import random; random.seed(42); from protocol.hazmat.noise import *
s = NoiseSource(random.randbytes, simulated=True); print([discrete_gaussian(10**9, s) for _ in range(8)])"""


def drawn_by_two_processes(code: str) -> set[str]:
    return {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}


def test_two_processes_never_draw_equal_noise():
    assert len(drawn_by_two_processes(DRAW)) == 2


def test_a_seeded_build_is_caught_by_that_test():
    assert len(drawn_by_two_processes(SEEDED)) == 1


FORKED = """
import os
from protocol.hazmat.noise import *
s = operating_system()
discrete_gaussian(10**9, s)                     # fills the buffer
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, repr([discrete_gaussian(10**9, s) for _ in range(8)]).encode())
    os._exit(0)
os.wait()
print(os.read(reader, 10_000).decode() == repr([discrete_gaussian(10**9, s) for _ in range(8)]))
"""


@pytest.mark.parametrize(("simulated", "equal"), [("False", "False"), ("True", "True")], ids=["real", "control"])
def test_a_forked_process_does_not_repeat_the_noise(simulated, equal):
    code = FORKED.replace("s = operating_system()", f"import secrets; s = NoiseSource(secrets.token_bytes, simulated={simulated})")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == equal


def test_the_operating_system_is_not_a_simulation():
    assert not operating_system().simulated


def test_a_coordinate_costs_at_most_fifty_microseconds():
    """CPU time of the fastest of ten runs, so that the neighbours of a shared machine are not measured; 20 to 33 us were."""
    source, variance, fastest = operating_system(), 318_153_166, math.inf
    for _ in range(10):
        start = time.process_time()
        for _ in range(650):
            discrete_gaussian(variance, source)
        fastest = min(fastest, (time.process_time() - start) / 650)
    assert fastest <= 50e-6


@pytest.mark.skipif(importlib.util.find_spec("opendp") is None, reason="opendp is a cross-check of developers: 265 MB")
@pytest.mark.parametrize("variance", [20, 318_153_166])
def test_opendp_draws_from_the_same_distribution(variance):
    """Two-sample chi-square over the same cells, false alarm 1e-6, against an independent implementation; the control is 0.9 sigma."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    source, count = operating_system(), 20_000
    ours = np.array([discrete_gaussian(variance, source) for _ in range(count)])
    edges = np.unique(np.rint(np.quantile(ours, np.linspace(0, 1, 30)[1:-1]))) + 0.5

    def agreement(scale: float) -> float:
        theirs = dp.m.make_gaussian(dp.atom_domain(T="i64"), dp.absolute_distance(T="i64"), scale=scale)
        other = np.array([theirs(0) for _ in range(count)])
        a, b = (np.bincount(np.searchsorted(edges, drawn), minlength=len(edges) + 1) for drawn in (ours, other))
        return float(stats.chi2.sf(((a - b) ** 2 / np.maximum(a + b, 1)).sum(), len(edges)))

    assert agreement(math.sqrt(variance)) > FALSE_ALARM
    assert agreement(0.9 * math.sqrt(variance)) < FALSE_ALARM
