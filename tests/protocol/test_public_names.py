import re
from pathlib import Path

import protocol

DOCUMENTED = Path(__file__).parent.parent.parent / "docs" / "protocol.md"


def test_public_names_are_exactly_the_documented_ones():
    section = DOCUMENTED.read_text().split("## 9. Public names")[1].split("\n## ")[0]
    documented = re.findall(r"`(\w+)`", section)[1:]  # the first is the package itself
    assert protocol.__all__ == sorted(protocol.__all__) == documented


def test_every_public_name_is_there_and_explains_itself():
    for name in protocol.__all__:
        assert getattr(protocol, name).__doc__, name
