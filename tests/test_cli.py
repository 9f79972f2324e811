"""The command line as a person meets it: `python -m drotator ...` in a process of its own, its stages being fakes.

The fakes are put in place by a sitecustomize.py on PYTHONPATH, so that they are there in the processes of submitit too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drotator import cli, config, verbs

ROOT = Path(__file__).parent.parent
FAKES = """
    import json, logging, os, signal, sys, types, warnings
    from pathlib import Path

    log = logging.getLogger("drotator.fake")

    def run_prune(settings, run_dir, *, baseline):
        log.info("baseline=%s resume=%s", baseline, settings.resume)
        warnings.warn("a library warns")
        if settings.seed == 13:
            os.kill(os.getpid(), signal.SIGINT)
        (run_dir / "config.yaml").write_text("eval: {name: quick}\\n")
        if settings.seed == 1:
            raise ValueError("seed=1 is odd.\\nTake another.")
        if settings.seed == 2:
            raise RuntimeError("layer 3 is not finite")
        if settings.seed == 3:
            os.kill(os.getpid(), signal.SIGINT)
        if settings.seed == 4:
            with open("/dev/full", "w") as file:
                file.write("x" * 100_000)
        if settings.seed == 5:
            raise KeyError("gone")
        return 12.5

    def run_eval(settings, run_dir):
        log.info("eval=%s of %s", settings.eval.name, settings.model.path)
        return 1.0

    def fetch_all(settings):
        log.info("fetch %s", settings.model.path)

    def report_command(paths, output):
        log.info("report of %s in %s", [str(path) for path in paths], output)

    def run_check(settings, run_dir):
        raise AssertionError("not called")

    def run_recover(settings, run_dir):
        (run_dir / "config.yaml").touch()
        os.kill(os.getpid(), signal.SIGINT)

    def module(name, **functions):
        sys.modules[f"drotator.{name}"] = types.ModuleType(f"drotator.{name}")
        vars(sys.modules[f"drotator.{name}"]).update(functions)

    module("pipeline", run_prune=run_prune)
    module("commands", run_eval=run_eval)
    module("fetch", fetch_all=fetch_all)
    module("comparison", report_command=report_command)
    module("check", run_check=run_check)
    module("recover", run_recover=run_recover)
