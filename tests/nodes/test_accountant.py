"""Our accountants against Google's dp-accounting, like for like, on five histories; figures stored, remade where it is installed."""

import importlib.util
import json
from pathlib import Path

import pytest

from nodes.accountant import prv_epsilon, second_opinion
from protocol.privacy import Event, Gaussian, PoissonSampledGaussian, composed_epsilon, filter_epsilon, ledger_epsilon, renyi_epsilon
from tests.vectors.make_accounting import DELTA, HISTORIES, figures

STORED = json.loads((Path(__file__).parent.parent / "vectors" / "accounting.json").read_text())
ONE_PERCENT = 0.01


def events_of(history: list[list[float]]) -> list[Event]:
    return [Gaussian(row[0]) if len(row) == 1 else PoissonSampledGaussian(row[0], row[1], int(row[2])) for row in history]


@pytest.fixture(scope="module", params=HISTORIES, ids=list(HISTORIES))
def history(request):
    return events_of(HISTORIES[request.param]), STORED["epsilon"][request.param]


def test_the_stored_figures_are_of_these_histories():
    assert STORED["histories"] == HISTORIES
    assert float(STORED["delta"]) == DELTA


@pytest.mark.skipif(importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting has an environment of its own")
def test_the_stored_figures_are_what_dp_accounting_says():
    for name, made in figures().items():
        assert made == pytest.approx(STORED["epsilon"][name], rel=1e-6)
        assert second_opinion(events_of(HISTORIES[name]), DELTA) == pytest.approx(made["pld"], rel=1e-6)


def test_renyi_composition_agrees_with_dp_accounting(history):
    events, reference = history
    assert renyi_epsilon(events, DELTA) == pytest.approx(reference["rdp"], rel=ONE_PERCENT)


def test_the_ledgers_figure_never_falls_below_the_numerical_one(history):
    events, reference = history
    assert ledger_epsilon(events, DELTA) >= reference["pld"] * (1 - 1e-6)
    assert filter_epsilon(events, DELTA) >= reference["rdp"]


def test_gaussians_alone_agree_with_dp_accounting():
    for name in ("one specification", "four specifications"):
        multipliers = [row[0] for row in HISTORIES[name]]
        assert composed_epsilon(multipliers, DELTA) == pytest.approx(STORED["epsilon"][name]["pld"], rel=1e-6)


def test_the_prv_figure_agrees_with_dp_accounting(history):
    events, reference = history
    assert reference["pld"] * (1 - ONE_PERCENT) <= prv_epsilon(events, DELTA) <= reference["pld"] * (1 + ONE_PERCENT)


def test_another_history_would_be_noticed():
    """The control: a tenth less noise is far outside what these tests allow."""
    assert composed_epsilon([0.9 * 4.2247], DELTA) > STORED["epsilon"]["one specification"]["pld"] * (1 + 5 * ONE_PERCENT)
    assert renyi_epsilon([PoissonSampledGaussian(0.9, 0.016, 300)], DELTA) > STORED["epsilon"]["a training"]["rdp"] * (1 + 5 * ONE_PERCENT)
