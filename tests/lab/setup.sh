#!/usr/bin/env bash
# Prepares a Debian 12 machine for `make demo`; with the argument `peers` also for `make test` and
# `make perf`, which run other servers, valgrind and iasl; with the argument `fuzz` for `make fuzz`,
# which runs clang's fuzzer and atheris. Installs the packages that are missing (and only those),
# creates .venv, builds vdev into it. Repeating it costs about a second.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$top"
venv=.venv
stamp=$venv/.vdev-setup

say() { printf '\033[1msetup:\033[0m %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

sudo=()
if [ "$(id -u)" != 0 ]; then
    sudo=(sudo)
fi

command -v apt-get >/dev/null || die "this needs Debian (apt-get was not found)"
[ "$(dpkg --print-architecture)" = amd64 ] ||
    die "this is $(dpkg --print-architecture), but the lab's guests are amd64"

# gcc only recommends libc6-dev and qemu-system-x86 only recommends its tools: all are named here,
# since recommended packages (a desktop's worth for QEMU) are left out.
packages=(
    ca-certificates git make gcc libc6-dev pkg-config liburing-dev libseccomp-dev
    qemu-system-x86 qemu-system-common qemu-utils
    fio iperf3 mmdebstrap busybox-static cpio kmod lz4 e2fsprogs mount util-linux
    iproute2 iputils-ping ethtool shellcheck
)
if [ "${1:-}" = peers ]; then
    packages+=(dpdk-dev valgrind acpica-tools)
fi
if [ "${1:-}" = fuzz ]; then
    packages+=(clang-14 libclang-rt-14-dev)
fi
python=$(command -v python3 || true)
if [ -z "$python" ]; then
    packages+=(python3 python3-venv python3-dev)
    python=/usr/bin/python3
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
    "$python" -c 'import os, sysconfig
os.stat(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null ||
        packages+=(python3-dev)
fi

installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' 2>/dev/null | sed -n 's/^installed //p')
missing=()
for package in "${packages[@]}"; do
    grep -qxF "$package" <<<"$installed" || missing+=("$package")
done

# The guest's kernel comes from the same lists, so they are needed even when nothing is missing.
lists_known() { apt-cache show --no-all-versions linux-image-amd64 >/dev/null 2>&1; }

if [ ${#missing[@]} -gt 0 ] || ! lists_known; then
    say "refreshing the package lists (apt-get update)"
    "${sudo[@]}" apt-get -qq update
fi
if [ ${#missing[@]} -gt 0 ]; then
    say "installing with apt-get: ${missing[*]}"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        -o Dpkg::Use-Pty=0 install --no-install-recommends "${missing[@]}" >/dev/null
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is $("$python" --version 2>&1), vdev needs Python 3.11 or newer"

# The list at that place of pyproject.toml, a line each.
requirements() {
    "$python" -c "import tomllib
print(*tomllib.load(open('pyproject.toml', 'rb'))$1, sep='\n')"
}

# An editable install rebuilds itself when imported; a new install is only needed when the
# packaging or the interpreter changes.
wanted=$({
    "$python" -c 'import sys; print(sys.version, sys.prefix)'
    cat pyproject.toml tests/lab/setup.sh
} | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "creating $venv with $("$python" --version 2>&1)"
    "$python" -m venv "$venv"
    mapfile -t tools < <(requirements '["build-system"]["requires"]')
    say "installing the build tools into $venv: ${tools[*]}"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "${tools[@]}"
    say "building vdev and installing it into $venv with what its tests need"
    PATH="$top/$venv/bin:$PATH" "$venv/bin/python" -m pip install -q --disable-pip-version-check \
        --no-build-isolation -e '.[dev]'
    printf '%s\n' "$wanted" >"$stamp"
else
    # Rebuilds what has changed now, as this user, rather than later as root.
    "$venv/bin/python" -c 'import vdev' || die "vdev does not build; see the messages above"
fi
if [ "${1:-}" = fuzz ] && ! "$venv/bin/python" -c 'import atheris' 2>/dev/null; then
    mapfile -t tools < <(requirements '["project"]["optional-dependencies"]["fuzz"]')
    say "installing into $venv: ${tools[*]}"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "${tools[@]}"
fi
