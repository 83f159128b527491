#!/usr/bin/env bash
# Look for known vulnerabilities in a lock: launch/audit.sh [cpu|gpu|tensorboard]. 0 = none is known, 1 = the list of them,
# 75 = the database could not be asked about some or all packages, which says nothing about those.
set -uo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$("${PYTHON:-python3}" "$root/launch/environment.py" sbom) || exit $?
lock=$root/requirements/${1:-cpu}.txt
[ -f "$lock" ] || { echo "launch/audit.sh: there is no lock '${1:-cpu}'; name cpu, gpu or tensorboard" >&2; exit 2; }
output=$("$python" -m pip_audit --requirement "$lock" --require-hashes --disable-pip --progress-spinner=off 2>&1)
echo "$output" | grep -v -e '^WARNING' -e 'could not be audited'
unasked=$(grep -c 'could not be audited' <<<"$output")
if grep -q 'Found .* known vulnerabilit' <<<"$output"; then exit 1; fi
if [ "$unasked" -gt 0 ] || ! grep -q 'No known vulnerabilities found' <<<"$output"; then
  echo "launch/audit.sh: not audited: the database of vulnerabilities could not be asked about ${unasked/#0/all} packages" >&2
  exit 75
fi
