"""The convergence study: what is trained, with what, how often, and what came out."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The examples are scripts, and the study reuses what they share.
if (_examples := str(ROOT / "examples")) not in sys.path:
    sys.path.insert(0, _examples)
