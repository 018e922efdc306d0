"""Every token of a batch can be found again in its file and document, whoever reads it."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpora.sources import BOS, EOS, build_loader, write_lines
from titan_ext.data import TextDataLoader


def identified(loader: TextDataLoader, count: int) -> list[Any]:
    loader.identify_tokens()
    return list(islice(loader, count))


def two_files(folder: Path, texts: list[str]) -> list[list[str]]:
    halves = [texts[:25], texts[25:]]
    for name, half in zip("ab", halves):
        write_lines(folder / f"{name}.jsonl", half)
    return halves


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("infinite", [True, False])
def test_each_token_stands_at_its_place_in_its_document(
    tmp_path: Path, texts: list[str], world: int, workers: int, infinite: bool
) -> None:
    halves = two_files(tmp_path, texts)
    every = [[BOS, *text.encode(), EOS] for text in texts]
    for rank in range(world):
        loader = build_loader(tmp_path, rank=rank, world=world, num_workers=workers, infinite=infinite)
        for inputs, labels in identified(loader, 6):
            assert inputs["identity"].shape == (2, 32, 3)
            tokens = zip(
                inputs["input"].flatten().tolist(), labels.flatten().tolist(), inputs["identity"].view(-1, 3).tolist()
            )
            for token, label, (source, document, place) in tokens:
                assert (token, label) == (every[document][place], every[document][place + 1])
                assert texts[document] in halves[source]


def test_tokens_keep_their_identity_over_a_resume(lines: Path) -> None:
    whole = identified(build_loader(lines), 6)
    first = build_loader(lines)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    resumed = build_loader(lines)
    resumed.load_state_dict(first.state_dict())
    for (expected, _), (found, _) in zip(whole[3:], identified(resumed, 3)):
        assert found["identity"].equal(expected["identity"])


def test_without_a_call_batches_are_torchtitans(lines: Path) -> None:
    assert sorted(next(iter(build_loader(lines)))[0]) == ["input", "positions"]
