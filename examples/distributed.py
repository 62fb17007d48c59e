"""ENGM in several processes: the loop of one process, with DistributedDataParallel around the wrapped network.

torchrun --nproc-per-node 2 examples/distributed.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import engm

EPOCHS, BATCH = 3, 60  # examples of all ranks together: the run is the same with any number of processes


def main() -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    data = TensorDataset(x, torch.tensor(digits.target))
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    ).to(device)  # fmt: skip
    model = DistributedDataParallel(engm.GradNormModule(net))  # <-- in this order
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = engm.ENGM(model, sgd, alpha=1.0)

    sampler = DistributedSampler(data, shuffle=True)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(data, BATCH // world, sampler=sampler, drop_last=True):
            losses = F.cross_entropy(model(images.to(device)), labels.to(device), reduction="none")
            stats = opt.backward(losses)  # one pass; gradients are averaged over the ranks while they are summed
            opt.step()
            opt.zero_grad()
        if rank == 0:
            print(f"epoch {epoch}  loss {stats.losses.mean():.3f}  clipped {stats.clipped_fraction:.0%}", flush=True)

    with torch.no_grad():
        accuracy = (net(x.to(device)).argmax(1).cpu() == data.tensors[1]).float().mean()
    if rank == 0:
        print(f"{world} processes, training accuracy {accuracy:.1%}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
