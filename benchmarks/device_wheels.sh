#!/usr/bin/env bash
# Wheels that a machine for training is likely not to have, to be carried there: benchmarks/device.sh --part check --wheels DIR.
#
#   benchmarks/device_wheels.sh DIR [PYTHON_VERSION]
#
# DIR             folder to download to: about 3 MB
# PYTHON_VERSION  of the other machine, which is Linux on x86-64 [3.12]
#
# Without dependencies, but for pydantic's, which must fit it exactly. pytorch-metric-learning is for the algorithm
# contrastive alone. faiss (tens of megabytes) is left out: PyTorch does its work on a GPU in any case.
set -euo pipefail
case "${1:-}" in
    "" | -*) echo "usage: benchmarks/device_wheels.sh DIR [PYTHON_VERSION]" >&2; exit 2 ;;
esac
dir=$1
download() {
    "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --dest "$dir" --only-binary=:all: \
        --python-version "$version" --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}
version=${2:-3.12}
download --no-deps "semilearn==0.3.2" "ruamel.yaml>=0.18" pytorch-metric-learning pytest-xdist execnet pytest-timeout
download pydantic
du -sh "$dir"
