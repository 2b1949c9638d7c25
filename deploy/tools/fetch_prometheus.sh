#!/bin/sh
# Fetch Debian's Prometheus and promtool into a folder, without root and without
# installing anything; prints nothing and does nothing if they are there.
# Usage: fetch_prometheus.sh FOLDER   (then FOLDER/usr/bin/prometheus)
set -eu
folder=$1
if [ -x "$folder/usr/bin/prometheus" ] && [ -x "$folder/usr/bin/promtool" ]; then
    exit 0
fi
mkdir -p "$folder"
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial"
# Lists of our own: those of the machine may be missing, old, or not ours to change.
apt() {
    apt-get -qq -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work" \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=3 "$@"
}
apt update
(cd "$work" && apt download prometheus)
dpkg-deb --extract "$work"/prometheus_*.deb "$work/unpacked"
# Last, and in one move: a run that was cut off leaves nothing that looks complete.
rm -rf "$folder/usr"
mv "$work/unpacked/usr" "$folder/usr"
