"""Several processes for one run: which of them this one is, how they find each other, and how all end when one fails.

torchrun or srun starts them. This module reads the environment alone, and needs no torch, until they are joined. They
then share a store of keys: the first process that fails takes a key and is the only one to tell, and a thread in each
of the others looks for that key, since a process that waits for another's part of a sum would wait for ever.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from drotator.distributed import World

JOIN_TIMEOUT = timedelta(minutes=10)
LONGEST_WAIT = timedelta(hours=24)  # of processes that wait while the first evaluates; failures are seen at once
SECONDS_TO_TELL = 15.0  # before the others end: torchrun kills all processes when one has ended
POLL_SECONDS = 0.5
DEFAULT_PORT = 29500
FAILED, TOLD = "failed", "told"


@dataclass(frozen=True)
class Place:
    """Rank among all processes of the run, their number, and the rank among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def place() -> Place:
    """Read the place of this process from the variables of torchrun, or from those of srun.

    Every process of a SLURM job has a SLURM_PROCID, also a job of a sweep: without MASTER_ADDR it is on its own.
    Raises: ValueError if a variable is no number.
    """
    variables = os.environ
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if "MASTER_ADDR" in variables and names[0] in variables and names[1] in variables:
            try:
                found = Place(*(int(variables.get(name, "0")) for name in names))
            except ValueError:
                raise ValueError(f"{', '.join(names)} in the environment have to be whole numbers.") from None
            return found if found.size > 1 else Place()
    return Place()


@dataclass
class _Joined:
    """What holds the processes together. store: TCPStore keys of this start of them. lookout: the watching thread's."""

    rank: int
    store: Any
    lookout: Any
    is_done: threading.Event = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None


_joined: _Joined | None = None


def join() -> World:
    """Meet the other processes. All but the first are silent from here on.

    CPU tensors go through gloo, those on GPUs through NCCL. Raises: RuntimeError if they do not all come.
    """
    global _joined  # noqa: PLW0603 - a process is joined once, as torch.distributed has it
    from drotator.console import quiet_libraries

    quiet_libraries()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or the end of one process fills the screens of the others
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from drotator.distributed import World

    here = place()
    host, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    keeps_store = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives what it starts again

    def connect(is_master: bool) -> Any:
        store = TCPStore(host, port, None, is_master, JOIN_TIMEOUT, wait_for_workers=False)
        return PrefixStore(f"drotator/{attempt}", store)

    _joined = _Joined(here.rank, connect(keeps_store), connect(False))
    if here.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, _interrupt_once)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
        store=PrefixStore("group", _joined.store),
        rank=here.rank,
        world_size=here.size,
        timeout=LONGEST_WAIT,
    )
    _joined.watcher = threading.Thread(target=_watch, args=(_joined,), daemon=True)
    _joined.watcher.start()
    return World.current()


def is_first_to_fail() -> bool:
    """Say whether this process is the one that tells what failed: a single one, or the first of several."""
    if _joined is None:
        return True
    try:
        return int(_joined.store.compare_set(FAILED, "", str(_joined.rank))) == _joined.rank
    except RuntimeError:  # with the process that kept the store: it was the first
        return False


def leave(exit_code: int) -> None:
    """Part from the other processes and end this one, after a success when all are done. A process alone goes on."""
    if _joined is None:
        return
    if exit_code:
        if is_first_to_fail():
            _joined.is_done.set()
            _flush()
            _joined.store.set(TOLD, "")
            os._exit(exit_code)  # no farewell to processes that wait for what will not come
        _end_when_told(_joined.store, exit_code)
    import torch.distributed as dist

    from drotator.distributed import World

    try:
        World.current().barrier()
    except RuntimeError:  # another process failed on its last steps
        _end_when_told(_joined.store, 1)
    _joined.is_done.set()
    if _joined.watcher:
        _joined.watcher.join()
    World.current().barrier()  # nobody looks into the store any more: the process that keeps it may go
    dist.destroy_process_group()
    _flush()
    os._exit(0)  # at an interpreter's end a thread of torch's may be left that it does not join, and abort the process


def _watch(joined: _Joined) -> None:
    """End this process when another one has failed."""
    while not joined.is_done.wait(POLL_SECONDS):
        try:
            is_over = joined.lookout.check([FAILED]) and int(joined.lookout.get(FAILED)) != joined.rank
        except RuntimeError:
            is_over = True
        if is_over and not joined.is_done.is_set():
            _end_when_told(joined.lookout, 1)


def _end_when_told(store: Any, exit_code: int) -> NoReturn:
    try:
        store.wait([TOLD], timedelta(seconds=SECONDS_TO_TELL))
    except RuntimeError:
        pass  # the process that was to tell is gone
    finally:
        _flush()
        os._exit(exit_code)


def _flush() -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C reaches a process from the terminal and from torchrun: the second must not break off the last words."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
