"""A runner process with the fake backend: what the server starts in tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lmx.runner import main
from tests.fakes import load

COMMAND = (sys.executable, __file__)

if __name__ == "__main__":
    sys.exit(main(load))
