#!/usr/bin/env bash
# Train in the image lockstep:cpu, or lockstep:gpu where a GPU is: launch/docker.sh [flags of trainers/custom_loop.py]
# Runs land in ./runs as the caller's files. ENGINE, IMAGE, RUNS and ENGINE_FLAGS (more flags of `docker run`) override;
# TRAINER is another loop: of the image, e.g. TRAINER=contrastive_loop, or a module of yours. The packages and modules of
# the current directory are mounted, read-only, where the trainer looks for them last.
set -euo pipefail
engine=${ENGINE:-$(command -v docker || command -v podman)} || { echo "launch/docker.sh: neither docker nor podman is here; install one" >&2; exit 2; }
root=$(dirname -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")")
stage=cpu gpus=()
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  stage=gpu
  case $(basename "$engine") in podman) gpus=(--device nvidia.com/gpu=all) ;; *) gpus=(--gpus all) ;; esac
  # NCCL pins memory and wants a large stack.
  gpus+=(--ulimit memlock=-1 --ulimit stack=67108864)
fi
runs=$(realpath -m -- "${RUNS:-runs}")
case $runs in *:*) echo "launch/docker.sh: RUNS is ${RUNS:-runs} ($runs), but $engine ends the path of a volume at a colon; name a directory without one" >&2; exit 2 ;; esac
read -r -a more <<<"${ENGINE_FLAGS:-}"
loop=()
if [ -n "${TRAINER:-}" ]; then
  case $TRAINER in */* | *.py) echo "launch/docker.sh: TRAINER is $TRAINER, a path; name a loop of the image or a module, e.g. my_pkg.my_loop" >&2; exit 2 ;; esac
  loop=(/app/trainers/run_loop.py "$TRAINER")
  if [ -f "$root/trainers/$TRAINER.py" ]; then loop=("/app/trainers/$TRAINER.py"); fi
  more+=(--entrypoint python)
fi
image=${IMAGE:-lockstep:$stage}
here=$(pwd -P)
# What Python can import from here: folders that hold Python files, and modules; no environment, none of this checkout.
found=()
for path in *; do
  name=${path%.py}
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || continue
  case $name in runs | models | trainers | __pycache__) continue ;; esac
  if [ "$here" = "$root" ] && [[ $name == launch || $name == tests ]]; then continue; fi
  if [ -d "$path" ]; then
    if [ "$path" != "$name" ] || [ -e "$path/pyvenv.cfg" ] || [ -z "$(find -L "$path" -maxdepth 4 -name '*.py' -print -quit 2>/dev/null)" ]; then continue; fi
  elif [ "$path" = "$name" ] || [ ! -f "$path" ]; then continue; fi
  found+=("$path")
done
if [ ${#found[@]} -gt 0 ] && { [ "$here" = / ] || [ "$here" = "$(realpath -m -- "${HOME:-/}")" ]; }; then
  echo "launch/docker.sh: nothing of $here is mounted, since it is no project's folder; start from the one that holds your package" >&2
  found=()
fi
own=() mounted=()
if [ ${#found[@]} -gt 0 ]; then
  # What launch/image.sh --with has put in comes first in the image: a mount would not be seen.
  held=" $("$engine" image inspect --format '{{index .Config.Labels "lockstep.with"}}' "$image" 2>/dev/null || true) "
  for path in "${found[@]}"; do
    if [[ $held == *" $path@"* ]]; then
      echo "launch/docker.sh: $image holds $path, which is taken in place of $here/$path" >&2
      continue
    fi
    source=$(realpath -- "$path")
    case $source in *:*) echo "launch/docker.sh: $source is to be mounted, but $engine ends the path of a volume at a colon; start from a directory without one" >&2; exit 2 ;; esac
    own+=(--volume "$source:/work/$path:ro") mounted+=("$path")
  done
  if [ ${#mounted[@]} -gt 0 ]; then echo "launch/docker.sh: mounted read-only: ${mounted[*]}" >&2; fi
fi
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
# NCCL and tf.data share memory between processes.
exec "$engine" run --rm --read-only --tmpfs /tmp:rw,size=2g,mode=1777 --cap-drop ALL \
  --security-opt no-new-privileges --shm-size 1g \
  --user "$user" "${same[@]}" --volume "$runs:/work/runs" "${own[@]}" "${gpus[@]}" "${more[@]}" "$image" "${loop[@]}" --strategy=mirrored "$@"
