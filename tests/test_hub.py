"""The real download code of huggingface_hub, datasets and lm-eval, against a hub on loopback with real data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import HUB, ROOT, serving
from tiny_text import BOS, byte_tokenizer, tiny_llama

pytestmark = [
    pytest.mark.hub,
    pytest.mark.skipif(not (HUB / "serve.py").is_file(), reason=f"no loopback hub at {HUB}"),
]

# The clients read their environment when they are imported, so that each look at the hub is a process of its own.
CLIENT = """
import json, logging, os
from drotator import calibration, evaluation, fetch
from drotator.config import CalibrationConfig, EvalConfig, FetchConfig, ModelConfig
from drotator.quiet import silent_libraries
from transformers import AutoModelForCausalLM

logging.basicConfig(level=logging.ERROR)
found = {}

def look(name, action):
    if os.environ.get("LOOK", name) != name:
        return
    try:
        found[name] = action()
    except ValueError as error:
        found[name] = str(error)

c4 = CalibrationConfig(dataset="c4", num_samples=3, seqlen=128)
tasks = EvalConfig(perplexity=["wikitext2", "c4"], seqlen=128, windows=2, limit=2)
model = ModelConfig(path="tests/tiny")

def measure():
    folder = fetch.resolve_model(model.path)
    with silent_libraries():
        network = AutoModelForCausalLM.from_pretrained(folder)
    return evaluation.evaluate(network, fetch.load_tokenizer(folder), tasks, seed=0)

look("fetch", lambda: fetch.fetch_all(FetchConfig(model=model, calibration=c4, eval=tasks)))
look("files", lambda: sorted(file.name for file in fetch.resolve_model(model.path).iterdir()))
tokenizer = fetch.load_tokenizer(fetch.resolve_model(model.path)) if isinstance(found.get("files"), list) else None
look("windows", lambda: calibration.calibration_windows(c4, tokenizer).tolist())
look("wikitext2", lambda: list(evaluation.perplexity_tokens("wikitext2", EvalConfig(), tokenizer).shape))
look("c4", lambda: list(evaluation.perplexity_tokens("c4", EvalConfig(), tokenizer).shape))
look("measure", measure)
look("no model", lambda: fetch.resolve_model("tests/none"))
look("no revision", lambda: str(fetch.resolve_model("tests/tiny", "other")))
look("pickled", lambda: fetch.resolve_model("tests/pickled"))
look("no split", lambda: calibration.calibration_windows(CalibrationConfig(dataset="wikitext2"), tokenizer))
print(json.dumps(found))
"""


def client(folder: Path, **environment: str) -> tuple[dict[str, object], str]:
    """Run CLIENT with a hub's cache and a drotator cache in `folder`; give what it found and its stderr."""
    caches = {"HF_HOME": str(folder / "hub"), "DROTATOR_CACHE": str(folder / "drotator"), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    finished = subprocess.run(
        [sys.executable, "-c", CLIENT],
        env={**inherited, **caches, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1]), finished.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address of a hub that has the real data sets, tests/tiny, and tests/pickled without safetensors."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("tiny", "pickled"):
        folder = root / "models" / "tests" / name
        tiny_llama(max_position_embeddings=2048).save_pretrained(folder)
        byte_tokenizer(bos=True).save_pretrained(folder)
        (folder / "modeling.py").write_text("raise RuntimeError")
        (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with serving(root) as address:
        yield address


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def online(served, caches):
    return client(caches, HF_ENDPOINT=served)


def test_a_model_comes_from_the_hub_without_code_and_second_copies(online):
    found, _ = online
    assert found["fetch"] is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])
    assert not {"modeling.py", "consolidated.safetensors"} & set(found["files"])


def test_calibration_and_evaluation_text_come_from_the_hub(online):
    found, _ = online
    assert [len(window) for window in found["windows"]] == [128] * 3
    rows = 4358  # of together 1305088 - 4 * rows bytes; one token is a byte
    assert found["wikitext2"] == [(1305088 - 4 * rows + len("\n\n") * (rows - 1) + len([BOS])) // 2048, 2048]
    assert found["c4"] == [256, 2048]


def test_a_model_from_the_hub_is_measured_on_everything_and_the_libraries_keep_quiet(online):
    found, stderr = online
    tasks = ["piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"]
    assert set(found["measure"]) == {
        "wikitext2", "c4", "zero_shot_mean", *tasks, *(f"{task}_acc" for task in tasks)
    }  # fmt: skip
    assert all(value in (0, 50, 100) for name, value in found["measure"].items() if name in tasks)
    assert found["measure"]["wikitext2"] > 100
    assert stderr == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no model", "tests/none is neither a folder here nor on the hub (http://127.0.0.1:"),
        ("pickled", "model.path=tests/pickled has no *.safetensors. Pickled weights (*.bin, *.pt) are not read"),
        ("no split", "data set wikitext2 (train): cannot read Salesforce/wikitext from the hub"),
    ],
)
def test_what_the_hub_lacks_is_said_in_one_line(online, name, message):
    found, _ = online
    assert message in found[name]
    assert "\n" not in found[name]


def test_what_was_fetched_serves_offline_and_gives_the_same(online, served, caches):
    found, _ = client(caches, HF_ENDPOINT=served, HF_HUB_OFFLINE="1")
    for name in ("fetch", "files", "windows", "wikitext2", "c4", "measure"):
        assert found[name] == online[0][name]
    assert "tests/none is not in the hub's cache" in found["no model"]


@pytest.mark.parametrize("name", ["fetch", "windows", "wikitext2"])
def test_without_the_hubs_files_offline_is_said_in_one_line_with_what_to_do(served, tmp_path, name):
    found, stderr = client(tmp_path, HF_ENDPOINT=served, HF_HUB_OFFLINE="1", LOOK=name)
    assert "HF_HUB_OFFLINE is set. Run `drotator fetch` with the same options" in found[name]
    assert "\n" not in found[name]
    assert stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fetch", "windows", "wikitext2"])
def test_a_hub_that_does_not_answer_is_said_in_one_line_with_what_to_do(tmp_path, name):
    found, stderr = client(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", LOOK=name)
    assert "Check the network; for use without one, run `drotator fetch`" in found[name]
    assert "\n" not in found[name]
    assert stderr == ""
