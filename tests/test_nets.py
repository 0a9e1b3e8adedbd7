"""Nets: their sizes, what they return, their options, weights from a file, and what they refuse."""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn

import muscle_plugin.usb.names  # noqa: F401  (makes semilearn importable with this torch and timm)
from muscle_plugin.cli import main
from muscle_plugin.nets import OWN_NETS, NetOptions, build_net, net_options
from muscle_plugin.nets.foreign import torchvision_net
from muscle_plugin.nets.own import channels

VIT = "timm:vit_tiny_patch16_224"
#: Every kind of net, with a size of image that makes it quick.
NETS = {"small_cnn": 16, "cnn13": 16, "resnet18_84": 32, "timm:resnet18": 32, VIT: 32}


def size(net):
    return sum(p.numel() for p in net.parameters())


def images(n=2, channels=3, side=32, seed=0):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def with_one_line(call, match):
    """Check that the call raises a ValueError of one line that matches."""
    with pytest.raises(ValueError, match=match) as e:
        call()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "classes", "double", "parameters"),
    [
        ("cnn13", 10, False, 3_125_908),
        ("cnn13", 10, True, 3_127_208),
        ("cnn13", 100, False, 3_137_608),
        ("cnn13", 100, True, 3_150_608),
        ("resnet18_84", 100, False, 11_227_812),
        ("resnet18_84", 100, True, 11_279_212),
    ],
)
def test_the_papers_nets_have_their_parameters(name, classes, double, parameters):
    assert size(build_net(name, classes, options={"double_head": double})) == parameters


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_what_a_net_returns(name, in_channels):
    x = images(channels=in_channels, side=NETS[name])
    net = build_net(name, 7, in_channels, NETS[name], {"double_head": True, "l2_feature": True, "dropout": 0.3})
    assert net.training
    net.eval()
    with torch.no_grad():
        out, feat = net(x), net(x, only_feat=True)
        assert set(out) == {"logits", "logits2", "feat"}
        assert out["logits"].shape == out["logits2"].shape == (2, 7)
        assert feat.shape == (2, net.num_features)
        torch.testing.assert_close(out["feat"], feat)
        torch.testing.assert_close(net(feat, only_fc=True), out["logits"])
        torch.testing.assert_close(feat.norm(dim=1), torch.ones(2))
    assert not torch.equal(out["logits"], out["logits2"])


