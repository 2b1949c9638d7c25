"""The chart and the manifests as objects, and their strict validation."""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/skfac"
SCHEMAS = ROOT / "deploy/schemas"
TOOLS = Path(os.environ.get("DEPLOY_TOOLS", ""))
_KUBERNETES = TOOLS / "kubernetes"  # the schemas of `kubernetes-validate --strict`
_MODELS = ("monitoring.coreos.com/v1", "keda.sh/v1alpha1")  # that validate.mjs knows

Object = dict[str, Any]


def helm(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run helm; what it prints and how it ends is for the caller to judge."""
    command = [TOOLS / "bin/helm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rendered(*arguments: str | Path) -> list[Object]:
    """What the chart makes of values, as release `prod` in namespace `training`."""
    ran = helm("template", "prod", CHART, "--namespace", "training", *arguments)
    assert ran.returncode == 0, ran.stderr
    return objects(ran.stdout)


def objects(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    return [one for one in yaml.safe_load_all(text) if one]


def only(found: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of a kind (and a name)."""
    (one,) = (
        o for o in found if o["kind"] == kind and name in {None, o["metadata"]["name"]}
    )
    return one


def errors_of(found: list[Object]) -> list[str]:
    """Everything that is wrong with objects; unknown fields and kinds are, too."""
    models = [o for o in found if o["apiVersion"] in _MODELS]
    errors = _errors_of_models(models)
    for one in found:
        if one in models:
            continue
        name = f"{one['kind']} {one['metadata']['name']}"
        for error in _validator(one["apiVersion"], one["kind"]).iter_errors(one):
            errors.append(f"{name}/{'/'.join(map(str, error.path))}: {error.message}")
    return errors


def _errors_of_models(found: list[Object]) -> list[str]:
    ran = subprocess.run(
        [
            shutil.which("node") or "node",
            SCHEMAS / "validate.mjs",
            TOOLS / "node_modules",
        ],
        input=json.dumps(found), capture_output=True, text=True, check=True,
    )  # fmt: skip
    errors: list[str] = json.loads(ran.stdout)
    return errors


@cache
def _validator(api_version: str, kind: str) -> Draft202012Validator:
    group, _, version = api_version.rpartition("/")
    if group == "ray.io":
        file = SCHEMAS / "ray.io-v1.json"
    else:
        prefix = f"{group.split('.')[0]}-" if group else ""
        file = _KUBERNETES / f"{kind.lower()}-{prefix}{version}.json"
    assert file.is_file(), f"There is no schema of {api_version} {kind}."
    return Draft202012Validator(_read(file), registry=_registry())


@cache
def _registry() -> Registry[Any]:
    definitions = Resource.from_contents(_read(_KUBERNETES / "_definitions.json"))
    return definitions @ Registry()


def _read(file: Path) -> Any:
    return json.loads(file.read_text())
