"""The decoders under atheris, which goes after input that reaches code not seen yet.

    python tests/fuzz/guided.py [--runs 300000] [--seed 1]

It begins with the corpus and adds nothing to it. Input that a decoder neither takes nor
refuses is written to the working directory, the exit code is 77 then.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["skfac.wire", "skfac.v1"]):
    from tests.fuzz.decoders import feed

from tests.fuzz.mutate import CORPUS

LONGEST = 4096  # bytes; the corpus has none longer than 500


def main() -> None:
    """Fuzz; libFuzzer prints what it does, and ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = shutil.copytree(CORPUS, Path(folder) / "corpus")
        flags = [f"-runs={options.runs}", f"-seed={options.seed}"]
        flags += [f"-max_len={LONGEST}", "-timeout=10", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *flags, str(begun)], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
