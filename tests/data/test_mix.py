"""Corpora in their shares: exact by tokens, changed at a step, resumed exactly, whoever reads."""

import json
import math
from pathlib import Path

import pytest
import torch

from titan_ext.data import ByteTokenizer, TextDataLoader
from titan_ext.data.mix import MixChange, Turns
from titan_ext.data.packing import IDENTITY
from titan_ext.errors import UserError

LETTERS = {"wiki": "w", "code": "c", "mail": "m"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for place, (name, letter) in enumerate(LETTERS.items()):
        texts = [f"{letter}{number:03d}" * (5 + 2 * number % 15) for number in range(50 + 20 * place)]
        path = folder / f"{name}.jsonl"
        if name == "mail":  # a folder of files
            (folder / name).mkdir()
            path = folder / name / "first.jsonl"
            (folder / name / "second.jsonl").write_text(json.dumps({"text": "m" * 50}) + "\n")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def build(corpora: Path, mix: dict[str, float], reader: int = 0, readers: int = 1, rows: int = 2, **settings):
    config = TextDataLoader.Config(dataset=str(corpora), mix=mix, **settings)
    return config.build(
        dp_world_size=readers, dp_rank=reader, tokenizer=ByteTokenizer(), seq_len=32, local_batch_size=rows
    )


def letters(batch: tuple) -> list[str]:
    """For each sequence the corpus that all of its letters are of."""
    found = []
    for row in batch[0]["input"].tolist():
        text = bytes(each for each in row if each < 256).decode()
        (letter,) = {each for each in text if each.isalpha()}
        found.append(letter)
    return found


def take(loader, steps: int, first: int = 1, batches_a_step: int = 1) -> list[list[str]]:
    stream, found = iter(loader), []
    for step in range(first, first + steps):
        loader.before_step(step)
        found.append([letter for _ in range(batches_a_step) for letter in letters(next(stream))])
    return found


def test_turns_are_never_a_whole_one_from_their_shares() -> None:
    shares = {"a": 0.55, "b": 0.3, "c": 0.15, "d": 0.0}
    turns, counts = Turns(list(shares)), dict.fromkeys(shares, 0)
    for number in range(1, 1001):
        counts[turns.next(shares)] += 1
        assert all(abs(counts[name] - number * share) < 1 + 1e-9 for name, share in shares.items())
    assert counts["d"] == 0


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_tokens_have_their_shares_at_the_site_and_each_reader_its_own(corpora: Path, readers: int) -> None:
    mix = {"wiki": 7, "code": 2, "mail": 1}
    loaders = [build(corpora, mix, reader, readers) for reader in range(readers)]
    streams = [iter(loader) for loader in loaders]
    batches = [[next(stream) for stream in streams] for _ in range(30)]
    seen = [letter for group in batches for batch in group for letter in letters(batch)]
    for name, share in mix.items():
        assert abs(seen.count(LETTERS[name]) - len(seen) * share / 10) <= readers
    lines = [tuple(row) for group in batches[:5] for batch in group for row in batch[0]["input"].tolist()]
    assert len(set(lines)) > 0.8 * len(lines), "readers have different text"


def test_shares_change_at_their_step_and_not_before(corpora: Path) -> None:
    changes = [MixChange(step=3, mix={"code": 1.0}), MixChange(step=5, mix={"wiki": 0.5, "mail": 0.5})]
    found = take(build(corpora, {"wiki": 1, "code": 0, "mail": 0}, mix_changes=changes), 9, batches_a_step=2)
    assert found[:3] == [["w"] * 4] * 3 and found[3:5] == [["c"] * 4] * 2
    rest = [letter for step in found[5:] for letter in step]
    assert set(rest) == {"w", "m"} and abs(rest.count("w") - 8) <= 1


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_resume_goes_on_with_the_very_next_batch(corpora: Path, stop: int) -> None:
    settings = {"mix": {"wiki": 0.6, "code": 0.4}, "mix_changes": [MixChange(step=4, mix={"mail": 0.0, "code": 1.0})]}
    settings["mix"] |= {"mail": 0.3}

    def stream(loader, first: int, steps: int) -> list[torch.Tensor]:
        batches, found = iter(loader), []
        for step in range(first, first + steps):
            loader.before_step(step)
            found.append(next(batches)[0]["input"])
        return found

    whole = stream(build(corpora, **settings), 1, 10)
    first, second = build(corpora, **settings), build(corpora, **settings)
    before = stream(first, 1, stop)
    state = first.state_dict()
    second.load_state_dict(state)
    assert torch.equal(torch.stack(before + stream(second, stop + 1, 10 - stop)), torch.stack(whole))


def test_a_resume_may_have_other_shares_and_a_new_corpus(corpora: Path) -> None:
    first = build(corpora, {"wiki": 0.5, "code": 0.5})
    take(first, 5)
    second = build(corpora, {"mail": 1.0, "code": 1.0})
    second.load_state_dict(first.state_dict())
    found = [letter for step in take(second, 10, first=6) for letter in step]
    assert abs(found.count("m") - 10) <= 1 and "w" not in found


def test_tokens_say_which_file_of_all_they_come_from(corpora: Path) -> None:
    loader = build(corpora, {"wiki": 1, "mail": 1})
    loader.identify_tokens()
    names = [(each.partition("/")[0], each.rpartition("/")[2]) for each in loader.feed.sources]
    assert names == [("wiki", "wiki.jsonl"), ("mail", "first.jsonl"), ("mail", "second.jsonl")]
    stream = iter(loader)
    for batch in (next(stream) for _ in range(6)):
        for letter, source in zip(letters(batch), batch[0][IDENTITY][..., 0].tolist(), strict=True):
            assert set(source) <= ({0} if letter == "w" else {1, 2})
    texts = [document.text[0] for document, _ in zip(loader.feed.read(0, None, 0, 1), range(4))]
    assert texts == ["w", "m", "w", "m"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mix": {"wikki": 1.0}}, "'wikki' must be one file or folder.*it has: "),
        ({"mix": {"wiki": -1.0}}, "data.mix.*at least 0.*wiki is -1"),
        ({"mix": {"wiki": math.inf}}, "data.mix.*finite.*wiki is inf"),
        ({"mix": {"wiki": 0.0}}, "shares that are not all 0"),
        ({"mix": {"wiki": 1.0}, "infinite": False}, "data.infinite"),
        ({"mix": {"wiki": 1.0}, "num_workers": 1}, "data.num_workers"),
        ({"mix": {"wiki": 1.0}, "mix_changes": [MixChange(step=2, mix={"code": 1.0})]}, r"mix_changes\[0\].mix.*code"),
        ({"mix": {"wiki": 1.0}, "mix_changes": [MixChange(step=0, mix={"wiki": 1.0})]}, r"mix_changes\[0\].step"),
        ({"mix": {"wiki": 1.0}, "mix_changes": [MixChange(step=2)]}, r"mix_changes\[0\].mix.*a table of shares"),
        ({"mix_changes": [MixChange(step=2, mix={})]}, "data.mix_changes.*left out without mix"),
    ],
)
def test_shares_that_cannot_be_are_refused(corpora: Path, settings: dict, words: str) -> None:
    config = TextDataLoader.Config(dataset=str(corpora), **settings)
    with pytest.raises(UserError, match=words):
        config.validate()


def test_a_state_without_a_mix_is_refused(corpora: Path) -> None:
    plain = build(corpora / "mail", {})
    next(iter(plain))
    with pytest.raises(UserError, match="without a mix"):
        build(corpora, {"wiki": 1.0}).load_state_dict(plain.state_dict())
