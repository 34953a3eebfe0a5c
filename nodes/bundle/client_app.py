"""The owner's half of the bundle: it names the installed ClientApp, so that no code travels with a campaign.

An assignment at the top level, because Flower's static check looks for one.
"""

from importlib.metadata import entry_points

app = entry_points(group="veilmart.flower")["client"].load()