@pytest.mark.parametrize("name", NETS)
def test_by_default_there_is_one_head_and_the_feature_is_as_it_comes(name):
    net = build_net(name, 5, img_size=NETS[name]).eval()
    with torch.no_grad():
        out = net(images(side=NETS[name]))
    assert set(out) == {"logits", "feat"}
    assert not torch.allclose(out["feat"].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(net.classifier(out["feat"]), out["logits"])
    copy.deepcopy(net)  # as an EMA teacher is made


@pytest.mark.parametrize("name", [*NETS, "torchvision"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_usbs_optimiser_takes_every_parameter_once(name, layer_decay):
    from semilearn.core.utils import get_optimizer

    if name == "torchvision":
        net = torchvision_net("resnet18", 4)
    else:
        net = build_net(name, 4, img_size=NETS[name], options={"double_head": True})
    optimizer = get_optimizer(net, "SGD", lr=1.0, momentum=0.9, weight_decay=0.1, layer_decay=layer_decay)
    of_parameter = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(of_parameter) == len(list(net.parameters()))
    without = set(net.no_weight_decay())
    assert without <= {n for n, _ in net.named_parameters()}
    assert all((of_parameter[id(p)]["weight_decay"] == 0) == (n in without) for n, p in net.named_parameters())
    if layer_decay < 1:
        rates = [of_parameter[id(p)]["lr"] for p in net.parameters()]
        heads = [of_parameter[id(p)]["lr"] for n, p in net.named_parameters() if n.startswith("classifier")]
        assert set(heads) == {1.0}
        assert rates[-1] == max(rates)
        assert rates[0] == min(rates) < 0.3


@pytest.mark.parametrize("name", ["cnn13", "resnet18_84", "timm:resnet18"])
def test_layer_groups_are_the_same_inside_another_module(name):
    from semilearn.nets.utils import group_parameters

    net = build_net(name, 4, img_size=32)
    holder = nn.Module()
    holder.backbone = net  # as USB's CoMatch and SimMatch hold it
    for coarse in (False, True):
        alone = group_parameters(net, net.group_matcher(coarse), reverse=True)
        held = group_parameters(holder, net.group_matcher(coarse, prefix="backbone."), reverse=True)
        assert held == {f"backbone.{n}": g for n, g in alone.items()}


def test_a_vits_embeddings_have_no_weight_decay():
    assert {"backbone.pos_embed", "backbone.cls_token"} <= set(build_net(VIT, 4, img_size=32).no_weight_decay())


# ------------------------------------------------------------------------------------------------------------- cnn13


def test_cnn13s_parameters_keep_their_names():
    names = list(build_net("cnn13", 10).state_dict())
    assert len(names) == 75
    expected = {
        "blocks.0.0.0.bias",
        "blocks.0.0.0.parametrizations.weight.original0",
        "blocks.2.1.0.parametrizations.weight.original1",
        "blocks.4.2.1.running_var",
        "classifier.bias",
        "classifier.parametrizations.weight.original0",
    }
    assert expected <= set(names)
    with_options = build_net("cnn13", 10, options=NetOptions(dropout=0, input_noise=0.15, l2_feature=True))
    assert list(with_options.state_dict()) == names


def test_without_dropout_only_batch_norm_tells_training_from_evaluation():
    x = images(4)
    net = build_net("cnn13", 10, options={"dropout": 0.0})
    assert not any(isinstance(m, nn.Dropout) for m in net.modules())
    assert torch.equal(net(x)["logits"], net(x)["logits"])
    dropping = build_net("cnn13", 10)
    assert [m.p for m in dropping.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert not torch.equal(dropping(x)["logits"], dropping(x)["logits"])


@pytest.mark.parametrize("name", ["small_cnn", "resnet18_84", "timm:resnet18"])
def test_dropout_before_the_head_leaves_the_feature_whole(name):
    x = images(4)
    net = build_net(name, 10, img_size=32, options={"dropout": 0.5})
    a, b = net(x), net(x)
    torch.testing.assert_close(a["feat"], b["feat"])
    assert not torch.allclose(a["logits"], b["logits"])


def test_input_noise_is_added_in_training_only():
    net = build_net("cnn13", 10, options={"dropout": 0, "input_noise": 0.15})
    seen = []
    net.blocks.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x = images(16)
    net(x)
    net.eval()(x)
    noise = seen[0] - x
    assert noise.std().item() == pytest.approx(0.15, rel=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.005)
    assert torch.equal(seen[1], x)


@pytest.mark.parametrize(("width", "expected"), [(1, 128), (0.5, 64), (0.25, 32), (0.1, 16), (0.01, 8), (2, 256)])
def test_width_multiplies_channels_in_eights(width, expected):
    assert channels(128, width) == expected
    if width <= 1:
        net = build_net("cnn13", 10, options={"width": width})
        assert net.num_features == net.blocks[0][0][0].out_channels == expected
        assert net.eval()(images())["feat"].shape == (2, expected)


def test_the_second_head_is_weight_normed_and_learns_apart():
    for name, normed in (("cnn13", True), ("resnet18_84", False)):
        net = build_net(name, 10, options={"double_head": True})
        assert hasattr(net.classifier2, "parametrizations")
        assert hasattr(net.classifier, "parametrizations") is normed
        net(images())["logits2"].sum().backward()
        assert net.classifier.bias.grad is None
        assert net.classifier2.bias.grad is not None


# ------------------------------------------------------------------------------------------------------- resnet18_84


def test_resnet18_84_is_torchvisions_resnet18():
    from torchvision.models import resnet18

    theirs, ours = resnet18(num_classes=10).eval(), build_net("resnet18_84", 10, 3, 84).eval()
    state = {k.replace("blocks.", "").replace("classifier.", "fc."): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x = images(side=84)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)["logits"], theirs(x))
        assert ours.blocks(x).shape == (2, 512, 3, 3)


# ------------------------------------------------------------------------------------------------- builders, options


def test_builders_still_take_usbs_keywords():
    for builder in OWN_NETS.values():
        net = builder(num_classes=3, in_channels=1, pretrained=False, pretrained_path=None)
        assert net.eval()(images(channels=1))["logits"].shape == (2, 3)
    builder = partial(build_net, "cnn13", in_channels=1, img_size=16, options=NetOptions(width=0.25))
    assert builder(num_classes=3, pretrained=False, pretrained_path="").num_features == 32


def test_an_option_that_asks_for_nothing_suits_any_net():
    off = NetOptions(dropout=0, input_noise=0, width=1, double_head=False, l2_feature=False)
    for name, side in NETS.items():
        assert build_net(name, 2, img_size=side, options=off) is not None
    assert net_options("cnn13") == ("dropout", "input_noise", "double_head", "l2_feature", "width")
    assert "width" not in net_options("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cnn31", {}, "^net: .*'cnn31'.* 'cnn13'.* small_cnn, cnn13, resnet18_84, timm:<name>"),
        ("cnn13", {"options": {"drop_out": 0}}, "cnn13 .*'drop_out'.* 'dropout'"),
        ("resnet18_84", {"options": {"width": 2}}, "resnet18_84 .*'width'.* dropout, input_noise"),
        ("timm:resnet18", {"options": NetOptions(width=0.5)}, "timm:resnet18 .*'width'"),
        ("cnn13", {"options": {"dropout": 1.0}}, r"dropout .*\b0 .*\b1, .*\b1\.0"),
        ("cnn13", {"options": {"input_noise": -0.1}}, r"input_noise .*\b0\b"),
        ("cnn13", {"options": {"width": 0}}, r"width .*\b0\b"),
        ("cnn13", {"in_channels": 0}, r"\b1 channel.*\b0\b"),
        ("cnn13", {"img_size": 11}, "cnn13 .* 11 x 11.* 12 x 12"),
        ("small_cnn", {"img_size": 8}, "small_cnn .* 8 x 8"),
        ("cnn13", {"pretrained": True}, "cnn13 .*pretrained"),
        ("resnet18_84", {"pretrained": True}, "resnet18_84 .*pretrained"),
        ("timm:resnet81", {}, r"timm .*'resnet81'.* 'resnet\d+"),
        ("timm:", {}, "timm .*''"),
        ("timm:hf-hub:some/model", {}, "timm .*'hf-hub:some/model'"),
        ("timm:resnet18.nosuchtag", {}, r"timm:resnet18\.nosuchtag "),
        (VIT, {"img_size": 30}, rf"{VIT} .* 30 x 30 .*\b16\b"),
        (VIT, {"img_size": 8}, f"{VIT} .* 8 x 8"),
        ("timm:vgg11", {"img_size": 16}, "timm:vgg11 .* 16 x 16"),
        ("timm:test_vit", {"in_channels": 0}, r"\b1 channel.*\b0\b"),
    ],
)
def test_what_cannot_be_built_is_one_line(name, arguments, message):
    with_one_line(lambda: build_net(name, 2, **arguments), message)


@pytest.mark.parametrize("name", ["cnn13", "timm:resnet18"])
def test_images_of_other_channels_are_one_line(name):
    net = build_net(name, 2, 3, 32)
    with_one_line(lambda: net(images(channels=1)), r"\b3 channels.*\(2, 1, 32, 32\)")
    with_one_line(lambda: net(images()[0]), r"\b3 channels")


# -------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize(("side", "grid"), [(32, 4), (64, 16)])
def test_a_vit_is_built_for_the_size_of_the_images(side, grid):
    net = build_net(VIT, 3, 1, side).eval()
    assert net.backbone.pos_embed.shape == (1, grid + 1, 192)
    assert net(images(channels=1, side=side))["feat"].shape == (2, 192)


def test_the_feature_is_timms_pooled_output_even_where_it_is_larger_than_num_features():
    net = build_net("timm:mobilenetv3_small_050", 3, 3, 32).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(net(x, only_feat=True), net.backbone(x))
    assert net.num_features == 1024 != net.backbone.num_features


def save(state, path):
    if path.suffix == ".safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("classes", [0, 11])
@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224"])
def test_weights_from_a_file(tmp_path, model, classes, suffix):
    import timm

    kwargs = {"img_size": 32} if "vit" in model else {}
    theirs = timm.create_model(model, num_classes=classes, **kwargs).eval()
    path = save(theirs.state_dict(), tmp_path / f"weights{suffix}")
    net = build_net(f"timm:{model}", 3, 3, 32, pretrained=True, pretrained_path=str(path)).eval()
    x = images()
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(net(x)["feat"], expected)
    assert net.classifier.out_features == 3


@pytest.mark.parametrize("model", ["efficientvit_m0", "test_convnext"])
def test_a_classifier_of_several_layers_is_left_out_of_weights(tmp_path, model):
    import timm

    theirs = timm.create_model(model, num_classes=7)
    path = save(theirs.state_dict(), tmp_path / "w.pth")
    net = build_net(f"timm:{model}", 3, pretrained=True, pretrained_path=path)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in net.backbone.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        "test_vit", "test_vit3", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224", "levit_128s", "test_convnext2",
        "mobilenetv3_small_050", "efficientvit_b0", "test_nfnet", "resnet50_clip",
    ],
)  # fmt: skip
def test_features_are_what_a_whole_models_classifier_gets(tmp_path, model):
    """Also where the pooling has weights of its own: an attention pool, a norm, a convolution before the classifier."""
    import timm

    try:
        theirs = timm.create_model(model).eval()
    except RuntimeError:
        pytest.skip(f"this timm has no {model}")
    with torch.no_grad():
        for p in theirs.parameters():  # no two equal, no layer that does nothing
            p.add_(0.02 * torch.randn_like(p))
    path = save(theirs.state_dict(), tmp_path / "w.pth")
    side = theirs.pretrained_cfg["input_size"][-1]
    net = build_net(f"timm:{model}", 3, 3, side, pretrained=True, pretrained_path=path).eval()
    x = images(1, side=side)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(net(x, only_feat=True), expected)


