#!/usr/bin/env bash
# Check a machine in at most 10 minutes, with a page to read: launch/gpu_check.sh [FOLDER] (default runs/gpu_check-TIME)
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# Where nothing can be installed the doctor still runs, and says why.
python=$("${PYTHON:-python3}" "$root/launch/environment.py" runtime) || python=${PYTHON:-python3}
exec "$python" "$root/launch/gpu_check.py" "$@"
