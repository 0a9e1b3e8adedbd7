"""``python train.py --c benchmark_configs/<name>.yaml [--setting value ...]``: the same as ``muscle-plugin train``."""

import sys

from muscle_plugin.cli import as_program, run_command

if __name__ == "__main__":
    sys.exit(as_program(lambda: run_command("train", sys.argv[1:], "train.py")))
