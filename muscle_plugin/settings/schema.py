"""The settings of every run, of MUSCLE and of each algorithm: types, ranges, defaults, help, and what each affects."""

from __future__ import annotations

import re
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

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
from muscle_plugin.text import did_you_mean, shown

#: Bounds of any setting: characters of a text (a path has 4,096 bytes at most), whole numbers, images of a step.
MOST_CHARACTERS = 4096
MOST_WHOLE = 2**53
MOST_IMAGES = 2**20

#: What a message about an unknown name adds.
OF_ONES_OWN = " (one of your own: --plugins FILE)"


T = TypeVar("T")
if TYPE_CHECKING:
    Filled = Annotated[T, "None until resolved"]
else:  #: A setting that may be left open, and that :func:`resolve` fills in: no resolved settings have None.
    Filled = T | None


class Affects(Enum):
    """What a setting affects at most."""

    STEP = "what a step computes: its duration and the result"
    RESULT = "the result, but not the duration of a step"
    SEED = "which random numbers are drawn"
    MACHINE = "rounding and speed"
    PLACE = "paths, logging and bookkeeping"


STEP, RESULT, SEED, MACHINE, PLACE = Affects


def setting(default: object, affects: Affects, description: str, **bounds: float) -> Any:
    """A field of a model of settings."""
    constraints = cast("dict[str, Any]", bounds)
    return Field(default, description=description, json_schema_extra={"affects": affects.value}, **constraints)


def affecting(*what: Affects) -> frozenset[str]:
    """Names of the settings of every run and of MUSCLE that affect this; those of single algorithms all affect a step.

    What may change on resume is ``affecting(MACHINE, PLACE)``. Runs that differ in ``affecting(SEED, MACHINE, PLACE)`` alone
    are repetitions of one another; steps of runs that differ in ``affecting(RESULT, SEED, PLACE)`` alone take the same time.
    """
    values = {a.value for a in what}
    fields = RunSettings.model_fields | MuscleSettings.model_fields
    return frozenset(n for n, info in fields.items() if cast("Any", info.json_schema_extra)["affects"] in values)


