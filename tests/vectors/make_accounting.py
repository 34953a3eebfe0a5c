"""Figures of Google's dp-accounting for five histories: a second opinion on ours.  Needs its own environment (attrs < 24):

python -m venv /tmp/accounting && /tmp/accounting/bin/pip install dp-accounting==0.6.0
/tmp/accounting/bin/python tests/vectors/make_accounting.py > tests/vectors/accounting.json
"""

import json
import sys
from importlib.metadata import version

DELTA = 1e-6
# [multiplier] is one Gaussian release, [multiplier, sampling rate, steps] a run of DP-SGD.
HISTORIES = {
    "one specification": [[4.2247]],
    "four specifications": [[4.2247]] * 4,
    "a training": [[1.0, 0.016, 300]],
    "a specification and a training": [[4.2247], [1.0, 0.016, 300]],
    "two of each": [[8.0576], [1.0, 0.016, 300], [4.2247], [1.2, 0.05, 200]],
}


def figures() -> dict[str, dict[str, float]]:
    """Return the epsilon of each history by the RDP and the PLD accountant, add-or-remove-one."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    found = {}
    for name, history in HISTORIES.items():
        relation = NeighboringRelation.ADD_OR_REMOVE_ONE
        accountants = {"rdp": RdpAccountant(neighboring_relation=relation), "pld": PLDAccountant(relation)}
        for multiplier, *sampled in history:
            event = GaussianDpEvent(multiplier)
            if sampled:
                event = SelfComposedDpEvent(PoissonSampledDpEvent(sampled[0], event), int(sampled[1]))
            for accountant in accountants.values():
                accountant.compose(event)
        found[name] = {kind: float(accountant.get_epsilon(DELTA)) for kind, accountant in accountants.items()}
    return found


if __name__ == "__main__":
    made = {"made_by": f"dp-accounting {version('dp-accounting')}", "delta": str(DELTA), "histories": HISTORIES, "epsilon": figures()}
    sys.stdout.write(json.dumps(made, indent=1) + "\n")
