#!/bin/bash
# Run on each new machine by `ray up` (setup_commands): qwen-ray with the versions of the lock, and the shared
# storage. Run again, it changes nothing but a qwen-ray that is another one than this checkout.
#
#   bash setup.sh nfs ADDRESS:/PATH    mounts it at /storage
#   bash setup.sh mounted              /storage is there already (on premises)
set -euo pipefail
source_folder=$(cd "$(dirname "$0")/.." && pwd)
home=$HOME/.qwen-ray
case $1 in
  nfs)
    if ! mountpoint --quiet /storage; then
      # A new machine updates itself: wait for its lock.
      sudo apt-get update --quiet -o DPkg::Lock::Timeout=300
      sudo apt-get install -o DPkg::Lock::Timeout=300 --yes --quiet nfs-common python3-venv
      sudo mkdir -p /storage
      sudo mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,retrans=2,noresvport "$2" /storage
      sudo chown "$(id -u):$(id -g)" /storage
    fi
    ;;
  mounted)
    if [[ ! -w /storage ]]; then
      echo "error: /storage is not there, or cannot be written by $(id -un)" >&2
      exit 2
    fi
    ;;
  *)
    echo "error: nfs ADDRESS:/PATH, or mounted" >&2
    exit 2
    ;;
esac
now=$(cd "$source_folder" && find docker/requirements.lock pyproject.toml qwen_ray -type f -not -name '*.pyc' -print0 |
  LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
if [[ $now != "$(cat "$home/installed" 2>/dev/null)" ]]; then
  python3 -m venv "$home"
  # torch first: its build fits the machine, and the lock leaves it out.
  "$home/bin/pip" install --quiet "$(grep -o 'torch [0-9.]*[0-9]' "$source_folder/docker/requirements.lock" | sed 's/ /==/')"
  "$home/bin/pip" install --quiet --constraint "$source_folder/docker/requirements.lock" "$source_folder[rag,gpu]"
  echo "$now" > "$home/installed" # last: an installation that broke off is done again
fi
if ! grep --quiet qwen-ray ~/.bashrc; then
  echo "export PATH=$home/bin:\$PATH RAY_AUTH_MODE=token HF_HOME=/storage/huggingface RAY_USAGE_STATS_ENABLED=0" >> ~/.bashrc
fi
