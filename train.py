"""``python train.py --c benchmark_configs/<name>.yaml [--setting value ...]``: the same as ``muscle-plugin train``."""

import sys

from muscle_plugin.cli import in_utf8
from muscle_plugin.cli.train import train_command

if __name__ == "__main__":
    in_utf8()
    sys.exit(train_command(sys.argv[1:], "train.py"))
