#!/bin/sh
# Install Debian's packages, one caller after the other: apt itself fails beside another.
# Usage: apt_install.sh PACKAGE...   (as root)
set -eu
exec 9<"$0"
flock 9
apt-get update -qq 9<&-
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" 9<&-
