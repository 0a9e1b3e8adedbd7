"""A trained net for use elsewhere: ``muscle-plugin export``, and :func:`load_exported` that reads it back.

An exported folder holds ``model.safetensors`` with ``config.json``, ``model.onnx``, or both. Nets of timm are written as
timm writes its own (``timm.create_model("local-dir:FOLDER", pretrained=True)``), others with the names of this package.
Nothing is left behind that does not give the checkpoint's own predictions on real images.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from muscle_plugin.data.images import decode, images_at
from muscle_plugin.errors import ConfigError, DataError, ExportError
from muscle_plugin.files import as_shared_as_any, load_safetensors, read_json, refuse_existing, write_json, writing
from muscle_plugin.inference.predict import Classifier, Predictor, Trained, build_trained, read_trained
from muscle_plugin.registry.names import TIMM
from muscle_plugin.run_files import checkpoint_of
from muscle_plugin.settings.resolve import resolve
from muscle_plugin.settings.sources import read_saved
from muscle_plugin.text import first_line
from muscle_plugin.training.host import read_source
from muscle_plugin.version import __version__

__all__ = ["ExportError", "export_model", "load_exported"]

FORMATS = ("safetensors", "onnx", "both")
WEIGHTS, CONFIG, ONNX = "model.safetensors", "config.json", "model.onnx"
#: The key of ``config.json`` under which this package's part stands, and the version of its form.
OURS, FORMAT = "muscle_plugin", 1
#: Images on which the export is compared with the checkpoint.
COMPARED = 64
TOLERANCE = 1e-4
_NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxruntime", "onnxscript")}


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    format: str = "both",
    images: str | Path | None = None,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Write the averaged net of a checkpoint to a new folder; returns lines that say what was written and checked.

    Args:
        checkpoint: a run's folder, or a checkpoint in it.
        out: folder to make.
        format: ``safetensors``, ``onnx`` or ``both``.
        images: a folder of images, or one, to compare the export with the checkpoint on; None: test images of the run's
            data set (training images if it has none).
        tolerance: the largest difference of a logit that is accepted, over the largest logit or 1.

    Raises:
        ValueError, DataError: an input cannot be had or read, ``out`` exists, or a package is missing.
        ExportError: torch cannot express the net in ONNX, or a difference is larger than ``tolerance``.
        WriteError: ``out`` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    wanted = ("safetensors", "onnx") if format == "both" else (format,)
    _refuse_missing(wanted)
    refuse_existing(out, "give a folder that does not")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"--tolerance: must be 0 or more, got {tolerance}")
    used = checkpoint_of(checkpoint)
    trained = read_trained(used)
    predictor = Predictor(trained, "cpu")
    pixels = _pixels(Path(images), predictor.img_size) if images is not None else _images_of_the_run(used, trained)
    expected = predictor.logits(pixels)
    checks = _Checks(expected, tolerance)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        try:
            if "safetensors" in wanted:
                _write_safetensors(trained, part, pixels, checks)
            if "onnx" in wanted:
                _write_onnx(trained, part / ONNX, pixels, checks)  # last: it folds the net's weights
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    kind = _weights_kind(trained)
    return [
        f"{trained.content['net']} of {used} ({kind} weights, step {predictor.step}, {len(predictor.classes)} classes): {out}",
        *(
            f"{name}: largest difference of a logit {d:.2g} over {len(pixels)} images"
            for name, d in checks.found.items()
        ),
    ]


def load_exported(folder: str | Path, device: str = "auto") -> Predictor:
    """What ``muscle-plugin export`` wrote as safetensors: ``probabilities`` and ``logits`` of uint8 RGB images, ``classes``,
    ``img_size``, and the net itself as ``classifier.net``.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: no such folder, or damaged.
        DeviceError: no such device.
    """
    folder = Path(folder)
    try:
        own = read_json(folder / CONFIG).get(OURS)
    except OSError as e:
        raise ValueError(f"{folder / CONFIG}: cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise ValueError(f"{folder / CONFIG}: damaged ({e})") from None
    if not isinstance(own, dict):
        raise ValueError(f"{folder / CONFIG}: not written by muscle-plugin export: there is no {OURS!r} in it")
    if own.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: of format {own.get('format')!r}; this version reads {FORMAT}")
    weights = load_safetensors(folder / WEIGHTS)
    if own.get("layout") == "timm":
        weights = _from_timm(weights, str(own.get("timm_classifier")))
    content = {**own, "it": own.get("step"), "ema_model": weights, "images": own}
    return Predictor(build_trained(content, folder), device)


# --------------------------------------------------------------------------------------------------------- safetensors


def _weights_kind(trained: Trained) -> str:
    settings = trained.content.get("settings")
    return "live" if isinstance(settings, dict) and settings.get("ema_m") == 0 else "averaged"


def _write_safetensors(trained: Trained, folder: Path, pixels: Tensor, checks: _Checks) -> None:
    from safetensors.torch import save_file

    about, content = trained.about, trained.content
    own = {
        "format": FORMAT,
        "version": __version__,
        "load": "muscle_plugin.load_exported(FOLDER)",
        "net": content["net"],
        "net_from_name": content["net_from_name"],
        "net_options": about["net_options"],
        "layout": "muscle_plugin",
        **{k: about[k] for k in ("classes", "img_size", "channels", "mean", "std")},
        "algorithm": content.get("algorithm_name"),
        "dataset": about.get("dataset"),
        "weights": _weights_kind(trained),
        "step": content["it"],
    }
    config: dict[str, Any] = {"architecture": content["net"], "num_classes": len(about["classes"])}
    config |= {"label_names": about["classes"]}
    weights = trained.net.state_dict()
    as_timm = _as_timm(trained, pixels, checks) if content["net"].startswith(TIMM) else None
    if as_timm is not None:
        config, weights, classifier = as_timm
        own |= {"layout": "timm", "timm_classifier": classifier}
    # no two tensors may share memory in such a file
    save_file(
        {n: t.detach().clone().contiguous() for n, t in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    as_shared_as_any(folder / WEIGHTS)  # the library's is for its owner alone
    write_json(folder / CONFIG, {**config, OURS: own})
    checks.compare(f"{WEIGHTS} by load_exported", load_exported(folder, "cpu").logits(pixels))
    if as_timm is not None:
        model = _timm_model(config)
        model.load_state_dict(load_safetensors(folder / WEIGHTS))
        checks.compare(f"{WEIGHTS} by timm", _logits_of_timm(trained, model, pixels))


def _as_timm(trained: Trained, pixels: Tensor, checks: _Checks) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """``config.json``, weights by timm's names and the name of timm's classifier; None where timm's model is not the same
    net: one with normalised features or of a shape of its own between pooling and classifier."""
    backbone = trained.net.get_submodule("backbone")
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    classifier = cfg.get("classifier")
    about = trained.about
    if not isinstance(classifier, str) or getattr(trained.net, "l2_feature", False):
        return None
    size = [3, about["img_size"], about["img_size"]]
    pretrained = {
        **{k: cfg[k] for k in ("first_conv", "fixed_input_size", "min_input_size") if cfg.get(k) is not None},
        "input_size": size,
        "num_classes": len(about["classes"]),
        "classifier": classifier,
        "custom_load": False,
        # as `predict` has images: stretched to the size, not cropped
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": about["mean"] * (3 // len(about["mean"])),
        "std": about["std"] * (3 // len(about["std"])),
    }
    config = {
        "architecture": trained.content["net"].removeprefix(TIMM).partition(".")[0],
        "num_classes": len(about["classes"]),
        "num_features": int(trained.net.num_features),  # type: ignore[arg-type]
        "label_names": about["classes"],
        "model_args": {"img_size": about["img_size"]},
        "pretrained_cfg": pretrained,
    }
    try:
        model = _timm_model(config)
    except TypeError:  # a net of convolutions, which takes any size
        del config["model_args"]
        model = _timm_model(config)
    own = trained.net.state_dict()
    weights = {n.removeprefix("backbone."): t for n, t in own.items() if n.startswith("backbone.")}
    weights |= {n.replace("classifier.", f"{classifier}.", 1): t for n, t in own.items() if n.startswith("classifier.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        return None
    return (config, weights, classifier) if checks.same(_logits_of_timm(trained, model, pixels)) else None


def _timm_model(config: dict[str, Any]) -> nn.Module:
    import timm

    arguments = config.get("model_args", {})
    return timm.create_model(config["architecture"], num_classes=config["num_classes"], **arguments).eval()


@torch.no_grad()
def _logits_of_timm(trained: Trained, model: nn.Module, pixels: Tensor) -> Tensor:
    """(N, C): what timm's model makes of the images as the checkpoint's net is given them."""
    whole = Classifier(Trained(_InPlace(model), trained.about, trained.content), torch.device("cpu"))
    return whole(pixels)


class _InPlace(nn.Module):
    """A model that returns logits, in USB's form."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(x)}


