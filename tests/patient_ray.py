"""Ray's own processes, on a machine that is busy with other tests.

`ray.init` gives them 30 s, which nothing sets; here they get as long as they need, up to a minute and a half.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_S = 90.0


@contextmanager
def patient() -> Iterator[None]:
    """Let a cluster that is started meanwhile take its time."""
    from ray._private import services

    looked = services.get_node

    def look(*where):
        until = time.monotonic() + LONGEST_S
        while True:
            try:
                return looked(*where)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    services.get_node = look
    try:
        yield
    finally:
        services.get_node = looked
