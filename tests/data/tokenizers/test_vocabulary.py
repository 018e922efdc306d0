"""Finding a site's vocabulary, keeping it, and finding it once for all ranks."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.data.corpora.sources import write_lines
from tests.data.tokenizers.vocabularies import same, save_vocabulary, train_bpe, write_words
from titan_ext.data import ByteTokenizer, TextDataLoader, Vocabulary, find_vocabulary, site_vocabulary
from titan_ext.data.loader import open_feed
from titan_ext.data.tokenizers.bpe import BOS, EOS, PAD
from titan_ext.data.tokenizers.counting import count_tokens
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.errors import UserError


@pytest.fixture
def bpe(tmp_path: Path, texts: list[str]) -> Path:
    return train_bpe(tmp_path / "bpe", texts)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_ids_are_those_that_occur_and_the_special_ones(name: str, bpe: Path, texts: list[str]) -> None:
    tokenizer = build_tokenizer(name if name == "byte" else str(bpe))
    found = find_vocabulary(texts[:5], tokenizer)
    counts = Counter(token for text in texts[:5] for token in tokenizer.encode(text, add_bos=True, add_eos=True))
    special = {256, 257, 258} if name == "byte" else {tokenizer.token_to_id(mark) for mark in (BOS, EOS, PAD)}
    assert found.ids.tolist() == sorted(counts.keys() | special) and found.ids.dtype == torch.int64
    assert found.total == tokenizer.get_vocab_size() == len(found.counts) > len(found)
    assert {token: count for token, count in enumerate(found.counts.tolist()) if count} == counts
    file = bpe / "tokenizer.json"
    assert found.tokenizer == ("byte" if name == "byte" else hashlib.sha256(file.read_bytes()).hexdigest())


def test_the_order_of_documents_does_not_matter(bpe: Path, texts: list[str]) -> None:
    tokenizer = build_tokenizer(str(bpe))
    assert same(find_vocabulary(texts, tokenizer), find_vocabulary(reversed(texts), tokenizer))


def test_documents_of_many_batches_are_counted_as_one_by_one(
    bpe: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer(str(bpe))
    whole = count_tokens(texts, tokenizer)
    monkeypatch.setattr("titan_ext.data.tokenizers.counting._BATCH_CHARACTERS", 100)
    assert torch.equal(count_tokens(texts, tokenizer), whole)


def test_a_tokenizer_that_pads_and_marks_by_itself_is_counted_as_the_loader_reads_it(
    bpe: Path, texts: list[str]
) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": PAD,
    }
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
    for settings in (content, {**content, "padding": None}):
        (bpe / "tokenizer.json").write_text(json.dumps(settings))
        tokenizer = build_tokenizer(str(bpe))
        counts = Counter(token for text in texts for token in tokenizer.encode(text, add_bos=True, add_eos=True))
        assert counts[0] == counts[1] == len(texts) and counts[2] == 0
        found = count_tokens(texts, tokenizer).tolist()
        assert {token: count for token, count in enumerate(found) if count} == +counts


def test_rare_tokens_are_left_out_but_counted() -> None:
    found = find_vocabulary(["aab"], ByteTokenizer(), min_count=2)
    assert found.ids.tolist() == [97, 256, 257, 258] and found.counts[98] == 1
    assert found.share_outside(found.counts) == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="min_count"):
        find_vocabulary(["a"], ByteTokenizer(), min_count=0)


def test_the_tokenizers_own_unknown_token_is_special(tmp_path: Path) -> None:
    words = build_tokenizer(str(write_words(tmp_path / "words", ["a", "b", "c", "<unk>"], unk_token="<unk>")))
    assert find_vocabulary(["b b"], words).ids.tolist() == [1, 3]


def test_a_feeds_training_documents_alone_are_read(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", ["", *(chr(48 + n) * 3 for n in range(40))])
    config = TextDataLoader.Config(dataset=str(corpus), split="train", holdout_fraction=0.25)
    found = find_vocabulary(open_feed(config), ByteTokenizer())
    read = {ord(each.text[0]) for each in open_feed(config).read(0, None, 0, 1) if each.text}
    assert set(found.ids.tolist()) == read | {256, 257, 258} and len(read) < 40
    # The marks too: a document without text has none.
    assert found.counts[256] == found.counts[257] == len(read)


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_ext.data.corpora.reading._EVERY", 4)
    lines: list[str] = []
    find_vocabulary(["abc", "def", "ghi"], ByteTokenizer(), progress=lines.append)
    assert [line.split(",")[0] for line in lines] == ["read 2 documents", "read 3 documents"]


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_text_is_an_error(documents: list[str]) -> None:
    with pytest.raises(UserError, match="no document holds any text"):
        find_vocabulary(documents, ByteTokenizer())


def test_remap_and_back_is_the_identity(texts: list[str]) -> None:
    found = find_vocabulary(texts, ByteTokenizer())
    local = found.local_ids()
    assert torch.equal(found.ids[local[found.ids]], found.ids)
    assert torch.equal(local[found.ids], torch.arange(len(found)))
    assert int((local < 0).sum()) == found.total - len(found)
    rows = found.row_ids(128)
    assert torch.equal(rows[: len(found)], found.ids) and bool((rows[len(found) :] == -1).all()) and len(rows) == 128
    with pytest.raises(ValueError, match="too small"):
        found.row_ids(len(found) - 1)


def test_save_and_load(tmp_path: Path, bpe: Path, texts: list[str]) -> None:
    path = tmp_path / "new" / "folder" / "vocabulary.json"
    saved = save_vocabulary(path, str(bpe), texts[:9], min_count=3)
    assert same(Vocabulary.load(path), saved)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("not json", "not a vocabulary file"),
        ([], "no JSON object"),
        ({"ids": None}, "ids is not a list of whole numbers"),
        ({"ids": [1.5]}, "ids is not a list of whole numbers"),
        ({"ids": [3, 2]}, "ascending"),
        ({"ids": [2, 2]}, "ascending"),
        ({"ids": [259]}, "from 0 to 258"),
        ({"ids": [-1]}, "from 0 to 258"),
        ({"seen": [259], "counts": [1]}, "out of"),
        ({"seen": [1], "counts": [-1]}, "none negative"),
        ({"seen": [1, 2, 3], "counts": [1, 2]}, "not a vocabulary file"),
        ({"total": "many"}, "not a vocabulary file"),
    ],
)
def test_bad_files(tmp_path: Path, change: object, words: str) -> None:
    path = tmp_path / "v.json"
    save_vocabulary(path, "byte", ["abc"])
    content = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps({**content, **change} if change else change))
    with pytest.raises(UserError, match=words) as raised:
        Vocabulary.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_no_file_and_no_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Vocabulary.load(tmp_path / "nowhere.json")
    (tmp_path / "v.json").write_text("{}")
    with pytest.raises(UserError, match="no key 'ids'"):
        Vocabulary.load(tmp_path / "v.json")
    (tmp_path / "file").write_text("")
    for use in (save_vocabulary, lambda path, *_: site_vocabulary(path, lambda: None, tokenizer=ByteTokenizer())):
        with pytest.raises(UserError, match="cannot be written"):
            use(tmp_path / "file" / "v.json", "byte", ["abc"])


def test_a_file_is_found_once_and_used_again(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "site" / "v.json", ByteTokenizer()
    found = site_vocabulary(path, lambda: find_vocabulary(["abc"], tokenizer), tokenizer=tokenizer)
    again = site_vocabulary(path, lambda: pytest.fail("read again"), tokenizer=tokenizer)
    assert same(found, again)


def test_a_file_of_another_tokenizer_is_refused(tmp_path: Path, bpe: Path) -> None:
    path, other = tmp_path / "v.json", build_tokenizer(str(bpe))
    save_vocabulary(path, "byte", ["abc"])
    with pytest.raises(UserError, match="another tokenizer.*byte, 259 ids") as raised:
        site_vocabulary(path, lambda: pytest.fail("read"), tokenizer=other)
    assert str(path) in str(raised.value)


def test_a_file_without_special_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    save_vocabulary(path, "byte", ["abc"])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"ids": [97, 98, 256, 257]}))
    with pytest.raises(UserError, match=r"lacks special tokens of the tokenizer: \[258\]"):
        site_vocabulary(path, lambda: pytest.fail("read"), tokenizer=ByteTokenizer())


def _find_slowly(path: Path, log: Path, die: bool) -> None:
    tokenizer = ByteTokenizer()

    def find() -> Vocabulary:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        while die:
            time.sleep(1)
        time.sleep(0.2)
        return find_vocabulary(["abc"], tokenizer)

    assert len(site_vocabulary(path, find, tokenizer=tokenizer)) == 6


def test_of_processes_that_start_together_one_reads_the_corpus(tmp_path: Path) -> None:
    log = tmp_path / "log"
    forked = multiprocessing.get_context("fork")
    racers = [forked.Process(target=_find_slowly, args=(tmp_path / "v.json", log, False)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert len(log.read_text().splitlines()) == 1


def test_another_process_takes_over_from_one_that_dies(tmp_path: Path) -> None:
    log, forked = tmp_path / "log", multiprocessing.get_context("fork")
    log.touch()
    holder = forked.Process(target=_find_slowly, args=(tmp_path / "v.json", log, True))
    holder.start()
    while not log.read_text():
        time.sleep(0.01)
    heir = forked.Process(target=_find_slowly, args=(tmp_path / "v.json", log, False))
    heir.start()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    heir.join()
    assert heir.exitcode == 0
    assert log.read_text().splitlines() == [str(holder.pid), str(heir.pid)]
