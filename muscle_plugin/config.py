"""Settings: defaults, YAML files (layered by ``extends``) and the command line, checked together.

Precedence: command line over YAML over defaults. Names are USB's wherever USB has one. Everything that is wrong is
reported at once, each with the place it came from. Nothing here imports torch or semilearn, so that ``--help`` and an
error answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import ScalarNode

from muscle_plugin.algorithms.catalogue import (
    MUSCLE,
    MUSCLE_PREFIX,
    NOT_HOSTED,
    Algorithm,
    CatalogueError,
    all_algorithms,
    base_algorithms,
    muscle_algorithms,
)
from muscle_plugin.algorithms.own import stage_1_epochs
from muscle_plugin.closest import closest, did_you_mean
from muscle_plugin.data.names import DATASETS, NETS, DatasetInfo
from muscle_plugin.extend import PluginError
from muscle_plugin.plugins import load_all, located
from muscle_plugin.text import shown

__all__ = ["ConfigError", "Resolved", "config_directory", "config_names", "load_settings"]

#: What a configuration file may be: its size, how deep its YAML nests, how many files ``extends`` may bring in.
MOST_BYTES = 1 << 18
MOST_DEPTH = 20
MOST_FILES = 64
#: No setting is a longer text (a path has 4,096 bytes at most) or a larger whole number.
MOST_CHARACTERS = 4096
MOST_WHOLE = 2**53
MOST_IMAGES = 2**20  # of a step
EXAMPLE = "muscle_fixmatch_digits_10"
#: What a message about an unknown name adds.
OF_ONES_OWN = " (one of your own: --plugins FILE)"


class ConfigError(ValueError):
    """One or more settings are wrong. ``str()`` gives one line per fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


