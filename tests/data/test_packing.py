"""Packing against plain loops, and against torchtitan's own dataset."""

from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.data.corpora.sources import BOS, EOS, build_loader, documents_in, flat
from titan_ext.data import ByteTokenizer
from titan_ext.data.packing import Cursor, pack


def reference(documents: list[list[int]], seq_len: int) -> list[tuple[list[int], list[int], list[int]]]:
    """One token at a time: its label is the next of its document, its position counts from the later of
    the document's start and the sequence's."""
    sequences, inputs, labels, positions = [], [], [], []
    for tokens in documents:
        position = 0
        for token, label in zip(tokens, tokens[1:]):
            inputs.append(token)
            labels.append(label)
            positions.append(position)
            position += 1
            if len(inputs) == seq_len:
                sequences.append((inputs, labels, positions))
                inputs, labels, positions = [], [], []
                position = 0
    return sequences


def packed(documents: list[list[int]], seq_len: int) -> list[tuple[list[int], list[int], list[int]]]:
    numbered = ((0, place, np.array(tokens, np.int64)) for place, tokens in enumerate(documents))
    return [flat(sample) for _, sample in pack(numbered, seq_len)]


def encoded(texts: list[str]) -> list[list[int]]:
    return [[BOS, *text.encode(), EOS] for text in texts]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 32, 100, 1000])
def test_packing_equals_plain_loops(texts: list[str], seq_len: int) -> None:
    sequences = packed(encoded(texts), seq_len)
    assert sequences == reference(encoded(texts), seq_len)
    assert all(0 <= position < seq_len for _, _, positions in sequences for position in positions)


def test_conventions_where_documents_meet() -> None:
    first, second = packed([[BOS, 1, 2, EOS], [BOS, 3, 4, 5, 6, 7, EOS]], seq_len=4)
    assert first == ([BOS, 1, 2, BOS], [1, 2, EOS, 3], [0, 1, 2, 0])
    assert second == ([3, 4, 5, 6], [4, 5, 6, 7], [0, 1, 2, 3])


def test_documents_without_a_next_token_are_passed_over() -> None:
    assert packed([[], [9], [1, 2, 3], [9], [4, 5]], seq_len=3) == [([1, 2, 4], [2, 3, 5], [0, 1, 0])]


def test_the_cursor_is_a_place_and_an_offset() -> None:
    documents = [(0, "a", np.arange(4)), (0, "b", np.arange(10, 20))]
    assert [cursor for cursor, _ in pack(documents, 3)] == [
        Cursor(0, "a", 3),
        Cursor(0, "b", 3),
        Cursor(0, "b", 6),
        Cursor(0, "b", 9),
    ]
    again = [flat(sample) for _, sample in pack(documents[1:], 3, skip=3)]
    assert again == [flat(sample) for _, sample in pack(documents, 3)][2:]


def test_the_loader_equals_torchtitans_dataset_on_the_same_documents(
    lines: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

    known = DatasetConfig(
        path="memory",
        loader=lambda path: datasets.Dataset.from_dict({"text": texts}),
        sample_processor=lambda sample: sample["text"],
    )
    monkeypatch.setitem(DATASETS, "ours", known)
    theirs = HuggingFaceTextDataset("ours", None, ByteTokenizer(), seq_len=32)
    ours = build_loader(lines, batch=1, shuffle=False, infinite=False)
    expected = [flat(sample) for sample in theirs]
    assert len(expected) > 50
    assert [flat(batch) for batch in ours] == expected


def test_batches_have_the_shapes_that_the_trainer_expects(lines: Path) -> None:
    inputs, labels = next(iter(build_loader(lines, seq_len=16, batch=3)))
    assert sorted(inputs) == ["input", "positions"]
    assert {(tensor.shape, str(tensor.dtype)) for tensor in (*inputs.values(), labels)} == {((3, 16), "torch.int64")}


def test_shuffled_epochs_hold_every_document_once(lines: Path, texts: list[str]) -> None:
    whole = sum(len(document) - 1 for document in encoded(texts))
    loader = build_loader(lines, seq_len=whole, batch=1)
    epochs = [documents_in([batch]) for batch in islice(loader, 3)]
    assert all(Counter(found) == Counter(texts) for found in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != texts


def test_empty_documents_take_no_token(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": ""}\n{"text": "abc"}\n{"text": null}\n')
    loader = build_loader(path, seq_len=4, batch=1)
    assert flat(next(iter(loader)))[0] == [BOS, *b"abc"]
