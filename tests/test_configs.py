"""Every YAML under configs/: it composes, it validates, it says what it is, and it is in the wheel."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from drotator import config
from drotator.composition import BEHAVIOUR, from_hydra, plan
from drotator.usage import config_folder, group_options, groups_of
from drotator.verbs import VERBS

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "model": "smollm2-135m llama3-8b llama3-70b llama3.2-1b llama2-7b llama2-13b llama2-70b mistral-7b qwen2.5-7b "
    "qwen2.5-14b qwen2.5-32b qwen2.5-72b qwen3-8b local",
    "pruner": "magnitude wanda sparsegpt admm none",
    "sparsity": "50 60 70 2of4 4of8",
    "rotation": "per_layer shared none",
    "objective": "auto entropy pruning_error",
    "optimizer": "adam_qr riemannian_adam spectral",
    "reconstruct": "none block",
    "calibration": "auto c4 wikitext2 local embedded",
    "eval": "auto full perplexity zeroshot quick none embedded",
    "cluster": "local slurm",
}
NEEDED = {"model=local": ["model.path=folder"], "calibration=local": ["calibration.path=text.txt"]}


def settings_of(verb: str, *words: str) -> Any:
    """Compose as the command line does and return the dataclass."""
    with initialize_config_dir(config_dir=str(config_folder()), **BEHAVIOUR):
        return from_hydra(compose(verb, overrides=list(words)), VERBS[verb].settings)


def yaml_files() -> list[Path]:
    return sorted(config_folder().rglob("*.yaml"))


def options_of_all_groups() -> list[str]:
    return [f"{group}={option}" for group, options in OPTIONS.items() for option in options.split()]


@pytest.mark.parametrize("file", yaml_files(), ids=lambda path: str(path.relative_to(config_folder())))
def test_every_yaml_opens_with_a_comment_of_one_to_three_lines(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    said = [line for line in comment if "@package" not in line]
    assert 1 <= len(said) <= 3
    assert all(len(line) > 10 for line in said)


@pytest.mark.parametrize("group", OPTIONS)
def test_a_group_has_exactly_the_options_that_are_promised(group: str) -> None:
    assert set(group_options(group)) == set(OPTIONS[group].split())
    assert group in groups_of("prune")


@pytest.mark.parametrize("word", options_of_all_groups())
def test_every_option_composes_and_validates(word: str) -> None:
    sweep = ["-m"] if word == "cluster=slurm" else []
    assert plan("prune", [*sweep, word, *NEEDED.get(word, [])]).words


ABLATIONS = [name for name in group_options("experiment") if name.startswith("ablation")]
PUBLISHED = [name for name in group_options("experiment") if name not in ABLATIONS]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_composes_on_the_real_model_and_is_a_sweep(name: str) -> None:
    settings = settings_of("prune", f"+experiment={name}")
    assert (settings.model.name, settings.pruner.name, settings.sparsity.label) == ("smollm2-135m", "sparsegpt", "2of4")
    assert (settings.calibration.dataset, settings.eval.perplexity, settings.eval.tasks) == ("c4", ["wikitext2"], [])
    assert plan("prune", [f"+experiment={name}"]).is_sweep == (name != "ablation")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_experiment_composes_and_says_what_to_expect(name: str) -> None:
    settings = settings_of("prune", f"+experiment={name}")
    assert settings.objective.name == "entropy"
    assert (settings.optimizer.name, settings.optimizer.steps, settings.optimizer.learning_rate) == (
        "adam_qr",
        2000,
        0.01,
    )
    assert (settings.calibration.dataset, settings.calibration.num_samples, settings.calibration.seqlen) == (
        "c4",
        128,
        2048,
    )
    assert settings.rotation.name == "per_layer"
    assert settings.eval.name == "full"
    text = (config_folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "Source: DenoiseRotator" in text and "Cost:" in text
    if name != "paper":
        assert "Expected: WikiText-2" in text
        assert name == f"{settings.model.name}-{settings.pruner.name}-{settings.sparsity.label}"


@pytest.mark.parametrize("words", list(itertools.permutations(["+experiment=paper", "model=llama3-8b", "eval=quick"])))
def test_the_command_line_wins_over_an_experiment_in_any_order(words: tuple[str, ...]) -> None:
    settings = settings_of("prune", *words)
    assert (settings.model.name, settings.eval.name, settings.calibration.dataset) == ("llama3-8b", "quick", "c4")


def test_the_defaults_of_prune_are_those_of_the_readme() -> None:
    settings = settings_of("prune")
    assert settings.model.path == "embedded"
    assert settings.pruner == config.PrunerConfig(name="sparsegpt", damping=0.01, block_size=128)
    assert settings.sparsity.label == "2of4"
    assert settings.rotation == config.RotationConfig(name="per_layer", groups=1, R1=True, R2=True, permute="none")
    assert settings.objective == config.ObjectiveConfig(name="pruning_error", salience="auto", weights="sensitivity")
    assert settings.optimizer == config.OptimizerConfig(name="spectral", steps=200, learning_rate=0.15)
    assert settings.reconstruct == config.ReconstructConfig(name="none")
    assert (settings.device, settings.seed, settings.resume, settings.baseline) == ("auto", 0, "", "auto")


def test_reconstruction_and_admm_compose_to_what_their_yaml_and_schema_say() -> None:
    words = ["pruner.iterations=30", "reconstruct.epochs=2", "rotation.permute=both", "objective.weights=uniform"]
    settings = settings_of("prune", "reconstruct=block", "pruner=admm", *words)
    assert (settings.rotation.permute, settings.objective.weights) == ("both", "uniform")
    assert settings.reconstruct == config.ReconstructConfig(name="block", target="model", epochs=2)
    assert settings.pruner == config.PrunerConfig(name="admm", damping=0.1, iterations=30, solve_steps=0)
    assert settings_of("prune", "pruner=admm").pruner.iterations == 100


@pytest.mark.parametrize(
    ("groups", "num_layers", "runs"),
    [
        (1, 5, [range(5)]),
        (2, 3, [range(1), range(1, 3)]),
        (2, 5, [range(2), range(2, 5)]),
        (3, 32, [range(10), range(10, 21), range(21, 32)]),
        (4, 4, [range(i, i + 1) for i in range(4)]),
        (9, 4, [range(i, i + 1) for i in range(4)]),
    ],
)
def test_groups_are_runs_of_neighbouring_layers_with_a_boundary_between_them(
    groups: int, num_layers: int, runs: list[range]
) -> None:
    rotation = config.RotationConfig(name="shared", groups=groups)
    assert rotation.runs(num_layers) == runs
    assert rotation.boundaries(num_layers) == [run.stop - 1 for run in runs[:-1]]


def test_without_r1_nothing_is_shared_and_layers_are_learned_one_by_one() -> None:
    rotation = config.RotationConfig(name="shared", R1=False)
    assert rotation.runs(3) == [range(1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize(
    ("given", "boundaries"),
    [
        ({"name": "per_layer"}, [0, 1, 2]),
        ({"name": "shared"}, []),
        ({"name": "none"}, []),
        ({"name": "per_layer", "R1": False}, []),
        ({"name": "shared", "groups": 2, "R1": False}, []),
        ({"name": "per_layer", "R2": False}, [0, 1, 2]),
    ],
)
def test_boundaries_stand_where_r1_changes(given: dict[str, Any], boundaries: list[int]) -> None:
    assert config.RotationConfig(**given).boundaries(4) == boundaries


@pytest.mark.parametrize(
    ("schema", "wrong", "said"),
    [
        (config.RotationConfig, {"name": "none", "groups": 2}, "rotation.groups=2 is not allowed: needs rotation=sha"),
        (config.RotationConfig, {"name": "none", "permute": "both"}, "rotation.permute=both is not allowed: needs rot"),
        (
            config.RotationConfig,
            {"name": "none", "value_map": "invertible"},
            "rotation.value_map=invertible is not allo",
        ),
        (config.RotationConfig, {"name": "shared", "groups": 0}, "rotation.groups=0 is not allowed: 1 or more."),
        (config.ReconstructConfig, {"epochs": 0}, "reconstruct.epochs=0 is not allowed: 1 or more."),
        (config.ReconstructConfig, {"learning_rate": 0.0}, "reconstruct.learning_rate=0.0 is not allowed: above 0."),
        (config.OptimizerConfig, {"batches": 0}, "optimizer.batches=0 is not allowed: 1 or more."),
        (config.PrunerConfig, {"solve_steps": -1}, "pruner.solve_steps=-1 is not allowed: 0 or more."),
        (config.PrunerConfig, {"iterations": 0}, "pruner.iterations=0 is not allowed: 1 or more."),
    ],
)
def test_numbers_out_of_range_are_refused_with_what_is_allowed(schema: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        schema(**wrong)


@pytest.mark.parametrize("sparsity", ["2of4", "4of8", "50", "60"])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_the_objective_goes_with_pruner_and_sparsity_unless_it_is_named(pruner: str, sparsity: str) -> None:
    words = (f"pruner={pruner}", f"sparsity='{sparsity}'")
    found = settings_of("prune", *words).objective
    is_entropy = pruner == "magnitude" and "of" in sparsity
    assert found == config.ObjectiveConfig(name="entropy" if is_entropy else "pruning_error")
    for name in ("entropy", "pruning_error"):
        assert settings_of("prune", *words, f"objective={name}").objective.name == name
    assert settings_of("prune", "pruner=magnitude", "sparsity.ratio=0.55").objective.name == "pruning_error"


@pytest.mark.parametrize("verb", ["check", "fetch", "prune"])
def test_calibration_goes_with_the_model(verb: str) -> None:
    assert settings_of(verb).calibration.dataset == "embedded"
    assert settings_of(verb, "model=llama3-8b").calibration.dataset == "c4"
    assert settings_of(verb, "model=local", "model.path=x").calibration.dataset == "c4"


@pytest.mark.parametrize("verb", ["eval", "fetch", "prune"])
def test_evaluation_goes_with_the_model(verb: str) -> None:
    assert settings_of(verb, "model=smollm2-135m").eval == config.EvalConfig(
        name="embedded", source="embedded", perplexity=["passages"], seqlen=512, windows=16, limit=20
    )
    assert settings_of(verb, "model=qwen3-8b").eval == config.EvalConfig()


@pytest.mark.parametrize("model", ["smollm2-135m", "llama3-8b"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_an_own_choice_of_calibration_and_eval_wins_in_any_order(model: str, order: tuple[int, ...]) -> None:
    words = [f"model={model}", "calibration=wikitext2", "eval=quick"]
    settings = settings_of("prune", *(words[i] for i in order))
    assert (settings.calibration.dataset, settings.eval.name) == ("wikitext2", "quick")


def test_one_own_choice_leaves_the_other_with_the_model() -> None:
    settings = settings_of("prune", "eval=none", "calibration.num_samples=3")
    assert (settings.calibration.dataset, settings.calibration.num_samples) == ("embedded", 3)
    assert (settings.eval.perplexity, settings.eval.tasks) == ([], [])


@pytest.mark.parametrize(
    ("words", "label", "fraction"),
    [
        (["sparsity=4of8"], "4of8", 0.5),
        (["sparsity.ratio=0.55"], "55", 0.55),
        (["sparsity=4of8", "sparsity.ratio=0.625"], "62.5", 0.625),
        (["sparsity.keep=1"], "1of4", 0.75),
        (["sparsity.keep=3", "sparsity.group=16"], "3of16", 1 - 3 / 16),
    ],
)
def test_any_sparsity_can_be_set(words: list[str], label: str, fraction: float) -> None:
    sparsity = settings_of("prune", *words).sparsity
    assert (sparsity.label, sparsity.fraction) == (label, fraction)


@pytest.mark.parametrize(("option", "fraction"), [("50", 0.5), ("60", 0.6), ("70", 0.7)])
def test_an_unstructured_option_is_its_percentage(option: str, fraction: float) -> None:
    assert plan("prune", [f"sparsity={option}"]).folder.name.endswith(f"-sparsegpt-{option}")  # type: ignore[union-attr]
    assert settings_of("prune", f"sparsity='{option}'").sparsity == config.SparsityConfig(ratio=fraction)


def test_an_export_is_of_one_format_and_replaces_nothing_unless_asked() -> None:
    settings = settings_of("export", "model.path=folder")
    assert (settings.format, settings.output, settings.overwrite) == ("sparse24", "", False)
    assert plan("export", ["model.path=folder", "output=there", "overwrite=true"]).folder == Path(".")


def test_a_recovery_trains_as_the_paper_does() -> None:
    settings = settings_of("recover", "model.path=folder")
    lora = config.RecoverConfig(rank=8, alpha=32, dropout=0.1, learning_rate=2e-4, weight_decay=1e-2, warmup_steps=400)
    assert settings.recover == lora
    assert lora.masked
    text = settings.calibration
    assert (text.dataset, text.num_samples, text.seqlen, settings.num_steps) == ("c4", 4096, 2048, 4096)
    few = settings_of(
        "recover", "model.path=x", "calibration=wikitext2", "calibration.batch_size=5", "recover.epochs=2"
    )
    assert (few.calibration.dataset, few.calibration.num_samples, few.num_steps) == ("wikitext2", 4096, 2 * 820)
    assert plan("recover", ["model.path=folder", "recover.masked=false"]).folder.name.endswith("-local-recover")  # type: ignore[union-attr]


def test_true_and_false_can_be_set() -> None:
    assert plan("prune", ["rotation.R1=false", "rotation.R2=true"]).words


def test_check_needs_little_text_and_few_steps_whatever_is_chosen() -> None:
    settings = settings_of("check", "model=llama3-8b", "optimizer=adam_qr")
    assert (settings.calibration.num_samples, settings.optimizer.steps) == (8, 20)
    assert settings_of("check", "optimizer.steps=5").optimizer.steps == 5


@pytest.mark.slow
def test_the_wheel_carries_the_configs_and_works_outside_the_repository(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("drotator-*.whl"))) as wheel:
        wheel.extractall(installed)
    packed = {path.relative_to(installed / "drotator" / "configs") for path in installed.rglob("*.yaml")}
    assert packed == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from drotator.cli import main; sys.exit(main())"
    words = ["prune", "--cfg", "job", "sparsity=60"]
    shown = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "ratio: 0.6" in shown.stdout


@pytest.mark.parametrize("permute", ["residual", "both"])
def test_residual_channels_are_not_permuted_without_r1(permute: str) -> None:
    with pytest.raises(ValueError, match=f"rotation.permute={permute} is not allowed: the residual channels"):
        plan("prune", ["rotation.R1=false", f"rotation.permute={permute}"])
    assert plan("prune", ["rotation.R1=false", "rotation.permute=intermediate"]).words
