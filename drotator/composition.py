"""Hydra's side of the command line: schemas, resolvers, and a look at every job's settings before any of them starts.

Whatever Hydra or a schema refuses becomes a ValueError of one line that names the setting, what was found, what is
allowed and the closest match. Importing this module registers schemas and resolvers: a job that another process
unpickles (as submitit does) composes its settings there again.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import inspect
import itertools
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from drotator.config import Resumable, SparsityConfig
from drotator.usage import config_folder, group_options, groups_of
from drotator.verbs import VERBS

# Hydra 1.3 warns when version_base is not given, Hydra 1.4 when it is; 1.4 wants to know what a logging YAML may call.
IS_HYDRA_1_3 = hydra.__version__.startswith("1.3.")
BEHAVIOUR: dict[str, Any] = {"version_base": "1.3"} if IS_HYDRA_1_3 else {}
MAY_CALL: dict[str, Any] = {} if IS_HYDRA_1_3 else {"execution_whitelist": ["drotator.console.console_handler"]}
HINTS = {
    "sparsity": "Any other: sparsity.ratio=0.55, or sparsity.keep=2 sparsity.group=8.",
    "model": "Any other: model=local model.path=FOLDER, FILE.gguf or a hub id.",
    "calibration": "Your own text: calibration=local calibration.path=FILE.",
}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    list[str]: "a list, such as [a,b]",
    list[int]: "a list, such as [1,8]",
}
NO_SUBMITIT = "cluster=slurm needs the package hydra-submitit-launcher: pip install 'drotator[slurm]'."


def _sparsity_label(sparsity: DictConfig) -> str:
    return SparsityConfig(ratio=sparsity.ratio, keep=sparsity.keep, group=sparsity.group).label


def _if_equal(value: Any, other: Any, then: Any, otherwise: Any) -> Any:
    return then if value == other else otherwise


def _register() -> None:
    for name, verb in VERBS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=verb.settings)
    # omegaconf 2.4 gave the old name of 2.0 back to the function that 2.1 to 2.3 call register_new_resolver
    is_renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register: Any = OmegaConf.register_resolver if is_renamed else OmegaConf.register_new_resolver
    register("drotator.if_equal", _if_equal, replace=True)
    register("drotator.sparsity_label", _sparsity_label, replace=True)


_register()


@dataclass(frozen=True)
class Plan:
    """A command line that has been checked: the words for Hydra, the folder of the run or sweep, and what it is."""

    words: list[str]
    folder: Path | None = None
    is_sweep: bool = False

    @property
    def has_started(self) -> bool:
        """Whether the folder holds what `resume` goes on with."""
        return self.folder is not None and _is_run(self.folder, self.is_sweep)


def from_hydra(cfg: DictConfig, schema: type) -> Any:
    """Turn a composed config into its dataclass. Raises: ValueError of one line if a value is not allowed."""
    try:
        settings = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ValueError(_first_line(error)) from error
    if not isinstance(settings, schema):
        raise ValueError(f"the config composes no {schema.__name__}: list its schema in the defaults of the YAML.")
    return settings


def plan(verb: str, words: list[str]) -> Plan:
    """Compose and validate every job of a command line, without starting one.

    Raises: ValueError of one line, for whatever Hydra, a schema or a folder to go on with does not allow.
    """
    arguments = _parse(words)
    if arguments.hydra_help or arguments.shell_completion or arguments.experimental_rerun or arguments.config_path:
        return Plan(words)
    only_shows = arguments.cfg is not None or arguments.info is not None
    extra = _searchpath(arguments)
    with initialize_config_dir(config_dir=str(config_folder()), **BEHAVIOUR):
        overrides = _read_overrides(verb, arguments.overrides)
        words = _rewritten(words, arguments.overrides, overrides)
        if only_shows:
            _compose(arguments.config_name or verb, [*extra, *_single(overrides)])
            return Plan(words)
        like_run = _like_its_run(overrides) if verb in ("eval", "recover") else []
        for job in _jobs(overrides) if arguments.multirun else [_single(overrides)]:
            cfg = _compose(arguments.config_name or verb, [*extra, *like_run, *job])
            settings = from_hydra(_without_hydra(cfg), VERBS[verb].settings)
        is_sweep = arguments.multirun or str(cfg.hydra.mode).endswith("MULTIRUN")
        if cfg.hydra.runtime.choices.get("cluster") == "slurm" and not is_sweep:
            raise ValueError(
                "cluster=slurm submits the jobs of a sweep: add -m; for a single run use scripts/slurm/prune.sbatch."
            )
        folder = Path(cfg.hydra.sweep.dir if is_sweep else cfg.hydra.run.dir)
        if isinstance(settings, Resumable) and settings.resume:
            folder = _folder_to_resume(settings.resume, is_sweep)
    if is_sweep:  # a failed job is told with what sets it apart
        same = ",".join(override.key_or_group for override in overrides if not override.is_sweep_override())
        words = [*words, f"hydra.job.config.override_dirname.exclude_keys=[{same}]"]
    key = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    return Plan([*words, *like_run, f"{key}={_quoted(str(folder))}"], folder, is_sweep)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}. Hydra's flags are listed by --hydra-help.")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(words)


def _searchpath(arguments: argparse.Namespace) -> list[str]:
    """Turn --config-dir, which compose() does not know, into an override."""
    if arguments.config_dir is None:
        return []
    folder = Path(arguments.config_dir).resolve()
    if not folder.is_dir():
        raise ValueError(f"--config-dir {arguments.config_dir}: there is no such folder.")
    return [f"hydra.searchpath=[{_quoted(f'file://{folder}')}]"]


def _compose(name: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(config_name=name, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error)) from error


def _without_hydra(cfg: DictConfig) -> DictConfig:
    cfg = cfg.copy()
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _read_overrides(verb: str, words: list[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = []
    for word in words:
        try:
            override = parser.parse_overrides([word])[0]
        except OverrideParseException as error:
            raise ValueError(_not_an_override(verb, word)) from error
        _check_key(verb, override)
        overrides.append(_with_option_names(override) if override.key_or_group in groups_of(verb) else override)
    return overrides


def _with_option_names(override: Override) -> Override:
    """Quote options that read as numbers: Hydra takes sparsity=50 for an integer and refuses it as an option."""
    if override.is_sweep_override():
        values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    elif isinstance(override.value(), list | dict) or override.is_delete():
        return override
    else:
        values = [str(override.input_line).partition("=")[2]]
    parser = OverridesParser.create()
    quoted = [value if isinstance(_parsed(parser, value), str) else _quoted(value) for value in values]
    if quoted == values:
        return override
    return parser.parse_override(f"{override.get_key_element()}={','.join(quoted)}")


def _parsed(parser: OverridesParser, value: str) -> Any:
    return parser.parse_override(f"key={value}").value()


def _rewritten(words: list[str], before: list[str], after: list[Override]) -> list[str]:
    """Put the flags first: Hydra 1.3 does not read settings on both sides of them."""
    return [word for word in words if word not in before] + [str(override.input_line) for override in after]


def _not_an_override(verb: str, word: str) -> str:
    group = next((group for group in groups_of(verb) if word in group_options(group)), None)
    meant = f" Did you mean {group}={word}?" if group else ""
    return f"'{word}' is not understood: settings are written key=value.{meant}"


def _check_key(verb: str, override: Override) -> None:
    """Refuse a name that no group and no setting has, with the closest one. Hydra's own message has none."""
    key = override.key_or_group
    if key == "experiment" and not override.is_add():
        raise ValueError(f"an experiment is added to the settings: write +{override.input_line}.")
    groups, settings = list(groups_of(verb)), dict(_settings(VERBS[verb].settings))
    if key.split("/")[0].split(".")[0] == "hydra" or key in groups or override.is_delete():
        return
    if (override.is_add() or override.is_force_add()) and GlobalHydra.instance().config_loader().get_group_options(key):
        return
    if key not in settings:
        raise ValueError(_no_such_key(verb, key, groups, list(settings)))
    if not (override.is_sweep_override() or _has_kind(override.value(), settings[key])):
        raise ValueError(f"{override.input_line} is not allowed: {key} must be {_kind(settings[key])}.")


