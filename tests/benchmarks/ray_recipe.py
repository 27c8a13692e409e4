"""Batch classification as Ray's documentation shows it: read_webdataset, a map, map_batches over actors, write_parquet.

It stands alone on purpose, with nothing of tilefleet in it: `tilefleet bench classify` runs it on the same tiles, the
same network and the same number of processes, to compare itself with. Tars in, Parquet and one line of JSON out::

    python tests/benchmarks/ray_recipe.py SHARDS OUT --model cnn --workers 2

`tiles_per_second` is of the time in which all actors work, `seconds` is all of it but Python's imports.
"""

import argparse
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from plain_ddp import Net
from ray.data import DataContext
from torchvision import models, transforms

transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])])


def preprocess(row: dict) -> dict:
    return {"tile_id": row["__key__"], "image": transform(row["jpg"]).numpy()}


class Classifier:
    def __init__(self, model: str, classes: int, size: int, bf16: bool) -> None:
        torch.manual_seed(0)
        self.bf16 = bf16
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = Net(classes, size) if model == "cnn" else models.vgg16(num_classes=classes)
        self.net = self.net.eval().to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = torch.from_numpy(batch["image"]).to(self.device)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            confidence, class_id = torch.softmax(self.net(images).float(), 1).cpu().max(1)
        noted = {"finished": np.full(len(images), time.time()), "actor": np.full(len(images), os.getpid())}
        return {"tile_id": batch["tile_id"], "class_id": class_id.numpy(), "confidence": confidence.numpy()} | noted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("out")
    parser.add_argument("--model", choices=["cnn", "vgg16"], default="cnn")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    # On CPUs larger batches fall out of the caches and are slower, GPUs need them.
    parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 64)
    parser.add_argument("--actor-cpus", type=float, default=0.5)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()

    started = time.perf_counter()
    ray.init(address="local", num_cpus=args.workers, include_dashboard=False, logging_level=logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    # An actor on each CPU would leave none to the tasks that read and transform: with half a CPU each they all run.
    dataset = (
        ray.data.read_webdataset(args.shards, suffixes=["jpg"])
        .map(preprocess)
        .map_batches(
            Classifier,
            fn_constructor_args=(args.model, args.classes, args.size, args.precision == "bf16"),
            batch_size=args.batch_size,
            concurrency=args.workers,
            num_cpus=args.actor_cpus,
            num_gpus=1 if torch.cuda.is_available() else 0,
        )
    )
    dataset.write_parquet(args.out)
    seconds = time.perf_counter() - started
    ray.shutdown()

    parts = [str(part) for part in Path(args.out).glob("*.parquet")]
    rows = pq.read_table(parts, columns=["finished", "actor"])
    actors = rows.group_by("actor").aggregate([("finished", "min"), ("finished", "max")])
    first, last = pc.max(actors["finished_min"]).as_py(), pc.min(actors["finished_max"]).as_py()
    if first >= last:  # too few tiles for all actors to work at once
        first, last = pc.min(rows["finished"]).as_py(), pc.max(rows["finished"]).as_py()
    steady = pc.sum(pc.and_(pc.greater(rows["finished"], first), pc.less_equal(rows["finished"], last))).as_py()
    rate = steady / (last - first) if steady else 0.0
    print(json.dumps({"tiles_per_second": rate, "tiles": len(rows), "seconds": seconds}))


if __name__ == "__main__":
    main()
