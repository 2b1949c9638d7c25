"""The shape of the source tree: one namespace, imports in one direction."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "curvature": ROOT / "service/skfac/curvature",
    "v1": ROOT / "proto/skfac/v1",
    "wire": ROOT / "proto/skfac/wire",
    "service": ROOT / "service/skfac/service",
    "client": ROOT / "client/skfac/client",
}
MAY_IMPORT = {
    "curvature": {"curvature"},
    "v1": {"v1"},
    "wire": {"wire", "v1", "curvature"},
    "service": {"service", "wire", "v1", "curvature"},
    "client": {"client", "wire", "v1", "curvature"},
}
# The embedded target runs the server's engine in the trainer's process.
EXCEPTIONS = {("client", "embedded.py"): {"service"}}
FOREIGN_TO_CURVATURE = {
    "torch",
    "jaxtyping",
    "math",
    "dataclasses",
    "functools",
    "itertools",
    "typing",
    "collections",
}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_skfac_is_a_namespace_package():
    # An __init__.py in any root would hide the other two.
    spec = importlib.util.find_spec("skfac")
    assert spec is not None
    assert spec.origin is None


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str):
    for path in PACKAGES[package].glob("*.py"):
        parts = (m.split(".") for m in imported_modules(path) if m.startswith("skfac."))
        used = {module[1] for module in parts}
        allowed = MAY_IMPORT[package] | EXCEPTIONS.get((package, path.name), set())
        assert used <= allowed, f"{path} imports skfac.{used - allowed}"


def test_curvature_is_pure():
    for path in PACKAGES["curvature"].glob("*.py"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert roots - {"skfac"} <= FOREIGN_TO_CURVATURE, path


def test_files_answer_one_question():
    sources = [p for folder in PACKAGES.values() for p in folder.glob("*.py")]
    sources += ROOT.glob("tests/**/*.py")
    long = [
        str(path)
        for path in sources
        if "_pb2" not in path.name and len(path.read_text().splitlines()) > 400
    ]
    assert not long