def _no_such_key(verb: str, key: str, groups: list[str], settings: list[str]) -> str:
    if key in {path.name for path in config_folder().iterdir() if path.is_dir()}:
        return f"{verb} has no group '{key}'. Its groups: {', '.join(groups)}."
    group = key.partition(".")[0]
    leaves = {name.rpartition(".")[2]: name for name in settings if not name.endswith(".name")}
    close = difflib.get_close_matches(key, [*groups, *settings], 1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, 1)
    ]
    meant = f" Did you mean {close[0]}?" if close else ""
    if group in groups:
        inside = ", ".join(name for name in settings if name.startswith(f"{group}.")) or "nothing to set"
        return f"there is no setting '{key}'.{meant} {group} has: {inside}."
    top = ", ".join(name for name in settings if "." not in name)
    return f"there is no setting '{key}'.{meant} Groups: {', '.join(groups)}; settings: {top or 'none'}."


def _settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(hints[item.name]):
            yield from _settings(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hints[item.name]


def _kind(hint: Any) -> str:
    return KINDS.get(hint, str(hint))


def _has_kind(value: object, hint: Any) -> bool:
    """Say whether a parsed value can have this type; Hydra's parser has already read numbers and lists."""
    if hint is str or (isinstance(value, str) and "${" in value):
        return not isinstance(value, list | dict)
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, list)