def device_fault(name: str) -> str | None:
    """Why a device cannot be used, whether or not this machine has it; None if it can."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        return None
    return "only CPUs and CUDA GPUs can be used (USB's algorithms call CUDA by name): give auto, cpu, cuda or cuda:N"


def _known_device(name: str) -> str:
    if fault := device_fault(name):
        raise PydanticCustomError("device", "{fault}", {"fault": fault})
    return name


def _two_numbers(text: str | None) -> str | None:
    low, _, high = ("0,1" if text is None else text).partition(",")
    if re.fullmatch(r"-?\d{1,10},-?\d{1,10}", f"{low},{high}") and int(low) < int(high):
        return text
    raise PydanticCustomError("range", "two whole numbers are expected, the lower first, as 0,4095")


def _numbers_of_views(text: str) -> str:
    if re.fullmatch(r"none|[1-9]\d?,[1-9]\d?", text):
        return text
    raise PydanticCustomError("views", "expected none, or the numbers of weak and strong views, 1 to 99 each, as 2,4")


class RunSettings(BaseModel):
    """Settings that every run has."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    # fmt: off
    plugins: tuple[str, ...] = setting(
        (), PLACE, "Python files or modules, separated by commas, that add algorithms, data sets and nets of your own; they are"
        " run. Alone, --plugins stands for those that the configuration names, which are not run without it")

    # -- what to train
    algorithm: str = setting("fixmatch", STEP, "an algorithm of USB or of this package, `muscle`, or `muscle_<algorithm>`")
    dataset: str = setting("digits", STEP, "data set: " + ", ".join(DATASETS))
    net: str = setting("small_cnn", STEP, f"net: {', '.join(NETS)}, one of USB's (wrn_28_2, ...), or timm:<name>")
    num_labels: int | None = setting(None, RESULT, "labelled images in all; default: the data set's, and of a folder all", ge=1)
    seed: int = setting(0, SEED, "sets the labelled subset, the initial weights and the order", ge=0, lt=2**32)

    # -- length
    epoch: int = setting(1, RESULT, "epochs; one is a pass over the unlabelled images", ge=1)
    num_train_iter: int | None = setting(
        None, RESULT, "training steps, as in USB; default, and 0: epoch x the steps of one pass", ge=1)
    num_warmup_iter: int = setting(0, RESULT, "steps of linear learning-rate warm-up", ge=0)
    num_eval_iter: int = setting(100, RESULT, "steps between two evaluations", ge=1)
    num_log_iter: int = setting(10, RESULT, "steps between two log lines; losses are averaged in between", ge=1)
    num_save_iter: int | None = setting(None, PLACE, "steps between two checkpoints; default: num_eval_iter", ge=1)
    keep_checkpoints: int = setting(2, PLACE, "checkpoints to keep: older ones serve if the newest is damaged", ge=1)

    # -- batch
    total_batch: Filled[int] = setting(None, STEP, "B: images per step, of both kinds; default 128", ge=2, le=MOST_IMAGES)
    ratio: Filled[float] = setting(None, STEP, "r = I/J: unlabelled images per labelled one; default 1", gt=0)
    batch_size: Filled[int] = setting(None, STEP, "USB's name: J, labelled images per step", ge=1, le=MOST_IMAGES)
    uratio: Filled[float] = setting(None, STEP, "USB's name for ratio", gt=0)
    eval_batch_size: int = setting(256, MACHINE, "images per evaluation batch", ge=1)

    # -- stage
    stage: Literal["train", "pretrain"] = setting(
        "train", STEP, "pretrain: without labels, for muscle, contrastive and muscle_contrastive")
    init_from: str | None = setting(
        None, RESULT, "checkpoint, run directory or state dict (also timm's) whose weights to start from, without its"
        " classifier; {save_dir} and {seed} in it stand for these settings")
    init_head: bool = setting(False, RESULT, "take the classifier of init_from too")

    # -- optimisation
    optim: Literal["SGD", "AdamW"] = setting("SGD", STEP, "optimiser")
    lr: float = setting(0.03, RESULT, "initial learning rate", gt=0)
    lr_schedule: Literal["usb", "cosine", "constant"] = setting(
        "usb", RESULT, "usb: 7/16 of a cosine cycle (cosine to 0.195); cosine: half a cycle, to 0 at lr_zero_at")
    lr_zero_at: float = setting(
        1.0, RESULT, "of lr_schedule cosine: where it reaches 0, over the run's length (paper: 210/180 = 1.1667)", ge=1)
    momentum: float = setting(0.9, RESULT, "SGD momentum (Nesterov)", ge=0, lt=1)
    weight_decay: float = setting(5e-4, RESULT, "weight decay; not on biases and batch-norm parameters", ge=0)
    decay_all: bool = setting(False, RESULT, "weight decay on these too, as in Mean Teacher and label propagation")
    layer_decay: float = setting(1.0, STEP, "layer-wise learning-rate decay, for transformers", gt=0, le=1)
    clip_grad: float = setting(0.0, STEP, "gradient norm to clip to; 0: no clipping", ge=0)
    nonfinite_steps: int | None = setting(
        None, PLACE, "of precision fp16: consecutive non-finite steps to skip before stopping; default 20. Otherwise the first"
        " non-finite loss ends the run", ge=0)
    ema_m: float = setting(0.999, STEP, "momentum of the averaged weights that are evaluated; 0: none", ge=0, lt=1)
    ulb_loss_ratio: float = setting(1.0, STEP, "weight of the base's unsupervised loss", ge=0)
    use_cat: bool = setting(True, STEP, "one forward for all views, where the algorithm has the choice")

    # -- data
    data_dir: str = setting("./data", PLACE, "folder of the data files")
    num_classes: int | None = setting(None, STEP, "number of classes; default: the data set's", ge=2, le=10**6)
    img_size: Filled[int] = setting(None, STEP, "images are resized to this; default: the data set's", ge=4, le=1024)
    split_seed: int | None = setting(None, SEED, "draws the labelled images; default: seed", ge=0, lt=2**32)
    split_file: str | None = setting(None, RESULT, "labelled images: a run's split.json, or a .npy file of indices")
    lb_imb_ratio: float = setting(
        1.0, RESULT, "labels of the first class over labels of the last, geometric in between", ge=1, le=1e6)
    sequestered: Filled[int] = setting(
        None, RESULT, "subclasses per class without labels (cifar20); default: the data set's", ge=0)
    include_lb_to_ulb: bool = setting(False, RESULT, "use the labelled images as unlabelled ones too (USB: yes; MUSCLE: no)")
    weak_augment: Filled[str] = setting(None, STEP, "weak views; default: the data set's")
    hard_augment: Filled[str] = setting(None, STEP, "strong views; default: the data set's")
    hard_ops: int | None = setting(
        None, STEP, "operations of RandAugment per strong view; default: 2, for randaugment_usb 3", ge=1, le=14)
    labels_csv: str | None = setting(None, RESULT, "of dataset folder: table of file,label[,split] over data_dir")
    pixel_range: Annotated[str | None, AfterValidator(_two_numbers)] = setting(
        None, RESULT, "values that become black and white, of image files with more than 8 bits: 0,4095 (below 0:"
        " --pixel_range=-1000,400); default: read from the files, else estimated from all images")
    skip_bad_images: bool = setting(False, RESULT, "leave out image files that cannot be read")
    allow_outside: bool = setting(False, RESULT, "links of an image folder, and names in labels_csv, may leave data_dir")
    cache_dir: str | None = setting(
        None, PLACE, "folder for arrays made of image files; default: .packed in data_dir or save_dir")
    data_on: Literal["auto", "device", "host"] = setting(
        "auto", MACHINE, "where the images are kept: auto: on the device if they fit; host: copied step by step")
    num_workers: int = setting(2, MACHINE, "threads that gather images ahead, with data_on host", ge=0, le=64)

    # -- net
    net_dropout: float | None = setting(None, STEP, "dropout of the net; default: the net's", ge=0, lt=1)
    net_noise: float | None = setting(None, STEP, "of cnn13: Gaussian noise on the input, while training", ge=0)
    net_width: float | None = setting(None, STEP, "of cnn13: channels, as a multiple of its own", gt=0)
    net_double_head: bool = setting(False, STEP, "a second head for the consistency loss (cnn13, resnet18_84)")
    net_l2: bool = setting(False, STEP, "L2-normalised features before the classifier (cnn13, resnet18_84)")
    net_from_name: bool = setting(False, STEP, "take `net` from torchvision.models")
    use_pretrain: bool = setting(
        False, RESULT, "start from pretrained weights: of pretrain_path, which implies it, or of timm's hub without one")
    pretrain_path: str = setting("", RESULT, "file of pretrained weights, for nets of USB, torchvision and timm")

    tune: Literal["full", "head", "norm", "lora"] = setting(
        "full", STEP, "what is trained: full: all weights; head: a head on the features of a frozen, pretrained backbone; norm:"
        " head and normalisation layers; lora: head and low-rank adapters of linear layers (by peft)")
    lora_rank: int = setting(8, STEP, "of tune lora: rank of the adapters", ge=1, le=1024)
    lora_alpha: float | None = setting(
        None, STEP, "of tune lora: adapters are scaled by lora_alpha / lora_rank; default: 2 x lora_rank", gt=0)
    lora_targets: Annotated[str | None, Field(pattern=r"^[\w.]+(,[\w.]+)*$")] = setting(
        None, STEP, "of tune lora: names of linear layers, as qkv,proj; default: qkv, proj, fc1 and fc2, those that there are")
    head: Literal["linear", "mlp"] = setting(
        "linear", STEP, "of tune head: the head; mlp: a hidden layer as wide as the feature")
    view_pool: Annotated[str, AfterValidator(_numbers_of_views)] = setting(
        "2,4", STEP, "of tune head: weak and strong views of each image whose features are computed once, and from which all"
        " steps draw; none: each step draws views and forwards them through the backbone")
    normalise: Literal["auto", "net", "data"] = setting(
        "auto", STEP, "pixels by the mean and standard deviation that the pretrained net was trained with, or the data set's;"
        " auto: the net's where it is pretrained and says them")
    net_size: int | None = setting(
        None, STEP, "side at which the net gets the images, resized after augmentation; default: img_size", ge=4, le=1024)

    # -- device
    device: Annotated[str, AfterValidator(_known_device)] = setting("auto", MACHINE, "auto, cpu, cuda or cuda:N")
    gpu: int | None = setting(None, MACHINE, "USB's name: the same as device cuda:N", ge=0, lt=128)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "fp32", STEP, "auto: bf16 where the GPU has it, else fp16 on a GPU, fp32 on a CPU")
    amp: bool | None = setting(None, STEP, "USB's name: true is precision fp16")
    compile: Literal["no", "default", "reduce-overhead", "max-autotune-no-cudagraphs"] = setting(
        "no", MACHINE, "torch.compile of the net's forward; reduce-overhead uses CUDA graphs. Changes the last bits")
    num_threads: int | None = setting(None, MACHINE, "CPU threads; default: PyTorch's. Changes the last bits", ge=1, le=1024)
    sync_bn: bool = setting(True, STEP, "with several processes: batch norm's statistics are those of all their images")
    dist_timeout: float = setting(
        1800, PLACE, "seconds that processes may take to exchange data before the run ends with an error", gt=0, le=10**7)
    deterministic: bool = setting(
        True, MACHINE, "on a GPU, PyTorch's and cuDNN's deterministic algorithms: a seed fixes the weights to the last bit, for"
        " equal GPU model, driver and versions; an operation that has no such algorithm is named in a warning")

    # -- saving
    save_dir: str = setting("./runs", PLACE, "folder of runs")
    save_name: Filled[str] = setting(None, PLACE, "run directory in save_dir; default: algorithm_dataset_labels_seed")
    resume: Literal["no", "yes", "auto"] = setting("no", PLACE, "resume from the last checkpoint; auto: if there is one")
    load_path: str | None = setting(None, PLACE, "checkpoint to begin from, with resume, until the run has its own")
    overwrite: bool = setting(False, PLACE, "delete the run of this name and start anew (resume comes first)")
    use_tensorboard: bool = setting(True, PLACE, "write TensorBoard events")
    use_wandb: bool = setting(False, PLACE, "log to Weights & Biases by USB's hook")
    use_aim: bool = setting(False, PLACE, "log to Aim by USB's hook")
    # fmt: on

    @property
    def input_size(self) -> int:
        """Side at which the net gets the images, in pixels."""
        return self.net_size or self.img_size


