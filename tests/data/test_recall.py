"""The recall task: its documents, the rows that they fill, and the distances of its answers."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from data.answers import AnswersOnly, distances
from data.config import BytesTokenizer, SyntheticData, TokenizerConfig
from data.corpus import load_corpus
from data.packing import pack, training_rows
from data.recall import FILLER, KEYS, MARKER, VALUES, write_document, write_recall

MARKER_ID = 1 + ord(MARKER)


def test_every_key_is_told_once_and_half_are_asked_once_with_the_same_value():
    for seed, length in enumerate((8, 9, 16, 17, 64, 257, 4096)):
        text = write_document(random.Random(seed), length, 12)
        assert len(text) == length - 1
        body, *asked = text.split(MARKER)
        told = re.findall(r"[A-Za-z][0-9]", body)
        assert body.replace(FILLER, "") == "".join(told), "pairs do not overlap"
        assert len(told) == len({key for key, _ in told}) == min(12, length // 4)
        assert len(asked) == len(set(asked)) == min(12, length // 4) // 2
        assert set(asked) <= set(told)


def test_a_character_is_of_one_kind():
    kinds = KEYS + VALUES + MARKER + FILLER
    assert len(set(kinds)) == len(kinds)
    assert kinds.isascii(), "a byte each, so that it is one token"


@pytest.mark.parametrize("length", [256, 1000, 4096])
def test_documents_fill_the_length_and_are_of_every_power_of_2_below_it(length):
    sizes = set()
    for number in range(20):
        texts = write_recall(random.Random(number), length, 8, number, progress=0.75)
        assert sum(len(text) + 1 for text in texts) == length
        sizes |= {len(text) + 1 for text in texts}
    assert sizes == {
        size for size in (length >> halvings for halvings in range(20)) if size >= 8 and length % size == 0
    }


def test_training_begins_with_the_shortest_documents_and_has_all_at_the_end():
    def sizes(progress: float) -> set[int]:
        return {
            len(text) + 1 for number in range(12) for text in write_recall(random.Random(0), 512, 8, number, progress)
        }

    assert [len(sizes(progress)) for progress in (0, 0.25, 0.35, 0.5, 0.75, 1.0)] == [1, 1, 2, 4, 7, 7]
    assert sizes(0.35) == {8, 16}


def test_distances_spread_over_the_row_with_as_many_answers_for_each_power_of_2():
    texts = [write_document(random.Random(seed), 2**14, 16) for seed in range(80)]
    tokens = np.array([[0, *(1 + byte for byte in text.encode())] for text in texts])
    found = distances(tokens, _answers(tokens))
    assert len(found) == 80 * 8
    assert found.max() > 0.9 * 2**14
    counts = np.histogram(found, 2.0 ** np.arange(5, 15))[0]
    assert counts.min() > 0.5 * counts.mean()
    assert counts.sum() > 0.9 * len(found)


def _answers(tokens_BS: np.ndarray) -> np.ndarray:
    targets_BS = np.full_like(tokens_BS, -100)
    rows, markers = np.nonzero(tokens_BS == MARKER_ID)
    targets_BS[rows, markers + 1] = tokens_BS[rows, markers + 2]
    return targets_BS


def test_a_distance_is_from_the_question_back_to_the_last_place_of_its_key():
    tokens = np.array([[0, 5, 9, 5, 8, 1, 5, 8, 1], [0, 6, 1, 2, 3, 4, 5, 6, 7]])
    targets = np.full((2, 9), -100)
    targets[0, 6], targets[1, 7] = 8, 7
    assert distances(tokens, targets).tolist() == [3, 6]


def rows_of(tmp_path, **settings):
    config = SyntheticData(task="recall", cache_dir=str(tmp_path), val_fraction=0.25, **settings)
    corpus = load_corpus(config, BytesTokenizer(), lambda line: None)
    return corpus, [
        AnswersOnly(rows, MARKER_ID) for rows in (training_rows(corpus, 256, True), pack(corpus, "val", 256, True))
    ]


def test_rows_are_whole_documents_whose_only_targets_are_answers(tmp_path):
    corpus, (train, val) = rows_of(tmp_path, documents=12, length=256)
    assert (len(train), len(val)) == (8, 2)  # 9 and 3, of which the last has no token after it
    assert all(np.array_equal(train.at(seed, 8 + 3).tokens, train[3].tokens) for seed in range(3)), "in their own order"
    for row in [*(train.at(0, position) for position in range(8)), *(val[index] for index in range(2))]:
        text = corpus.tokenizer.decode(row.tokens)
        questions = list(re.finditer(r"\?(.)(.)", text.replace("<|endoftext|>", "\n")))
        expected = np.full(256, -100)
        for question in questions:
            if question.end() <= 256:
                expected[question.start() + 1] = 1 + ord(question[2])
        assert row.targets.tolist() == expected.tolist()
        assert row.tokens[0] == corpus.tokenizer.separator_id, "no document is cut"
        lengths = np.diff(np.append(np.unique(row.starts), 256))
        assert len(questions) == sum(min(8, length // 4) // 2 for length in lengths)
        found = distances(row.tokens[None], row.targets[None])
        assert found.max() < lengths.max()


def test_the_same_seed_gives_the_same_rows_and_another_one_others(tmp_path):
    (_, (first, _)), (_, (again, _)), (_, (other, _)) = (
        rows_of(tmp_path / name, documents=6, length=256, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    tokens = [[rows.at(3, position).tokens.tolist() for position in range(4)] for rows in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_rows_and_tokenizers_that_cannot_hold_the_task_are_refused():
    config = SyntheticData(task="recall", length=512)
    config.check_rows(1024, BytesTokenizer())
    with pytest.raises(ValueError, match=r"data\.length=512 does not divide seq_len=768.*set data\.length=768"):
        config.check_rows(768, BytesTokenizer())
    with pytest.raises(ValueError, match=r"data\.task=recall asks for single bytes: set tokenizer=bytes, not bpe"):
        config.check_rows(512, TokenizerConfig())
    SyntheticData(task="needle", length=512).check_rows(768, TokenizerConfig())