def _single(overrides: list[Override]) -> list[str]:
    for override in overrides:
        if override.is_sweep_override():
            raise ValueError(f"{override.input_line} names several values: add -m to run one job for each.")
    return [str(override.input_line) for override in overrides]


def _jobs(overrides: list[Override]) -> Iterable[list[str]]:
    """Expand a sweep as Hydra's basic sweeper does."""
    axes = []
    for override in overrides:
        if not override.is_sweep_override():
            axes.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ValueError(f"{override.input_line}: only listed values, choice() and range() can be swept.")
    return [list(job) for job in itertools.product(*axes)]


def _like_its_run(overrides: list[Override]) -> list[str]:
    """Measure a run's checkpoint as the run was measured, unless an eval option is asked for."""
    given = {override.key_or_group: override for override in overrides}
    path = given["model.path"].value() if "model.path" in given and "eval" not in given else None
    written = Path(path).resolve().parent / "config.yaml" if isinstance(path, str) and path else None
    if written is None or not written.is_file():
        return []
    try:
        run: Any = OmegaConf.to_container(OmegaConf.load(written))
        settings = dict(run["eval"])
        name = settings.pop("name")
    except (OmegaConfBaseException, ValueError, AttributeError, KeyError, TypeError):
        return []
    if name not in group_options("eval") or name == "none":
        return []
    same = {f"eval.{key}": value for key, value in settings.items() if f"eval.{key}" not in given}
    return [f"eval={name}", *(f"{key}={str(value).replace(chr(39), '')}" for key, value in same.items())]


def _folder_to_resume(resume: str, is_sweep: bool) -> Path:
    folder = Path(resume)
    if _is_run(folder, is_sweep):
        return folder
    if is_sweep:
        raise ValueError(f"resume={resume}: there is no such folder. Give the folder of the sweep.")
    raise ValueError(f"resume={resume}: there is no config.yaml in it. Give the folder of a run that has started.")


def _is_run(folder: Path, is_sweep: bool) -> bool:
    return folder.is_dir() if is_sweep else (folder / "config.yaml").is_file()


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def command_line(verb: str, words: list[str], resume: Path) -> str:
    """Write the command that goes on with an interrupted run."""
    kept = [word for word in words if not word.startswith("resume=")]
    return shlex.join(["drotator", verb, *kept, f"resume={resume}"])


def _explain(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        path = error.missing_cfg_file
        group, _, option = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
        if "submitit" in option and importlib.util.find_spec("submitit") is None:
            return NO_SUBMITIT
        options = _options(group)
        close = difflib.get_close_matches(option, options, 1)
        meant = f" Did you mean {group}={close[0]}?" if close else ""
        hint = f" {HINTS[group]}" if group in HINTS else ""
        return f"{group}={option} is no option.{meant} Choose from {', '.join(options)}.{hint}"
    cause = error.__cause__
    return f"{_first_line(error)} {_first_line(cause)}" if cause else _first_line(error)


def _options(group: str) -> list[str]:
    """List ours in a person's order, then those that --config-dir and plugins add."""
    ours = group_options(group)
    return [
        *ours,
        *(name for name in GlobalHydra.instance().config_loader().get_group_options(group) if name not in ours),
    ]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
