#!/bin/bash
# Builds the images qwen-ray-train and qwen-ray-serve; see docs/deploy.md.
#
#   docker/build.sh            into the local docker, by version
#   docker/build.sh REGISTRY   pushed to REGISTRY; prints what goes into k8s/components/images
#
# TORCH_INDEX=URL  index of torch's builds for CPUs (a small image without CUDA)
# PIP_CONF=FILE    pip's settings while building, such as an index of your own; not left in the image
# BASE=IMAGE       another base than docker/Dockerfile's
set -euo pipefail
cd "$(dirname "$0")/.."
registry=${1:-}
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' qwen_ray/__init__.py)
base=${BASE:-$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)}
if [[ $base != *@* ]]; then # what a tag means changes; its digest does not
  base="$base@$(docker buildx imagetools inspect "$base" --format '{{json .Manifest.Digest}}' | tr -d '"')"
fi
echo "base: $base" >&2
metadata=$(mktemp)
trap 'rm -f "$metadata"' EXIT
for target in train serve; do
  image="${registry:+$registry/}qwen-ray-$target"
  if [[ -n $registry ]]; then where=(--push --provenance=true); else where=(--load); fi
  docker buildx build --file docker/Dockerfile --target "$target" --tag "$image:$version" \
    --build-arg "BASE=$base" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" \
    ${PIP_CONF:+--secret "id=pip,src=$PIP_CONF"} --metadata-file "$metadata" "${where[@]}" .
  if [[ -n $registry ]]; then
    digest=$(sed -n 's/.*"containerimage.digest": "\(sha256:[0-9a-f]*\)".*/\1/p' "$metadata" | head -n 1)
    echo "kustomize edit set image qwen-ray-$target=$image@$digest"
  else
    echo "$image:$version"
  fi
done