def device_fault(name: str) -> str | None:
    """Why a device cannot be used, whether or not this machine has it; None if it can."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        return None
    return (
        "only CPUs and CUDA GPUs can be used (USB's algorithms call CUDA by name): give auto, cpu, cuda or cuda:N with"
        " N = 0, 1, ..."
    )


def _known_device(name: str) -> str:
    if fault := device_fault(name):
        raise PydanticCustomError("device", "{fault}", {"fault": fault})
    return name


class RunSettings(BaseModel):
    """Settings that every run has. ``json_schema_extra={"moves": True}`` marks those that may differ when a run is resumed
    (and among runs that a report averages), since they say where and how it is computed, not what: at most rounding differs."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    plugins: tuple[str, ...] = Field(
        (),
        description="Python files or modules, separated by commas, that add algorithms, data sets and nets of your own; they"
        " are run. Alone, --plugins stands for those that the configuration names, which are not run without it",
        json_schema_extra={"moves": True},
    )

    # -- what to train
    algorithm: str = Field(
        "fixmatch", description="an algorithm of USB or of this package, `muscle`, or `muscle_<algorithm>`"
    )
    dataset: str = Field("digits", description="data set: " + ", ".join(DATASETS))
    net: str = Field(
        "small_cnn", description="net: " + ", ".join(NETS) + ", one of USB's (wrn_28_2, ...), or timm:<name>"
    )
    num_labels: int | None = Field(
        None, ge=1, description="labelled images in all; default: the data set's, and of a folder all"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="sets the labelled subset, the initial weights and the order")

    # -- length
    epoch: int = Field(1, ge=1, description="epochs; one is a pass over the unlabelled images")
    num_train_iter: int | None = Field(
        None, ge=1, description="training steps in all, as in USB; default, and 0: epoch x the steps of one pass"
    )
    num_warmup_iter: int = Field(0, ge=0, description="steps of linear learning-rate warm-up")
    num_eval_iter: int = Field(100, ge=1, description="steps between two evaluations")
    num_log_iter: int = Field(10, ge=1, description="steps between two log lines; losses are averaged in between")
    num_save_iter: int | None = Field(
        None,
        ge=1,
        description="steps between two checkpoints; default: num_eval_iter",
        json_schema_extra={"moves": True},
    )

    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="checkpoints to keep: the newest and those before it, which serve if it is damaged",
        json_schema_extra={"moves": True},
    )

    # -- batch
    total_batch: int | None = Field(
        None, ge=2, le=MOST_IMAGES, description="B: images per step, labelled and unlabelled; default 128"
    )
    ratio: float | None = Field(None, gt=0, description="r = I/J: unlabelled images per labelled one; default 1")
    batch_size: int | None = Field(None, ge=1, le=MOST_IMAGES, description="USB's name: J, labelled images per step")
    uratio: float | None = Field(None, gt=0, description="USB's name for ratio")
    eval_batch_size: int = Field(
        256, ge=1, description="images per evaluation batch", json_schema_extra={"moves": True}
    )

    # -- stage
    stage: Literal["train", "pretrain"] = Field(
        "train", description="pretrain: without labels, for muscle, contrastive and muscle_contrastive"
    )
    init_from: str | None = Field(
        None,
        description="checkpoint, run directory or state dict (also timm's) whose weights to start from, without its classifier;"
        " {save_dir} and {seed} in it stand for these settings",
    )
    init_head: bool = Field(False, description="take the classifier of init_from too")

    # -- optimisation
    optim: Literal["SGD", "AdamW"] = Field("SGD", description="optimiser")
    lr: float = Field(0.03, gt=0, description="initial learning rate")
    lr_schedule: Literal["usb", "cosine", "constant"] = Field(
        "usb", description="usb: 7/16 of a cosine cycle (cosine to 0.195); cosine: half a cycle, to 0 at lr_zero_at"
    )
    lr_zero_at: float = Field(
        1.0,
        ge=1,
        description="of lr_schedule cosine: where it reaches 0, over the run's length (paper: 210/180 = 1.1667)",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum (Nesterov)")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay; not on biases and batch-norm parameters")
    decay_all: bool = Field(False, description="weight decay on these too, as in Mean Teacher and label propagation")
    layer_decay: float = Field(1.0, gt=0, le=1, description="layer-wise learning-rate decay, for transformers")
    clip_grad: float = Field(0.0, ge=0, description="gradient norm to clip to; 0: no clipping")
    nonfinite_steps: int | None = Field(
        None,
        ge=0,
        description="of precision fp16: steps in a row whose loss or gradient may be not finite, and which are left out;"
        " default 20. Otherwise the first such loss ends the run",
        json_schema_extra={"moves": True},
    )
    ema_m: float = Field(0.999, ge=0, lt=1, description="momentum of the averaged weights that are evaluated; 0: none")
    ulb_loss_ratio: float = Field(1.0, ge=0, description="weight of the base's unsupervised loss")
    use_cat: bool = Field(True, description="one forward for all views, where the algorithm has the choice")

    # -- data
    data_dir: str = Field("./data", description="folder of the data files", json_schema_extra={"moves": True})
    num_classes: int | None = Field(None, ge=2, le=10**6, description="number of classes; default: the data set's")
    img_size: int | None = Field(None, ge=4, le=1024, description="images are resized to this; default: the data set's")
    split_seed: int | None = Field(None, ge=0, lt=2**32, description="draws the labelled images; default: seed")
    split_file: str | None = Field(
        None, description="take the labelled images from a run's split.json, or from a .npy file of indices"
    )
    lb_imb_ratio: float = Field(
        1.0, ge=1, le=1e6, description="labels of the first class over those of the last, geometric in between"
    )
    sequestered: int | None = Field(
        None, ge=0, description="subclasses per class that give no labels (cifar20); default: the data set's"
    )
    include_lb_to_ulb: bool = Field(
        False, description="labelled images are among the unlabelled ones too (USB: yes; MUSCLE: the rest only)"
    )
    weak_augment: str | None = Field(None, description="weak views; default: the data set's")
    hard_augment: str | None = Field(None, description="hard (strong) views; default: the data set's")
    hard_ops: int | None = Field(
        None, ge=1, le=14, description="operations per hard view of RandAugment; default: 2, of randaugment_usb 3"
    )
    labels_csv: str | None = Field(None, description="of dataset folder: table of file,label[,split] over data_dir")
    skip_bad_images: bool = Field(False, description="leave out image files that cannot be read")
    allow_outside: bool = Field(
        False, description="links of an image folder, and names of labels_csv, may lead out of data_dir"
    )
    cache_dir: str | None = Field(
        None,
        description="folder for the array files made of image files; default: .packed in data_dir or save_dir",
        json_schema_extra={"moves": True},
    )
    data_on: Literal["auto", "device", "host"] = Field(
        "auto",
        description="where the images live: auto: on the device if they fit; host: brought step by step",
        json_schema_extra={"moves": True},
    )
    num_workers: int = Field(
        2, ge=0, le=64, description="processes that bring images, with data_on host", json_schema_extra={"moves": True}
    )

    # -- net
    net_dropout: float | None = Field(None, ge=0, lt=1, description="dropout of the net; default: the net's")
    net_noise: float | None = Field(None, ge=0, description="of cnn13: Gaussian noise on the input, while training")
    net_width: float | None = Field(None, gt=0, description="of cnn13: channels, as a multiple of its own")
    net_double_head: bool = Field(False, description="a second head for the consistency loss (cnn13, resnet18_84)")
    net_l2: bool = Field(False, description="L2-normalised features before the classifier (cnn13, resnet18_84)")
    net_from_name: bool = Field(False, description="take `net` from torchvision.models")
    use_pretrain: bool = Field(False, description="start from pretrain_path; nets of timm without one: from its hub")
    pretrain_path: str = Field("", description="file of pretrained weights, for nets of USB, torchvision and timm")

    # -- device
    device: Annotated[str, AfterValidator(_known_device)] = Field(
        "auto", description="auto, cpu, cuda or cuda:N", json_schema_extra={"moves": True}
    )
    gpu: int | None = Field(
        None, ge=0, lt=128, description="USB's name: the same as device cuda:N", json_schema_extra={"moves": True}
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="auto: bf16 where the GPU has it, else fp16 on a GPU, fp32 on a CPU"
    )
    amp: bool | None = Field(None, description="USB's name: true is precision fp16")
    compile: Literal["no", "default", "reduce-overhead", "max-autotune-no-cudagraphs"] = Field(
        "no",
        description="torch.compile of the net's forward; reduce-overhead uses CUDA graphs. Changes the last bits",
        json_schema_extra={"moves": True},
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads; default: PyTorch's. Changes the last bits",
        json_schema_extra={"moves": True},
    )
    sync_bn: bool = Field(
        True, description="with several processes: batch norm's statistics are those of all their images"
    )
    dist_timeout: float = Field(
        1800,
        gt=0,
        le=10**7,
        description="seconds that an exchange between processes may take before the run ends with an error",
        json_schema_extra={"moves": True},
    )
    deterministic: bool = Field(
        True,
        description="on a GPU, PyTorch's and cuDNN's deterministic algorithms: a seed fixes the weights to the last bit, for"
        " equal GPU model, driver and versions; an operation that has no such algorithm is named in a warning",
        json_schema_extra={"moves": True},
    )

    # -- saving
    save_dir: str = Field("./runs", description="folder of runs", json_schema_extra={"moves": True})
    save_name: str | None = Field(
        None,
        description="run directory in save_dir; default: algorithm_dataset_labels_seed",
        json_schema_extra={"moves": True},
    )
    resume: Literal["no", "yes", "auto"] = Field(
        "no", description="go on from the last checkpoint; auto: if there is one", json_schema_extra={"moves": True}
    )
    load_path: str | None = Field(
        None, description="checkpoint to resume from; default: the run's own", json_schema_extra={"moves": True}
    )
    overwrite: bool = Field(
        False,
        description="delete the run of this name and start anew (resume comes first)",
        json_schema_extra={"moves": True},
    )
    use_tensorboard: bool = Field(True, description="write TensorBoard events", json_schema_extra={"moves": True})
    use_wandb: bool = Field(
        False, description="log to Weights & Biases by USB's hook", json_schema_extra={"moves": True}
    )
    use_aim: bool = Field(False, description="log to Aim by USB's hook", json_schema_extra={"moves": True})


Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MuscleSettings(BaseModel):
    """The settings that MUSCLE adds to whatever it is composed with."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    mi_weight: float = Field(1.0, ge=0, description="alpha of equation 7: weight of the mutual information")
    hard_views: int = Field(3, ge=1, le=64, description="V: hard views per weak view (paper: 3)")
    mi_labelled: bool = Field(True, description="labelled images take part in the mutual information (section 4.3)")
    mi_batch_norm: Literal["joint", "separate"] = Field(
        "joint", description="hard views share the forward, and so the batch statistics, of the base, or have their own"
    )


#: Keys of USB's configuration files that change nothing here: accepted with a notice, so that those files can be used.
WITHOUT_EFFECT = {
    "clip": "nothing in USB reads it either; to clip gradients set clip_grad",
    "train_sampler": "every image of an epoch is seen once",
    "crop_ratio": "weak_augment fixes the crop",
    "rank": "launch several processes with torchrun",
    "world_size": "launch several processes with torchrun",
    "dist_url": "launch several processes with torchrun",
    "dist_backend": "launch several processes with torchrun",
    "multiprocessing_distributed": "launch several processes with torchrun",
    "use_amp": "set amp, or precision",
}
#: What USB's parsers give where nobody gave anything, of keys that change nothing here.
_IN_USB = {"clip": 0, "train_sampler": "RandomSampler", "crop_ratio": 0.875, "use_amp": False}
#: Further settings of USB that have no counterpart here, and what they must be: imbalanced learning.
_BALANCED = {"imb_algorithm": None, "ulb_imb_ratio": 1, "ulb_num_labels": None}
#: What else USB's parsers give, or it and this package write into the settings.
_NO_SETTINGS = frozenset([
    "c", "max_length", "max_length_seconds", "sample_rate", "distributed", "lb_dest_len", "ulb_dest_len", "use_epass", "source",
])  # fmt: skip
#: So much like a setting that it is one misspelt (difflib's ratio).
_MISSPELT = 0.8

#: Algorithms that learn something where there are no labels.
WITHOUT_LABELS = ("muscle", "contrastive", "muscle_contrastive")

_SHORT_FLAGS = {
    "save_name": "-sn", "num_labels": "-nl", "batch_size": "-bsz", "algorithm": "-alg", "dataset": "-ds",
    "num_classes": "-nc", "overwrite": "-o",
}  # fmt: skip
_FLAGS_WITHOUT_VALUE: dict[str, Any] = {"resume": "yes", "plugins": True}


@dataclass
class Layer:
    """Settings from one place (a file, the command line), named for error messages."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """A checked configuration: the settings, where each explicit one came from, notices for the user, and the name of the
    configuration file if it is one of ``benchmark_configs`` (``muscle_digits_10``, ``classic_cv/fixmatch_svhn_40``)."""

    settings: Any
    sources: Mapping[str, str]
    notices: tuple[str, ...]
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, plain values; read back by :func:`resolve` they give the same run."""
        return self.settings.model_dump()

    def to_yaml(self, leave_out: Sequence[str] = ()) -> str:
        """The settings as YAML, in the order in which they are declared, but for those named."""
        from io import StringIO

        out = StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump({k: v for k, v in self.as_dict().items() if k not in leave_out}, out)
        return out.getvalue()