def test_weights_nested_in_a_checkpoint_of_a_parallel_model(tmp_path):
    import timm

    theirs = timm.create_model("test_vit", num_classes=0)
    path = save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "w.pth"
    )
    net = build_net("timm:test_vit", 3, pretrained=True, pretrained_path=path)
    assert all(torch.equal(v, net.backbone.state_dict()[k]) for k, v in theirs.state_dict().items())


def test_position_embeddings_are_interpolated_to_another_size_of_images(tmp_path):
    import timm

    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64)
    path = save(theirs.state_dict(), tmp_path / "w.pth")
    net = build_net(VIT, 3, 3, 32, pretrained=True, pretrained_path=path)
    assert net.backbone.pos_embed.shape == (1, 5, 192)
    assert torch.equal(net.backbone.pos_embed[:, 0], theirs.pos_embed[:, 0])
    assert torch.equal(net.backbone.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


def test_a_path_without_pretrained_is_not_read():
    assert build_net("timm:test_vit", 3, pretrained_path="/no/such/file") is not None


class Payload:
    def __reduce__(self):
        return (print, ("ran",))


def test_weights_that_cannot_be_used_are_one_line(tmp_path, capsys):
    import timm

    def load(path, in_channels=3):
        return lambda: build_net("timm:resnet18", 3, in_channels, 32, pretrained=True, pretrained_path=tmp_path / path)

    state = timm.create_model("resnet18", num_classes=0).state_dict()
    save({k: v for k, v in state.items() if not k.startswith("conv1")}, tmp_path / "less.pth")
    save({**state, "neck.weight": torch.zeros(1)}, tmp_path / "more.pth")
    save(state, tmp_path / "rgb.pth")
    save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Payload()))
    with_one_line(load("none.pth"), r"none\.pth: no such")
    with_one_line(load("less.pth"), r"less\.pth: .* timm:resnet18.*missing.* conv1\.weight$")
    with_one_line(load("more.pth"), r"more\.pth: .* timm:resnet18.*not in the model.* neck\.weight$")
    with_one_line(load("rgb.pth", 1), r"rgb\.pth: .*shape.* conv1\.weight \(64, 3, 7, 7\).*\(64, 1, 7, 7\)$")
    with_one_line(load("vit.safetensors"), r"missing.* conv1\.weight, .* \d+ more.*not in the model")
    with_one_line(load("list.pth"), "list.pth: .* list")
    with_one_line(load("text.pth"), "text.pth: ")
    with_one_line(load("text.safetensors"), "text.safetensors: ")
    with_one_line(load("code.pth"), "code.pth: ")
    assert "ran" not in capsys.readouterr().out


