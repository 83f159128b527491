#!/usr/bin/env bash
# Make a base for the Dockerfile where no registry can be reached: Debian bookworm with its Python 3.11, as
# localhost/lockstep-base:bookworm, for launch/image.sh … --build-arg BASE_IMAGE=… Needs root and debootstrap.
set -euo pipefail
engine=${ENGINE:-$(command -v podman || command -v docker)} || { echo "launch/base_image.sh: neither podman nor docker is here; install one" >&2; exit 2; }
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >&2
ln -s python3 "$root/usr/bin/python"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
tar -C "$root" -c . | "$engine" import - localhost/lockstep-base:bookworm
