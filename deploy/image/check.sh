#!/usr/bin/env bash
# Builds the image and uses it: read-only, as its own user, without capabilities, it serves
# a trainer, says that it is ready, and ends with 0 on SIGTERM. Needs root and Debian; the
# base is made of Debian's packages and takes the name of the official one.
set -euo pipefail
cd "$(dirname "$0")/../.."

base=python:3.11-slim-bookworm
work=$PWD/.tools/image # kept between runs: the base and the wheels
image=skfac:check
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
store=(--root "$work/storage" --runroot "$work/run")
mkdir -p "$work/wheels" "$work/empty"

buildah() { command buildah "${store[@]}" "$@"; }
podman() { command podman "${store[@]}" --runtime runc --cgroup-manager cgroupfs "$@"; }

tools() {
  local missing=()
  for tool in buildah podman runc mmdebstrap; do
    type -P "$tool" >/dev/null || missing+=("$tool")
  done
  [ ${#missing[@]} -eq 0 ] && return
  deploy/tools/apt_install.sh "${missing[@]}"
}

make_base() {
  local sources=/etc/apt/sources.list.d/debian.sources
  [ -s "$sources" ] || sources=/etc/apt/sources.list
  [ -s "$work/base.tar" ] || {
    mmdebstrap --mode=root --variant=minbase --include=python3,python3-venv,ca-certificates \
      --customize-hook='ln -s /usr/bin/python3 "$1/usr/local/bin/python"' \
      bookworm "$work/base.tar.part" "$sources"
    mv "$work/base.tar.part" "$work/base.tar"
  }
  local container
  container=$(buildah from scratch)
  buildah add -q "$container" "$work/base.tar" / >/dev/null
  buildah config --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$container"
  buildah commit -q --rm "$container" "$base" >/dev/null
}

build() {
  python3 -m pip download -q --dest "$work/wheels" -c requirements/dev.lock . hatchling torch
  buildah bud --format docker --pull=never --layers=false --volume "$work/wheels:/wheels:ro" \
    --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels --tag "$image" .
}

# The machine's own limits may be lower than those that podman would set.
limits() {
  cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
END
  export CONTAINERS_CONF=$work/containers.conf
}

start() {
  podman run --detach --name skfac-check --network host --read-only --cap-drop ALL \
    --security-opt no-new-privileges --memory 4g --tmpfs /tmp:rw,size=64m \
    --env SKFAC_ADDRESS=127.0.0.1:0 --env SKFAC_METRICS_ADDRESS=127.0.0.1:0 \
    --env SKFAC_HEALTH_ADDRESS=127.0.0.1:50052 "$image" >/dev/null
  trap 'podman rm --force skfac-check >/dev/null 2>&1 || true' EXIT
  for _ in $(seq 120); do
    address=$(podman logs skfac-check 2>&1 | sed -n 's/^Serving on //p')
    [ -n "$address" ] && return
    [ "$(podman inspect --format '{{.State.Running}}' skfac-check)" = true ] || break
    sleep 1
  done
  podman logs skfac-check
  exit 1
}

train() {
  podman run --rm --network host --read-only --cap-drop ALL --entrypoint python \
    --tmpfs /tmp:rw,size=64m --volume "$PWD/deploy/helm/skfac/files/train.py:/train.py:ro" \
    "$image" /train.py "$address"
}

check_confinement() {
  local status
  status=$(podman exec skfac-check cat /proc/1/status)
  grep -Eq '^Uid:[[:space:]]+10001' <<<"$status"
  grep -Eq '^CapEff:[[:space:]]+0+$' <<<"$status"
  grep -Eq '^NoNewPrivs:[[:space:]]+1' <<<"$status"
  if podman exec skfac-check python -c "open('/opt/skfac/x', 'w')" 2>/dev/null; then
    echo "The root file system can be written to." >&2
    exit 1
  fi
}

stop() {
  podman stop --time 30 skfac-check >/dev/null
  local code
  code=$(podman inspect --format '{{.State.ExitCode}}' skfac-check)
  [ "$code" = 0 ] || { echo "SIGTERM ended it with $code." >&2; podman logs skfac-check; exit 1; }
}

tools
make_base
build
limits
start
check_confinement
train
podman healthcheck run skfac-check
stop
podman image inspect --format 'image-check passed: {{.Size}} bytes, user {{.User}}' "$image"
command buildah "${store[@]}" rmi --all --force >/dev/null # vfs keeps each layer whole
