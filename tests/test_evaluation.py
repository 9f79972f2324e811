from __future__ import annotations

import copy
import math
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from tiny_text import byte_tokenizer, embedded_data_in_cache, tiny_llama, words

from drotator import evaluation
from drotator.config import EvalConfig


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def settings(**changes):
    given = {"source": "embedded", "perplexity": ["passages"], "tasks": [], "seqlen": 32, "batch_size": 2, **changes}
    return EvalConfig(**given)


def perplexity_in_float64(model, windows):
    """One token at a time, in float64, as the papers define it."""
    model = copy.deepcopy(model).double()
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0]
        steps = [-torch.log_softmax(logits[i], dim=-1)[window[i + 1]].item() for i in range(len(window) - 1)]
        losses.append(sum(steps) / len(steps))
    return math.exp(sum(losses) / len(losses))


def random_windows(count=5, seqlen=24):
    return torch.randint(0, 258, (count, seqlen), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_perplexity_is_the_papers_whatever_the_batch_size(batch_size):
    expected = perplexity_in_float64(tiny_llama(), random_windows())
    assert evaluation.perplexity(tiny_llama(), random_windows(), batch_size) == pytest.approx(expected, rel=1e-5)


def test_perplexity_in_pieces_is_the_same(monkeypatch):
    whole = evaluation.perplexity(tiny_llama(), random_windows(), 5)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 1)
    monkeypatch.setattr(evaluation, "LOSS_TOKENS", 7)
    assert evaluation.perplexity(tiny_llama(), random_windows(), 5) == pytest.approx(whole, rel=1e-6)


def test_the_loss_of_a_bfloat16_model_is_summed_in_higher_precision():
    model = tiny_llama().bfloat16()
    logits = model(random_windows()).logits.double()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), random_windows()[:, 1:], reduction="none"
    )
    expected = math.exp(losses.mean().item())
    assert evaluation.perplexity(model, random_windows(), 5) == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_window():
    model = tiny_llama()
    windows = random_windows().clamp(min=1)
    windows[3, 5] = 0
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="perplexity on c4: the loss of window 3 is nan"):
        evaluation.perplexity(model, windows, 2, "perplexity on c4")


def test_windows_longer_than_the_models_context_are_refused():
    with pytest.raises(ValueError, match=r"eval\.seqlen=300 is more than the 256 positions of the model"):
        evaluation.perplexity(tiny_llama(), random_windows(seqlen=300), 2)


@pytest.fixture
def data(tmp_path):
    squad = [(f"Title {i % 6}", words(100 * i)) for i in range(12)]
    return embedded_data_in_cache(squad, [words(5000 + 100 * i) for i in range(8)], tmp_path)


