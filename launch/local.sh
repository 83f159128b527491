#!/usr/bin/env bash
# Install what is missing into .venv (first call only), then train: launch/local.sh [flags of trainers/custom_loop.py]
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$("${PYTHON:-python3}" "$root/launch/environment.py" runtime)
exec "$python" "$root/trainers/custom_loop.py" --strategy=mirrored "$@"
