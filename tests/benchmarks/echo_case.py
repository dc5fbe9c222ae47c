"""A case that costs nothing: tells in which order it was started, and fails when told to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--turn", type=int)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    with options.log.open("a") as log:
        log.write(f"{options.turn}{options.case} ")
    if options.case == "b" and options.turn == 1:
        raise SystemExit("b has had enough")
    print("chatter before the figures")
    print(json.dumps({"s": (options.turn + 1) * {"a": 1.0, "b": 2.0, "c": 5.0}[options.case]}))
