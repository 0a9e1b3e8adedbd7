"""A configuration file builds on others by `extends`."""
# ruff: noqa: PT017

import os
from argparse import Namespace
from pathlib import Path

from semilearn.core.utils import over_write_args_from_file


def write(name, text):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)


def read(name):
    args = Namespace(seed=7)
    over_write_args_from_file(args, name)
    return vars(args)


write("base/net.yaml", "net: wrn_28_2\nlr: 0.1\n")
write("base/protocol.yaml", "extends: net.yaml\nlr: 0.2\nepoch: 3\n")
write("base/other.yaml", "epoch: 4\nclip_grad: 1\n")
write("run.yaml", "extends: [base/protocol.yaml, base/other.yaml]\nclip_grad: 0\n")
expected = {"seed": 7, "net": "wrn_28_2", "lr": 0.2, "epoch": 4, "clip_grad": 0}
assert read("run.yaml") == expected, read("run.yaml")
write("plain.yaml", "seed: 1\ndataset: cifar10\n")
assert read("plain.yaml") == {"seed": 1, "dataset": "cifar10"}
os.mkdir("elsewhere")
os.chdir("elsewhere")  # relative to the file, not to the folder one is in
assert read("../run.yaml") == expected
write("nothing.yaml", "# only a comment\n")
assert read("nothing.yaml") == {"seed": 7}

write("lost.yaml", "extends: nowhere.yaml\n")
write("circle.yaml", "extends: around.yaml\n")
write("around.yaml", "extends: circle.yaml\n")
write("number.yaml", "extends: 3\n")
write("list.yaml", "- lr\n")
for name, words in {
    "lost.yaml": ("nowhere.yaml", "lost.yaml"), "circle.yaml": ("circle.yaml", "around.yaml"),
    "number.yaml": ("number.yaml", "extends", "3"), "list.yaml": ("list.yaml",), "absent.yaml": ("absent.yaml",),
}.items():  # fmt: skip
    try:
        read(name)
    except (OSError, ValueError) as e:
        assert all(word in str(e) for word in words), f"{name}: {e}"
    else:
        raise AssertionError(f"{name} was read")
