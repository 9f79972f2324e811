"""Typed settings of every command: what may be set, its type, its default and what is allowed.

YAML under configs/ composes these schemas; composition.py turns the composed config into plain dataclasses, once, at
the door. Below that door no code sees omegaconf. A wrong value is a ValueError that names the field, the value and what
is allowed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

PRUNERS = ("magnitude", "wanda", "sparsegpt", "admm", "none")
ROTATIONS = ("per_layer", "shared", "none")
OBJECTIVES = ("entropy", "pruning_error")
WEIGHTS = ("uniform", "sensitivity")
MASK_WEIGHTS = ("auto", *WEIGHTS)
PERMUTATIONS = ("none", "intermediate", "residual", "both")
VALUE_MAPS = ("orthogonal", "invertible")
RECONSTRUCTIONS = ("none", "block")
SALIENCES = ("auto", "magnitude", "wanda", "obs", "sequential_obs")
OPTIMIZERS = ("adam_qr", "riemannian_adam", "spectral")
PRODUCTS = ("auto", "float8", "bfloat16", "float32")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PERPLEXITY_SETS = ("wikitext2", "c4", "passages")
BASELINES = ("auto", "always", "never")
OFFLOADS = ("auto", "device", "host", "disk")
FORMATS = ("sparse24",)
BENCHMARKS = ("pruning", "inference")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} is not allowed: {allowed}.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, name, value, f"choose from {', '.join(allowed)}")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model to prune.

    path: "embedded" (SmolLM2-135M-Instruct from the package index), a folder, a .gguf file or a hub id.
    dtype: the dtype in which weights are stored and layers run; auto keeps the checkpoint's own.
    """

    name: str = "local"
    path: str = ""
    revision: str = "main"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, DTYPES)
        _require(self.path != "", "model.path", "''", "give a folder, a .gguf file or a hub id")


@dataclass(kw_only=True, slots=True)
class PrunerConfig:
    """How weights are removed.

    damping: part of the mean diagonal of H added to it. block_size: columns of SparseGPT's sweep. iterations: of ADMM.
    solve_steps: steps of conjugate gradients that fit the surviving weights to the dense outputs, after any pruner.
    weights: what the outputs of a linear count where an unstructured mask compares them: uniform (the papers), or by
    what an error in each does to the layer's output; auto: as the rotation's pruning_error does, else uniform.
    """

    name: str = "sparsegpt"
    damping: float = 0.01
    block_size: int = 128
    iterations: int = 100
    solve_steps: int = 0
    weights: str = "auto"

    def __post_init__(self) -> None:
        _one_of("pruner.name", self.name, PRUNERS)
        _require(0 < self.damping < 1, "pruner.damping", self.damping, "between 0 and 1")
        _require(self.block_size >= 1, "pruner.block_size", self.block_size, "1 or more")
        _require(self.iterations >= 1, "pruner.iterations", self.iterations, "1 or more")
        _require(self.solve_steps >= 0, "pruner.solve_steps", self.solve_steps, "0 or more")
        _one_of("pruner.weights", self.weights, MASK_WEIGHTS)


@dataclass(kw_only=True, slots=True)
class SparsityConfig:
    """How many weights are removed: `ratio` of them, or all but `keep` of every `group` consecutive inputs."""

    ratio: float = 0.5
    keep: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        if self.group or self.keep:
            _require(self.group >= 2, "sparsity.group", self.group, "2 or more")
            _require(1 <= self.keep < self.group, "sparsity.keep", self.keep, f"1 to {self.group - 1}")
        else:
            _require(0 < self.ratio < 1, "sparsity.ratio", self.ratio, "between 0 and 1, without its ends")

    @property
    def is_grouped(self) -> bool:
        return self.group > 0

    @property
    def fraction(self) -> float:
        """Part of the weights that is removed."""
        return 1 - self.keep / self.group if self.is_grouped else self.ratio

    @property
    def label(self) -> str:
        """The option's name: 50, 62.5, 2of4."""
        return f"{self.keep}of{self.group}" if self.is_grouped else f"{100 * self.ratio:g}"


