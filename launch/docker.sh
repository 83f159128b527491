#!/usr/bin/env bash
# Train in the image lockstep:cpu, or lockstep:gpu where a GPU is: launch/docker.sh [flags of trainers/custom_loop.py]
# Runs land in ./runs as the caller's files. ENGINE, IMAGE, RUNS and ENGINE_FLAGS (more flags of `docker run`) override;
# TRAINER is another loop of the image, e.g. TRAINER=contrastive_loop.
set -euo pipefail
engine=${ENGINE:-$(command -v docker || command -v podman)} || { echo "launch/docker.sh: neither docker nor podman is here; install one" >&2; exit 2; }
stage=cpu gpus=()
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  stage=gpu
  case $(basename "$engine") in podman) gpus=(--device nvidia.com/gpu=all) ;; *) gpus=(--gpus all) ;; esac
  # NCCL pins memory and wants a large stack.
  gpus+=(--ulimit memlock=-1 --ulimit stack=67108864)
fi
runs=$(realpath -m -- "${RUNS:-runs}")
case $runs in *:*) echo "launch/docker.sh: RUNS is ${RUNS:-runs} ($runs), but $engine ends the path of a volume at a colon; name a directory without one" >&2; exit 2 ;; esac
user=$(id -u):$(id -g)
# Root trains as whoever called sudo, else as the image's own user; a directory that is there keeps its owner.
if [ "$(id -u)" = 0 ]; then user=${SUDO_UID:-10001}:${SUDO_GID:-10001}; fi
if [ ! -d "$runs" ]; then
  mkdir -p -- "$runs"
  if [ "$(id -u)" = 0 ]; then chown "$user" -- "$runs"; fi
fi
# Podman without root maps the caller to root inside unless told to keep the id.
same=()
if [ "$(basename "$engine")" = podman ] && [ "$(id -u)" != 0 ]; then same=(--userns keep-id); fi
read -r -a more <<<"${ENGINE_FLAGS:-}"
loop=()
if [ -n "${TRAINER:-}" ]; then more+=(--entrypoint python) loop=("/app/trainers/$TRAINER.py"); fi
# NCCL and tf.data share memory between processes.
exec "$engine" run --rm --read-only --tmpfs /tmp:rw,size=2g,mode=1777 --cap-drop ALL \
  --security-opt no-new-privileges --shm-size 1g \
  --user "$user" "${same[@]}" --volume "$runs:/work/runs" "${gpus[@]}" "${more[@]}" "${IMAGE:-lockstep:$stage}" "${loop[@]}" --strategy=mirrored "$@"
