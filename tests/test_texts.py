from __future__ import annotations

import pytest
from tiny_text import byte_tokenizer, embedded_data_in_cache, words

from drotator import texts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))


def both_parts() -> tuple[list[str], list[str]]:
    return texts.passages("calibration"), texts.passages("evaluation")


def test_passages_of_one_article_are_all_in_one_part_and_no_passage_is_in_both_or_twice(tmp_path):
    squad = [(f"Title {i % 4}", words(100 * i)) for i in range(40)]
    boolq = [words(10_000 + 100 * i) for i in range(40)]
    embedded_data_in_cache(squad, boolq + boolq[:5] + [squad[0][1]], tmp_path)
    calibration, evaluation = both_parts()
    assert sorted(calibration + evaluation) == sorted([passage for _, passage in squad] + boolq)
    for title in {title for title, _ in squad}:
        of_title = {passage for other, passage in squad if other == title}
        assert of_title <= set(calibration) or of_title <= set(evaluation)
    assert min(len(calibration), len(evaluation)) > 15


def test_evaluation_passages_that_repeat_twelve_words_of_a_calibration_passage_are_dropped(tmp_path):
    boolq = [words(100 * i) for i in range(40)]
    embedded_data_in_cache([], boolq, tmp_path / "plain")
    calibration, evaluation = both_parts()
    copied = [f"{words(20_000 + 100 * i)} {calibration[0]}" for i in range(10)]
    (tmp_path / "cache").rename(tmp_path / "old")
    embedded_data_in_cache([], boolq + copied, tmp_path / "copies")
    assert set(texts.passages("evaluation")) == set(evaluation)
    assert len(set(texts.passages("calibration")) & set(copied)) not in (0, 10)


def test_the_squad_passage_is_cut_out_of_the_prompt_even_if_it_has_lines_and_questions_of_its_own(tmp_path):
    passage = "First line.\nQuestion: asked in the text?\nAnswer: yes. Last line."
    embedded_data_in_cache([("A_title", passage)], [words(0)], tmp_path)
    calibration, evaluation = both_parts()
    assert {*calibration, *evaluation} == {passage, words(0)}


def test_a_text_file_is_one_text_and_a_jsonl_file_is_its_documents_joined(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one\ntwo", encoding="utf-8")
    lines.write_text('{"text": "é one\\u2028", "id": 3}\n\n{"text": "two"}\n', encoding="utf-8")
    assert texts.local_text(str(text)) == "one\ntwo"
    assert texts.local_text(str(lines)) == "é one\u2028\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read .No such file"),
        ("text.csv", b"a,b", "must end in .txt or .jsonl"),
        ("latin.txt", "café".encode("latin-1"), "no UTF-8 text"),
        ("empty.txt", b" \n", "holds no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', 'line 2: expected a JSON object with the field "text"'),
        ("other.jsonl", b'{"body": "a"}', 'line 1: expected a JSON object with the field "text"'),
        ("number.jsonl", b'{"text": 3}', "must be a string, found 3"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_with_its_path_and_the_reason(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        texts.local_text(str(tmp_path / name))
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bos_is_put_once_at_the_start_of_a_text_where_the_tokenizer_does_so():
    assert texts.encode("ab", byte_tokenizer(bos=True))[0] == 0
    assert len(texts.encode("ab", byte_tokenizer(bos=True))) == 3
    assert texts.adds_bos(byte_tokenizer(bos=True))
    assert not texts.adds_bos(byte_tokenizer())


def test_the_fingerprint_tells_tokenizers_apart_and_is_the_same_for_the_same_rules():
    assert texts.tokenizer_fingerprint(byte_tokenizer()) == texts.tokenizer_fingerprint(byte_tokenizer())
    assert texts.tokenizer_fingerprint(byte_tokenizer()) != texts.tokenizer_fingerprint(byte_tokenizer(bos=True))
