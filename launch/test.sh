#!/usr/bin/env bash
# Install what is missing into .venv (first call only), then run the test suite: launch/test.sh [flags of pytest]
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$("${PYTHON:-python3}" "$root/launch/environment.py" test)
cd -- "$root"
exec "$python" -m pytest "$@"
