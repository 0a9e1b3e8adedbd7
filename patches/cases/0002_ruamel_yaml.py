"""A configuration file is read with any ruamel.yaml, to plain values only."""

from argparse import Namespace
from contextlib import suppress
from pathlib import Path

from ruamel.yaml import YAMLError
from semilearn.core.utils import over_write_args_from_file

Path("config.yaml").write_text("lr: 0.03\nepoch: 7\nnet: wrn_28_2\namp: False\ngpu: None\nsmall: 5e-4\n")
args = Namespace(lr=0.1, seed=1)
over_write_args_from_file(args, "config.yaml")
expected = {"lr": 0.03, "seed": 1, "epoch": 7, "net": "wrn_28_2", "amp": False, "gpu": "None", "small": 5e-4}
assert vars(args) == expected, vars(args)

Path("hostile.yaml").write_text("lr: !!python/object/apply:os.mkdir [was_run]\n")
with suppress(YAMLError):
    over_write_args_from_file(args, "hostile.yaml")
assert not Path("was_run").exists(), "reading a configuration file ran code"
