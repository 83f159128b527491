#!/usr/bin/env bash
# Build an image of the commit that is checked out: launch/image.sh cpu|gpu|tensorboard [flags of docker or podman build]
# ENGINE=podman chooses the engine, ENGINE_FLAGS adds flags of its build; the image is lockstep:STAGE. Only what is
# committed goes in, with the commit's time.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
stage=${1:?name a stage: cpu, gpu or tensorboard}
shift
engine=${ENGINE:-$(command -v docker || command -v podman)} || { echo "launch/image.sh: neither docker nor podman is here; install one" >&2; exit 2; }
time=$(git log -1 --format=%ct)
case $(basename "$engine") in
  podman) reproducible=(--format docker --timestamp "$time") ;;
  *) reproducible=(--build-arg "SOURCE_DATE_EPOCH=$time") ;;
esac
umask 022 # what is copied into the image is read by another user there
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git archive HEAD Dockerfile .dockerignore requirements models trainers | tar -x -C "$context"
git rev-parse HEAD >"$context/COMMIT"
touch -d "@$time" "$context/COMMIT"
read -ra more <<<"${ENGINE_FLAGS:-}"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
"$engine" build "${reproducible[@]}" --target "$stage" --label "org.opencontainers.image.version=$version" \
  --label "org.opencontainers.image.revision=$(git rev-parse HEAD)" --tag "lockstep:$stage" ${more[@]+"${more[@]}"} "$@" "$context"