# ----------------------------------------------------------------------------------------------------------- reading


def config_directory() -> Path:
    """The folder of configurations that come with this package: in it when it is installed from a wheel, beside it in
    the repository."""
    here = Path(__file__).resolve().parent
    inside = here / "benchmark_configs"
    return inside if inside.is_dir() else here.parent / "benchmark_configs"


def _file_named(name: str) -> Path:
    """Where ``benchmark_configs`` would have a configuration of this name, which may end in ``.yaml``."""
    return config_directory() / f"{name.removesuffix('.yaml')}.yaml"


def find_config(word: str | Path, studies: Sequence[str] = ()) -> Path:
    """The file of a configuration: ``word`` itself if it is one, or what ``benchmark_configs`` has under that name.

    Args:
        studies: names that would have been right too, for the message.

    Raises:
        ConfigError: neither; with the nearest names, or what names there are.
    """
    path, named = Path(word), _file_named(str(word))
    try:
        if path.is_file():
            return path
        if named.is_file():
            return named
        is_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
        here = [p.stem for p in path.parent.glob("*.yaml")] if is_path else []
    except (OSError, ValueError) as e:
        raise ConfigError([f"{shown(word)}: not a file's name: {getattr(e, 'strerror', None) or e}"]) from None
    names = config_names()
    offered = [*(() if is_path else studies), *(n for n in names if n not in here)]
    near = did_you_mean(str(word).removesuffix(".yaml"), offered, most=3)
    if is_path and (not near or closest(path.stem, here)):
        return path  # reading it says what is wrong with it
    raise ConfigError([f"{shown(word)}: {_no_such(str(word), names, studies, near)}"])


def _no_such(word: str, names: Sequence[str], studies: Sequence[str], near: str) -> str:
    """Why a word is no configuration's name, and what would be one."""
    from muscle_plugin.bench.studies import study_configs  # which imports this module

    if of_study := [] if studies else study_configs(word):
        return f"a study of {len(of_study)} configurations; give one of them ({of_study[0]}), or `muscle-plugin sweep {word}`"
    what = "study or configuration" if studies else "configuration"
    of_studies = f"studies: {', '.join(studies)}; " if studies else ""
    there = f"{of_studies}{config_directory()} has {len(names)} configurations, such as {EXAMPLE}"
    return f"no such {what}{near or f'; {there}'}"


def config_names() -> list[str]:
    """Names of all configurations that come with this package."""
    here = config_directory()
    return sorted(
        name
        for p in here.rglob("*.yaml")
        if not (name := p.relative_to(here).with_suffix("").as_posix()).startswith("_")
    )


def config_name(path: Path) -> str | None:
    """The name of a file of ``benchmark_configs``; None for another file."""
    try:
        return path.resolve().relative_to(config_directory()).with_suffix("").as_posix()
    except ValueError:
        return None


