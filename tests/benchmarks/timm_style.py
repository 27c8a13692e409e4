"""Batch classification in the manner of timm's inference script: a folder of images, a DataLoader, channels_last.

It stands alone on purpose, with nothing of tilefleet in it: `tilefleet bench classify` runs it on the same tiles, the
same network and the same number of processes, to compare itself with. Folders in, Parquet and one line of JSON out::

    python tests/benchmarks/timm_style.py IMAGES OUT --model cnn --workers 2 --channels-last

As in timm, workers pass on bytes, and a batch is scaled and normalised on the device. `tiles_per_second` is from the
first finished batch to the last, `seconds` is all of it but Python's imports.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from plain_ddp import Net
from torch.utils.data import DataLoader
from torchvision import datasets, models


def fast_collate(samples: list[tuple[Image.Image, int]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image, _ in samples]).transpose(0, 3, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images")
    parser.add_argument("out")
    parser.add_argument("--model", choices=["cnn", "vgg16"], default="cnn")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    # On CPUs larger batches fall out of the caches and are slower, GPUs need them.
    parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 64)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()

    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.workers)
    torch.manual_seed(0)
    net = Net(args.classes, args.size) if args.model == "cnn" else models.vgg16(num_classes=args.classes)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    net = net.eval().to(device, memory_format=layout)

    dataset = datasets.ImageFolder(args.images)
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        num_workers=args.workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
    )
    mean = std = torch.full((1, 3, 1, 1), 127.5, device=device)

    class_ids, confidences, finished, tiles = [], [], [], 0
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        for pixels in loader:
            images = pixels.to(device, non_blocking=True).float().sub_(mean).div_(std).contiguous(memory_format=layout)
            confidence, class_id = torch.softmax(net(images).float(), 1).topk(1)
            class_ids.append(class_id.cpu().numpy())
            confidences.append(confidence.cpu().numpy())
            tiles += len(pixels)
            finished.append((time.perf_counter(), tiles))
    Path(args.out).mkdir(parents=True)
    columns = {
        "tile_id": [Path(path).stem for path, _ in dataset.samples],
        "class_id": np.concatenate(class_ids)[:, 0],
        "confidence": np.concatenate(confidences)[:, 0],
    }
    pq.write_table(pa.table(columns), f"{args.out}/predictions.parquet")

    (first, before), last = finished[0], finished[-1][0]
    rate = (tiles - before) / (last - first) if tiles > before else 0.0
    print(json.dumps({"tiles_per_second": rate, "tiles": tiles, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
