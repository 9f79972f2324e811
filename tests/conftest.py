"""What holds for every test: one thread, and a reason where a test needs what this machine has not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import HUB, make_inputs, serving

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that runs in this process sets up the console's handlers: the next test has its own."""
    root, own = logging.getLogger(), logging.getLogger("drotator")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Address of a loopback hub with the real data sets."""
    if not (HUB / "serve.py").is_file():
        pytest.skip(f"no loopback hub at {HUB}")
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with a tiny model and a text, never changed; its caches are those of all runs of the module."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROTATOR_CACHE", str(folder / "cache"))
        yield make_inputs(folder)
