"""The loader over ranks, workers, splits and sites."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tests.data.corpora.sources import build_loader, documents_in, flat, write_lines
from titan_ext.data import ByteTokenizer, TextDataLoader
from titan_ext.data.dataset import PackedTextDataset
from titan_ext.data.loader import open_feed
from titan_ext.errors import UserError


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_finite_pass_gives_every_rank_as_many_batches_and_no_text_twice(
    lines: Path, texts: list[str], world: int
) -> None:
    ranks = [list(build_loader(lines, rank=rank, world=world, seq_len=16, infinite=False)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [flat(row) for batches in ranks for batch in batches for row in _rows(batch)]
    assert len({tuple(inputs) for inputs, _, _ in rows}) == len(rows)
    tokens = sum(len(text.encode()) + 1 for text in texts)
    assert tokens - 16 * 2 * world < 16 * len(rows) <= tokens


def _rows(batch: tuple) -> list[tuple]:
    inputs, labels = batch
    return [({key: value[row] for key, value in inputs.items()}, labels[row]) for row in range(len(labels))]


@pytest.mark.parametrize("workers", [1, 2])
def test_ranks_and_workers_read_disjoint_parts(lines: Path, texts: list[str], workers: int) -> None:
    longest = 400
    found: list[str] = []
    for rank in range(2):
        loader = build_loader(lines, rank=rank, world=2, seq_len=longest, batch=1, num_workers=workers)
        found += documents_in(islice(loader, workers))
    assert len(found) > 10 and max(Counter(found).values()) == 1 and set(found) <= set(texts)


def test_workers_give_what_the_main_process_gives(lines: Path) -> None:
    alone = islice(build_loader(lines, num_workers=0), 20)
    worker = islice(build_loader(lines, num_workers=1), 20)
    assert [flat(batch) for batch in alone] == [flat(batch) for batch in worker]


def test_sites_that_share_a_corpus_read_disjoint_parts(lines: Path, texts: list[str]) -> None:
    def site(index: int) -> set[str]:
        loader = build_loader(lines, seq_len=256, batch=1, share_index=index, share_count=2)
        return set(documents_in(islice(loader, 20)))

    first, second = site(0), site(1)
    assert not first & second and first <= set(texts[0::2]) and second <= set(texts[1::2])


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_validation_holds_what_training_never_reads(tmp_path: Path, texts: list[str], prefix: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "x.jsonl", texts)

    def read(split: str, seed: int) -> set[str]:
        settings = {"split": split, "holdout_fraction": 0.3, "infinite": False, "seed": seed}
        return set(documents_in(build_loader(f"{prefix}{folder}", seq_len=8, batch=1, **settings)))

    train, validation = read("train", seed=1), read("validation", seed=2)
    assert not train & validation
    assert len(train) > 20 and len(validation) > 5
    assert len(train | validation) >= len(texts) - 2, "a pass may lose its last incomplete sequence"


def test_an_endless_loader_never_ends_on_a_small_corpus(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["one short document", "and another"])
    assert len(list(islice(build_loader(path, seq_len=8, batch=1), 50))) == 50


@pytest.mark.parametrize("infinite", [True, False])
def test_too_little_text_for_a_batch_is_refused_at_once(lines: Path, infinite: bool) -> None:
    with pytest.raises(UserError, match="too little text for one batch: [0-9]+ tokens of the 80000"):
        build_loader(lines, seq_len=40000, batch=2, infinite=infinite)


def test_fewer_documents_than_readers_are_refused_on_every_rank(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a long enough document " * 20] * 3)
    for rank in range(4):
        with pytest.raises(UserError, match="3 documents .* cannot be dealt to 4 readers"):
            build_loader(path, rank=rank, world=4)
    with pytest.raises(UserError, match="1 documents .*part 1 of 2.* cannot be dealt to 2 readers"):
        build_loader(path, world=2, share_index=1, share_count=2)


def test_a_dataset_without_any_text_does_not_turn_for_ever(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["", "", ""])
    feed = open_feed(TextDataLoader.Config(dataset=str(path)))
    with pytest.raises(UserError, match="no text for reader 0 of 1"):
        next(iter(PackedTextDataset(feed, ByteTokenizer(), seq_len=8)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_line_far_in_the_corpus_is_one_line_of_error(tmp_path: Path, workers: int) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["good text here"] * 20)
    with open(path, "a") as file:
        file.write('{"text": "cut of\n')
    loader = build_loader(path, seq_len=8, batch=1, shuffle=False, num_workers=workers)
    with pytest.raises(UserError, match="document 21: not a line of JSON") as raised:
        list(islice(loader, 60))
    assert "\n" not in str(raised.value)


def test_torchtitans_validator_can_replace_the_config(lines: Path) -> None:
    from dataclasses import replace

    config = TextDataLoader.Config(dataset=str(lines), holdout_fraction=0.2, split="validation", infinite=False)
    endless = replace(config, infinite=True).build(
        dp_world_size=1, dp_rank=0, tokenizer=ByteTokenizer(), seq_len=16, local_batch_size=1
    )
    assert len(list(islice(endless, 100))) == 100
    assert 1 < len(list(build_loader(lines, seq_len=16, holdout_fraction=0.2, split="validation", infinite=False))) < 50
