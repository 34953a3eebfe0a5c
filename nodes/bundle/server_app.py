"""The operator's half of the bundle: it names the installed ServerApp."""

from importlib.metadata import entry_points

app = entry_points(group="veilmart.flower")["server"].load()
