#!/usr/bin/env bash
# What a GPU lent for fifteen minutes is asked, in two visits: `check` takes four minutes at most, `train` seven; to start a
# machine and to bring everything there takes a minute or two each time. benchmarks/device.py does the work;
# `benchmarks/device.sh --help` lists its options.
#
#   benchmarks/device.sh [OUT] --part check [--wheels DIR]
#       CUDA tests; a step against stock USB; views; label propagation; a profile of a step. Wants no data set.
#   benchmarks/device.sh [OUT] --part train --data_dir DIR [--wheels DIR]
#       CIFAR-10 with 250 labels: FixMatch and MUSCLE + FixMatch at the same time; accuracy at equal steps and seconds.
#
#   benchmarks/device.sh out --part check --device cpu --minutes 2    # rehearsals without a GPU: the same, tiny
#   benchmarks/device.sh out --part train --device cpu --minutes 2
#
# OUT is results/gpu/<date>-<device> by itself; both parts may have the same. Where one brings them together later:
# `python benchmarks/device_summary.py OUT` writes its summary.md anew.
#
# It wants no network, but Python 3.10 or newer, PyTorch with Triton, torchvision, timm, scikit-learn (with numpy and scipy),
# rich, tensorboard, matplotlib, Pillow and pytest, which machines for training have; and semilearn, pydantic, ruamel.yaml,
# pytest-xdist, pytest-timeout, which they seldom have. Where there is a network (and for a Python other than 3.12, see there):
#
#   benchmarks/device_wheels.sh wheels        # about 3 MB
#
# The folder is carried along with the repository and given as --wheels. Of what semilearn itself asks for, wandb, aim,
# progress, scikit-image, torchaudio and transformers may be absent; so may faiss. PYTHON names the interpreter [python3].
exec "${PYTHON:-python3}" "$(dirname "$0")/device.py" "$@"
