#!/usr/bin/env bash
# arm.sh DIR: Python 3.11 and torch for aarch64 in DIR, without touching this system's packages (Debian; qemu-user runs it).
set -euo pipefail
mkdir -p "$1"
root=$(realpath "$1")
mkdir -p "$root"/apt/{lists/partial,archives/partial}
touch "$root/apt/status"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State=$root/apt" -o "Dir::Cache=$root/apt" -o "Dir::State::status=$root/apt/status")
"${apt[@]}" update
"${apt[@]}" install --yes --no-install-recommends --download-only python3.11 libgomp1 libstdc++6
for package in "$root"/apt/archives/*.deb; do dpkg-deb --extract "$package" "$root"; done
pip=("$(dirname "$0")/../../.venv/bin/python" -m pip install --quiet --no-compile --only-binary :all: --python-version 3.11 --target "$root/site")
for tag in manylinux_2_28 manylinux_2_17 manylinux2014; do pip+=(--platform "${tag}_aarch64"); done
"${pip[@]}" --no-deps torch==2.10.0
"${pip[@]}" filelock typing_extensions sympy networkx jinja2 fsspec numpy safetensors click rich PyYAML pydantic psutil pytest
