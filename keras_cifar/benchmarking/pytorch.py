"""Peer: PyTorch, eager or compiled, in either memory format, in one process or two. Run by its path."""

from networks import build_modules
from turns import Turns

turns = Turns()
settings = turns.settings

import torch
from torch import nn

bfloat16 = settings["dtype_policy"] == "mixed_bfloat16"
batch_size = settings["batch_size"] // settings.get("processes", 1)
torch.manual_seed(0)
model = build_modules(turns, nn, nn.Module, "d", "bias")
layout = torch.channels_last if settings["channels_last"] else torch.contiguous_format
model = model.train().to(memory_format=layout)
images = torch.rand(batch_size, 3, 32, 32).contiguous(memory_format=layout)
labels = torch.randint(0, 10, (batch_size,))
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
forward = torch.compile(model) if settings["compile"] else model
if processes := settings.get("processes"):
    torch.set_num_threads(settings["threads"])
    torch.distributed.init_process_group(
        "gloo", settings["address"], world_size=processes, rank=settings["rank"]
    )
    forward = nn.parallel.DistributedDataParallel(model)


def step():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = nn.functional.cross_entropy(forward(images), labels)
    loss.backward()
    optimizer.step()


turns.repeat(step, settings["batch_size"])