@dataclass(kw_only=True, slots=True)
class RotationConfig:
    """Where R1 lives: one for each layer, one for the model, or nowhere.

    groups: with shared, how many runs of neighbouring layers have an R1 of their own. R1, R2: whether it is learned.
    permute: the free permutations that are searched before: none, intermediate (of the MLP), residual, or both.
    value_map: what R2 may be, between v and o: an orthogonal matrix (the paper), or any invertible one.
    """

    name: str = "per_layer"
    groups: int = 1
    R1: bool = True
    R2: bool = True
    permute: str = "none"
    value_map: str = "orthogonal"

    def __post_init__(self) -> None:
        _one_of("rotation.name", self.name, ROTATIONS)
        _one_of("rotation.permute", self.permute, PERMUTATIONS)
        _one_of("rotation.value_map", self.value_map, VALUE_MAPS)
        _require(
            self.R2 or self.value_map == "orthogonal", "rotation.value_map", self.value_map, "needs rotation.R2=true"
        )
        fits = self.R1 or self.permute in ("none", "intermediate")
        _require(
            fits, "rotation.permute", self.permute, "the residual channels are permuted by R1: set rotation.R1=true"
        )
        _require(self.groups >= 1, "rotation.groups", self.groups, "1 or more")
        _require(self.groups == 1 or self.name == "shared", "rotation.groups", self.groups, "needs rotation=shared")
        for name, idle in (("permute", "none"), ("value_map", "orthogonal")):
            value = getattr(self, name)
            fits = self.name != "none" or value == idle
            _require(fits, f"rotation.{name}", value, "needs rotation=per_layer or rotation=shared")

    def runs(self, num_layers: int) -> list[range]:
        """Runs of neighbouring layers that are learned together; R1 is the same within a run."""
        if self.name != "shared" or not self.R1:
            return [range(index, index + 1) for index in range(num_layers)]
        count = min(self.groups, num_layers)
        bounds = [num_layers * i // count for i in range(count + 1)]
        return [range(*pair) for pair in itertools.pairwise(bounds)]

    def boundaries(self, num_layers: int) -> list[int]:
        """Layers that are followed by a matrix between two bases."""
        if self.name == "none" or not self.R1:
            return []
        return [run[-1] for run in self.runs(num_layers)[:-1]]


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What the rotation minimises, and the importance it is made of (auto: the pruner's own).

    weights: how pruning_error adds up the linears: uniform, each by the part of its own output's energy; sensitivity,
    each output by what an error in it does to the layer's output.
    """

    name: str = "pruning_error"
    salience: str = "auto"
    weights: str = "sensitivity"

    def __post_init__(self) -> None:
        _one_of("objective.name", self.name, OBJECTIVES)
        _one_of("objective.salience", self.salience, SALIENCES)
        _one_of("objective.weights", self.weights, WEIGHTS)

    @property
    def is_weighed(self) -> bool:
        """Whether it reads the sensitivities of a layer's outputs: the entropy adds up no errors."""
        return (self.name, self.weights) == ("pruning_error", "sensitivity")


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """How the rotation is learned.

    learning_rate: of Adam for adam_qr; of body-frame Adam at hidden_size 576 for riemannian_adam (scaled by
    sqrt(576 / hidden_size)); the first angle in radians for spectral.
    batches: a step looks at one of this many parts of a layer's outputs, in turn; 1: at all of them.
    products: of the large weights with R1, summed in float32: float8, bfloat16 or float32. auto: the fastest that a GPU
    has for weights of 16 bits, else float32.
    warm_start: R1 starts from what the layers before have learned, not from the identity.
    """

    name: str = "spectral"
    steps: int = 200
    learning_rate: float = 0.15
    batches: int = 1
    products: str = "auto"
    warm_start: bool = True

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, OPTIMIZERS)
        _require(self.steps >= 0, "optimizer.steps", self.steps, "0 or more")
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "above 0")
        _require(self.batches >= 1, "optimizer.batches", self.batches, "1 or more")
        _one_of("optimizer.products", self.products, PRODUCTS)


