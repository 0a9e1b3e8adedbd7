"""A trained net for use elsewhere: ``muscle-plugin export``, and :func:`load_exported` that reads it back.

An exported folder holds ``model.safetensors`` with ``config.json``, ``model.onnx``, or both. Nets of timm are written as
timm writes its own (``timm.create_model("local-dir:FOLDER", pretrained=True)``), others with the names of this package.
Nothing is left behind that does not give the checkpoint's own predictions on real images.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from muscle_plugin.data.images import decode, images_at
from muscle_plugin.data.load import load_data
from muscle_plugin.errors import DataError, ExportError, InputError
from muscle_plugin.files import load_safetensors, read_json, refuse_existing, write_json, writing
from muscle_plugin.inference.predict import Predictor
from muscle_plugin.inference.trained import Classifier, Trained, read_trained, rebuild
from muscle_plugin.nets.frozen import FrozenNet
from muscle_plugin.registry.names import TIMM
from muscle_plugin.run_files import CONFIG_FILE, checkpoint_of
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.settings.sources import read_saved
from muscle_plugin.text import first_line
from muscle_plugin.version import __version__

__all__ = ["ExportError", "export_model", "load_exported"]

WEIGHTS, CONFIG, ONNX = "model.safetensors", "config.json", "model.onnx"
#: The key of ``config.json`` under which this package's part stands, and the version of its form.
OURS, FORMAT = "muscle_plugin", 1
#: Images on which the export is compared with the checkpoint.
COMPARED = 64
#: Packages that a format needs.
_NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxruntime", "onnxscript")}
#: Whether this torch writes ONNX by ``torch.export``; older ones trace.
BY_TORCH_EXPORT = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 6)


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    format: str = "both",
    images: str | Path | None = None,
    tolerance: float = 1e-4,
    pretrain_path: str | Path | None = None,
) -> list[str]:
    """Write the averaged net of a checkpoint to a new folder; returns lines that say what was written and checked.

    Args:
        checkpoint: a run's folder, or a checkpoint in it.
        out: folder to make.
        format: ``safetensors``, ``onnx`` or ``both``.
        images: a folder of images, or one, to compare the export with the checkpoint on; None: test images of the run's
            data set (training images if it has none).
        tolerance: largest accepted difference of a logit, relative to the largest logit or 1.
        pretrain_path: file of the frozen backbone's weights, of a run with ``tune``; None: where the run had them.

    Raises:
        InputError: an input is no checkpoint, ``out`` exists, or a package is missing.
        DataError: the images to compare on cannot be had.
        ExportError: torch cannot express the net in ONNX, or a difference is larger than ``tolerance``.
        WriteError: ``out`` cannot be written.
    """
    out = Path(out)
    wanted = tuple(_NEEDS) if format == "both" else (format,)
    for name in wanted:
        if name not in _NEEDS:
            raise InputError(f"--format: {name!r} is none of {', '.join(_NEEDS)}, both")
        if missing := [p for p in _NEEDS[name] if find_spec(p) is None]:
            raise InputError(
                f"--format {name} needs {', '.join(missing)}, not installed here: pip install 'muscle-plugin[export]'"
            )
    refuse_existing(out, "choose another output folder")
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"--tolerance: must be 0 or more, got {tolerance}")
    used = checkpoint_of(Path(checkpoint))
    trained = read_trained(used, Path(pretrain_path) if pretrain_path else None)
    info, size = trained.info, trained.info.img_size
    pixels = read_images(Path(images), size) if images is not None else _images_of_the_run(used, size)
    comparison = Comparison(pixels, Predictor(trained, "cpu").logits(pixels), tolerance)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        try:
            if "safetensors" in wanted:
                _write_safetensors(trained, part, comparison)
            if "onnx" in wanted:
                _write_onnx(trained, part / ONNX, comparison)  # last: it changes the net's weights
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return [
        f"{info.net} of {used} ({info.weights} weights, step {info.step}, {len(info.classes)} classes): {out}",
        *(
            f"{name}: largest difference of a logit {d:.2g} over {len(pixels)} images"
            for name, d in comparison.found.items()
        ),
    ]


def load_exported(folder: str | Path, device: str = "auto") -> Predictor:
    """Read what ``muscle-plugin export`` wrote as safetensors: ``probabilities`` and ``logits`` of uint8 RGB images,
    ``classes``, ``img_size``, and the net itself as ``classifier.net``.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: no such folder, damaged, or USB is needed for its net and not installed.
        DeviceError: no such device.
    """
    folder = Path(folder)
    try:
        own = read_json(folder / CONFIG).get(OURS)
    except (OSError, InputError) as e:
        raise InputError(
            f"{folder / CONFIG}: absent or damaged ({getattr(e, 'strerror', None) or first_line(e)})"
        ) from None
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG}: not written by muscle-plugin export, in format {FORMAT}")
    weights = load_safetensors(folder / WEIGHTS)
    if own.get("layout") == "timm":
        head = f"{own.get('timm_classifier')}."
        weights = {
            f"classifier.{n.removeprefix(head)}" if n.startswith(head) else f"backbone.{n}": t
            for n, t in weights.items()
        }
    return Predictor(rebuild(own, weights, folder), device)


class Comparison:
    """Compares logits of (N, 3, S, S) uint8 RGB ``images`` with the checkpoint's, ``expected`` (N, C); ``found`` holds the
    largest difference of a logit by what was compared."""

    def __init__(self, images: Tensor, expected: Tensor, tolerance: float) -> None:
        self.images, self.expected, self.found = images, expected, dict[str, float]()
        self.limit = tolerance * max(1.0, float(expected.abs().max()))

    def check(self, name: str, logits: Tensor, first: int = 0) -> None:
        """Refuse logits, of all images from ``first`` on, that differ by more than the tolerance."""
        difference = float((logits - self.expected[first:]).abs().max())
        if not difference <= self.limit:
            raise ExportError(
                f"{name} differs from the checkpoint by {difference:.2g} in a logit, more than {self.limit:.2g};"
                " nothing was written"
            )
        self.found[name] = difference


def read_images(path: Path, size: int) -> Tensor:
    """(N, 3, size, size) uint8 RGB: at most :data:`COMPARED` images of a folder, evenly chosen; or one image."""
    files = images_at(path)
    return torch.from_numpy(np.stack([decode(files[i], size) for i in _evenly(len(files))]))


def _images_of_the_run(checkpoint: Path, size: int) -> Tensor:
    """As :func:`read_images`, of the data set that the run of a checkpoint was trained on: test images if it has any."""
    try:
        saved = {k: v for layer in read_saved(checkpoint.parent / CONFIG_FILE) for k, v in layer.values.items()}
        s = RunSettings(**{k: v for k, v in saved.items() if k in RunSettings.model_fields})
        source = load_data(s.model_copy(update={"img_size": size}))
    except (DataError, OSError, ValueError) as e:
        raise DataError(
            f"the images of the run, to compare on, cannot be had ({first_line(e)}); --images names a folder of some"
        ) from None
    members = source.test if len(source.test) else source.train
    pixels = source.images[members[_evenly(len(members))]]
    return pixels if pixels.shape[1] == 3 else pixels.repeat(1, 3, 1, 1)


def _evenly(count: int) -> Sequence[int]:
    chosen = min(count, COMPARED)
    return [i * count // chosen for i in range(chosen)]


def _write_safetensors(trained: Trained, folder: Path, comparison: Comparison) -> None:
    from safetensors.torch import save

    info = trained.info
    own = {
        "format": FORMAT,
        "version": __version__,
        "load": "muscle_plugin.load_exported(FOLDER)",
        "layout": "muscle_plugin",
        **info.model_dump(),
    }
    config = {"architecture": info.net, "num_classes": len(info.classes), "label_names": info.classes}
    weights = trained.net.state_dict()
    plain = trained.net.folded() if isinstance(trained.net, FrozenNet) else trained.net
    if info.net.startswith(TIMM) and plain and (as_timm := _to_timm(replace(trained, net=plain), comparison)):
        config, weights, classifier = as_timm
        own |= {"layout": "timm", "timm_classifier": classifier, "head": None}
    # no two tensors may share memory in such a file
    whole = {n: t.detach().clone().contiguous() for n, t in weights.items()}
    (folder / WEIGHTS).write_bytes(save(whole, metadata={"format": "pt"}))
    write_json(folder / CONFIG, {**config, OURS: own})
    comparison.check(f"{WEIGHTS} by load_exported", load_exported(folder, "cpu").logits(comparison.images))


class ForONNX(nn.Module):
    """(N, 3, S, S) uint8 RGB to logits and probabilities, (N, C) each."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(images)
        return logits, logits.softmax(1)


