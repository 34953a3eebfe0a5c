"""The process that `veilmart market up` keeps running: HOME [HOST:]PORT MAP MARKET_KEY, all of them public."""

import sys
from pathlib import Path

from market_node.page.serving import serve
from protocol.errors import VeilmartError

if __name__ == "__main__":
    home, where, which_map, market_key = sys.argv[1:]
    try:
        serve(Path(home), where, which_map, market_key=bytes.fromhex(market_key), ready=lambda address: None)
    except VeilmartError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
