from __future__ import annotations

import logging

import pytest
from datasets import Dataset
from tqdm import tqdm

from drotator.quiet import silent_libraries


def test_bars_are_hidden_inside_even_where_a_library_asks_for_them_and_are_back_outside(capsys):
    with silent_libraries():
        list(tqdm(range(3), desc="inside", disable=False))
        Dataset.from_list([{"a": 1}]).map(lambda row: row, desc="inside")
    assert capsys.readouterr().err == ""
    list(tqdm(range(3), desc="outside"))
    assert "outside" in capsys.readouterr().err


def test_log_levels_and_bars_are_as_before_even_after_an_error():
    logger = logging.getLogger("lm_eval")
    before = logger.level, tqdm.__init__

    def fail():
        with silent_libraries():
            assert not logging.getLogger("lm_eval.models").isEnabledFor(logging.WARNING)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (logger.level, tqdm.__init__) == before


def test_of_two_threads_the_last_to_leave_brings_bars_back():
    before = tqdm.__init__
    first, second = silent_libraries(), silent_libraries()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tqdm.__init__ is not before
    second.__exit__(None, None, None)
    assert tqdm.__init__ is before
