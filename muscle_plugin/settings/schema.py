"""The settings of every run, of MUSCLE and of each algorithm: types, ranges, defaults, help."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

from muscle_plugin.text import did_you_mean, shown
from muscle_plugin.errors import ConfigError
from muscle_plugin.registry.catalogue import (
    MUSCLE_PREFIX,
    NOT_HOSTED,
    Algorithm,
    all_algorithms,
    base_algorithms,
    muscle_algorithms,
)
from muscle_plugin.registry.names import DATASETS, NETS

#: No setting is a longer text (a path has 4,096 bytes at most) or a larger whole number.
MOST_CHARACTERS = 4096


MOST_WHOLE = 2**53


MOST_IMAGES = 2**20  # of a step


#: What a message about an unknown name adds.
OF_ONES_OWN = " (one of your own: --plugins FILE)"


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


def moving_settings() -> set[str]:
    """The settings that may differ when a run is resumed."""
    extra: dict[str, Any] = {n: f.json_schema_extra or {} for n, f in RunSettings.model_fields.items()}
    return {n for n, e in extra.items() if e.get("moves")}