def _write_onnx(trained: Trained, path: Path, comparison: Comparison) -> None:
    """Write the net with its normalisation; weight norm and other parametrisations of it become plain weights."""
    import onnx
    import onnxruntime

    images = comparison.images
    for module in list(trained.net.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name)
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)  # of one image, torch would fix the batch
    about = trained.info.model_dump(include={"classes", "img_size", "mean", "std"})
    properties = {**{k: json.dumps(v) for k, v in about.items()}, "net": trained.info.net, "muscle_plugin": __version__}
    try:
        with _quiet():
            module = ForONNX(Classifier(trained, torch.device("cpu"))).eval()
            model = onnx.load_model_from_string(_onnx_of(module, example))
            onnx.helper.set_model_props(model, properties)
            onnx.checker.check_model(model)
            onnx.save(model, path)
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            outputs = ["logits", "probabilities"]
            logits, probabilities = map(torch.tensor, session.run(outputs, {"images": images.numpy()}))
            last = torch.tensor(session.run(["logits"], {"images": images[-1:].numpy()})[0])
    except OSError:
        raise
    except Exception as e:  # torch's exporters, onnx and its runtime raise what they meet
        raise ExportError(
            f"torch {torch.__version__} writes no ONNX of this net that runs: {first_line(e.__cause__ or e)}"
        ) from e
    comparison.check(f"{ONNX} by onnxruntime {onnxruntime.__version__}", logits)
    comparison.check(f"{ONNX} (one image at a time)", last, len(images) - 1)
    if not torch.allclose(probabilities, comparison.expected.softmax(1), atol=1e-3):
        raise ExportError(f"{ONNX}: its probabilities are not the softmax of its logits")