class _BoundedComposer(Composer):
    """Refuses what makes a short YAML text large or deep in memory: settings are single values, so that neither nesting
    nor a reference to a list or a mapping has a use."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            event = self.parser.peek_event()
            if not isinstance(self.anchors.get(event.anchor), (ScalarNode, type(None))):
                raise ComposerError(None, None, "a reference to a list or a mapping", event.start_mark)
        if self._depth > MOST_DEPTH:
            raise ComposerError(None, None, f"nested more than {MOST_DEPTH} deep", self.parser.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _load(path: Path) -> Any:
    """The content of a YAML file, as plain values.

    Raises:
        OSError, ConfigError, Exception: ruamel raises what it meets.
    """
    with path.open("rb") as f:  # of a device or a pipe no more than this is read
        raw = f.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ConfigError([f"{path}: larger than {MOST_BYTES >> 10} KB; not a file of settings"])
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    return yaml.load(raw.decode("utf-8"))


def read_yaml(path: Path, seen: tuple[Path, ...] = (), read: list[Path] | None = None) -> list[Layer]:
    """The layers of a YAML file, lowest precedence first; ``extends`` names one file or a list, relative to the file.

    Args:
        seen: the files that led to this one.
        read: all files read so far.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, a circle of ``extends``, or too many files.
    """
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as e:  # a link to itself, a name that none can be
        raise ConfigError([f"{shown(path)}: cannot be read: {e}"]) from None
    if path in seen:
        raise ConfigError([f"{path}: extends itself, by way of {' -> '.join(p.name for p in (*seen, path))}"])
    if seen and path.exists() and not path.is_file():  # a pipe would not end; one that the user names does
        raise ConfigError([f"{path}: not a file; {seen[-1]} extends it"])
    read = [] if read is None else read
    read.append(path)
    if len(read) > MOST_FILES:
        raise ConfigError([f"{path}: extends brings in more than {MOST_FILES} files"])
    try:
        content = _load(path)
    except ConfigError:
        raise
    except FileNotFoundError:
        near = closest(path.stem, (p.stem for p in path.parent.glob("*.yaml")))
        hint = f"; did you mean {near}.yaml?" if near else ""
        asked = f"; {seen[-1]} extends it (relative to itself, or a name of benchmark_configs)" if seen else ""
        raise ConfigError([f"{path}: no such file{hint}{asked}"]) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError([f"{path}: cannot be read: {e}"]) from None
    except YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError([f"{path}{where}: not valid YAML: {shown(getattr(e, 'problem', None) or e)}"]) from None
    except Exception as e:  # of values: a 13th month, a number of 5,000 digits
        raise ConfigError([f"{path}: not valid YAML: {shown(e) or type(e).__name__}"]) from None
    if content is None:
        raise ConfigError([f"{path}: holds no settings; expected lines of `name: value`"])
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise ConfigError([f"{path}: expected lines of `name: value`, found {type(content).__name__}"])
    if "plugins" in content:
        try:
            content["plugins"] = located(content["plugins"], path.parent)
        except PluginError as e:
            raise ConfigError([f"{path}: plugins: {e}"]) from None
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError([f"{path}: extends must name a file or a list of files, got {shown(bases)}"])
    layers = [layer for base in bases for layer in read_yaml(_base_file(path, base), (*seen, path), read)]
    return [*layers, Layer(path.name, content)]


def _base_file(path: Path, base: str) -> Path:
    """The file that ``extends`` of ``path`` means: relative to it, or one of this package's, with or without ``.yaml``."""
    relative, named = path.parent / base, _file_named(base)
    try:
        return named if not relative.exists() and named.is_file() else relative
    except (OSError, ValueError):
        return relative  # reading it says what is wrong with it


def _algorithm_entry(name: Any) -> Algorithm:
    """The catalogue entry, or a ConfigError that names the nearest one."""
    known = all_algorithms()
    if isinstance(name, str) and name in known:
        return known[name]
    if isinstance(name, str) and name.startswith(MUSCLE_PREFIX) and name[len(MUSCLE_PREFIX) :] in base_algorithms():
        base = name[len(MUSCLE_PREFIX) :]
        raise ConfigError(
            [f"algorithm: {name!r} does not exist, since a step of {base!r} sees no unlabelled image; use 'muscle'"]
        )
    if reason := NOT_HOSTED.get(str(name).removeprefix(MUSCLE_PREFIX)):
        raise ConfigError([f"algorithm: {reason}"])
    raise ConfigError(
        [
            f"algorithm: unknown {shown(repr(name))}{did_you_mean(str(name), known)}{OF_ONES_OWN}; known:"
            f" {', '.join(known)}"
        ]
    )


@cache
def settings_model(algorithm: str) -> type[BaseModel]:
    """The pydantic model of all settings of one algorithm: every run's, MUSCLE's where it is composed in, and those
    that USB's class declares in ``get_argument``."""
    entry = _algorithm_entry(algorithm)
    bases = (MuscleSettings, RunSettings) if algorithm in muscle_algorithms() else (RunSettings,)
    fields: dict[str, Any] = {
        a.name: (a.type, Field(a.default, description=a.help or f"of {entry.name}, see USB"))
        for a in entry.arguments
        if a.name not in RunSettings.model_fields
    }
    return create_model(f"Settings_{algorithm}", __base__=bases, **fields)


def _owners(key: str) -> list[str]:
    """The algorithms that have a setting of this name."""
    if key in MuscleSettings.model_fields:
        return ["muscle", "muscle_<base>"]
    return [n for n, a in base_algorithms().items() if any(x.name == key for x in a.arguments)]


def _defaults(key: str) -> list[Any]:
    """The defaults that those algorithms give a setting of this name."""
    if key in MuscleSettings.model_fields:
        return [MuscleSettings.model_fields[key].default]
    return [x.default for a in base_algorithms().values() for x in a.arguments if x.name == key]


def _known_keys() -> set[str]:
    usb = {x.name for a in base_algorithms().values() for x in a.arguments}
    return {*RunSettings.model_fields, *MuscleSettings.model_fields, *usb}


# ---------------------------------------------------------------------------------------------------------- batch sizes


def batch_composition(layers: Sequence[Layer]) -> tuple[int, int]:
    """(J, I): labelled and unlabelled images per step, from ``total_batch``/``ratio`` or USB's ``batch_size``/``uratio``.

    A later layer overrides an earlier one, whichever pair of names it uses. With B given, J = round(B / (1 + r)).

    Raises:
        ConfigError: two names in one layer that contradict each other, or no room for an image of either kind.
    """
    total: int | None = 128
    labelled: int | None = None
    ratio = Fraction(1)
    for layer in layers:
        v = {k: x for k, x in layer.values.items() if x is not None}
        if "ratio" in v or "uratio" in v:
            ratios = {Fraction(v[k]).limit_denominator(10**6) for k in ("ratio", "uratio") if k in v}
            if len(ratios) > 1:
                raise ConfigError([f"{layer.source}: ratio {v['ratio']} and uratio {v['uratio']} are the same setting"])
            ratio = ratios.pop()
        if "total_batch" in v and "batch_size" in v:
            total, labelled = v["total_batch"], v["batch_size"]
            if labelled != _labelled(total, ratio):
                raise ConfigError(
                    [
                        f"{layer.source}: batch_size {labelled} contradicts total_batch {total} with ratio {float(ratio):g}"
                        f" (which gives {_labelled(total, ratio)} labelled images); give one of the two"
                    ]
                )
        elif "total_batch" in v:
            total, labelled = v["total_batch"], None
        elif "batch_size" in v:
            total, labelled = None, v["batch_size"]
    if total is not None:
        labelled = _labelled(total, ratio)
        unlabelled = total - labelled
    else:
        assert labelled is not None
        unlabelled = round(labelled * ratio)
    if labelled < 1 or unlabelled < 1 or labelled + unlabelled > MOST_IMAGES:
        if labelled + unlabelled > MOST_IMAGES:
            raise ConfigError([f"a step would hold more than {MOST_IMAGES:,} images; lower total_batch or ratio"])
        raise ConfigError(
            [f"a step would hold {labelled} labelled and {unlabelled} unlabelled images; both must be at least 1"]
        )
    return labelled, unlabelled


