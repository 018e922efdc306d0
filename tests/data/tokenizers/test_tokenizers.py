"""Bytes as tokens, trained tokenizers, and what a config may call one."""

import json
from pathlib import Path

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_ext.data import ByteTokenizer, TextDataLoader, resolve_tokenizer, vocabulary_size
from titan_ext.data.tokenizers.bpe import BOS, EOS, train_tokenizer
from titan_ext.errors import UserError

TEXT = "Ein Text, noch ein Text – und 漢字 dazu.\n\n\tindented 1234  \U0001f600"


@pytest.fixture
def trained(tmp_path: Path, texts: list[str]) -> Path:
    """A folder with a tokenizer of 300 tokens."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    assert train_tokenizer([*texts, TEXT * 5], 300, folder) == 300
    return folder


def test_bytes() -> None:
    tokenizer = ByteTokenizer.Config().build(tokenizer_path="")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.encode("a", add_bos=True, add_eos=True) == [256, 97, 257]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.get_vocab_size() == 259
    assert tokenizer.decode(tokenizer.encode(TEXT, add_bos=True, add_eos=True)) == TEXT
    assert tokenizer.decode([97, 0xC3, 258, 98]) == "a\ufffdb"
    assert tokenizer.encode("\ud800") == [63]


def test_a_trained_tokenizer_is_torchtitans(trained: Path) -> None:
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(trained))
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.get_vocab_size() == 300
    tokens = tokenizer.encode(TEXT, add_bos=True, add_eos=True)
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(tokens) == TEXT
    assert len(tokens) < len(TEXT.encode())
    assert tokenizer.encode("", add_bos=True, add_eos=True) == [tokenizer.bos_id, tokenizer.eos_id]
    unseen = "ωμέγα \x00\x01"
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen


def test_training_is_deterministic(tmp_path: Path, texts: list[str], trained: Path) -> None:
    train_tokenizer([*texts, TEXT * 5], 300, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_a_trained_tokenizer_feeds_the_loader(trained: Path, lines: Path, texts: list[str]) -> None:
    config, folder = resolve_tokenizer(str(trained))
    tokenizer = config.build(tokenizer_path=folder)
    loader = TextDataLoader.Config(dataset=str(lines), shuffle=False).build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=64, local_batch_size=1
    )
    inputs, labels = next(iter(loader))
    tokens = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    assert inputs["input"][0].tolist() == [token for document in tokens for token in document[:-1]][:64]
    assert labels[0].tolist() == [token for document in tokens for token in document[1:]][:64]
    assert int(inputs["input"].max()) < vocabulary_size(str(trained))


def test_names_of_tokenizers(trained: Path) -> None:
    config, folder = resolve_tokenizer("byte")
    assert isinstance(config, ByteTokenizer.Config) and folder == "" and vocabulary_size("byte") == 259
    for spec in (str(trained), str(trained / "tokenizer.json")):
        config, folder = resolve_tokenizer(spec)
        assert isinstance(config, HuggingFaceTokenizer.Config) and folder == str(trained)
        assert vocabulary_size(spec) == 300


def test_a_vocabulary_with_holes_counts_its_highest_token(trained: Path) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<|far|>"})
    (trained / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(trained))
    assert vocabulary_size(str(trained)) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", ["'byte'"]),
        ("bytes", ["no such folder", "did you mean 'byte'?"]),
        ("nowhere", ["no such folder", "tokenizer.json"]),
        ("bare", ["has no tokenizer.json", "titan-ext data tokenizer"]),
        ("bare/other.json", ["not a tokenizer.json"]),
        ("broken", ["cannot read its tokenizer.json"]),
        ("config", ["cannot read its tokenizer.json"]),
    ],
)
def test_bad_tokenizers(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, spec: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bare", "broken", "config"):
        Path(name).mkdir()
    Path("bare/other.json").write_text("{}")
    Path("broken/tokenizer.json").write_text("{")
    Path("config/tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    Path("config/tokenizer_config.json").write_text("{")
    for use in (resolve_tokenizer, vocabulary_size):
        with pytest.raises(UserError) as raised:
            use(spec)
        assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)