class MuscleSettings(BaseModel):
    """The settings that MUSCLE adds to those of its base algorithm."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    mi_weight: float = setting(1.0, STEP, "alpha of equation 7: weight of the mutual information", ge=0)
    hard_views: int = setting(3, STEP, "V: strong views per weak view (paper: 3)", ge=1, le=64)
    mi_labelled: bool = setting(True, STEP, "labelled images take part in the mutual information (section 4.3)")
    mi_batch_norm: Literal["joint", "separate"] = setting(
        "joint", STEP, "strong views share the forward, and so the batch statistics, of the base, or have their own"
    )


#: Keys of USB's configuration files that change nothing here: accepted with a notice, so that those files can be used.
WITHOUT_EFFECT = {
    "clip": "nothing in USB reads it either; to clip gradients set clip_grad",
    "train_sampler": "every image of an epoch is seen once",
    "crop_ratio": "weak_augment fixes the crop",
    **dict.fromkeys(
        ("rank", "world_size", "dist_url", "dist_backend", "multiprocessing_distributed"),
        "launch several processes with torchrun",
    ),
    "use_amp": "set amp, or precision",
}

#: Algorithms that learn something where there are no labels.
WITHOUT_LABELS = ("muscle", "contrastive", "muscle_contrastive")


def settings_model(algorithm: object) -> type[RunSettings]:
    """The pydantic model of all settings of one algorithm: every run's, MUSCLE's where it is composed in, and those
    that USB's class declares in ``get_argument``. A ConfigError if there is no such algorithm."""
    known = all_algorithms()
    if isinstance(algorithm, str) and algorithm in known:
        return _model(known[algorithm], algorithm in muscle_algorithms())
    name = str(algorithm)
    base = name.removeprefix(MUSCLE_PREFIX)
    if name != base and base in base_algorithms():
        fault = f"{name!r} does not exist, since a step of {base!r} sees no unlabelled image; use 'muscle'"
    elif reason := NOT_HOSTED.get(base):
        fault = reason
    else:
        fault = f"unknown {shown(repr(algorithm))}{did_you_mean(name, known)}{OF_ONES_OWN}; known: {', '.join(known)}"
    raise ConfigError([f"algorithm: {fault}"])


@cache
def _model(entry: Algorithm, with_muscle: bool) -> type[RunSettings]:
    fields: dict[str, Any] = {
        a.name: (a.type, Field(a.default, description=a.help or f"of {entry.name}, see USB", **dict(a.bounds)))
        for a in entry.arguments
        if a.name not in RunSettings.model_fields
    }
    bases: Any = (MuscleSettings, RunSettings) if with_muscle else (RunSettings,)
    model: type[RunSettings] = create_model(f"Settings_{entry.name}", __base__=bases, **fields)
    return model


def owners(key: str) -> dict[str, Any]:
    """The algorithms that have a setting of this name, and its default in each."""
    if key in MuscleSettings.model_fields:
        return dict.fromkeys(["muscle", "muscle_<base>"], MuscleSettings.model_fields[key].default)
    return {n: x.default for n, a in base_algorithms().items() for x in a.arguments if x.name == key}


def known_keys() -> set[str]:
    """The names of all settings."""
    usb = {x.name for a in base_algorithms().values() for x in a.arguments}
    return {*RunSettings.model_fields, *MuscleSettings.model_fields, *usb}
