#!/usr/bin/env bash
# Remake the hash locks from requirements/*.in. Needs uv (`pip install uv`); pass --upgrade to move versions.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../requirements"
lock() {
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-header --no-annotate "$@"
}
lock "$@" build.in -o build.txt
lock "$@" runtime.in -c build.txt -o cpu.txt
lock "$@" gpu.in -c cpu.txt -o gpu.txt
lock "$@" storage.in -c cpu.txt -o storage.txt
lock "$@" test.in -c cpu.txt -o test.txt
lock "$@" tensorboard.in -c cpu.txt -c storage.txt -o tensorboard.txt
lock "$@" sbom.in -o sbom.txt
lock "$@" k8s.in -o k8s.txt
lock "$@" metrics.in -o metrics.txt
lock "$@" mlflow.in -c cpu.txt -o mlflow.txt
lock "$@" wandb.in -c cpu.txt -c mlflow.txt -o wandb.txt
lock "$@" trackers.in -c mlflow.txt -o trackers.txt
lock "$@" tokenize.in -o tokenize.txt
lock "$@" emulators.in -o emulators.txt
lock "$@" jax.in -c cpu.txt -o jax.txt