@dataclass(kw_only=True, slots=True)
class ReconstructConfig:
    """Whether the surviving weights of a pruned layer are tuned to the dense layer's output, masks kept.

    target: "model": what the dense model's layer puts out; "layer": what the dense layer makes of the pruned inputs.
    epochs: passes over the calibration set. learning_rate: of Adam, cosine to 0.
    """

    name: str = "none"
    target: str = "model"
    epochs: int = 8
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _one_of("reconstruct.name", self.name, RECONSTRUCTIONS)
        _require(self.epochs >= 1, "reconstruct.epochs", self.epochs, "1 or more")
        _one_of("reconstruct.target", self.target, ("model", "layer"))
        _require(self.learning_rate > 0, "reconstruct.learning_rate", self.learning_rate, "above 0")


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """The text the statistics come from. dataset: c4, wikitext2, local (path: .txt or .jsonl) or embedded."""

    dataset: str = "c4"
    path: str = ""
    num_samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        _one_of("calibration.dataset", self.dataset, ("c4", "wikitext2", "local", "embedded"))
        _require(self.dataset != "local" or self.path != "", "calibration.path", "''", "give a .txt or .jsonl file")
        for name in ("num_samples", "seqlen", "batch_size"):
            _require(getattr(self, name) >= 1, f"calibration.{name}", getattr(self, name), "1 or more")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What is measured. perplexity: sets; tasks: lm-eval names; windows and limit: 0 means all there is.

    source: hub (WikiText-2, C4 and the tasks as lm-eval names them) or embedded (from the package index).
    """

    name: str = "full"
    source: str = "hub"
    perplexity: list[str] = field(default_factory=lambda: ["wikitext2", "c4"])
    tasks: list[str] = field(default_factory=lambda: ["piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"])
    seqlen: int = 2048
    windows: int = 0
    limit: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        _one_of("eval.source", self.source, ("hub", "embedded"))
        for name in self.perplexity:
            _one_of("eval.perplexity", name, PERPLEXITY_SETS)
        _require(self.seqlen >= 2, "eval.seqlen", self.seqlen, "2 or more")
        _require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "1 or more")
        for name in ("windows", "limit"):
            _require(getattr(self, name) >= 0, f"eval.{name}", getattr(self, name), "0 (all) or more")


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """The model, and what is done to its layers."""

    model: ModelConfig
    pruner: PrunerConfig
    sparsity: SparsityConfig
    rotation: RotationConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig


@dataclass(kw_only=True, slots=True)
class PruneConfig(MethodConfig):
    """Settings of `drotator prune`.

    device: auto, cpu, cuda or cuda:N. offload: where the activations of the calibration set are kept: device, host
    (memory), disk (files in the run folder), or auto: the first of these that fits. resume: the run folder to go on
    with. baseline: prune the unrotated model too and show it beside the rotated one (auto: in a single run, not in a
    sweep).
    """

    calibration: CalibrationConfig
    eval: EvalConfig
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    device: str = "auto"
    offload: str = "auto"
    seed: int = 0
    resume: str = ""
    baseline: str = "auto"

    def __post_init__(self) -> None:
        _one_of("offload", self.offload, OFFLOADS)
        _one_of("baseline", self.baseline, BASELINES)
        if self.rotation.value_map == "invertible":
            self._check_invertible_map()

    @property
    def mask_is_weighed(self) -> bool:
        """Whether an unstructured mask weighs the outputs by their sensitivities; in groups none are compared."""
        if self.sparsity.is_grouped or self.pruner.name == "none":
            return False
        if self.pruner.weights != "auto":
            return self.pruner.weights == "sensitivity"
        return self.rotation.name != "none" and self.objective.is_weighed

    def _check_invertible_map(self) -> None:
        """Refuse what a map that stretches makes meaningless: a QR factor, an importance that sees no inputs, and the
        entropy of columns, which falls as one row outgrows the others.
        """
        why = "rotation.value_map=invertible needs"
        salience = self.pruner.name if self.objective.salience == "auto" else self.objective.salience
        _require(self.optimizer.name != "adam_qr", "optimizer", "adam_qr", f"{why} riemannian_adam or spectral")
        _require(self.objective.name == "pruning_error", "objective", self.objective.name, f"{why} pruning_error")
        _require(salience != "magnitude", "objective.salience", salience, f"{why} wanda, obs or sequential_obs")


@dataclass(kw_only=True, slots=True)
class EvalCommandConfig:
    """Settings of `drotator eval`."""

    model: ModelConfig
    eval: EvalConfig
    device: str = "auto"
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class CheckConfig:
    """Settings of `drotator check`: random rotations, then rotations learned in optimizer.steps steps."""

    model: ModelConfig
    calibration: CalibrationConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    sparsity: SparsityConfig
    device: str = "auto"
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class FetchConfig:
    """Settings of `drotator fetch`: which model and data sets to bring into the local caches."""

    model: ModelConfig
    calibration: CalibrationConfig
    eval: EvalConfig


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Settings of `drotator export`.

    output: the folder to write; '' is one beside the checkpoint, CHECKPOINT-FORMAT. overwrite: replace an export that
    stands there.
    """

    model: ModelConfig
    format: str = "sparse24"
    output: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        _require(self.model.dtype == "auto", "model.dtype", self.model.dtype, "an export keeps the checkpoint's own")