def _from_timm(weights: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """Weights by this package's names."""
    head = f"{classifier}."
    return {
        f"classifier.{n.removeprefix(head)}" if n.startswith(head) else f"backbone.{n}": t for n, t in weights.items()
    }


# ---------------------------------------------------------------------------------------------------------------- ONNX


class _ForONNX(nn.Module):
    """(N, 3, S, S) uint8 RGB to logits and probabilities, (N, C) each."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(images)
        return logits, logits.softmax(1)


def _write_onnx(trained: Trained, path: Path, pixels: Tensor, checks: _Checks) -> None:
    import onnx
    import onnxruntime

    _fold(trained.net)
    module = _ForONNX(Classifier(trained, torch.device("cpu"))).eval()
    example = pixels[:2] if len(pixels) > 1 else pixels.repeat(2, 1, 1, 1)  # of one image, torch would fix the batch
    try:
        with _quiet():
            model = onnx.load_model_from_string(_exported(module, example))
            about = {k: trained.about[k] for k in ("classes", "img_size", "mean", "std")}
            onnx.helper.set_model_props(
                model,
                {**{k: json.dumps(v) for k, v in about.items()}, "net": trained.content["net"], OURS: __version__},
            )
            onnx.checker.check_model(model)
            onnx.save(model, path)
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as e:  # torch's exporters, onnx and its runtime raise what they meet
        raise ExportError(
            f"torch {torch.__version__} cannot write this net as ONNX: {first_line(e.__cause__ or e)}"
        ) from e
    run: Callable[[Tensor], Any] = lambda x: session.run(["logits", "probabilities"], {"images": x.numpy()})  # noqa: E731
    try:
        logits, probabilities = (torch.from_numpy(np.array(v)) for v in run(pixels))
        alone = torch.from_numpy(np.array(run(pixels[-1:])[0]))
    except Exception as e:  # onnxruntime's errors derive from Exception alone
        raise ExportError(f"{ONNX} does not run on {len(pixels)} images: {first_line(e)}") from e
    checks.compare(f"{ONNX} by onnxruntime {onnxruntime.__version__}", logits)
    checks.compare(f"{ONNX} (one image at a time)", alone, -1)
    if not torch.allclose(probabilities, checks.expected.softmax(1), atol=1e-3):
        raise ExportError(f"{ONNX}: its probabilities are not the softmax of its logits")


def _exported(module: nn.Module, example: Tensor) -> bytes:
    """The ONNX file, for any number of images: by ``torch.export`` where this torch has it for ONNX, else by tracing."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits", "probabilities"]}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters and _version() >= (2, 6):
        shapes = {"images": {0: torch.export.Dim("batch")}}
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        assert program is not None
        return program.model_proto.SerializeToString()
    return _traced(module, example, names)


