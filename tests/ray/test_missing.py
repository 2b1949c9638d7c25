"""Without Ray everything else works, and what needs it says so."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["ray"] = None  # as if it were not installed

import torch
from skfac.client import ConfigurationError, Preconditioner
import skfac.service.main, skfac.service.server

model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    try:
        Preconditioner(model, optimizer, target="ray://skfac/skfac")
    except ConfigurationError as error:
        print(error)
try:
    import skfac.service.ray
except ImportError as error:
    print(error)
with Preconditioner(model, optimizer, target="embedded") as preconditioner:
    model(torch.ones(1, 3)).sum().backward()
    preconditioner.step()
print(sorted(name for name in sys.modules if name.startswith("ray")))
"""


def test_a_target_of_ray_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        *["Targets of Ray need Ray: pip install '.[ray]' in a clone."] * 2,
        "An engine in Ray's actors needs Ray: pip install '.[ray]' in a clone.",
        "['ray']",
    ]
