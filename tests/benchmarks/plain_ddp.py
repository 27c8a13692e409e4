"""Image classification as most people write it: torchvision's ImageFolder, a DataLoader with workers, transforms, DDP.

It stands alone on purpose, with nothing of tilefleet in it: `tilefleet bench train` runs it on the same tiles, the same
network and the same number of processes, to compare itself with. Class folders in, one line of JSON out::

    torchrun --nproc-per-node 2 tests/benchmarks/plain_ddp.py EuroSAT_RGB --epochs 3

`tiles_per_second` is over all processes and over the epochs after the first.
"""

import argparse
import json
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision import datasets, models, transforms


class Net(nn.Module):
    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(64 * (size // 8) ** 2, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.pool(self.relu(self.conv3(x)))
        x = self.dropout(torch.flatten(x, 1))
        x = self.dropout(self.relu(self.fc1(x)))
        return self.fc2(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--model", choices=["cnn", "vgg16"], default="cnn")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--num-workers", type=int, default=2, help="of each process")
    args = parser.parse_args()

    use_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if use_cuda else "cpu")

    transform = transforms.Compose(
        [
            transforms.Resize((args.size, args.size)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ]
    )
    dataset = datasets.ImageFolder(args.data, transform)
    sampler = DistributedSampler(dataset, shuffle=True)
    loader = DataLoader(
        dataset, batch_size=args.batch_size, sampler=sampler, num_workers=args.num_workers, pin_memory=use_cuda
    )

    num_classes = len(dataset.classes)
    net = Net(num_classes, args.size) if args.model == "cnn" else models.vgg16(num_classes=num_classes)
    ddp = DistributedDataParallel(net.to(device), device_ids=[device.index] if use_cuda else None)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=args.lr)

    seconds, loss_of_epoch = [], 0.0
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        ddp.train()
        started, running_loss = time.perf_counter(), 0.0
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = criterion(ddp(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        if use_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        loss_of_epoch = running_loss / len(loader)

    if rank == 0:
        steady = seconds[1:]
        rate = len(dataset) * len(steady) / sum(steady)
        print(json.dumps({"tiles_per_second": rate, "tiles": len(dataset), "loss": loss_of_epoch, "seconds": seconds}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
