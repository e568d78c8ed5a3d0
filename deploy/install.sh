#!/bin/sh
# Puts Pagoda into a Python environment: the steps of the images, for any machine.
#   deploy/install.sh cpu|cuda [PYTHON]
# PIP_ARGS is passed on to pip, for a private index, say.
set -eu
kind=${1:?say cpu or cuda}
python=${2:-python3}
source=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
case $kind in
cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;;
cuda) index="" ;;
*)
    echo "$kind is neither cpu nor cuda" >&2
    exit 2
    ;;
esac
# shellcheck disable=SC2086
"$python" -m pip install --no-cache-dir $index ${PIP_ARGS:-} "$source[serve]"
"$python" -m pagoda.cli.main env
