#!/usr/bin/env bash
# Debian packages that some tests need. Installed where this is allowed; where not, those tests are skipped by name.
set -u
packages=()
need() { command -v "$1" >/dev/null 2>&1 || packages+=("$2"); }
need chromium chromium
need prometheus prometheus
need sshd openssh-server
need rsync rsync
need ip iproute2
command -v initdb >/dev/null 2>&1 || compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null || packages+=(postgresql)
[ ${#packages[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "not installed (needs root and apt-get): ${packages[*]}; the tests that use them are skipped by name"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# The services themselves must not start: tests start their own on loopback.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq >/dev/null 2>&1
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 \
    || echo "could not install: ${packages[*]}; the tests that use them are skipped by name"
exit 0
