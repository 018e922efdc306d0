"""``titan-ext data vocab``, as a person calls it."""

import json
from pathlib import Path

import pytest

from tests.data.corpora.sources import write_lines
from tests.data.test_command import call
from tests.data.tokenizers.vocabularies import train_bpe
from titan_ext.data import Vocabulary
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.errors import UserError

OWN_TABLES = """\
[[semi_sync.scopes]]
name = "tables"
parameters = ["tok_embeddings.*", "lm_head.*"]
shared = "local"
"""
RUN = """
[model]
name = "llama3"
flavor = "tiny"
vocab_size = 600
{model}
[training]
seq_len = 16
[semi_sync]
method = "diloco"
{tables}
[[site]]
name = "east"
data = {{ dataset = "east.jsonl", split = "train", holdout_fraction = 0.25 }}
tokenizer = "byte"
[[site]]
name = "west"
data = "west.jsonl"
tokenizer = "bpe"
"""


@pytest.fixture
def file(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sites: one of bytes that holds documents out, one of a BPE tokenizer that does not."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "east.jsonl", [*(chr(48 + n) for n in range(40))])
    write_lines(tmp_path / "west.jsonl", texts[:4])
    train_bpe(tmp_path / "bpe", texts, 600)
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(model="", tables=OWN_TABLES))
    return path


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    out = capsys.readouterr().out
    return {each["site"]: each for each in json.loads(out.splitlines()[-1])["sites"]}


def test_sites_of_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("vocab", str(file), "--out", "vocabularies") == 0
    printed = capsys.readouterr()
    assert "site" in printed.out and "none, no document is held out" in printed.out
    assert "east: read 30 documents" in printed.err and "east: read 10 documents" in printed.err
    east, west = json.loads(printed.out.splitlines()[-1])["sites"]

    # 30 documents of one byte each and the three marks; every held-out document is one unknown byte and two marks.
    assert (east["vocabulary"], east["global_vocabulary"], east["rows"], east["global_rows"]) == (33, 259, 64, 320)
    assert east["tokens"] == 90 and east["coverage"] == 1.0 and east["share"] == pytest.approx(33 / 259)
    assert east["held_out_tokens"] == 30 and east["out_of_vocabulary"] == pytest.approx(1 / 3)
    # The tiny model is 96 wide, and its head is a table of its own.
    assert east["parameters_saved"] == (320 - 64) * 96 * 2
    assert east["memory_bytes_saved"] == 16 * east["parameters_saved"]
    assert east["round_bytes_saved"] == 4 * (320 - 33) * 96 * 2

    assert west["held_out"] is west["out_of_vocabulary"] is west["held_out_tokens"] is None
    for report in (east, west):
        saved = Vocabulary.load(f"vocabularies/{report['site']}.json")
        assert len(saved) == report["vocabulary"] and int(saved.counts.sum()) == report["tokens"]
    Vocabulary.load("vocabularies/west.json").check(build_tokenizer("bpe"), "")


def test_tied_tables_are_counted_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(RUN.format(model="enable_weight_tying = true", tables=OWN_TABLES))
    assert call("vocab", str(file), "--site", "east", "--json") == 0
    assert last_line(capsys)["east"]["parameters_saved"] == (320 - 64) * 96


def test_a_runs_validation_data_is_its_validation_split(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(Path("valid.jsonl"), ["00z"])
    file.write_text(file.read_text() + '[validator]\nenable = true\n[validator.dataloader]\ndataset = "valid.jsonl"\n')
    assert call("vocab", str(file), "--site", "west", "--json") == 0
    west = last_line(capsys)["west"]
    assert west["held_out"] == "valid.jsonl" and west["held_out_tokens"] > 2


def test_one_site_as_json_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("vocab", str(file), "--site", "west", "--json") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and [each["site"] for each in json.loads(out)["sites"]] == ["west"]


def test_what_a_first_start_would_find(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a variant that trims, before any site has started; nothing is written that was not asked for."""
    before = sorted(file.parent.rglob("*"))
    file.write_text('[dept]\nvariant = "trim"\n' + RUN.format(model="", tables=""))
    assert call("vocab", str(file)) == 0
    assert last_line(capsys).keys() == {"east", "west"}
    assert sorted(file.parent.rglob("*")) == before


def test_a_corpus_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, out = write_lines(tmp_path / "c.jsonl", ["aab"], key="body"), str(tmp_path)
    flags = ("--corpus", str(corpus), "--text-key", "body", "--tokenizer", "byte", "--out", out)
    assert call("vocab", *flags, "--site", "south", "--min-count", "2") == 0
    south = last_line(capsys)["south"]
    assert south["vocabulary"] == 4 and south["coverage"] == pytest.approx(4 / 5)
    assert south["parameters_saved"] is south["memory_bytes_saved"] is south["round_bytes_saved"] is None
    assert Vocabulary.load(tmp_path / "south.json").ids.tolist() == [97, 256, 257, 258]
    with pytest.raises(UserError, match="--force"):
        call("vocab", *flags, "--site", "south")
    assert call("vocab", *flags, "--site", "south", "--force") == 0
    assert len(Vocabulary.load(tmp_path / "south.json")) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either FILE.toml or --corpus"),
        (("run.toml", "--corpus", "x"), "either FILE.toml or --corpus"),
        (("run.toml", "--tokenizer", "byte"), "only with --corpus"),
        (("run.toml", "--site", "north"), "north"),
        (("--corpus", "east.jsonl"), "--tokenizer is missing"),
        (("--corpus", "east.jsonl", "--tokenizer", "nowhere"), "no such folder"),
        (("--corpus", "nowhere", "--tokenizer", "byte"), "nowhere"),
        (("--corpus", "east.jsonl", "--tokenizer", "byte", "--site", "a/b"), "must be a name"),
        (("--corpus", "east.jsonl", "--tokenizer", "byte", "--min-count", "0"), "--min-count 0"),
        (("--corpus", "east.jsonl", "--tokenizer", "byte", "--out", "run.toml"), "cannot be written"),
    ],
)
def test_bad_arguments(file: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        call("vocab", *arguments)
    assert "\n" not in str(raised.value)
