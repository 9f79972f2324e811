"""The text of `drotator --help` and `drotator VERB --help`, read from configs/ and the schemas: at once, no torch."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import yaml

from drotator.verbs import REPORT, REPORT_SUMMARY, VERBS

FLAGS = (
    ("-m", "sweep: one job for each combination of the values listed (a=1,2 b=x,y)"),
    ("--cfg job", "print the composed settings and stop"),
    ("--info defaults", "print which YAML each setting comes from and stop"),
    ("--config-dir DIR", "look for more options in DIR/model, DIR/pruner, ..."),
    ("--hydra-help", "Hydra's other flags"),
)


@cache
def config_folder() -> Path:
    """Return the folder of the YAML files: packed in the package when installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "prune.yaml").is_file():
            return folder
    raise RuntimeError(f"no configs folder in {here} or beside it: install drotator again.")


@cache
def groups_of(verb: str) -> dict[str, str]:
    """Return the groups of a command in the order of its YAML, the model first, with the default option of each."""
    entries = yaml.safe_load((config_folder() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [next(iter(entry.items())) for entry in entries if isinstance(entry, dict)]
    return dict(sorted(((group, option) for group, option in pairs if " " not in group), key=lambda p: p[0] != "model"))


@cache
def group_options(group: str) -> dict[str, str]:
    """Return the options of a group, sorted as a person counts, with the first comment line of each."""
    files = sorted((config_folder() / group).glob("*.yaml"), key=lambda path: (_natural(path.stem), path.stem))
    return {path.stem: _first_comment(path) for path in files}


def _natural(name: str) -> list[tuple[int, str]]:
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    head = name.rstrip("0123456789bB.of-")
    return [(0, head), *((int(number), "") for number in digits)]


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and "@package" not in line), "")


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 100))


def _row(name: str, text: str, indent: int = 2, column: int = 20) -> str:
    head = f"{' ' * indent}{name:<{column - 1}} "
    return textwrap.fill(text, _width(), initial_indent=head, subsequent_indent=" " * (indent + column))


def general_help() -> str:
    """Return the text of `drotator --help`."""
    lines = ["Learn rotations, merge them in a language model and prune it.", ""]
    lines += ["Usage: drotator COMMAND [group=option] [setting=value] [flags]", "", "Commands:"]
    lines += [_row(name, verb.summary, column=13) for name, verb in VERBS.items()]
    lines += [
        _row(REPORT, REPORT_SUMMARY, column=13),
        "",
        "Groups (the default in brackets; COMMAND --help says more):",
    ]
    for group, option in groups_of("prune").items():
        lines.append(_row(group, f"{', '.join(group_options(group))} [{option}]", column=13))
    lines.append(_row("+experiment", ", ".join(group_options("experiment")), column=13))
    lines += ["", "Examples:", *(f"  {line}" for line in VERBS["prune"].examples)]
    lines += ["  drotator report outputs", "", "drotator COMMAND --help    drotator --version", ""]
    return "\n".join(lines)


def verb_help(name: str) -> str:
    """Return the text of `drotator VERB --help`."""
    verb = VERBS[name]
    lines = [textwrap.fill(f"drotator {name}: {verb.summary}", _width()), ""]
    lines += [f"Usage: drotator {name} [group=option] [setting=value] [flags]", ""]
    for group, default in groups_of(name).items():
        lines.append(f"{group} [{default}]")
        lines += [_row(option, text) for option, text in group_options(group).items()]
    if name == "prune":
        lines.append("+experiment (added to the settings: +experiment=paper)")
        lines += [_row(option, text, column=28) for option, text in group_options("experiment").items()]
    lines += ["", "Settings (an option may have another default: see --cfg job):", *_setting_lines(verb.settings)]
    lines += ["", "Flags:", *(_row(flag, text) for flag, text in FLAGS), "", "Examples:"]
    return "\n".join([*lines, *(f"  {line}" for line in verb.examples), ""])


def _setting_lines(schema: type) -> list[str]:
    hints = get_type_hints(schema)
    own = [item.name for item in fields(schema) if not is_dataclass(hints[item.name])]
    lines = [_assignments(schema, own, "")] if own else []
    for item in fields(schema):
        if is_dataclass(hints[item.name]):
            inner = hints[item.name]
            names = [field.name for field in fields(inner) if field.name != "name"]
            lines += [_assignments(inner, names, f"{item.name}.")] if names else []
    return lines


def _assignments(schema: type, names: list[str], prefix: str) -> str:
    words = []
    for item in fields(schema):
        if item.name in names:
            value = item.default_factory() if item.default_factory is not MISSING else item.default
            shown = f"[{','.join(map(str, value))}]" if isinstance(value, list) else value
            shown = str(shown).lower() if isinstance(shown, bool) else shown
            words.append(f"{prefix}{item.name}={shown if shown != '' else repr('')}")
    return textwrap.fill(
        " ".join(words), _width(), initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
