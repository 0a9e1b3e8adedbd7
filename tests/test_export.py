"""From a checkpoint to files that timm, ONNX Runtime and this package read, by the command line; and faults in one line."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from muscle_plugin.cli import main
from muscle_plugin.inference import export
from muscle_plugin.inference.export import read_images
from muscle_plugin.inference.predict import Predictor

pytest.importorskip("safetensors")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

#: Settings of a net -> what is under test.
NETS = {
    "small_cnn": {"num_train_iter": 40, "num_eval_iter": 20},
    "cnn13": {"net_width": 0.1, "net_double_head": True},
    "timm:test_vit": {"img_size": 32},
    # grey images, larger ones for the net, and its own normalisation, of colours
    "timm:test_convnext": {"img_size": 16, "net_size": 40, "normalise": "net"},
    "wrn_28_2": {"img_size": 16},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Net -> the directory of a short run of it."""
    from conftest import SHORT

    from muscle_plugin.runs.train import train
    from muscle_plugin.settings.resolve import load_settings

    made = {}

    def run(net):
        if net not in made:
            where = tmp_path_factory.mktemp("run")
            settings = {**SHORT, "num_train_iter": 2, "epoch": 1, "num_eval_iter": 2, **NETS[net]}
            train(load_settings(None, **settings, net=net, save_dir=str(where), save_name="r"), quiet=True)
            made[net] = where / "r"
        return made[net]

    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Colour images of other sizes than the net's: what is exported must turn them grey as `predict` does."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(5):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize((40 + i, 31), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_exported_files_predict_what_the_checkpoint_predicts(net, trained, photos, tmp_path, capsys):
    run, out = trained(net), tmp_path / "a folder" / "out"
    assert main(["export", "--checkpoint", str(run), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "averaged weights" in said
    assert "64 images" in said  # the run's own test images
    assert ("by timm" in said) == net.startswith("timm:")
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1  # no file for its owner alone
    predictor = Predictor(run / "latest_model.pth", "cpu")
    images = read_images(photos, predictor.img_size)
    expected = predictor.logits(images)
    assert expected.std(0).max() > 0  # images do differ in what they are given

    again = export.load_exported(out, "cpu")
    assert torch.equal(again.logits(images), expected)
    assert torch.equal(again.probabilities(images), predictor.probabilities(images))
    assert (again.classes, again.img_size, again.step) == (predictor.classes, predictor.img_size, predictor.step)

    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    for some in (images, images[:1], images[:3]):
        logits, probabilities = session.run(None, {"images": some.numpy()})
        np.testing.assert_allclose(logits, expected[: len(some)], atol=1e-4)
        np.testing.assert_allclose(probabilities, expected[: len(some)].softmax(1), atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == predictor.classes
    assert not any("parametrizations" in i.name for i in session.get_inputs())
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]  # nothing half-written is left


def test_predict_prepares_images_as_the_runs_own_evaluation_does(trained, build_short):
    run, settings = trained("timm:test_convnext"), NETS["timm:test_convnext"]
    host = build_short(net="timm:test_convnext", **settings)
    checkpoint = torch.load(run / "latest_model.pth", weights_only=True)
    host.model.load_state_dict(checkpoint["ema_model"])
    images = host.source.images[:9]
    assert images.shape[1:] == (1, 16, 16)
    prepared = host.batches.to_net(images)
    assert prepared.shape[1:] == (3, 40, 40)
    assert checkpoint["images"]["interpolation"] == "bicubic"
    with torch.no_grad():
        expected = host.model.eval()(prepared)["logits"]
    torch.testing.assert_close(Predictor(run / "latest_model.pth", "cpu").logits(images.repeat(1, 3, 1, 1)), expected)


def test_timm_reads_the_folder_by_itself(trained, tmp_path):
    import timm

    out = tmp_path / "out"
    export.export_model(trained("timm:test_vit"), out, "safetensors")
    assert not (out / "model.onnx").exists()
    config = json.loads((out / "config.json").read_text())
    if tuple(int(n) for n in timm.__version__.split(".")[:3]) >= (1, 0, 16):
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    else:
        known = {k: config[k] for k in ("num_classes",)} | config["model_args"]
        model = timm.create_model(
            config["architecture"], checkpoint_path=str(out / "model.safetensors"), **known
        ).eval()
    predictor = Predictor(trained("timm:test_vit") / "latest_model.pth", "cpu")
    data = timm.data.resolve_data_config({}, model=model)
    assert data["input_size"] == (3, 32, 32)
    # a grey image, as the run's own are; timm's transforms and ours resize alike but for rounding
    grey = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).convert("RGB")
    x = timm.data.create_transform(**data, is_training=False)(grey)
    ours = predictor.logits(torch.from_numpy(np.asarray(grey).transpose(2, 0, 1).copy())[None])
    with torch.no_grad():
        torch.testing.assert_close(model(x[None]), ours, atol=1e-4, rtol=1e-4)
    assert config["label_names"] == predictor.classes


def test_by_tracing_where_torch_is_old(trained, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "BY_TORCH_EXPORT", False)
    monkeypatch.setattr(torch.onnx, "export", partial(torch.onnx.export, dynamo=False))  # as it is there
    lines = export.export_model(trained("small_cnn"), tmp_path / "out", "onnx", photos)
    assert any("5 images" in line for line in lines)


def test_an_exported_net_starts_a_run(trained, short_run, tmp_path):
    export.export_model(trained("small_cnn"), tmp_path / "out", "safetensors")
    file = tmp_path / "out" / "model.safetensors"
    assert short_run(init_from=str(file), init_head=True, num_train_iter=2, lr=1e-9, ema_m=0.0)["complete"]
    (run,) = [p.parent for p in tmp_path.rglob("latest_model.pth")]
    before, after = export.load_exported(tmp_path / "out", "cpu"), Predictor(run / "latest_model.pth", "cpu")
    torch.testing.assert_close(after.classifier.net.classifier.weight, before.classifier.net.classifier.weight)


def fault(capsys, *words, status=2):
    assert main(["export", *map(str, words)]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_what_predicts_otherwise_is_refused_and_leaves_nothing(trained, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    # as an exporter would that gets something wrong
    monkeypatch.setattr(
        export.ForONNX, "forward", lambda self, images: (y := self.classifier(255 - images), y.softmax(1))
    )
    line = fault(
        capsys, "--checkpoint", trained("small_cnn"), "--out", out, "--images", photos, "--format", "onnx", status=1
    )
    assert re.search(r"model\.onnx .*onnxruntime.*more than", line)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line(trained, tmp_path, capsys, monkeypatch):
    run, out = trained("small_cnn"), tmp_path / "out"
    assert "no such file" in fault(capsys, "--checkpoint", tmp_path / "absent", "--out", out)
    damaged = tmp_path / "damaged.pth"
    content = bytearray((run / "latest_model.pth").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert "damaged" in fault(capsys, "--checkpoint", damaged, "--out", out)
    assert "already" in fault(capsys, "--checkpoint", run, "--out", tmp_path)
    alone = tmp_path / "alone.pth"
    alone.write_bytes((run / "latest_model.pth").read_bytes())
    assert "--images" in fault(capsys, "--checkpoint", alone, "--out", out)
    assert f"{tmp_path}: no image" in fault(capsys, "--checkpoint", run, "--out", out, "--images", tmp_path)
    assert "--tolerance" in fault(capsys, "--checkpoint", run, "--out", out, "--tolerance", "nan")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    line = fault(capsys, "--checkpoint", run, "--out", out)
    assert "onnxscript" in line
    assert "'muscle-plugin[export]'" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{", r"config\.json: .*damaged"),
        ("config.json", b"{}", r"config\.json: .*muscle-plugin export"),
        ("config.json", b'{"muscle_plugin": {"format": 2}}', r"config\.json: .*format 1\b"),
        ("config.json", b'{"muscle_plugin": {"format": 1}}', r"out: .*\bwhole\b.*\bnet_options\b"),
        ("model.safetensors", b"no tensors", r"model\.safetensors: .*as safetensors"),
        ("model.safetensors", None, r"model\.safetensors: no such"),
    ],
)
def test_damaged_folder_is_one_line(file, content, said, trained, tmp_path):
    out = tmp_path / "out"
    export.export_model(trained("small_cnn"), out, "safetensors")
    (out / file).unlink()
    if content is not None:
        (out / file).write_bytes(content)
    with pytest.raises(ValueError, match=said) as e:
        export.load_exported(out)
    assert "\n" not in str(e.value)