@dataclass(kw_only=True, slots=True)
class RecoverConfig:
    """How a pruned checkpoint is fine-tuned: LoRA on its pruned linears. Defaults: DenoiseRotator, Table 10.

    masked: train W + mask * (B A), so that merging loses nothing; false trains the dense update, which is faster, and
    masks it when it is merged. accumulation: batches of calibration.batch_size windows in one step.
    gradient_checkpointing: less memory, a third more time. save_every: steps between two saved states.
    """

    masked: bool = True
    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    learning_rate: float = 2e-4
    weight_decay: float = 1e-2
    warmup_steps: int = 400
    epochs: int = 1
    accumulation: int = 1
    gradient_checkpointing: bool = False
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "accumulation", "save_every"):
            _require(getattr(self, name) >= 1, f"recover.{name}", getattr(self, name), "1 or more")
        for name in ("alpha", "learning_rate"):
            _require(getattr(self, name) > 0, f"recover.{name}", getattr(self, name), "above 0")
        for name in ("weight_decay", "warmup_steps"):
            _require(getattr(self, name) >= 0, f"recover.{name}", getattr(self, name), "0 or more")
        _require(0 <= self.dropout < 1, "recover.dropout", self.dropout, "0 or more, and below 1")


@dataclass(kw_only=True, slots=True)
class RecoverCommandConfig:
    """Settings of `drotator recover`; calibration is the training text. resume: the run folder to go on with."""

    model: ModelConfig
    calibration: CalibrationConfig
    eval: EvalConfig
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    device: str = "auto"
    seed: int = 0
    resume: str = ""

    def __post_init__(self) -> None:
        _require(self.model.dtype != "float16", "model.dtype", "float16", "train in bfloat16 or float32")
        _require(self.calibration.seqlen >= 2, "calibration.seqlen", self.calibration.seqlen, "2 or more to train")
        warmup, steps = self.recover.warmup_steps, self.num_steps
        _require(warmup < steps, "recover.warmup_steps", warmup, f"less than the {steps} steps that the text gives")

    @property
    def windows_per_step(self) -> int:
        return self.calibration.batch_size * self.recover.accumulation

    @property
    def num_steps(self) -> int:
        """Steps of the optimizer: an epoch's last one may have fewer windows."""
        return self.recover.epochs * math.ceil(self.calibration.num_samples / self.windows_per_step)


Resumable = PruneConfig | RecoverCommandConfig
"""Settings of the commands that go on with resume=RUN."""


@dataclass(kw_only=True, slots=True)
class BenchOptions:
    """What `drotator bench` measures.

    objectives: those whose rotation step is timed; [] is the one of the settings. steps: of training between two
    timings. paper: time the paper's formulation beside them. layers: of the random model that goes through the whole
    pipeline, 0 leaves that out.
    batch_size, seqlen: of the prefill; seqlen is the length of the KV cache too. decode: batch sizes of decoding.
    compile: time the layers under torch.compile too.
    """

    objectives: list[str] = field(default_factory=list)
    steps: int = 40
    paper: bool = False
    layers: int = 2
    batch_size: int = 32
    seqlen: int = 2048
    decode: list[int] = field(default_factory=lambda: [1, 8, 64])
    compile: bool = False

    def __post_init__(self) -> None:
        for name in self.objectives:
            _one_of("bench.objectives", name, OBJECTIVES)
        for name in ("steps", "batch_size", "seqlen"):
            _require(getattr(self, name) >= 1, f"bench.{name}", getattr(self, name), "1 or more")
        _require(self.layers >= 0, "bench.layers", self.layers, "0 (no pipeline) or more")
        for size in self.decode:
            _require(size >= 1, "bench.decode", size, "1 or more")


@dataclass(kw_only=True, slots=True)
class BenchConfig(MethodConfig):
    """Settings of `drotator bench`: the model gives the shapes, and its weights, like all tokens, are random.

    kind: pruning: rotation step, Hessians, pruner and whole pipeline; inference: a layer dense, 2:4 and with boundary.
    calibration: how many tokens the pipeline calibrates on; its text is not read. offload: as of `drotator prune`.
    """

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    bench: BenchOptions = field(default_factory=BenchOptions)
    kind: str = "pruning"
    device: str = "auto"
    offload: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, BENCHMARKS)


def describe(settings: object) -> dict[str, Any]:
    """Turn nested settings into plain dicts, for config.yaml and for comparing two runs."""
    if is_dataclass(settings):
        return {f.name: describe(getattr(settings, f.name)) for f in fields(settings)}
    return settings  # type: ignore[return-value]
