#!/usr/bin/env bash
# What only a machine with a GPU can show, written to results/<device>-<date>/:
#   the CUDA tests, the speed of views, of label propagation and of a step against stock USB, and CIFAR-10 training for as long as it is given.
#
#   benchmarks/device.sh OUT [DATA_DIR] [MINUTES]
#
# OUT       folder for what it writes
# DATA_DIR  folder that holds cifar-10-batches-py; without it no training [data]
# MINUTES   of training, shared by MUSCLE + FixMatch and FixMatch [6]
#
# PYTHON names an interpreter with this package's dependencies [python].
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${1:?usage: benchmarks/device.sh OUT [DATA_DIR] [MINUTES]}
data=${2:-data}
minutes=${3:-6}
mkdir -p "$out"
status=0

say() { echo "== $*" | tee -a "$out/report.txt"; }
try() {
    say "$*"
    "$@" 2>&1 | tee -a "$out/report.txt" || status=1
}

say "$(date -u +%FT%TZ), revision $(git describe --always --dirty 2>/dev/null || echo unknown)"
try nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
try "$PYTHON" -c 'import sys, torch, torchvision, semilearn; from importlib.metadata import version
print("python", sys.version.split()[0], "torch", torch.__version__, "torchvision", torchvision.__version__, "semilearn", version("semilearn"))'
try "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_cuda.py
try "$PYTHON" benchmarks/views.py --device cuda --seconds 3
for classes in 10 100; do
    try "$PYTHON" benchmarks/propagation.py --device cuda --sizes 50000 200000 --classes "$classes"
done
if [ -d "$data/cifar-10-batches-py" ]; then
    try "$PYTHON" benchmarks/data.py --data_dir "$data" --rounds 1
    for precision in fp32 bf16; do # stock USB's amp is fp16
        try "$PYTHON" benchmarks/step.py --device cuda --precision "$precision" --nets cnn13 wrn_28_2 --data_dir "$data" \
            --seconds 2 --rounds 3
    done
    try "$PYTHON" benchmarks/overhead.py --device cuda --precision bf16 --nets cnn13 --data_dir "$data" --seconds 1 --rounds 3
    for algorithm in muscle_fixmatch fixmatch; do
        # as many steps as fit: the speed of a short run decides
        short=(--c "benchmark_configs/${algorithm}_cifar10_250.yaml" --data_dir "$data" --device cuda --precision bf16
            --save_dir "$out/runs" --overwrite --use_tensorboard false --epoch 1)
        try "$PYTHON" train.py "${short[@]}" --num_train_iter 300 --num_eval_iter 300 --save_name "${algorithm}_short"
        steps=$("$PYTHON" - "$out/runs/${algorithm}_short/result.json" "$minutes" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
print(max(500, int(float(sys.argv[2]) * 60 / 2 / (r["seconds"] / r["steps"]) * 0.9)))
PY
        )
        try "$PYTHON" train.py "${short[@]}" --num_train_iter "$steps" --num_eval_iter 1000 --save_name "$algorithm"
        cp "$out/runs/$algorithm/result.json" "$out/$algorithm.result.json"
    done
    rm -rf "$out"/runs
else
    say "no $data/cifar-10-batches-py: no training"
fi
exit $status
