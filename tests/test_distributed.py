"""One run by several processes: it ends as a single process does, is resumed by any number of them, and fails as one.

What may differ: sums over windows are taken in another order, which moves H by 1e-7 of itself. In the first layer that
is all, and 1e-3 is allowed. Further on an optimizer may take a step by the sign of a gradient that is all but 0, and
masks follow: there weights are not compared, and errors only to 10 %.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objectives import DAMPING, SIZES, TWO_OF_FOUR, layer_of, moments, problem, random_map, random_rotation
from tiny_models import some_tokens, tiny_source
from tiny_runs import drotator, process_environment, report_of, weights, words_of
from torch.utils.flop_counter import FlopCounterMode

from drotator.architecture import LayerSizes
from drotator.config import ObjectiveConfig, OptimizerConfig, PrunerConfig, SparsityConfig
from drotator.distributed import ALONE, World
from drotator.objectives import INPUT_OF, LayerProblem, build_objective, with_gradients
from drotator.processes import Place, place
from drotator.pruners import PRUNERS
from drotator.pruners.solve import solve_on_mask
from drotator.pruning import prune_weights
from drotator.resources import choose_device
from drotator.rotation import Rotation
from drotator.statistics import ActivationStream, white_noise
from drotator.training import train_rotation

SPLIT = {"num_samples": 7, "batch_size": 4}  # batches of 4 and 3: of either, two and three processes have unequal parts
CASES = {
    "sparsegpt": {"calibration": SPLIT},
    "wanda": {"calibration": SPLIT, "pruner": "wanda", "sparsity": {"ratio": 0.5}, "offload": "disk"},
    "shared": {"calibration": SPLIT, "rotation": "shared"},
    "idle": {"reconstruct": {"name": "block", "epochs": 3}},  # batches of 2 and 1: of three, the first has no window
}
SEVERAL = {"sparsegpt": 3, "wanda": 3, "shared": 2, "idle": 3}
TOGETHER = """
import dataclasses, json, os, shutil, sys, traceback
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from drotator import pipeline
from drotator.artifacts import RunFolder
from tiny_runs import settings

for name in ("perplexity", "layers", "objective", "importance_image", "importance_curves"):
    setattr(pipeline, f"plot_{name}", lambda *args: None)

def work(rank, size, run, resume, given, stop):
    if size > 1:
        where = {"init_method": f"file://{run}.{size}.store", "timeout": timedelta(seconds=60)}
        dist.init_process_group("gloo", rank=rank, world_size=size, **where)
    save_layer = RunFolder.save_layer
    def save_and_stop(self, index, *rest):
        save_layer(self, index, *rest)
        if stop and index == 1:
            os._exit(7)
    RunFolder.save_layer = save_and_stop
    calibration = given.pop("calibration", {})
    chosen = settings(inputs, resume=resume, device="cpu", **given)
    chosen.calibration = dataclasses.replace(chosen.calibration, **calibration)
    pipeline.run_prune(chosen, run, baseline=False)

def fork(*arguments):
    child = os.fork()  # nothing was computed yet: each starts as a process of its own would
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