def _traced(module: nn.Module, example: Tensor, names: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    old = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    batch = {n: {0: "batch"} for n in ("images", "logits", "probabilities")}
    torch.onnx.export(module, (example,), out, opset_version=17, dynamic_axes=batch, **names, **old)  # type: ignore[call-overload]
    return out.getvalue()


def _version() -> tuple[int, ...]:
    return tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own workings."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _fold(net: nn.Module) -> None:
    """Put plain weights in the place of weight norm and other parametrisations."""
    for module in list(net.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)


# ------------------------------------------------------------------------------------------------------------ checking


class _Checks:
    """Compares logits with those of the checkpoint; ``found``: what was compared -> the largest difference."""

    def __init__(self, expected: Tensor, tolerance: float) -> None:
        self.expected, self.found = expected, dict[str, float]()
        self._limit = tolerance * max(1.0, float(expected.abs().max()))

    def same(self, logits: Tensor) -> bool:
        return float((logits - self.expected).abs().max()) <= self._limit

    def compare(self, name: str, logits: Tensor, first: int = 0) -> None:
        difference = float((logits - self.expected[first:]).abs().max())
        if not difference <= self._limit:
            raise ExportError(
                f"{name} differs from the checkpoint by {difference:.2g} in a logit, more than {self._limit:.2g};"
                " nothing was written"
            )
        self.found[name] = difference


def _pixels(images: Path, size: int) -> Tensor:
    """(N, 3, size, size) uint8: at most :data:`COMPARED` images, evenly chosen."""
    files = images_at(images)
    chosen = [files[i] for i in _evenly(len(files))]
    return torch.from_numpy(np.stack([decode(p, size) for p in chosen]))


def _images_of_the_run(checkpoint: Path, trained: Trained) -> Tensor:
    """The same of the data set that the run was trained on.

    Raises:
        DataError: it cannot be had.
    """
    file = checkpoint.parent / "config.yaml"
    try:
        args = Namespace(**resolve(read_saved(file)).as_dict())
        source = read_source(args).resized(trained.about["img_size"])
    except (ConfigError, DataError, OSError, ValueError) as e:
        raise DataError(
            f"the images of the run, to compare on, cannot be had ({first_line(e)}); --images names a folder of some"
        ) from None
    members = source.test if len(source.test) else source.train
    pixels = source.images[members[_evenly(len(members))]]
    return pixels if pixels.shape[1] == 3 else pixels.repeat(1, 3, 1, 1)


def _evenly(count: int) -> list[int]:
    return sorted({i * count // min(count, COMPARED) for i in range(min(count, COMPARED))})


def _refuse_missing(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in _NEEDS:
            raise ValueError(f"--format: {name!r} is none of {', '.join(FORMATS)}")
        if missing := [p for p in _NEEDS[name] if find_spec(p) is None]:
            raise ValueError(
                f"--format {name} needs {', '.join(missing)}, not installed here: pip install 'muscle-plugin[export]'"
            )
