"""The tokenizer of a site's own vocabulary."""

from pathlib import Path

import pytest
import torch

from tests.data.corpora.sources import write_lines
from tests.data.tokenizers.vocabularies import save_vocabulary, train_bpe, write_words
from titan_ext.data import ByteTokenizer, TextDataLoader, TrimmedTokenizer, resolve_tokenizer, vocabulary_size
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.errors import UserError


@pytest.fixture(params=["byte", "bpe"])
def spec(request: pytest.FixtureRequest, tmp_path: Path, texts: list[str]) -> str:
    """A tokenizer without an unknown token of its own."""
    return "byte" if request.param == "byte" else str(train_bpe(tmp_path / "bpe", texts))


def trim(spec: str, folder: Path, texts: list[str]) -> TrimmedTokenizer:
    save_vocabulary(folder / "v.json", spec, texts)
    return build_tokenizer(spec, str(folder / "v.json"))


def test_remap_and_back_is_the_identity_on_the_vocabulary(spec: str, tmp_path: Path, texts: list[str]) -> None:
    base, trimmed = build_tokenizer(spec), trim(spec, tmp_path, texts)
    ids = trimmed.vocabulary.ids
    for text in texts:
        local = trimmed.encode(text, add_bos=True, add_eos=True)
        assert ids[local].tolist() == base.encode(text, add_bos=True, add_eos=True)
        assert local[0] == trimmed.bos_id and local[-1] == trimmed.eos_id
        assert trimmed.decode(local) == base.decode(ids[local].tolist())
    assert ids[trimmed.bos_id] == base.bos_id and ids[trimmed.eos_id] == base.eos_id
    assert trimmed.get_vocab_size() == len(ids) + 1 < base.get_vocab_size()


def test_unknown_tokens_have_a_row(tmp_path: Path) -> None:
    trimmed = trim("byte", tmp_path, ["abc"])
    assert trimmed.unknown_id == 6 and trimmed.get_vocab_size() == 7
    assert (trimmed.bos_id, trimmed.eos_id, trimmed.pad_id) == (3, 4, 5)
    assert trimmed.encode("axxcb", add_bos=True) == [3, 0, 6, 6, 2, 1]
    assert trimmed.encode("z") == [6]
    assert trimmed.decode([3, 0, 6, 63, 2, 1, 4]) == "a\ufffd\ufffdcb"
    assert trimmed.encode("") == [] and trimmed.decode([]) == ""


def test_the_bases_own_unknown_token_is_used(tmp_path: Path) -> None:
    spec = str(write_words(tmp_path / "words", ["a", "b", "c", "<unk>"], unk_token="<unk>"))
    trimmed = trim(spec, tmp_path, ["c a"])
    assert trimmed.vocabulary.ids.tolist() == [0, 2, 3] and trimmed.get_vocab_size() == 3
    assert trimmed.encode("a b c never") == [0, 2, 1, 2] and trimmed.unknown_id == 2
    # What the base does not know itself is one of its tokens, not one that the site lacks.
    assert trimmed.pad_id is None and trimmed.bos_id is None and trimmed.eos_id is None


def test_a_vocabulary_of_every_token_is_the_base(tmp_path: Path) -> None:
    spec = str(write_words(tmp_path / "words", ["a", "b"]))
    trimmed = trim(spec, tmp_path, ["b a"])
    assert trimmed.unknown_id is None and trimmed.get_vocab_size() == 2 == vocabulary_size(spec)
    assert trimmed.encode("a b b") == build_tokenizer(spec).encode("a b b")


def test_names_resolve_to_trimmed_tokenizers(spec: str, tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "v.json"
    vocabulary = save_vocabulary(path, spec, texts[:3])
    config, folder = resolve_tokenizer(spec, str(path))
    assert isinstance(config, TrimmedTokenizer.Config) and folder == ("" if spec == "byte" else spec)
    assert config.build(tokenizer_path=folder).get_vocab_size() == len(vocabulary) + 1
    assert vocabulary_size(spec, str(path)) == len(vocabulary) + 1 and vocabulary_size(spec) == vocabulary.total


@pytest.mark.parametrize("use", [resolve_tokenizer, vocabulary_size, build_tokenizer])
def test_a_vocabulary_of_another_tokenizer_is_refused(use: object, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    save_vocabulary(path, str(write_words(tmp_path / "words", ["a", "b"])), ["a"])
    with pytest.raises(UserError, match="another tokenizer"):
        use("byte", str(path))
    with pytest.raises(UserError, match="cannot be read"):
        use("byte", str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match="another tokenizer"):
        TrimmedTokenizer.Config(base=ByteTokenizer.Config(), vocabulary_path=str(path)).build(tokenizer_path="")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_trimmed_tokenizer_feeds_the_loader(spec: str, workers: int, tmp_path: Path, texts: list[str]) -> None:
    lines = write_lines(tmp_path / "corpus.jsonl", texts)
    trimmed = trim(spec, tmp_path, texts)
    config = TextDataLoader.Config(dataset=str(lines), num_workers=workers)

    def batches(tokenizer: object) -> list[torch.Tensor]:
        loader = iter(config.build(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=32, local_batch_size=2))
        return [torch.stack([inputs["input"], labels]) for inputs, labels in (next(loader) for _ in range(5))]

    for local, whole in zip(batches(trimmed), batches(build_tokenizer(spec)), strict=True):
        assert torch.equal(trimmed.vocabulary.ids[local], whole)