def _labelled(total: int, ratio: Fraction) -> int:
    return round(total / (1 + ratio))


# ------------------------------------------------------------------------------------------------------------ resolving


def _spelling(key: str, layer: Layer) -> str:
    if not layer.source:
        return key
    return f"--{key}" if layer.source == "command line" else f"{layer.source}: {key}"


def _from_usb_values(layer: Layer) -> None:
    """Values that USB spells differently: a boolean for ``resume``, the word None for nothing, and a number of steps where
    its train.py takes no other value (0 holds any number of whole epochs)."""
    for key, value in list(layer.values.items()):
        if value == "None" or (key == "num_train_iter" and str(value) == "0"):
            layer.values[key] = None
    asked = str(layer.values.get("resume")).lower()
    if asked in ("true", "false"):  # USB's files set it in every run, the first one too
        layer.values["resume"] = "auto" if asked == "true" else "no"


def resolve(layers: Sequence[Layer], name: str | None = None) -> Resolved:
    """Check and merge layers, lowest precedence first.

    Args:
        layers: of settings.
        name: of the configuration file, if it is one of ``benchmark_configs``.

    Raises:
        ConfigError: with every fault found, one line each.
    """
    faults: list[str] = []
    notices: list[str] = []
    for layer in layers:
        faults += _plugin_faults(layer)
        faults += _refused_values(layer)
        _from_usb_values(layer)
    merged: dict[str, Any] = {}
    where: dict[str, Layer] = {}
    for layer in layers:
        if layer.values.get("dataset", merged.get("dataset")) != merged.get("dataset"):
            merged.pop("num_classes", None)  # it was another data set's
            where.pop("num_classes", None)
        for key, value in layer.values.items():
            merged[key], where[key] = value, layer

    try:
        algorithm = merged.get("algorithm", RunSettings.model_fields["algorithm"].default)
        entry_faults: list[str] = []
        try:
            model = settings_model(algorithm)
        except ConfigError as e:
            entry_faults, model = e.faults, settings_model("muscle")  # go on, to report the other faults too
            merged["algorithm"] = "muscle"
        known = _known_keys()
    except CatalogueError as e:
        raise ConfigError([str(e)]) from None
    faults += [f"{_spelling('algorithm', where['algorithm'])}: {f.removeprefix('algorithm: ')}" for f in entry_faults]

    for key in [k for k in merged if k not in model.model_fields]:
        spelled = _spelling(key, where[key])
        del merged[key]
        if key in WITHOUT_EFFECT:
            notices.append(f"{spelled} has no effect: {WITHOUT_EFFECT[key]}")
        elif owners := _owners(key):
            if not entry_faults:
                faults.append(f"{spelled} is not a setting of {algorithm!r}, but of {', '.join(owners)}")
        else:
            faults.append(f"{shown(spelled)} is not a setting{did_you_mean(key, known)}")

    settings, wrong = _validated(model, merged)
    faults += _placed(wrong, where)
    for fault in wrong:
        for layer in layers:
            layer.values.pop(fault.partition(": ")[0], None)
    try:
        typed = [Layer(x.source, {k: _typed(x, k) for k in x.values if k in _BATCH_TYPES}) for x in layers]
        labelled, unlabelled = batch_composition(typed)
        settings = settings.model_copy(
            update={
                "batch_size": labelled, "total_batch": labelled + unlabelled,
                "ratio": unlabelled / labelled, "uratio": unlabelled / labelled,
            }
        )  # fmt: skip
    except ConfigError as e:
        faults += e.faults
    faults += _placed(_cross_checks(settings), where)
    if faults:
        raise ConfigError(faults)
    if settings.load_path and settings.resume == "no":
        notices.append(f"{_spelling('load_path', where['load_path'])} has no effect without resume")
    given = [layer.values.get("ratio", layer.values.get("uratio")) for layer in layers]
    asked = next((x for x in reversed(given) if x is not None), None)
    if asked is not None and abs(settings.ratio - float(asked)) > 1e-3:
        sizes = (
            f"{settings.batch_size} labelled + {settings.total_batch - settings.batch_size} unlabelled images a step"
        )
        notices.append(f"ratio {float(asked):g} becomes {settings.ratio:.3f}: {sizes} is nearest to it")
    return Resolved(_finish(settings, name), {k: x.source for k, x in where.items()}, tuple(notices), name)


def _validated(model: type[BaseModel], values: dict[str, Any]) -> tuple[Any, list[str]]:
    """The settings of those values that are valid (there may be faults between them), and what is wrong with the others."""
    try:
        return model(**values), []
    except ValidationError as e:
        wrong = [(str(error["loc"][0]), _readable(error)) for error in e.errors()]
    names = dict(wrong)
    return model(**{k: v for k, v in values.items() if k not in names}), [f"{k}: {reason}" for k, reason in wrong]


def _placed(faults: Iterable[str], where: Mapping[str, Layer]) -> list[str]:
    """Faults of settings (``name: what is wrong``) with the place where each was given."""
    parts = [fault.partition(": ") for fault in faults]
    return [f"{_spelling(k, where[k]) if k in where else k}: {rest}" for k, _, rest in parts]


