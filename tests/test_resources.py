"""Device, memory and disk: what is refused before a run, and what is measured in it."""

from __future__ import annotations

import os
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from drotator import resources
from drotator.resources import (
    Stopwatch,
    check_disk_space,
    choose_device,
    free_memory,
    peak_memory,
    reset_peak_memory,
)

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


def test_what_is_free_is_a_part_of_the_machines_memory() -> None:
    block = torch.ones(2**26)  # 256 MiB, so that it is no rounding
    free = free_memory(CPU)
    assert 0 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - block.nbytes


def test_the_tightest_control_group_counts_and_caches_of_files_do_not(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/elsewhere\n0::/job/step\n")
    for name, limit in (("", "max"), ("job", "1000"), ("job/step", "5000")):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\nfile 200\n")
    assert resources._left_to_the_job(tmp_path, own) == 1000 - (700 - 200)
    own.write_text("4:memory:/elsewhere\n")
    assert resources._left_to_the_job(tmp_path, own) == sys.maxsize


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
    held = torch.cuda.memory_allocated(device)  # by tests before
    block = torch.ones(2**22, device=device)
    assert peak_memory(device)["device"] >= block.nbytes
    del block
    reset_peak_memory(device)
    assert peak_memory(device)["device"] <= held


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