@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_the_text_in_order_without_overlap_with_one_bos_and_without_the_rest(data, bos):
    tokenizer = byte_tokenizer(bos=bos)
    windows = evaluation.perplexity_tokens("passages", settings(), tokenizer)
    tokens = tokenizer("\n\n".join(evaluation.passages("evaluation"))).input_ids
    assert windows.dtype == torch.int64
    assert windows.shape == (len(tokens) // 32, 32)
    assert windows.flatten().tolist() == tokens[: windows.numel()]
    assert (windows == 0).sum() == bos


def test_the_number_of_windows_can_be_capped(data):
    tokenizer = byte_tokenizer()
    every = evaluation.perplexity_tokens("passages", settings(), tokenizer)
    assert torch.equal(evaluation.perplexity_tokens("passages", settings(windows=3), tokenizer), every[:3])


def test_c4_is_its_first_1100_documents_joined_by_a_space_and_at_most_256_windows(monkeypatch):
    documents = [f"document {i}" for i in range(1200)]
    monkeypatch.setattr(evaluation, "c4_documents", lambda split: (documents, "commit"))
    windows = evaluation.perplexity_tokens("c4", settings(seqlen=40), byte_tokenizer())
    assert windows.shape == (256, 40)
    assert byte_tokenizer().decode(windows.flatten()) == " ".join(documents)[: 256 * 40]
    everything = evaluation.perplexity_tokens("c4", settings(seqlen=100), byte_tokenizer())
    assert len(everything) == len(" ".join(documents[:1100])) // 100


def test_text_shorter_than_one_window_is_refused_with_both_counts(data):
    with pytest.raises(ValueError, match=r"passages has \d+ tokens, fewer than eval\.seqlen=99999\. Lower"):
        evaluation.perplexity_tokens("passages", settings(seqlen=99999), byte_tokenizer())


def log_likelihood(model, tokenizer, context, continuation):
    """Sum of the log-probabilities of the continuation's tokens."""
    tokens = torch.tensor([tokenizer(context + continuation).input_ids])
    count = len(tokenizer(context + continuation).input_ids) - len(tokenizer(context).input_ids)
    scores = torch.log_softmax(model(tokens).logits[0, :-1].double(), dim=-1)
    return sum(scores[i, tokens[0, i + 1]].item() for i in range(tokens.shape[1] - 1 - count, tokens.shape[1] - 1))


@pytest.mark.parametrize("bos", [False, True])
def test_zero_shot_accuracies_are_those_of_the_prompts_scored_by_hand(data, bos, capfd):
    tokenizer, model = byte_tokenizer(bos=bos), tiny_llama(seed=3)
    metrics = evaluation.zero_shot(model, tokenizer, settings(tasks=["piqa", "winogrande"]), seed=0)
    hits = {"acc": 0, "acc_norm": 0, "winogrande": 0}
    for i in range(6):
        choices = [f"do {i}", f"do not do {i} at all"]
        scores = [log_likelihood(model, tokenizer, f"Question: goal {i}\nAnswer:", f" {choice}") for choice in choices]
        lengths = [len(choice) for choice in choices]
        hits["acc"] += int((scores[1] > scores[0]) == i % 2)
        hits["acc_norm"] += int((scores[1] / lengths[1] > scores[0] / lengths[0]) == i % 2)
    for i in range(4):
        bob, clarissa = (
            log_likelihood(model, tokenizer, f"Ann saw {name}", f" on day {i}.") for name in ("Bob", "Clarissa")
        )
        hits["winogrande"] += int(bob > clarissa)
    assert metrics["piqa"] == pytest.approx(100 * hits["acc_norm"] / 6)
    assert metrics["piqa_acc"] == pytest.approx(100 * hits["acc"] / 6)
    assert metrics["winogrande"] == metrics["winogrande_acc"] == pytest.approx(100 * hits["winogrande"] / 4)
    assert metrics["zero_shot_mean"] == pytest.approx((metrics["piqa"] + metrics["winogrande"]) / 2)
    assert tokenizer.pad_token is None
    assert capfd.readouterr().err == ""


def test_evaluate_gives_perplexities_accuracies_and_their_mean_and_respects_the_limit(data, monkeypatch):
    asked = []
    original = evaluation._Reader.loglikelihood
    monkeypatch.setattr(
        evaluation._Reader,
        "loglikelihood",
        lambda reader, requests: asked.append(len(requests)) or original(reader, requests),
    )
    metrics = evaluation.evaluate(tiny_llama(), byte_tokenizer(), settings(tasks=["piqa"], limit=2, windows=4), seed=0)
    assert set(metrics) == {"passages", "piqa", "piqa_acc", "zero_shot_mean"}
    assert asked == [4]
    windows = evaluation.perplexity_tokens("passages", settings(windows=4), byte_tokenizer())
    assert metrics["passages"] == pytest.approx(perplexity_in_float64(tiny_llama(), windows), rel=1e-5)


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("embedded", "boolq", "boolq is not in the embedded data, which has piqa, winogrande"),
        pytest.param("hub", "piqua", r"lm-eval has no task piqua\. Did you mean piqa", marks=pytest.mark.slow),
    ],
)
def test_a_task_that_is_not_there_is_refused_before_the_work_with_what_there_is(source, task, message):
    with pytest.raises(ValueError, match=message):
        evaluation.prepare(settings(source=source, perplexity=[], tasks=[task]), byte_tokenizer())


def test_the_five_tasks_are_where_we_look_for_them_in_the_installed_lm_eval():
    folder = Path(lm_eval.tasks.__file__).parent
    for name, file in evaluation.TASK_FILES.items():
        content = (folder / file).read_text(encoding="utf-8")
        assert f"task: {name}\n" in content


def test_provenance_tells_what_decides_the_numbers(data):
    described = evaluation.provenance(settings(tasks=["piqa"], limit=2, windows=4), byte_tokenizer(bos=True))
    assert [described[name] for name in ("seqlen", "batch_size", "bos", "tasks_limit")] == [32, 2, True, 2]
    assert described["windows"] == {"passages": 4}
    other = evaluation.provenance(settings(windows=3), byte_tokenizer(bos=True))
    assert described["evaluation_tokens"] != other["evaluation_tokens"]