def test_a_vit_does_not_take_a_resnets_weights(tmp_path):
    import timm

    path = save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "w.pth")
    call = partial(build_net, VIT, 3, 3, 32, pretrained=True, pretrained_path=path)
    with_one_line(call, rf" {VIT}.*missing.* cls_token, pos_embed, .*not in the model.* conv1\.weight")


def test_offline_the_hub_is_one_line_that_names_the_way_out(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    call = partial(build_net, "timm:resnet18", 3, 3, 32, pretrained=True)
    with_one_line(call, r"timm:resnet18 .*offline.* model\.safetensors .*/timm/resnet18\S* as --pretrain_path FILE")


def test_a_server_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    class Unreachable:
        def head(self, url, timeout):
            asked.append(timeout)
            raise OSError("no route")

    monkeypatch.setattr(hub, "get_session", Unreachable)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with_one_line(partial(build_net, "timm:resnet18", 3, 3, 32, pretrained=True), "timm:resnet18 .*offline")
    assert asked == [5]
    assert not hub.constants.HF_HUB_OFFLINE


def test_weights_from_the_hub_must_fit_but_for_the_classifier(monkeypatch):
    import timm

    def hub(state):
        def create(name, pretrained=False, pretrained_cfg=None, **arguments):
            overlay = {"state_dict": state} if pretrained else pretrained_cfg
            return timm_create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments)

        monkeypatch.setattr(timm, "create_model", create)
        return build_net("timm:test_resnet", 3, 3, 32, pretrained=True)

    timm_create = timm.create_model
    state = timm_create("test_resnet").state_dict()
    assert torch.equal(hub(dict(state)).backbone.conv1[0].weight, state["conv1.0.weight"])
    del state["conv1.0.weight"]
    with_one_line(lambda: hub(state), r"timm:test_resnet .*conv1\.0\.weight")


