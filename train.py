"""``python train.py --c benchmark_configs/<name>.yaml [--setting value ...]``: the same as ``muscle-plugin train``."""

import sys

from muscle_plugin.cli import in_utf8, run_command

if __name__ == "__main__":
    in_utf8()
    sys.exit(run_command("train", sys.argv[1:], "train.py"))
