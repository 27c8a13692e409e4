"""Storage against a real S3 service on loopback: names, folders, few requests, faults that pass."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import storage
from configs.errors import TilefleetError
from tests.object_store import ObjectStore
from training import checkpoint

pytestmark = pytest.mark.process


def test_a_small_file_is_written_by_one_request(bucket: str, s3: ObjectStore) -> None:
    storage.write_bytes(storage.join(bucket, "folder", "a.txt"), b"one")
    assert len(s3.requests) == 1


def test_folders_are_seen_and_removed_whole(bucket: str) -> None:
    for name in ("run/config.yaml", "run/checkpoints/1/state.pt", "run/checkpoints/2/state.pt", "running/x"):
        storage.write_bytes(storage.join(bucket, name), b"x")
    run = storage.join(bucket, "run")
    assert storage.is_dir(run)
    assert storage.exists(run)
    assert not storage.is_dir(f"{run}/config.yaml")
    assert storage.list_files(run) == [f"{run}/config.yaml"]
    storage.remove_tree(f"{run}/checkpoints/1")
    assert storage.list_files(run, recursive=True) == [f"{run}/checkpoints/2/state.pt", f"{run}/config.yaml"]
    storage.remove(f"{run}/config.yaml")
    storage.remove_tree(f"{run}/checkpoints")
    assert storage.list_files(run, recursive=True) == []  # what stands for an empty folder there is no file
    storage.remove_tree(run)
    assert storage.list_files(bucket, recursive=True) == [f"{bucket}/running/x"]


@pytest.mark.parametrize("name", ["with space.jpg", "50%25.jpg", "a+b&c.jpg", "größe.jpg", "q?x=1.jpg", "h#1.jpg"])
def test_any_name_comes_back_as_it_was(bucket: str, name: str) -> None:
    target = storage.join(bucket, name)
    storage.write_bytes(target, name.encode())
    assert storage.list_files(bucket) == [target]
    assert storage.read_bytes(target) == name.encode()


def test_more_files_than_one_answer_lists_written_by_many_threads(bucket: str) -> None:
    names = [storage.join(bucket, "parts", f"part-{number:04d}") for number in range(1_005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write_bytes(name, b"x"), names))
    assert storage.list_files(f"{bucket}/parts") == names
    storage.remove_tree(f"{bucket}/parts")
    assert storage.list_files(bucket, recursive=True) == []


def test_a_reader_sees_the_old_file_or_the_new_one(bucket: str) -> None:
    target = storage.join(bucket, "status.json")
    versions = [f"{number} ".encode() * (1 + number % 2 * 300) for number in range(200)]  # each once, as with a clock
    storage.write_bytes(target, versions[0])
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(lambda: [storage.write_bytes(target, version) for version in versions])
        while not written.done():
            assert storage.read_bytes(target) in versions
    written.result()


def test_a_file_too_large_for_one_request(bucket: str, s3: ObjectStore) -> None:
    target, data = storage.join(bucket, "large"), os.urandom(12 << 20)
    s3.fail("PUT", "partNumber=2", 3)
    storage.write_bytes(target, data)
    assert any("partNumber=2" in request for request in s3.requests)
    assert storage.read_bytes(target) == data
    assert storage.read_bytes(target, 11 << 20, 100) == data[11 << 20 :][:100]


@pytest.mark.parametrize("how", ["500", "503", "cut"])
def test_three_faults_in_a_row_pass(bucket: str, s3: ObjectStore, how: str) -> None:
    target = storage.join(bucket, "a")
    if how != "cut":
        s3.fail("PUT", "/a", 3, how)
    storage.write_bytes(target, bytes(range(256)) * 1000)
    s3.fail("GET", "/a", 3, how)
    assert storage.read_bytes(target) == bytes(range(256)) * 1000


def test_a_fault_that_lasts_is_one_line_after_a_few_tries(bucket: str, s3: ObjectStore) -> None:
    target = storage.join(bucket, "a")
    storage.write_bytes(target, b"old")
    s3.mend()
    s3.fail("PUT", "/a", 1000)
    with pytest.raises(TilefleetError, match=f"^{target}: .*run the same command again$") as caught:
        storage.write_bytes(target, b"new")
    assert "\n" not in str(caught.value)
    assert len(s3.requests) == storage.ATTEMPTS
    assert storage.read_bytes(target) == b"old"


def test_a_refusal_is_not_tried_again(bucket: str, s3: ObjectStore) -> None:
    with pytest.raises(TilefleetError, match=r"^s3://no-such-bucket/a: .*NO_SUCH_BUCKET"):
        storage.write_bytes("s3://no-such-bucket/a", b"x")
    s3.fail("PUT", "/a", 1000, "403")
    with pytest.raises(TilefleetError, match=f"^{bucket}/a: .*ACCESS_DENIED"):
        storage.write_bytes(f"{bucket}/a", b"x")
    assert len(s3.requests) == 2


def test_a_store_that_is_not_there_is_named_soon(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(TilefleetError, match=f"^{bucket}/a: "):
        storage.read_bytes(f"{bucket}/a")
    assert time.monotonic() - started < 60


def test_checkpoints_cost_the_same_however_many_came_before(bucket: str, s3: ObjectStore) -> None:
    run, cost = storage.join(bucket, "run"), []
    for step in range(1, 13):
        s3.mend()
        checkpoint.save(run, {"progress": {"step": step}}, step=step, keep=3)
        cost.append(len(s3.requests))
    assert len(set(cost[4:])) == 1
    assert [int(name[-8:]) for name in checkpoint.complete(run)] == [10, 11, 12]
    storage.write_bytes(storage.join(checkpoint.complete(run)[-1], checkpoint.STATE), b"damaged")
    warnings: list[str] = []
    newest = checkpoint.newest_whole(run, warnings.append)
    assert newest is not None
    assert checkpoint.load(newest) == {"progress": {"step": 11}}
    assert "damaged" in warnings[0]
