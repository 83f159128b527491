#!/usr/bin/env bash
# Build an image of the commit that is checked out: launch/image.sh cpu|gpu|tensorboard [flags of docker or podman build]
# Put packages of your own on top of one:           launch/image.sh --with=PACKAGE [--with=OTHER] [--tag=NAME] cpu|gpu
# ENGINE=podman chooses the engine, ENGINE_FLAGS adds flags of its build; the image is lockstep:STAGE, or NAME of
# --tag=NAME. Only what is committed goes in, with the commit's time. With packages it is lockstep:STAGE-PACKAGE, one
# layer on lockstep:STAGE: what git would not ignore of them, without hidden files, in /app/own.
set -euo pipefail

# One line and code 2.
refuse() {
  echo "launch/image.sh: $1" >&2
  exit 2
}

# The files of a package that belong into an image, each ended by a zero byte, relative to the folder that holds the
# package: without what git ignores, whether the folder is git's or not, and what .dockerignore names.
files_of() {
  local holds=$1 name=$2 file kept=() ignored=()
  local list=(git -C "$holds" ls-files -z --cached --others)
  if ! git -C "$holds" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git init --quiet --bare "$context/.git"
    list=(git -C "$holds" --git-dir="$context/.git" --work-tree="$holds" ls-files -z --others)
  fi
  for file in "$holds/.dockerignore" "$holds/$name/.dockerignore"; do
    if [ -f "$file" ]; then ignored+=("--exclude-from=$file"); fi
  done
  declare -A left_out=()
  if [ ${#ignored[@]} -gt 0 ]; then
    while IFS= read -r -d '' file; do left_out[$file]=1; done < <("${list[@]}" --ignored "${ignored[@]}" -- "$name")
  fi
  while IFS= read -r -d '' file; do
    # A file that git knows may be gone; a repository inside of it ends with a slash.
    if [ -f "$holds/$file" ] && [ -z "${left_out[$file]:-}" ]; then kept+=("$file"); fi
  done < <("${list[@]}" --exclude-standard --exclude='.*' --exclude=__pycache__ --exclude='*.pyc' -- "$name")
  if [ ${#kept[@]} -gt 0 ]; then printf '%s\0' "${kept[@]}"; fi
}

# Copies a package into the context.
take() {
  local path name
  path=$(realpath -m -- "${1/#\~\//$HOME/}") # Bash leaves the ~ of --with=~/… as it is
  name=$(basename -- "$path")
  [ -d "$path" ] || refuse "--with=$1 is not a directory; name the folder of a package"
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || refuse "--with=$1: Python cannot import a package of the name '$name'; use letters, digits and _"
  case $name in models | trainers | launch) refuse "--with=$1: the image has a package $name of its own; rename yours" ;; esac
  [ ! -e "$context/own/$name" ] || refuse "--with=$1: there are two packages of the name $name; rename one"
  mkdir -p "$context/own/$name"
  files_of "$(dirname -- "$path")" "$name" >"$context/files"
  tar -C "$(dirname -- "$path")" --dereference --null --files-from="$context/files" --create | tar -x -C "$context/own"
  [ -n "$(find "$context/own/$name" -name '*.py' -print -quit)" ] || refuse "--with=$1 holds no Python files, or git ignores them; name the folder of a package"
  packages+=("$name")
}

# Ends with one line where the image would import something else, or nothing could be imported beside a package.
refuse_shadows() {
  local taken
  taken=$("$engine" run --rm --network none --entrypoint python "$base" -I -c '
import importlib.util, sys
sys.path.insert(0, "/app")
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name)])' "${packages[@]}") || refuse "$base does not run; build it again: launch/image.sh $stage"
  [ -z "$taken" ] || refuse "the image has a module $taken of its own, which yours would hide; rename yours"
}

stage='' tag='' given=() flags=()
for word in "$@"; do
  case $word in
    --with=*) given+=("${word#--with=}") ;;
    --with) refuse "--with needs a value; write --with=PACKAGE" ;;
    --tag=*) tag=${word#--tag=} ;;
    *) if [ -z "$stage" ] && [[ $word != -* ]]; then stage=$word; else flags+=("$word"); fi ;;
  esac
done
[ -n "$stage" ] || refuse "no stage is named; write cpu, gpu or tensorboard"
engine=${ENGINE:-$(command -v docker || command -v podman)} || refuse "neither docker nor podman is here; install one"
root=$(dirname -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")")
umask 022 # what is copied into the image is read by another user there
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
read -ra more <<<"${ENGINE_FLAGS:-}"
packages=()
if [ ${#given[@]} -gt 0 ]; then
  case $stage in cpu | gpu) ;; *) refuse "--with goes on top of cpu or gpu, not of $stage" ;; esac
  for package in "${given[@]}"; do take "$package"; done
fi
time=$(git -C "$root" log -1 --format=%ct)
case $(basename "$engine") in
  podman) reproducible=(--format docker --timestamp "$time") ;;
  *) reproducible=(--build-arg "SOURCE_DATE_EPOCH=$time") ;;
esac

if [ ${#packages[@]} -gt 0 ]; then
  base=lockstep:$stage
  "$engine" image inspect "$base" >/dev/null 2>&1 || refuse "$base is not here; build it first: launch/image.sh $stage"
  refuse_shadows
  of=$("$engine" image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' "$base")
  head=$(git -C "$root" rev-parse HEAD)
  if [ "$of" != "$head" ]; then echo "launch/image.sh: $base is of commit ${of:0:12}, and ${head:0:12} is checked out; launch/image.sh $stage builds that" >&2; fi
  cd -- "$context"
  chmod -R u=rwX,go=rX own
  find own -exec touch -h -d "@$time" {} +
  label=
  for package in "${packages[@]}"; do
    digest=$(cd own && find "$package" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
    label+="${label:+ }$package@sha256:$digest"
  done
  printf 'FROM %s\nCOPY own /app/own\nENV PYTHONPATH=/app/own\n' "$base" >Dockerfile
  printf '*\n!own\n' >.dockerignore
  tag=${tag:-$base-$(IFS=- && echo "${packages[*]}")}
  # The commit's labels come with the image below.
  "$engine" build "${reproducible[@]}" --label "lockstep.with=$label" --tag "$tag" ${more[@]+"${more[@]}"} ${flags[@]+"${flags[@]}"} .
  echo "launch/image.sh: $tag holds $label" >&2
  exit
fi

cd -- "$root"
git archive HEAD Dockerfile .dockerignore requirements models trainers | tar -x -C "$context"
git rev-parse HEAD >"$context/COMMIT"
touch -d "@$time" "$context/COMMIT"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
"$engine" build "${reproducible[@]}" --target "$stage" --label "org.opencontainers.image.version=$version" \
  --label "org.opencontainers.image.revision=$(git rev-parse HEAD)" --tag "${tag:-lockstep:$stage}" ${more[@]+"${more[@]}"} ${flags[@]+"${flags[@]}"} "$context"