def check_usb_settings(
    given: Mapping[str, Any], files: Sequence[Layer] = (), own: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Check settings that USB gathered, from a notebook or by its train.py, as :func:`resolve` checks this package's. USB
    gives all of its settings values and takes any other key: what resembles no setting is the user's own affair.

    Args:
        given: name -> value.
        files: what configuration files said, to name them.
        own: names of settings that the algorithm declares.

    Returns:
        Values that are not of their setting's type, in that type; notices.

    Raises:
        ConfigError: with every fault found.
    """
    asked = given.get("algorithm", RunSettings.model_fields["algorithm"].default)
    algorithm = asked if isinstance(asked, str) and asked in all_algorithms() else MUSCLE
    model, known = settings_model(algorithm), _known_keys()
    places = {name: layer.source for layer in files for name in layer.values}
    where = {name: Layer(places.get(name, "")) for name in given}
    faults, notices, unread = [], [], []
    values = Layer("")
    for key, value in given.items():
        spelled = shown(_spelling(key, where[key]))
        if key == "extends":
            faults.append(f"{spelled}: has not been followed: this USB knows no `extends` (patch 0011 adds it)")
        elif key in _BALANCED:
            if value not in (_BALANCED[key], None, "None"):
                faults.append(f"{spelled}: {shown(value)} is not hosted; use USB's own class of the algorithm")
        elif key in model.model_fields:
            part = Layer(where[key].source, {key: _plain(value)})
            faults += _refused_values(part)
            values.values |= part.values
        elif key in WITHOUT_EFFECT:
            if value != _IN_USB.get(key, value):
                notices.append(f"{spelled} has no effect: {WITHOUT_EFFECT[key]}")
        elif key in own or key in _NO_SETTINGS:
            pass
        elif owners := _owners(key):
            if value not in _defaults(key):
                notices.append(
                    f"{spelled} has no effect: not a setting of {shown(repr(asked))}, but of {', '.join(owners)}"
                )
        elif near := closest(key, {*known, *own}, _MISSPELT):
            faults.append(f"{spelled} is not a setting; did you mean {near!r}?")
        else:
            unread.append(key)
    if unread:
        notices.append(
            f"{', '.join(map(shown, unread))}: not a setting of USB or this package, which read no such thing"
        )
    values.values.pop("plugins", None)
    _from_usb_values(values)
    settings, wrong = _validated(model, values.values)
    faults += _placed(wrong, where)
    if given.get("source") is None:
        if settings.precision == "bf16":  # of settings that have trained before, amp says so too
            settings = settings.model_copy(update={"amp": None})
        faults += _placed(_cross_checks(settings), where)
    if faults:
        raise ConfigError(faults)
    as_here = {k: getattr(settings, k) for k in values.values if k != "resume"}  # USB's hooks want its truth value
    alike = (int, float)  # a whole number where another would do
    return {k: v for k, v in as_here.items() if (type(given[k]), type(v)) not in ((type(v), type(v)), alike)}, notices


def _plain(value: Any) -> Any:
    """A path as text; a fraction, a scalar of NumPy or PyTorch as a number; anything else as it is."""
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


_BATCH_TYPES: dict[str, TypeAdapter[Any]] = {
    "total_batch": TypeAdapter(int | None), "batch_size": TypeAdapter(int | None),
    "ratio": TypeAdapter(Ratio | None), "uratio": TypeAdapter(Ratio | None),
}  # fmt: skip


def _refused_values(layer: Layer) -> list[str]:
    """Take out of a layer what no setting can be, and say so: lists and mappings, texts that no path or name can be, whole
    numbers beyond all bounds."""
    faults = []
    for key, value in list(layer.values.items()):
        reason = ""
        if key == "plugins":
            continue
        if not isinstance(value, (str, int, float, bool, type(None))):
            reason = f"a single value is expected, got a {type(value).__name__}"
        elif isinstance(value, str) and len(value) > MOST_CHARACTERS:
            reason = f"a text of {len(value):,} characters is too long"
        elif isinstance(value, str) and not _can_be_name(value):
            reason = f"holds characters that no name can have, got {shown(repr(value))}"
        elif type(value) is int and abs(value) > MOST_WHOLE:
            reason = "a number out of all bounds"
        if reason:
            faults.append(f"{shown(_spelling(key, layer))}: {reason}")
            del layer.values[key]
    return faults


def _plugin_faults(layer: Layer) -> list[str]:
    """Put absolute names into a layer; of ``--plugins`` alone nothing, so that those of the files below it hold."""
    value = layer.values.pop("plugins", None)
    if value is None or value is True:
        return []
    try:
        layer.values["plugins"] = located(value, "")
    except PluginError as e:
        return [f"{shown(_spelling('plugins', layer))}: {e}"]
    return []


def _can_be_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return not any(c < " " or c == "\x7f" for c in text)


def _typed(layer: Layer, key: str) -> Any:
    """A layer's value in the type of the setting (a command line gives strings).

    Raises:
        ConfigError: a later layer hides that it is none.
    """
    try:
        return _BATCH_TYPES[key].validate_python(layer.values[key])
    except ValidationError as e:
        raise ConfigError([f"{_spelling(key, layer)}: {_readable(e.errors()[0])}"]) from None


def _readable(error: Any) -> str:
    got = error.get("input")
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {shown(repr(got))}"


def _cross_checks(settings: Any) -> list[str]:
    """Faults that concern more than one setting, or names that must exist."""
    faults = [f"{k}: a number out of all bounds" for k, v in settings if type(v) is int and abs(v) > MOST_WHOLE]
    if settings.dataset not in DATASETS:
        faults.append(
            f"dataset: unknown {shown(repr(settings.dataset))}{did_you_mean(settings.dataset, DATASETS)}{OF_ONES_OWN};"
            f" known: {', '.join(DATASETS)}"
        )
    else:
        faults += _split_faults(settings, DATASETS[settings.dataset])
    if settings.stage == "pretrain" and settings.algorithm not in WITHOUT_LABELS:
        faults.append(f"stage: pretrain is for {', '.join(WITHOUT_LABELS)}; {settings.algorithm} needs labels")
    elif settings.stage == "pretrain" and settings.algorithm == MUSCLE and not settings.mi_weight:
        faults.append("mi_weight: 0 leaves stage pretrain nothing to train on")
    start = getattr(settings, "lp_start", None)
    if start is not None and not 0 <= start <= 1:
        faults.append(f"lp_start: a share of the epochs, from 0 to 1, got {start:g}")
    elif start is not None and ((start > 0) != (stage_1_epochs(start, settings.epoch) > 0)):
        faults.append(
            f"lp_start: {start:g} of {settings.epoch} epoch(s) leaves no whole one for the first stage; give more --epoch"
        )
    if settings.overwrite and settings.resume == "yes":
        faults.append("overwrite: deletes the run that --resume goes on with; give one of the two")
    if settings.lr_schedule != "cosine" and settings.lr_zero_at != 1:
        faults.append("lr_zero_at: only with --lr_schedule cosine")
    if settings.amp and settings.precision not in ("fp32", "auto", "fp16"):
        faults.append(f"amp: true is precision fp16, but precision is {settings.precision}; give one of the two")
    if settings.nonfinite_steps and not settings.amp and settings.precision not in ("auto", "fp16"):
        faults.append(
            f"nonfinite_steps: only with --precision fp16, whose loss scaler leaves such steps out; with {settings.precision}"
            " the weights are lost at the first"
        )
    if settings.gpu is not None and settings.device not in ("auto", "cuda", f"cuda:{settings.gpu}"):
        faults.append(f"gpu: {settings.gpu} contradicts device {settings.device}; give one of the two")
    if settings.num_warmup_iter and settings.num_train_iter and settings.num_warmup_iter >= settings.num_train_iter:
        faults.append(f"num_warmup_iter: {settings.num_warmup_iter} leaves no step of the {settings.num_train_iter}")
    if settings.num_train_iter and settings.num_train_iter < settings.epoch:
        faults.append(
            f"num_train_iter: {settings.num_train_iter} steps cannot hold {settings.epoch} epochs; give --epoch 1 with it"
        )
    if settings.save_name is not None and (
        Path(settings.save_name).name != settings.save_name or settings.save_name in ("", ".", "..")
    ):
        faults.append(
            f"save_name: must be a plain directory name, got {shown(repr(settings.save_name))}; the folder goes into save_dir"
        )
    return faults


def _split_faults(settings: Any, info: DatasetInfo) -> list[str]:
    faults = []
    if info.num_classes is not None and settings.num_classes not in (None, info.num_classes):
        faults.append(f"num_classes: {settings.dataset} has {info.num_classes} classes, got {settings.num_classes}")
    sequestered = info.sequestered if settings.sequestered is None else settings.sequestered
    if sequestered and sequestered >= info.subclasses:
        has = f"{info.subclasses} subclasses per class" if info.subclasses > 1 else "no subclasses"
        faults.append(f"sequestered: {settings.dataset} has {has}, got {sequestered}")
        return faults
    groups = info.label_groups(sequestered)
    if settings.lb_imb_ratio != 1 and sequestered:
        faults.append("lb_imb_ratio: labels are shared equally where subclasses are sequestered; give --sequestered 0")
    elif (
        settings.lb_imb_ratio == 1 and not settings.split_file
        and groups and settings.num_labels and settings.num_labels % groups
    ):  # fmt: skip
        what = "subclasses that keep labels" if sequestered else "classes"
        faults.append(
            f"num_labels: {settings.num_labels} cannot be shared equally by the {groups} {what} of {settings.dataset};"
            f" give a multiple of {groups}"
        )
    if settings.split_file and settings.lb_imb_ratio != 1:
        faults.append("lb_imb_ratio: split_file says which images are labelled; give one of the two")
    files = ("folder", "miniimagenet", "eurosat")
    of_files = {"labels_csv": ("folder",), "skip_bad_images": files, "allow_outside": files}
    for name, allowed in of_files.items():
        if getattr(settings, name) and settings.dataset not in allowed:
            faults.append(f"{name}: only for image files (dataset {', '.join(allowed)}), not for {settings.dataset}")
    return faults


def following(settings: Any) -> dict[str, Any]:
    """The settings that follow from others and are left open: the data set's, the device and precision by USB's names, the
    fields of ``init_from``."""
    info = DATASETS[settings.dataset]
    update: dict[str, Any] = {"num_classes": settings.num_classes or info.num_classes, **info.defaults(settings)}
    if settings.amp and settings.precision != "bf16":
        update["precision"] = "fp16"
    if settings.gpu is not None and settings.device != "cpu":
        update["device"] = f"cuda:{settings.gpu}"
    if settings.init_from is not None:
        fields = {"{save_dir}": settings.save_dir, "{seed}": str(settings.seed)}
        for field_name, value in fields.items():
            update["init_from"] = update.get("init_from", settings.init_from).replace(field_name, value)
    return update


def _finish(settings: Any, name: str | None) -> Any:
    """Fill in what follows from other settings, and from the name of the configuration."""
    update = following(settings)
    if settings.resume != "no":
        update["overwrite"] = False  # as in USB, whose files set both
    if settings.save_name is None:
        labels = (
            Path(settings.split_file).stem if settings.split_file else update.get("num_labels", settings.num_labels)
        )
        stem = f"{settings.algorithm}_{settings.dataset}_{labels or 'all'}"
        if name is not None and Path(name).name.startswith(stem):  # it says more: another setting, USB's protocol
            stem = name.replace("/", "-")
        update["save_name"] = f"{stem}_{settings.seed}"
    return settings.model_copy(update=update | {"amp": None, "gpu": None})


def load_settings(config: str | Path | None = None, **overrides: Any) -> Resolved:
    """The settings of a run from a YAML file, or the name of one of ``benchmark_configs``, and keyword arguments (which
    win), as ``train.py`` would resolve them.

    The argument ``plugins`` imports plugins, and so runs their code: a list of files and modules, or True for those that
    the file names. Without it a file that names some is refused.

    Raises:
        ConfigError: with every fault found.
    """
    path = find_config(config) if config else None
    layers = read_yaml(path) if path else []
    load_plugins(layers, overrides.get("plugins"))
    return resolve([*layers, Layer("command line", overrides)], config_name(path) if path else None)


def load_plugins(layers: Sequence[Layer], given: Any) -> None:
    """Import the plugins of a run.

    Args:
        layers: of its files.
        given: the setting on the command line: names; True: those of the files; None: not given.

    Raises:
        ConfigError: a plugin cannot be had, or the files name some and none was given.
    """
    named = next((x for x in reversed(layers) if x.values.get("plugins") is not None), None)
    of_files = named.values["plugins"] if named else ()
    if given is None and named and of_files:
        raise ConfigError(
            [
                f"{named.source}: plugins: {', '.join(map(shown, of_files))}: is code, which a configuration cannot have run:"
                " add --plugins if you trust it"
            ]
        )
    try:
        load_all(of_files if given is True else located(given, ""))
    except PluginError as e:
        place = f"{named.source}: plugins" if given is True and named else "--plugins"
        raise ConfigError([f"{place}: {e}"]) from None


def load_named_plugins(argv: Sequence[str], files_of: Callable[[argparse.Namespace, list[str]], Sequence[str]]) -> None:
    """Import the plugins that a command line names, before it is parsed: their settings are flags of it.

    Args:
        files_of: the configurations that it names, given ``c`` and the words that are no such flag.

    Raises:
        ConfigError: one cannot be had, or a configuration cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--c", "--config", dest="c", nargs="?")
    parser.add_argument("--plugins", nargs="?", const=True)
    options, rest = parser.parse_known_args(list(argv))
    if options.plugins is None:
        return
    if options.plugins is not True:
        load_plugins([], options.plugins)
        return
    for word in files_of(options, rest):
        load_plugins(read_yaml(find_config(word)), True)


def named_in(words: Sequence[str]) -> list[str]:
    """Those of the words of a command line that are a configuration's name or file."""
    known = config_names()
    return [w for w in words if w.endswith((".yaml", ".yml")) or w in known]


def add_plugins_of_net(parser: argparse.ArgumentParser) -> None:
    """``--plugins`` of a command that uses a trained net; what it names goes to :func:`load_plugins`."""
    parser.add_argument(
        "--plugins", metavar="FILE", help="of a net of your own: the Python file, or module, that adds it"
    )


def moving_settings() -> set[str]:
    """The settings that may differ when a run is resumed."""
    extra: dict[str, Any] = {n: f.json_schema_extra or {} for n, f in RunSettings.model_fields.items()}
    return {n for n, e in extra.items() if e.get("moves")}


def read_saved(path: Path) -> list[Layer]:
    """The layers of a run's ``config.yaml``, as :func:`read_yaml`: a pipe, which a user may name, has no place there."""
    if path.exists() and not path.is_file():
        raise ConfigError([f"{path}: not a file"])
    return read_yaml(path)


def differing_settings(saved: str | Path, resolved: Resolved) -> dict[str, tuple[Any, Any]]:
    """What a run's ``config.yaml`` and a configuration differ in, of the settings that a result depends on: name ->
    (there, here).

    Raises:
        ConfigError: the file cannot be read, or holds what is no setting.
    """
    there, here = resolve(read_saved(Path(saved))).as_dict(), resolved.as_dict()
    moves = moving_settings()
    return {k: (there.get(k), here.get(k)) for k in {**there, **here} if k not in moves and there.get(k) != here.get(k)}


def began_otherwise(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """What :func:`differing_settings` found of a run and the settings it is to go on with, for people."""
    listed = "; ".join(f"{k} was {there!r}, now {here!r}" for k, (there, here) in differing.items())
    return f"this run began with other settings: {listed}"


# --------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every setting as a flag, USB's names and short names, values checked later by :func:`resolve`."""
    parser.add_argument(
        "--c",
        "--config",
        dest="c",
        metavar="FILE",
        help="YAML file of settings, or the name of one of benchmark_configs; the word alone, without --c, will do",
    )
    parser.add_argument("--print-config", action="store_true", help="show the resolved settings and stop")
    added: set[str] = set()

    def add(group: Any, name: str, description: str | None, default: Any, kind: Any) -> None:
        if name in added:
            return
        added.add(name)
        flags = ([_SHORT_FLAGS[name]] if name in _SHORT_FLAGS else []) + [f"--{name}"]
        text = (description or "").replace("%", "%%")
        if get_origin(kind) is Literal:
            text += f" ({', '.join(get_args(kind))})"
        extra: dict[str, Any] = {}
        if kind is bool or name in _FLAGS_WITHOUT_VALUE:
            extra = {"nargs": "?", "const": _FLAGS_WITHOUT_VALUE.get(name, True)}
        if default not in (None, "", ()):
            text += f" [{default}]"
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar="X", help=text, **extra)

    group = parser.add_argument_group("settings of every run")
    for name, info in RunSettings.model_fields.items():
        add(group, name, info.description, info.default, bool if "bool" in str(info.annotation) else info.annotation)
    group = parser.add_argument_group("settings of muscle and muscle_<base>")
    for name, info in MuscleSettings.model_fields.items():
        add(group, name, info.description, info.default, info.annotation)
    by_name: dict[str, list[str]] = {}
    defaults: dict[str, Any] = {}
    for algorithm in base_algorithms().values():
        for a in algorithm.arguments:
            by_name.setdefault(a.name, []).append(algorithm.name)
            defaults[a.name] = a
    group = parser.add_argument_group("settings of USB's algorithms (defaults differ; --print-config shows them)")
    for name, owners in sorted(by_name.items()):
        argument = defaults[name]
        help_text = f"{argument.help} ({', '.join(owners)})" if argument.help else ", ".join(owners)
        add(group, name, help_text, argument.default if len(owners) == 1 else None, argument.type)


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Layer, list[str]]:
    """Parsed arguments, the layer of settings among them, and a fault per unknown flag."""
    known = _known_keys()
    namespace, rest = parser.parse_known_args([_underscored(word, known) for word in argv])
    layer = Layer("command line", {k: v for k, v in vars(namespace).items() if k in known})
    faults = []
    for word in rest:
        if word.startswith("-") and not _is_number(word):
            name, _, value = word.lstrip("-").partition("=")
            if name.replace("-", "_") in WITHOUT_EFFECT:
                layer.values[name.replace("-", "_")] = value
            else:
                faults.append(f"{shown(word.partition('=')[0])} is not a setting{did_you_mean(name, known)}")
        elif faults or set(layer.values) & set(WITHOUT_EFFECT):
            continue  # the value of such a flag, most likely
        elif not (namespace.c or _is_number(word)):
            namespace.c = word
        elif not _is_number(word):
            faults.append(f"give one configuration: {shown(namespace.c)} or {shown(word)}")
        else:
            faults.append(f"unexpected argument {shown(repr(word))}; settings are given as --name value")
    return namespace, layer, faults


def _underscored(word: str, known: set[str]) -> str:
    """``--skip-bad-images`` as ``--skip_bad_images``."""
    name, equals, value = word.partition("=")
    spelled = name[2:].replace("-", "_")
    return f"--{spelled}{equals}{value}" if name.startswith("--") and spelled in known else word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
