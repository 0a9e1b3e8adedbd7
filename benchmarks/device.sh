#!/usr/bin/env bash
# All that a GPU should be asked in 25 minutes: the CUDA tests, the benchmarks, CIFAR-10 training. benchmarks/device.py does
# the work; `benchmarks/device.sh --help` lists its options.
#
#   benchmarks/device.sh OUT [--minutes 25] [--only tests,views,propagation,step,...] [--data_dir data] [--wheels DIR]
#
#   benchmarks/device.sh out/1 --minutes 10 --only tests,step,overhead   # in calls of ten minutes, a folder each
#   benchmarks/device.sh out/2 --minutes 10 --only training
#   benchmarks/device.sh out --device cpu --minutes 5                    # a rehearsal without a GPU: the same, tiny
#
# It wants no network, but Python 3.10 or newer, PyTorch, torchvision, timm, scikit-learn (with numpy and scipy),
# rich, tensorboard, matplotlib, Pillow and pytest, which machines for training have, and semilearn, pydantic, ruamel.yaml,
# which they seldom have. Where there is a network (and for a Python other than 3.12, see there):
#
#   benchmarks/device_wheels.sh wheels        # about 3 MB
#
# The folder is carried along with the repository and given as --wheels. Of what semilearn itself asks for, wandb, aim,
# progress, scikit-image, torchaudio and transformers may be absent; so may faiss. PYTHON names the interpreter [python].
exec "${PYTHON:-python}" "$(dirname "$0")/device.py" "$@"
