"""Batch classification as most people write it: webdataset, Pillow, ToTensor, a DataLoader, an eager model.

It stands alone on purpose, with nothing of tilefleet in it: `tilefleet bench classify` runs it on the same tiles, the
same network and the same number of processes, to compare itself with. Tars in, Parquet and one line of JSON out::

    python tests/benchmarks/plain_loader.py SHARDS OUT --model cnn --workers 2

`tiles_per_second` is from the first finished batch to the last, `seconds` is all of it but Python's imports.
"""

import argparse
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from plain_ddp import Net
from torch.utils.data import DataLoader
from torchvision import models, transforms


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
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()

    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.workers)
    torch.manual_seed(0)
    net = Net(args.classes, args.size) if args.model == "cnn" else models.vgg16(num_classes=args.classes)
    net = net.eval().to(device)

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])])
    shards = sorted(str(shard) for shard in Path(args.shards).glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg")
    # Whole batches are made by the workers, as webdataset advises: a tile at a time would pass between processes.
    dataset = dataset.map_tuple(str, transform).batched(args.batch_size)
    loader = DataLoader(dataset, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda")

    tile_ids, class_ids, confidences, finished = [], [], [], []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        for keys, images in loader:
            confidence, class_id = torch.softmax(net(images.to(device, non_blocking=True)).float(), 1).max(1)
            tile_ids += keys
            class_ids += class_id.tolist()
            confidences += confidence.tolist()
            finished.append((time.perf_counter(), len(tile_ids)))
    Path(args.out).mkdir(parents=True)
    columns = {"tile_id": tile_ids, "class_id": class_ids, "confidence": confidences}
    pq.write_table(pa.table(columns), f"{args.out}/predictions.parquet")

    (first, before), (last, tiles) = finished[0], finished[-1]
    rate = (tiles - before) / (last - first) if tiles > before else 0.0
    print(json.dumps({"tiles_per_second": rate, "tiles": tiles, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
