"""A package that names a module under the entry point group `semilearn.plugins` is known without being imported by anyone."""
# ruff: noqa: E402, PT017, PT018, SIM118

import os
import sys
from pathlib import Path

import torch

MODULE = """
import semilearn.nets
from semilearn.algorithms.fixmatch import FixMatch
from semilearn.algorithms.utils import SSL_Argument
from semilearn.core.utils import ALGORITHMS, DATASETS

with open("times_loaded", "a") as f:
    f.write("1")


@ALGORITHMS.register("made_up_match")
class MadeUpMatch(FixMatch):
    @staticmethod
    def get_argument():
        return [*FixMatch.get_argument(), SSL_Argument("--made_up", float, 0.25)]


def made_up_net(num_classes, **_):
    return f"a net of {num_classes} classes"


assert "made_up_match" in ALGORITHMS
semilearn.nets.made_up_net = made_up_net
DATASETS["made_up_images"] = lambda **kwargs: ([kwargs["dataset"]], [], [])
"""


def installed(name, module):
    """A folder with a distribution `name` that offers the module `name` as a plugin."""
    info = Path(f"site_{name}/{name}-1.0.dist-info")
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[semilearn.plugins]\n{name} = {name}_plugin\n")
    (info.parent / f"{name}_plugin.py").write_text(module)
    return str(info.parent.resolve())


broken = installed("broken", "import a_package_that_is_not_there\n")
sys.path += [installed("made_up", MODULE), broken]

from semilearn import get_algorithm, get_config, get_dataset, get_net_builder
from semilearn.core.utils import ALGORITHMS

assert not Path("times_loaded").exists(), "a plugin was loaded while semilearn itself was"
assert "fixmatch" in ALGORITHMS and ALGORITHMS["fixmatch"].__name__ == "FixMatch"
assert callable(get_net_builder("wrn_28_2", False)), "a broken plugin stops what needs no plugin"
import semilearn.datasets

semilearn.datasets.get_cifar = lambda *_, **__: (["cifar"], [], [])
plain = get_dataset(None, "fixmatch", "cifar10", 40, 10)
assert plain["train_lb"] == ["cifar"], "a broken plugin stops a data set of USB's own"
try:
    get_net_builder("made_up_net", False)
except ImportError as e:
    assert "broken_plugin" in str(e) and "a_package_that_is_not_there" in str(e), e
else:
    raise AssertionError("a plugin that cannot be imported passes without a word")
sys.path.remove(broken)

args = get_config({"algorithm": "made_up_match", "dataset": "made_up_images", "amp": False, "distributed": False})
assert args.made_up == 0.25, args
assert get_net_builder("made_up_net", False)(num_classes=3) == "a net of 3 classes"
assert get_dataset(args, "made_up_match", "made_up_images", 6, 3)["train_lb"] == ["made_up_images"]
assert "made_up_match" in ALGORITHMS.keys()
assert Path("times_loaded").read_text() == "1", "a plugin was loaded more than once"
args.dataset = "none"  # no loaders
args.lb_dest_len = args.ulb_dest_len = 6
built = get_algorithm(args, lambda **_: torch.nn.Linear(2, 2), None, None)
assert type(built).__name__ == "MadeUpMatch"

train = Path(os.environ["USB_TREE"], "train.py")
if train.is_file():
    import runpy

    sys.argv = ["train.py", "--algorithm", "made_up_match"]
    parsed = runpy.run_path(str(train))["get_config"]()
    assert (parsed.algorithm, parsed.made_up) == ("made_up_match", 0.25), parsed