def _onnx_of(module: nn.Module, example: Tensor) -> bytes:
    """The ONNX file, for any number of images: by ``torch.export`` where this torch has it for ONNX, else by tracing."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits", "probabilities"]}
    if BY_TORCH_EXPORT:
        shapes = {"images": {0: torch.export.Dim("batch")}}
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        assert program is not None
        return program.model_proto.SerializeToString()
    out = io.BytesIO()
    batch = {n: {0: "batch"} for n in ("images", "logits", "probabilities")}
    torch.onnx.export(module, (example,), out, opset_version=17, dynamic_axes=batch, **names)  # type: ignore[call-overload]
    return out.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' remarks on their own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _to_timm(trained: Trained, comparison: Comparison) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """``config.json``, weights by timm's names, and the name of timm's classifier.

    None where timm's model is not the same net: with normalised features, or with layers between pooling and classifier.
    """
    info, backbone = trained.info, trained.net.get_submodule("backbone")
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    classifier = cfg.get("classifier")
    if not isinstance(classifier, str):
        return None
    pretrained = {
        **{k: cfg[k] for k in ("first_conv", "fixed_input_size", "min_input_size") if cfg.get(k) is not None},
        "input_size": [3, info.input_size, info.input_size],
        "num_classes": len(info.classes),
        "classifier": classifier,
        "custom_load": False,
        # as `predict` has images: stretched to the size, not cropped
        "interpolation": info.interpolation if info.net_size else "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": info.mean * (3 // len(info.mean)),
        "std": info.std * (3 // len(info.std)),
    }
    config = {
        "architecture": info.net.removeprefix(TIMM).partition(".")[0],
        "num_classes": len(info.classes),
        "num_features": int(trained.net.num_features),  # type: ignore[arg-type]
        "label_names": info.classes,
        "model_args": {"img_size": info.input_size},
        "pretrained_cfg": pretrained,
    }
    names = {"backbone": "", "classifier": f"{classifier}."}  # a second head stays behind
    parts = ((*name.partition("."), tensor) for name, tensor in trained.net.state_dict().items())
    weights = {names[part] + rest: tensor for part, _, rest, tensor in parts if part in names}
    try:
        try:
            logits = _logits_by_timm(config, weights, trained, comparison.images)
        except TypeError:  # a convolutional net, which takes any size
            del config["model_args"]
            logits = _logits_by_timm(config, weights, trained, comparison.images)
        comparison.check(f"{WEIGHTS} by timm", logits)
    except RuntimeError:  # it has other layers or, an ExportError, gives other logits
        return None
    return config, weights, classifier


@torch.no_grad()
def _logits_by_timm(config: dict[str, Any], weights: dict[str, Tensor], trained: Trained, images: Tensor) -> Tensor:
    """(N, C) logits of the timm model that a ``config.json`` describes, for images prepared as for the checkpoint's net."""
    import timm

    arguments = config.get("model_args", {})
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **arguments).eval()
    model.load_state_dict(weights)
    return Classifier(trained, torch.device("cpu"), model)(images)