def test_torchvisions_weights_say_how_their_images_were(tmp_path):
    """Weights are known by the name of torchvision's file; a classifier of other classes is left out."""
    import torchvision

    from muscle_plugin.nets.build import pretrained_statistics
    from muscle_plugin.settings.resolve import load_settings

    own = torchvision.models.resnet18()
    with torch.no_grad():
        own.conv1.weight.fill_(0.25)
    own.fc = nn.Linear(512, 7)
    path = save(own.state_dict(), tmp_path / "w.pth")
    assert (torchvision_net("resnet18", 3, True, path).backbone.conv1.weight == 0.25).all()
    del own.layer4
    save(own.state_dict(), path)
    with_one_line(lambda: torchvision_net("resnet18", 3, True, path), r"w\.pth: .*missing: layer4\.0\.conv1\.weight, ")

    def found(net, file, **more):
        settings = load_settings(net=net, net_from_name=True, pretrain_path=str(tmp_path / file), **more).settings
        return pretrained_statistics(settings)

    assert found("resnet18", "w.pth") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    assert found("vit_b_16", "vit_b_16_swag-9ac1b537.pth")[2] == "bicubic"
    assert found("resnet18", "w.pth", normalise="data") is None


def test_a_model_without_weights_in_the_hub_is_one_line():
    import timm

    name = next(n for n in timm.list_models() if not timm.is_model_pretrained(n))
    call = partial(build_net, f"timm:{name}", 3, pretrained=True)
    with_one_line(call, f"timm .*pretrained .*{name}")


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "test_efficientnet", "test_resnet"])
def test_other_models_of_timm_train(model):
    net = build_net(f"timm:{model}", 3, 3, 64)
    net(images(side=64))["logits"].sum().backward()
    assert all(p.grad is not None for p in net.classifier.parameters())
    assert next(net.backbone.parameters()).grad is not None


def test_usbs_nets_take_weights_from_a_file_and_say_what_is_wrong_with_it(tmp_path, build_short):
    small = {"algorithm": "fixmatch", "net": "vit_tiny_patch2_32", "img_size": 32, "total_batch": 4}
    net = build_short(**small).model
    weights = {n: torch.full_like(t, 0.5) for n, t in net.state_dict().items()}
    torch.save({"model": {f"module.{n}": t for n, t in weights.items()}}, tmp_path / "published.pth")
    loaded = build_short(**small, use_pretrain=True, pretrain_path=str(tmp_path / "published.pth")).model.state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in loaded.items() if not n.startswith("head"))
    assert not torch.equal(loaded["head.weight"], weights["head.weight"])
    torch.save({"something": 1}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("text")
    for path, message in (
        ("none.pth", "no such"),
        ("other.pth", "not weights"),
        ("text.pth", "not weights"),
    ):
        with pytest.raises(ValueError, match=rf"{path}: {message} .*vit_tiny_patch2_32"):
            build_short(**small, use_pretrain=True, pretrain_path=str(tmp_path / path))
    with pytest.raises(ValueError, match=r"/weights\.pth: .*downloaded .*--pretrain_path FILE"):
        build_short(**small, use_pretrain=True, pretrain_path="http://127.0.0.1:9/weights.pth")


@pytest.mark.parametrize(
    "words",
    [
        "--net wrn_28_2 --pretrain_path none.pth",
        "--net timm:test_resnet --pretrain_path none.pth",
        "--net resnet18 --net_from_name true --pretrain_path none.pth",
        "--net resnet18 --net_from_name true --use_pretrain true",
        "--net small_cnn --pretrain_path none.pth",
    ],
)
def test_pretrained_weights_that_cannot_be_had_end_before_training(words, tmp_path, capsys):
    place = ["--save_dir", str(tmp_path), "--save_name", "a"]
    assert main(["train", "fixmatch_digits_10", *words.split(), *place]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match("error: .*(none.pth: no such file|--pretrain_path FILE|small_cnn has no pretrained weights)", last)
    assert not (tmp_path / "a" / "result.json").exists()
