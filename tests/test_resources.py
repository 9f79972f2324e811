"""Device, memory and disk: what is refused before a run, and what is measured in it."""

from __future__ import annotations

import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from drotator import resources
from drotator.resources import Stopwatch, check_disk_space, choose_device, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_available, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_available: found)
        assert choose_device("auto").type == expected


def test_a_device_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cpu") == CPU
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cuda:x", ""])
def test_a_device_that_is_no_choice_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=f"device={name} is not allowed: choose auto, cpu, cuda or cuda:N"):
        choose_device(name)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused_with_their_number(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"device={name}: this machine has {count} CUDA GPUs"):
        choose_device(name)


def test_a_disk_with_too_little_room_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: usage(9e9, 6e9, 3e9))
    check_disk_space(tmp_path, 3_000_000_000)
    with pytest.raises(ValueError, match=r"needs about 3\.1 GB, but its disk has 3\.0 GB free") as refusal:
        check_disk_space(tmp_path, 3_100_000_000)
    assert str(tmp_path) in str(refusal.value)


def test_the_hosts_peak_covers_what_was_allocated() -> None:
    before = peak_memory(CPU)
    block = torch.ones(before["host"] // 4)  # as many bytes as the peak so far
    after = peak_memory(CPU)
    assert after["host"] >= before["host"] + block.nbytes // 8
    assert before["host"] > 2**20
    assert before["device"] == 0
    reset_peak_memory(CPU)


@pytest.mark.gpu
def test_the_devices_peak_starts_again_when_it_is_reset() -> None:
    device = torch.device("cuda")
    block = torch.ones(2**22, device=device)
    assert peak_memory(device)["device"] >= block.nbytes
    del block
    reset_peak_memory(device)
    assert peak_memory(device)["device"] < 2**24


def test_a_stopwatch_adds_up_by_stage_also_where_a_stage_fails() -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.measure("slow"):
            time.sleep(0.02)
    with pytest.raises(RuntimeError), watch.measure("failed"):
        raise RuntimeError
    assert 0.04 <= watch.seconds["slow"] < 10
    assert 0 <= watch.seconds["failed"] < watch.seconds["slow"]
    assert set(watch.seconds) == {"slow", "failed"}
