"""Peer: torchvision's RandomResizedCrop and flip in PyTorch's DataLoader. Run by its path."""

import sys

from turns import Turns

WORKERS = 2

turns = Turns()
# torchvision looks for a module `pytorch` and would find the peer of that name.
del sys.path[0]

import torch
from torchvision import datasets, transforms

size = turns.settings["size"]
transform = transforms.Compose(
    [
        transforms.RandomResizedCrop(size),  # antialiased
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),  # uint8, as ours
    ]
)
loader = torch.utils.data.DataLoader(
    datasets.ImageFolder(turns.settings["data"], transform),
    turns.settings["batch_size"],
    shuffle=True,
    drop_last=True,
    num_workers=WORKERS,
    persistent_workers=True,
)


def endless():
    while True:
        yield from loader


batches = endless()
turns.repeat(lambda: next(batches), turns.settings["batch_size"])
