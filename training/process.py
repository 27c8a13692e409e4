"""What a process sets up for training by itself, before its first step: its device, its group, its memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_up(device: torch.device) -> None:
    """Set up a process for training on ``device``; of no use to what shares its process with other work.

    Weights that no longer move have gradients and moments so small that a CPU takes many times as long for each
    operation on them; there they count as 0. And each step takes and frees the same memory: glibc would give it back to
    the system in between, which clears every page of it again for the next step.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let this process keep memory that is freed, where glibc would give it back, for work that soon takes as much."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most it takes; larger blocks are few
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The device of this process, set up and within the group that ``torchrun`` started, where it did."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    set_up(device)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