inputs, folder = Path(sys.argv[1]), Path(sys.argv[2])
for name, size, given, stop in json.loads(sys.argv[3]):
    run = folder / name
    resume = ""
    if name.startswith("resumed"):
        shutil.copytree(folder / "stopped", run)
        resume = str(run)
    children = [fork(rank, size, run, resume, given, stop) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [7 if stop else 0] * size, (name, codes)
"""


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with runs CASE-PROCESSES, one by three that stopped after two layers, and what others made of it."""
    folder = tmp_path_factory.mktemp("runs")
    plan = [(f"{case}-{size}", size, given, False) for case, given in CASES.items() for size in (1, SEVERAL[case])]
    plan += [("stopped", 3, CASES["sparsegpt"], True)]
    plan += [(f"resumed-{size}", size, CASES["sparsegpt"], False) for size in (1, 2)]
    command = [sys.executable, "-c", TOGETHER, str(inputs), str(folder), json.dumps(plan)]
    subprocess.run(command, check=True, env=process_environment(), timeout=200)
    return folder


def assert_same_but_for_rounding(run: Path, expected: Path) -> None:
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.split("/")[1].startswith("000") and name.split("/")[0] != "checkpoint":
            assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
            assert ((found[name] == 0) == (tensor == 0)).all(), name
    ours, theirs = report_of(run), report_of(expected)
    assert ours["sparsity_realised"] == theirs["sparsity_realised"] == 0.5
    assert ours["metrics"]["pruned"] == pytest.approx(theirs["metrics"]["pruned"], rel=0.1)
    assert ours["metrics"]["dense"] == theirs["metrics"]["dense"]
    for layer, other in zip(ours["layers"], theirs["layers"], strict=True):
        allowed = 0.1 if layer["index"] else 1e-3
        for key in ("objective_before", "objective_after"):
            assert layer[key] == pytest.approx(other[key], rel=allowed)
        assert layer.get("reconstruction", {}) == pytest.approx(other.get("reconstruction", {}), rel=allowed)
        for name, linear in layer["linears"].items():
            assert linear == pytest.approx(other["linears"][name], rel=allowed)


@pytest.mark.parametrize(("case", "size"), SEVERAL.items())
def test_several_processes_end_as_one_does(runs: Path, case: str, size: int) -> None:
    assert_same_but_for_rounding(runs / f"{case}-{size}", runs / f"{case}-1")
    assert report_of(runs / f"{case}-{size}")["provenance"]["processes"] == size


def test_only_the_files_of_a_run_are_left(runs: Path) -> None:
    for case, size in SEVERAL.items():
        found, expected = (
            {str(path.relative_to(run)) for path in run.rglob("*")}
            for run in (runs / f"{case}-{size}", runs / f"{case}-1")
        )
        assert found == expected


@pytest.mark.parametrize("size", [1, 2])
def test_another_number_of_processes_goes_on_with_a_run(runs: Path, size: int) -> None:
    stopped, resumed = (
        [run / f"layers/00{index}.safetensors" for index in range(3)]
        for run in (runs / "stopped", runs / f"resumed-{size}")
    )
    assert [path.exists() for path in stopped] == [True, True, False]
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(stopped[:2], resumed[:2], strict=True)] == [True, True]
    assert_same_but_for_rounding(runs / f"resumed-{size}", runs / "sparsegpt-1")


class Gathered(World):
    """A process of several that are called one after the other: what it would send is returned."""

    def gather_rows(self, rows: torch.Tensor, count: int, unit: int = 1) -> torch.Tensor:
        return rows