"""

Drotator = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "sitecustomize.py").write_text(textwrap.dedent(FAKES))
    without = {name: value for name, value in os.environ.items() if not name.startswith(("HYDRA_", "DROTATOR_"))}
    return {**without, "PYTHONPATH": f"{fakes}{os.pathsep}{ROOT}", "COLUMNS": "80"}


@pytest.fixture
def drotator(tmp_path: Path, environment: dict[str, str]) -> Drotator:
    folder = tmp_path / "work"
    folder.mkdir()

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "drotator", *words]
        return subprocess.run(
            command, cwd=folder, env=environment | more, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def one_line(result: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """Return the line of a command that failed as it should: one on stderr, no traceback, this exit code."""
    assert result.returncode == exit_code, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("drotator: ")
    assert "Traceback" not in result.stdout
    return result.stderr.removeprefix("drotator: ").rstrip()


def run_folders(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in (tmp_path / "work").rglob("log.txt"))


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_commands_groups_and_options(drotator: Drotator, words: list[str]) -> None:
    shown = drotator(*words)
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in [
        *verbs.VERBS,
        "report",
        "llama3-8b",
        "2of4",
        "riemannian_adam",
        "reconstruct",
        "+experiment",
    ]:
        assert word in shown.stdout
    assert max(len(line) for line in shown.stdout.splitlines()) <= 80


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_help_of_a_command_lists_options_with_their_comment_and_settings(drotator: Drotator, verb: str) -> None:
    shown = drotator(verb, "--help").stdout
    assert "SmolLM2-135M-Instruct from the package index" in shown
    assert "model.dtype=auto" in shown
    assert f"drotator {verb}" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_help_of_prune_lists_how_layers_are_reconstructed(drotator: Drotator) -> None:
    lines = drotator("prune", "--help").stdout.splitlines()
    text = " ".join(" ".join(lines[lines.index("reconstruct [none]") :]).split())
    described = "block Surviving weights of each layer are tuned to the dense model's outputs."
    assert text.startswith(f"reconstruct [none] {described} none Pruned weights stay as the pruner leaves them.")
    defaults = config.ReconstructConfig()
    for name in ("target", "epochs", "learning_rate"):
        assert f"reconstruct.{name}={getattr(defaults, name)}" in text
    for word in ("rotation.groups=1", "rotation.permute=none", "objective.weights=", "pruner.solve_steps=0"):
        assert word in text


def test_help_of_report_and_the_version_are_there(drotator: Drotator) -> None:
    assert "--output FILE" in drotator("report", "--help").stdout
    assert drotator("--version").stdout.split()[0] == "drotator"


def test_help_comes_in_under_a_second(drotator: Drotator) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        drotator("prune", "--help")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "prune --help",
        "bench --help",
        "bench kind=speed",
        "prune --cfg job",
        "prune modle=x",
        "prune pruner=x",
        "nope",
    ],
)
def test_help_composition_and_refusals_import_no_torch(environment: dict[str, str], tmp_path: Path, words: str) -> None:
    code = "import sys; from drotator.cli import main; main(); print({'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", code, *words.split()]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("prunee", "Did you mean prune?"),
        ("model=x", "the command comes first: drotator prune model=x"),
        ("prune pruner=wandaa", "Did you mean pruner=wanda? Choose from admm, magnitude, none, sparsegpt, wanda."),
        ("prune sparsity=0.5", "Any other: sparsity.ratio=0.55"),
        ("prune model=org/name", "model=org/name is no option"),
        ("prune model=null", "model=null is no option"),
        ("prune +experiment=papr", "Did you mean experiment=paper?"),
        ("prune experiment=paper", "write +experiment=paper"),
        ("prune modle=x", "there is no setting 'modle'. Did you mean model?"),
        ("prune pruner.dampin=1", "Did you mean pruner.damping? pruner has: pruner.name, pruner.damping"),
        ("prune damping=0.1", "Did you mean pruner.damping?"),
        ("prune +foo=1", "there is no setting 'foo'"),
        ("prune ++pruner.dampin=1", "Did you mean pruner.damping?"),
        ("eval pruner=wanda", "eval has no group 'pruner'. Its groups: model, eval, cluster."),
        ("prune wanda", "settings are written key=value. Did you mean pruner=wanda?"),
        ("prune pruner.damping=much", "pruner.damping=much is not allowed: pruner.damping must be a number"),
        ("prune seed=1.5", "seed must be a whole number"),
        ("prune eval.tasks=piqa", "eval.tasks must be a list"),
        ("prune pruner.damping=5", "pruner.damping=5.0 is not allowed: between 0 and 1."),
        ("prune sparsity.keep=4", "sparsity.keep=4 is not allowed: 1 to 3."),
        ("prune model.dtype=fp16", "choose from auto, float32, bfloat16, float16"),
        ("prune rotation.groups=2", "rotation.groups=2 is not allowed: needs rotation=shared."),
        (
            "prune rotation=none rotation.permute=both",
            "rotation.permute=both is not allowed: needs rotation=per_layer or",
        ),
        (
            "prune rotation.permute=all",
            "rotation.permute=all is not allowed: choose from none, intermediate, residual, both.",
        ),
        ("prune objective.weights=even", "objective.weights=even is not allowed: choose from uniform, sensitivity."),
        ("prune reconstruct=blocks", "Did you mean reconstruct=block? Choose from block, none."),
        (
            "prune reconstruct=block reconstruct.target=dense",
            "reconstruct.target=dense is not allowed: choose from model, layer.",
        ),
        ("prune model=local", "model.path='' is not allowed: give a folder, a .gguf file or a hub id."),
        ("eval", "model.path='' is not allowed"),
        ("export", "model.path='' is not allowed"),
        ("export model.path=x format=sparse", "format=sparse is not allowed: choose from sparse24."),
        ("export model.path=x fromat=sparse24", "there is no setting 'fromat'. Did you mean format?"),
        ("export model.path=x overwrite=1", "overwrite=1 is not allowed: overwrite must be true or false."),
        ("export model.path=x model.dtype=float16", "model.dtype=float16 is not allowed: an export keeps"),
        ("bench kind=speed", "kind=speed is not allowed: choose from pruning, inference."),
        ("bench bench.objectives=[loss]", "bench.objectives=loss is not allowed: choose from entropy, pruning_error."),
        ("bench bench.steps=0", "bench.steps=0 is not allowed: 1 or more."),
        ("bench bench.layers=-1", "bench.layers=-1 is not allowed: 0 (no pipeline) or more."),
        ("bench bench.decode=[1,0]", "bench.decode=0 is not allowed: 1 or more."),
        ("bench bench.decode=8", "bench.decode must be a list, such as [1,8]."),
        ("bench bench.layer=1", "Did you mean bench.layers?"),
        ("bench model=local", "model.path='' is not allowed"),
        ("bench calibration=local", "bench has no group 'calibration'."),
        ("export pruner=wanda", "export has no group 'pruner'. Its groups: model."),
        ("prune rotation.R1=1", "rotation.R1 must be true or false"),
        ("prune calibration=local", "calibration.path='' is not allowed"),
        ("prune ~calibration", "missing mandatory value: calibration"),
        ("prune pruner=wanda,magnitude", "names several values: add -m"),
        ("prune -m pruner=wanda,foo", "pruner=foo is no option"),
        ("prune -m pruner.damping=0.1,2", "pruner.damping=2.0 is not allowed"),
        ("prune -m seed=interval(0,3)", "only listed values, choice() and range() can be swept"),
        ("prune cluster=slurm", "cluster=slurm submits the jobs of a sweep: add -m"),
        ("prune resume=nowhere", "there is no config.yaml in it"),
        ("prune -m resume=nowhere", "there is no such folder"),
        ("prune --nope", "unrecognized arguments: --nope"),
        ("prune --config-dir nowhere", "there is no such folder"),
        ("prune hydra.rn.dir=x", "Key 'rn' not in 'HydraConf'"),
        ("report", "the following arguments are required: RUN"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_made(
    drotator: Drotator, tmp_path: Path, words: str, said: str
) -> None:
    result = drotator(*words.split())
    assert said in one_line(result, 2)
    assert result.stdout == ""
    assert list((tmp_path / "work").iterdir()) == []


def test_a_run_gets_a_folder_with_its_name_and_log(drotator: Drotator, tmp_path: Path) -> None:
    result = drotator("prune", "model=llama3-8b", "pruner=wanda", "sparsity.ratio=0.55")
    assert (result.returncode, result.stderr) == (0, "")
    (folder,) = run_folders(tmp_path)
    assert folder.name.endswith("-llama3-8b-wanda-55")
    assert folder.parent.parent == tmp_path / "work" / "outputs"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "log.txt"]
    logged = (folder / "log.txt").read_text()
    assert "baseline=True" in logged and "a library warns" in logged
    assert "baseline=True" in result.stdout and "a library warns" not in result.stdout


def test_an_option_that_reads_as_a_number_is_an_option(drotator: Drotator, tmp_path: Path) -> None:
    assert drotator("prune", "-m", "sparsity=50,2of4").returncode == 0
    assert [folder.name for folder in run_folders(tmp_path)] == ["0", "1"]
    assert "ratio: 0.7" in drotator("prune", "sparsity=70", "--cfg", "job").stdout


def test_flags_may_stand_between_settings(drotator: Drotator, tmp_path: Path) -> None:
    result = drotator("prune", "pruner=wanda,magnitude", "-m", "seed=0", "sparsity=50")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(run_folders(tmp_path)) == 2


def test_hydra_flags_pass_through(drotator: Drotator, tmp_path: Path) -> None:
    assert "experiment/paper" in drotator("prune", "+experiment=paper", "--info", "defaults").stdout
    assert "dampin" in one_line(drotator("prune", "pruner.dampin=1", "--cfg", "job"), 2)
    own = tmp_path / "own" / "pruner"
    own.mkdir(parents=True)
    (own / "gentle.yaml").write_text("name: wanda\ndamping: 0.5\n")
    shown = drotator("prune", "--config-dir", str(own.parent), "pruner=gentle", "--cfg", "job")
    assert "damping: 0.5" in shown.stdout
    assert drotator("prune", "--config-dir", str(own.parent), "pruner=gentle").returncode == 0


@pytest.mark.parametrize(
    ("seed", "exit_code", "said"),
    [
        (1, 2, "seed=1 is odd. Take another."),
        (2, 1, "layer 3 is not finite (traceback: "),
        (4, 2, "no space left on the disk while writing in "),
        (5, 1, "KeyError: 'gone' (traceback: "),
    ],
)
def test_a_failed_run_is_told_in_one_line_and_its_traceback_is_in_the_log(
    drotator: Drotator, tmp_path: Path, seed: int, exit_code: int, said: str
) -> None:
    assert said in one_line(drotator("prune", f"seed={seed}"), exit_code)
    (folder,) = run_folders(tmp_path)
    assert "Traceback (most recent call last)" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("name", ["DROTATOR_TRACEBACK", "HYDRA_FULL_ERROR"])
def test_a_traceback_can_be_asked_for(drotator: Drotator, name: str) -> None:
    result = drotator("prune", "seed=2", **{name: "1"})
    assert result.returncode == 1
    assert "RuntimeError: layer 3 is not finite" in result.stderr


def test_an_interrupted_run_says_how_to_go_on(drotator: Drotator, tmp_path: Path) -> None:
    said = one_line(drotator("prune", "seed=3", "pruner=wanda"), 130)
    (folder,) = run_folders(tmp_path)
    resume = folder.relative_to(tmp_path / "work")
    assert said == f"interrupted. Go on with: drotator prune seed=3 pruner=wanda resume={resume}"
    assert signal.SIGINT == 130 - 128


def test_ctrl_c_before_there_is_a_run_folder_says_no_more(drotator: Drotator) -> None:
    assert one_line(drotator("prune", "seed=13"), 130) == "interrupted."


def test_ctrl_c_says_how_to_go_on_with_a_recovery(drotator: Drotator) -> None:
    said = one_line(drotator("recover", "model.path=x", "hydra.run.dir=run"), 130)
    assert said == "interrupted. Go on with: drotator recover model.path=x hydra.run.dir=run resume=run"


def test_an_unwritable_output_folder_is_told_in_one_line(drotator: Drotator) -> None:
    assert one_line(drotator("prune", "hydra.run.dir=/dev/null/run"), 2) == "Not a directory: /dev/null/run"


def test_resume_goes_on_in_the_same_folder(drotator: Drotator, tmp_path: Path) -> None:
    run = "a folder, with 'quotes'"
    (tmp_path / "work" / run).mkdir()
    (tmp_path / "work" / run / "config.yaml").touch()
    assert drotator("prune", f'resume="{run}"').returncode == 0
    (folder,) = run_folders(tmp_path)
    assert folder == tmp_path / "work" / run
    assert f"resume={run}" in (folder / "log.txt").read_text()


def test_the_other_jobs_of_a_sweep_run_on_and_each_failure_is_one_line(drotator: Drotator, tmp_path: Path) -> None:
    result = drotator("prune", "-m", "seed=0,1,2,6", "pruner=wanda")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "drotator: job 1 (seed=1): seed=1 is odd. Take another.",
        "drotator: job 2 (seed=2): layer 3 is not finite",
    ]
    folders = run_folders(tmp_path)
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert [(folder / "failed.txt").exists() for folder in folders] == [False, True, True, False]
    assert "RuntimeError: layer 3 is not finite" in (folders[2] / "log.txt").read_text()
    assert "baseline=False" in (folders[3] / "log.txt").read_text()


def test_a_sweep_goes_on_where_it_was(drotator: Drotator, tmp_path: Path) -> None:
    assert drotator("prune", "-m", "seed=0,1").returncode == 1
    sweep = run_folders(tmp_path)[0].parent
    shutil.rmtree(sweep / "0")
    result = drotator("prune", "-m", "seed=0,6", f"resume={sweep}")
    assert (result.returncode, result.stderr) == (0, "")
    assert run_folders(tmp_path) == [sweep / "0", sweep / "1"]
    assert not (sweep / "1" / "failed.txt").exists()
    assert "resume=\n" in (sweep / "0" / "log.txt").read_text()
    assert f"resume={sweep / '1'}" in (sweep / "1" / "log.txt").read_text()


def test_a_sweep_runs_through_submitit(drotator: Drotator, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the slurm extra is not installed")
    words = ["cluster=slurm", "hydra/launcher=submitit_local", "hydra.launcher.gpus_per_node=0"]
    result = drotator("prune", "-m", *words, "seed=0,1")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "seed=1 is odd. Take another." in result.stderr
    assert ["baseline=False" in (folder / "log.txt").read_text() for folder in run_folders(tmp_path)] == [True, True]


def test_eval_measures_a_checkpoint_as_its_run_was(drotator: Drotator) -> None:
    assert drotator("prune", "hydra.run.dir=run").returncode == 0
    assert "eval=quick of run/checkpoint" in drotator("eval", "model.path=run/checkpoint").stdout
    assert "eval=none of run/checkpoint" in drotator("eval", "eval=none", "model.path=run/checkpoint").stdout
    assert "eval=full of elsewhere" in drotator("eval", "model.path=elsewhere").stdout


def test_fetch_leaves_nothing_behind(drotator: Drotator, tmp_path: Path) -> None:
    result = drotator("fetch")
    assert "fetch embedded" in result.stdout
    assert list((tmp_path / "work").iterdir()) == []


def test_report_takes_folders(drotator: Drotator) -> None:
    assert "report of ['a', 'b'] in table.md" in drotator("report", "a", "b", "--output", "table.md").stdout


@pytest.mark.parametrize(
    ("baseline", "rotation", "pruner", "is_sweep", "expected"),
    [
        ("auto", "per_layer", "wanda", False, True),
        ("auto", "per_layer", "wanda", True, False),
        ("always", "per_layer", "wanda", True, True),
        ("never", "per_layer", "wanda", False, False),
        ("always", "none", "wanda", False, False),
        ("auto", "per_layer", "none", False, False),
    ],
)
def test_the_unrotated_model_is_pruned_too_where_there_is_something_to_compare(
    baseline: str, rotation: str, pruner: str, is_sweep: bool, expected: bool
) -> None:
    settings = config.PruneConfig(
        model=config.ModelConfig(path="x"),
        pruner=config.PrunerConfig(name=pruner),
        sparsity=config.SparsityConfig(),
        rotation=config.RotationConfig(name=rotation),
        objective=config.ObjectiveConfig(),
        optimizer=config.OptimizerConfig(),
        calibration=config.CalibrationConfig(),
        eval=config.EvalConfig(),
        baseline=baseline,
    )
    assert verbs.has_baseline(settings, is_sweep) is expected


def test_a_missing_slurm_plugin_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hydra.errors import MissingConfigException

    from drotator import composition

    def without_plugin(*_: object, **__: object) -> None:
        raise MissingConfigException("missing", "hydra/launcher/submitit_slurm", ["basic"])

    monkeypatch.setattr(composition, "compose", without_plugin)
    monkeypatch.setattr(composition.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["prune", "-m", "cluster=slurm"]) == 2
    assert "pip install 'drotator[slurm]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "task", "expected"),
    [
        ("prune.sbatch", "", "prune model=x hydra.run.dir=outputs/slurm/7"),
        ("several_gpus.sbatch", "", "prune model=x hydra.run.dir=outputs/slurm/7"),
        (
            "sweep_array.sbatch",
            "6",
            "prune pruner=sparsegpt sparsity=2of4 rotation=none baseline=never model=x "
            "hydra.run.dir=outputs/multirun/slurm-7/6",
        ),
    ],
)
def test_a_batch_script_starts_a_run_and_resumes_it(tmp_path: Path, script: str, task: str, expected: str) -> None:
    recorder = tmp_path / "recorder"
    recorder.write_text('#!/bin/sh\necho "$@"\n')
    recorder.chmod(0o755)
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n'
    )
    skip = 'while [ "${1#--}" != "$1" ]; do shift; done'
    (tmp_path / "srun").write_text(f'#!/bin/sh\n{skip}\n[ "$MASTER_ADDR $MASTER_PORT" = "node1 20007" ] && exec "$@"\n')
    for tool in ("scontrol", "srun"):
        (tmp_path / tool).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7"}
    slurm |= {"SLURM_ARRAY_TASK_ID": task, "DROTATOR": str(recorder)}
    slurm |= {"SLURM_JOB_NODELIST": "node[1-2]", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def submit() -> str:
        command = ["bash", str(ROOT / "scripts" / "slurm" / script), "model=x"]
        return subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout.strip()

    assert submit() == expected
    run = expected.rpartition("=")[2]
    (tmp_path / run).mkdir(parents=True)
    (tmp_path / run / "config.yaml").touch()
    assert submit() == expected.replace("hydra.run.dir=", "resume=")
