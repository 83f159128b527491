#!/usr/bin/env bash
# Show runs in TensorBoard, from an environment without TensorFlow: launch/tensorboard.sh [LOGDIR] [flags of tensorboard]
# LOGDIR may be an address of an object store: s3://bucket/runs
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$("${PYTHON:-python3}" "$root/launch/environment.py" tensorboard)
logdir=runs
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then logdir=$1 && shift; fi
echo "From another machine: ssh -L 6006:127.0.0.1:6006 $(id -un 2>/dev/null || id -u)@$(hostname), then http://127.0.0.1:6006" >&2
case $logdir in *://*) exec "$python" "$root/launch/follow_store.py" "$logdir" --host=127.0.0.1 "$@" ;; esac
exec "$python" -m tensorboard.main --logdir="$logdir" --host=127.0.0.1 "$@"