@pytest.mark.parametrize("solve_steps", [0, 3])
@pytest.mark.parametrize("sparsity", [SparsityConfig(keep=2, group=4), SparsityConfig(ratio=0.45)], ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_the_rows_of_all_processes_are_those_of_one(name: str, sparsity: SparsityConfig, solve_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 16, generator=generator) for rows in (23, 10)]
    X = torch.randn(16, 400, generator=generator)
    H, pruner = 2 / 400 * X @ X.mT, PrunerConfig(name=name, solve_steps=solve_steps)
    parts = [prune_weights(weights, H, [None, None], sparsity, pruner, Gathered(rank, 3)) for rank in range(3)]
    for index, W in enumerate(weights):
        (pruned,) = PRUNERS[name]([W], H, sparsity, pruner)
        expected = pruned.weight
        if solve_steps:
            expected = solve_on_mask(W, expected, pruned.mask, H, damping=pruner.damping, steps=solve_steps)
        rows = [found[index] for found, _ in parts]
        shares = [len(W) * (rank + 1) // 3 - len(W) * rank // 3 for rank in range(3)]
        assert [len(weight) for weight in rows] == (shares if sparsity.is_grouped else [len(W)] * 3)
        found = torch.cat(rows) if sparsity.is_grouped else rows[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert {damping for _, damping in parts} == {pruned.damping}


def test_every_window_is_one_process_own_and_so_is_its_noise(tmp_path: Path) -> None:
    source, windows, cpu = tiny_source(tmp_path, "llama"), some_tokens(7), torch.device("cpu")
    whole = ActivationStream.start(source, windows, 4, cpu)
    noise = list(white_noise(whole, 0))
    for size in (1, 2, 3, 5, 9):
        streams = [ActivationStream.start(source, windows, 4, cpu, world=World(rank, size)) for rank in range(size)]
        noises = [dict(zip([p.index for p in s.parts], white_noise(s, 0), strict=True)) for s in streams]
        for batch in (0, 1):
            having = [(s, position) for s in streams if (position := s.position(batch)) is not None]
            assert torch.equal(torch.cat([s.hidden[position] for s, position in having]), whole.hidden[batch])
            assert sum(s.share(position) for s, position in having) == pytest.approx(1)
            assert torch.equal(torch.cat([found[batch] for found in noises if batch in found]), noise[batch])


def test_a_process_alone_gives_back_what_it_is_given() -> None:
    x = torch.randn(3, 2)
    kept = x.clone()
    assert (ALONE.all_reduce_(x) is x) and (ALONE.broadcast_(x) is x) and (ALONE.gather_rows(x, 3) is x)
    assert torch.equal(x, kept)
    assert (ALONE.share(lambda: 5), ALONE.in_turn(lambda: 6), ALONE.gather(7)) == (5, 6, [7])
    assert (ALONE.part(9), ALONE.part(9, 4)) == (slice(0, 9), slice(0, 9))
    assert (ALONE.own(x, 1) is x) and (ALONE.sums([x])[0] is x)
    assert World.current() == ALONE


@pytest.mark.parametrize("unit", [1, 4, 8])
def test_the_parts_of_all_processes_are_whole_units_of_one_row(unit: int) -> None:
    for count in (0, 3, 8, 23):
        parts = [World(rank, 5).part(count, unit) for rank in range(5)]
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        assert all(part.start % unit == 0 or part.start == count for part in parts)


# The terms of an objective: an entry of TERMS is its name, salience and sparsity, whether R2 is any invertible map, and
# whether outputs are weighed. Of three processes, one has no head of the two.
HALF, FOUR_OF_EIGHT = SparsityConfig(ratio=0.5), SparsityConfig(keep=4, group=8)
TERMS: dict[str, tuple[str, str, SparsityConfig, str, bool]] = {
    **{
        f"entropy-{salience}": ("entropy", salience, TWO_OF_FOUR, "orthogonal", False)
        for salience in ("magnitude", "wanda", "obs", "sequential_obs")
    },
    **{
        f"error-{salience}-{sparsity.label}": ("pruning_error", salience, sparsity, "orthogonal", False)
        for salience in ("magnitude", "wanda", "obs", "sequential_obs")
        for sparsity in (TWO_OF_FOUR, FOUR_OF_EIGHT, HALF)
    },
    **{
        f"error-{salience}-weighed-{value_map}": ("pruning_error", salience, TWO_OF_FOUR, value_map, True)
        for salience in ("wanda", "obs")
        for value_map in ("orthogonal", "invertible")
    },
    "error-wanda-invertible": ("pruning_error", "wanda", HALF, "invertible", False),
}
WIDE = LayerSizes(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def summed(case: str, world: World, batch: int | None = None) -> list[torch.Tensor]:
    """The loss of two layers and both gradients, float64; or of one of two batches."""
    name, salience, sparsity, value_map, is_weighed = TERMS[case]
    at = random_map() if value_map == "invertible" else random_rotation()
    layers = [layer_of(is_weighed), layer_of(is_weighed)]
    layers[1] = dataclasses.replace(layers[1], weights=problem(7).weights)
    given = (ObjectiveConfig(name=name), salience, sparsity)
    batches, chosen = (1, None) if batch is None else (2, torch.tensor([batch]))
    objectives = [build_objective(*given, layer, DAMPING, value_map, world, batches) for layer in layers]
    return list(with_gradients(objectives, world)(at.R1, torch.cat([at.R2, at.R2.flip(0)]), chosen))


def trained(name: str, world: World) -> list[torch.Tensor]:
    """The float32 rotations that 20 steps of an optimizer learn."""
    layer = problem()
    weights, hessians = ({key: T.float() for key, T in part.items()} for part in (layer.weights, layer.hessians))
    given = (ObjectiveConfig(), "wanda", TWO_OF_FOUR, LayerProblem(weights, hessians, SIZES), DAMPING)
    objective = with_gradients([build_objective(*given, world=world)], world)
    settings = OptimizerConfig(name=name, steps=20, learning_rate=0.01)
    rotation = train_rotation(objective, Rotation.identity(SIZES), settings, world=world).rotation
    return [rotation.R1, rotation.R2]


def operations(name: str, world: World) -> int:
    """Of the products in one evaluation of an objective and its gradients."""
    d, m, queries, values = WIDE.hidden_size, WIDE.intermediate_size, WIDE.input_size("output"), 32
    rows = {"query": queries, "key": values, "value": values, "output": d, "gate": m, "up": m, "down": d}
    inputs = {"attention": d, "output": queries, "mlp": d, "down": m}
    weights = {key: torch.ones(rows[key], inputs[INPUT_OF[key]]) for key in rows}
    hessians = {key: moments(size, 3).float() for key, size in inputs.items()}
    given = (ObjectiveConfig(name=name), "wanda", TWO_OF_FOUR, LayerProblem(weights, hessians, WIDE), DAMPING)
    objective, at = with_gradients([build_objective(*given, world=world)], world), Rotation.identity(WIDE)
    with FlopCounterMode(display=False) as counter:
        objective(at.R1, at.R2)
    return counter.get_total_flops()


def found_by(world: World) -> dict[str, Any]:
    return {
        **{case: summed(case, world) for case in TERMS},
        **{f"{case}, a batch": summed(case, world, 1) for case in TERMS},
        **{name: trained(name, world) for name in LEARNED},
        **{f"{name} operations": operations(name, world) for name in ("entropy", "pruning_error")},
    }


LEARNED = ("riemannian_adam", "spectral", "adam_qr")
IN_PARTS = """
import os, sys, traceback
from datetime import timedelta
import torch
import torch.distributed as dist
from test_distributed import World, found_by

def start(rank, size, folder):
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        where = {"init_method": f"file://{folder}/{size}.store", "timeout": timedelta(seconds=60)}
        dist.init_process_group("gloo", rank=rank, world_size=size, **where)
        torch.save(found_by(World.current()), f"{folder}/{size}-{rank}.pt")
        World.current().barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

for size in (1, 2, 3):
    children = [start(rank, size, sys.argv[1]) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes
"""


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each of one, two and three processes has found, by their number."""
    folder = tmp_path_factory.mktemp("parts")
    command = [sys.executable, "-c", IN_PARTS, str(folder)]
    subprocess.run(command, check=True, env=process_environment(), timeout=200)
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in (1, 2, 3)}


several = pytest.mark.parametrize("size", [2, 3])


@several
@pytest.mark.parametrize("case", [*TERMS, *(f"{case}, a batch" for case in TERMS)])
def test_the_terms_of_all_processes_add_up_to_the_objective(
    in_parts: dict[int, list[dict[str, Any]]], case: str, size: int
) -> None:
    (alone,) = in_parts[1]
    for found in in_parts[size]:
        torch.testing.assert_close(found[case], alone[case], rtol=1e-10, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(found[case], in_parts[size][0][case], strict=True))


@several
@pytest.mark.parametrize("name", LEARNED)
def test_all_processes_learn_the_same_rotations_and_those_of_one(
    in_parts: dict[int, list[dict[str, Any]]], name: str, size: int
) -> None:
    (alone,) = in_parts[1]
    for found in in_parts[size]:
        torch.testing.assert_close(found[name], alone[name], rtol=0, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(found[name], in_parts[size][0][name], strict=True))


@several
@pytest.mark.parametrize("name", ["entropy", "pruning_error"])
def test_each_process_has_its_part_of_the_products(
    in_parts: dict[int, list[dict[str, Any]]], name: str, size: int
) -> None:
    (alone,) = in_parts[1]
    for found in in_parts[size]:
        assert found[f"{name} operations"] < {2: 0.65, 3: 0.5}[size] * alone[f"{name} operations"]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "a"}
PLACES = {
    "torchrun": (TORCHRUN, Place(1, 4, 0)),
    "srun": (SRUN, Place(5, 8, 1)),
    "torchrun in a job": (SRUN | TORCHRUN, Place(1, 4, 0)),
    "one task": (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place()),
    "a job that is not prepared": ({k: v for k, v in SRUN.items() if k != "MASTER_ADDR"}, Place()),
    "salloc": ({"SLURM_NTASKS": "8", "MASTER_ADDR": "a"}, Place()),
    "nothing": ({}, Place()),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_place_of_a_process_is_what_its_launcher_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variables, expected = PLACES[name]
    for variable in TORCHRUN | SRUN:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert place() == expected


def test_each_process_gets_its_own_gpu_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [choose_device(name, World(3, 4, 1)) for name in ("auto", "cuda")] == [torch.device("cuda:1")] * 2
    assert current == [torch.device("cuda:1")] * 2
    assert choose_device("cpu", World(3, 4, 1)) == torch.device("cpu")
    assert choose_device("cuda", ALONE) == torch.device("cuda")
    with pytest.raises(ValueError, match="has 2 GPUs, and process 3 on it finds none left"):
        choose_device("auto", World(2, 4, 2))
    with pytest.raises(ValueError, match="each of the 4 processes takes its own GPU"):
        choose_device("cuda:0", World(2, 4, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as the scheduler shows it
    assert choose_device("auto", World(2, 4, 2)) == torch.device("cuda:0")


AS_SRUN_DOES = """
import json, os, signal, socket, sys
from pathlib import Path
from drotator import pipeline
from drotator.cli import main

prune_layer = pipeline.prune_layer
def prune_layer_until(what):
    def prune(context, *args, **kwargs):
        if context.index == 1 and context.stream.world.rank == 1:
            if what == "raises":
                raise RuntimeError("rank 1 has had enough")
            os.kill(os.getpid(), {"is interrupted": signal.SIGINT, "is killed": signal.SIGKILL}[what])
        return prune_layer(context, *args, **kwargs)
    return prune

def start(rank, port, folder, what, words):
    child = os.fork()
    if child:
        return child
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    pipeline.prune_layer = prune_layer_until(what)
    code = 1
    try:
        os.chdir(folder)
        code = main(words)
    finally:
        sys.stdout.flush()
        os._exit(code)

folder = Path(sys.argv[1])
for what, words in json.loads(sys.argv[2]).items():
    (folder / what).mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [start(rank, port, folder / what, what, words) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / what / "codes").write_text(json.dumps(codes))
"""
FAILURES = {
    "raises": ([1, 1], "rank 1 has had enough (traceback: "),
    "is interrupted": ([1, 130], "interrupted. Go on with: drotator prune "),
    "is killed": ([1, -9], "another process of this run has ended without a word"),
}
REFUSED = {
    "eval": (["eval"], "eval is the work of one process, but 2 were started"),
    "sweep": (["prune", "-m", "pruner=wanda,sparsegpt"], "2 processes share one run: start each job of a sweep by it"),
    "typo": (["prune", "optimizer.steps=-1"], "optimizer.steps=-1 is not allowed: 0 or more."),
}


@pytest.fixture(scope="module")
def ended(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two processes each that failed: their exit codes, out0, out1, err0 and err1."""
    folder = tmp_path_factory.mktemp("ended")
    plan = {what: words_of(inputs, "baseline=never", "device=cpu", "hydra.run.dir=run") for what in FAILURES}
    plan |= {name: words for name, (words, _) in REFUSED.items()}
    command = [sys.executable, "-c", AS_SRUN_DOES, str(folder), json.dumps(plan)]
    environment = process_environment(TORCH_CPP_LOG_LEVEL="ERROR")  # torch is there before they are joined
    subprocess.run(command, check=True, env=environment, timeout=200)
    return folder


@pytest.mark.parametrize("what", FAILURES)
def test_one_message_ends_all_processes_when_one(ended: Path, what: str) -> None:
    folder, (codes, line) = ended / what, FAILURES[what]
    assert json.loads((folder / "codes").read_text()) == codes
    errors = [(folder / f"err{rank}").read_text() for rank in range(2)]
    messages = [text for error in errors for text in error.splitlines() if text.startswith("drotator:")]
    assert len(messages) == 1
    assert messages[0].startswith(f"drotator: {line}")
    assert not any("Traceback" in error for error in errors)
    assert (folder / "out1").read_text() == ""
    log = (folder / "run" / "log.txt").read_text()
    assert log.count("RuntimeError: rank 1 has had enough") == (what == "raises")


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_processes_cannot_do_is_refused_once(ended: Path, name: str) -> None:
    folder, (_, reason) = ended / name, REFUSED[name]
    assert json.loads((folder / "codes").read_text()) == [2, 1]
    (line,) = (folder / "err0").read_text().splitlines()
    assert line.startswith(f"drotator: {reason}")
    assert {path.name for path in folder.iterdir()} == {"codes", "out0", "out1", "err0", "err1"}
    assert not any((folder / file).read_text() for file in ("out0", "out1", "err1"))


def torchrun(words: list[str], cwd: Path, script: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *([script] if script else ["-m", "drotator"]), *words],
        env=process_environment(**environment),
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        timeout=200,
    )


def test_torchrun_starts_a_run_that_one_process_tells_of(inputs: Path, tmp_path: Path) -> None:
    finished = torchrun(words_of(inputs, "baseline=never", "device=cpu"), tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.count("run folder:") == 1
    (run,) = {path.parent for path in (tmp_path / "outputs").rglob("report.json")}
    assert report_of(run)["provenance"]["processes"] == 2
    assert (run / "log.txt").read_text().count("run folder:") == 1
    assert str(run) in finished.stdout


def test_a_benchmark_is_shared_and_written_once(inputs: Path, tmp_path: Path) -> None:
    few = ("calibration.num_samples=3", "calibration.seqlen=16", "calibration.batch_size=1", "optimizer.steps=1")
    words = ["bench", "model=local", f"model.path={inputs / 'model'}", "device=cpu", "hydra.run.dir=run", *few]
    finished = torchrun([*words, "bench.steps=1", "bench.layers=1"], tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "2 x cpu" in finished.stdout
    assert "in each of 2 processes" in " ".join(finished.stdout.split())
    assert finished.stdout.count("written to") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"bench.json", "log.txt"}
    names = [row["name"] for row in json.loads((tmp_path / "run" / "bench.json").read_text())]
    assert {"rotation step, pruning_error, spectral", "sparsegpt, 7 linears", "layer: rotate"} < set(names)
    assert len(set(names)) == len(names)


@pytest.mark.gpu
def test_two_gpus_end_as_one_does(inputs: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    words, exact = words_of(inputs, "baseline=never", "device=cuda"), {"NVIDIA_TF32_OVERRIDE": "0"}
    finished = torchrun([*words, "hydra.run.dir=two"], tmp_path, **exact)  # TF32 rounds other shapes otherwise, by 1e-3
    assert (finished.returncode, finished.stderr) == (0, "")
    assert drotator(*words, "hydra.run.dir=one", cwd=tmp_path, **exact).returncode == 0
    assert_same_but_for_rounding(tmp_path / "two", tmp_path / "one")
    assert "without a CUDA graph" not in (tmp_path / "two" / "log.txt").read_text()


ONE_CANNOT = """
import torch
from drotator import processes
from drotator.graphs import captured

world = processes.join()
device = torch.device("cuda", world.local_rank)
torch.cuda.set_device(device)
total = torch.zeros(1, device=device)

def step():
    total.add_(world.all_reduce_(torch.ones(1, device=device)))
    if world.rank == 1:
        total.item()  # waits for the device

run = captured(step, [total], world)
for _ in range(5):
    run()
assert (run is step, total.item()) == (True, 10.0)
processes.leave(0)
"""


@pytest.mark.gpu
def test_no_process_replays_a_step_that_one_cannot_capture(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    (tmp_path / "one_cannot.py").write_text(ONE_CANNOT)
    finished = torchrun([], tmp_path, script="one_cannot.py")
    assert (finished.returncode, finished.stderr) == (0, "")
