"""A resume on other documents, another order or another tokenizer is refused by name, or goes on and says so."""

import json
import os
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.corpora.sources import PACKERS, documents_in, flat
from tests.data.tokenizers.vocabularies import save_vocabulary, train_bpe
from titan_ext.data import TextDataLoader, open_corpus
from titan_ext.data.corpora import fingerprint
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.errors import UserError

TEXTS = [f"A{n:03} " + "alpha " * 9 for n in range(40)]
OTHERS = [f"B{n:03} " + "gamma " * 9 for n in range(40)]


def write(path: Path, texts: list[str], kind: str = "jsonl") -> Path:
    """A folder of one kind of files with the documents."""
    path.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in texts)
    if kind == "jsonl":
        (path / "a.jsonl").write_text(lines)
    elif kind == "packed":
        (path / "a.jsonl.zst").write_bytes(PACKERS["zst"](lines.encode()))
    elif kind == "json":
        (path / "a.json").write_text(json.dumps([json.loads(line) for line in lines.splitlines()]))
    elif kind == "csv":
        (path / "a.csv").write_text("text,body\n" + "".join(f"{text},{text[::-1]}\n" for text in texts))
    elif kind == "parquet":
        table = pyarrow.table({"text": texts, "body": [text[::-1] for text in texts]})
        parquet.write_table(table, path / "a.parquet", row_group_size=8)
    elif kind == "arrow":
        table = pyarrow.table({"text": texts, "body": [text[::-1] for text in texts]})
        with pyarrow.ipc.new_file(str(path / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=8)
    else:
        for number, text in enumerate(texts):
            (path / f"{number:02}.txt").write_text(text)
    return path


KINDS = ["jsonl", "packed", "json", "csv", "parquet", "arrow", "text"]


def loader(data: object, tokenizer: str = "byte", vocabulary: str = "", **config: Any) -> TextDataLoader:
    return TextDataLoader.Config(dataset=str(data), **config).build(
        dp_world_size=1, dp_rank=0, tokenizer=build_tokenizer(tokenizer, vocabulary), seq_len=32, local_batch_size=2
    )


def state_after(batches: int, *given: Any, **config: Any) -> dict[str, Any]:
    begun = loader(*given, **config)
    list(islice(begun, batches))
    return begun.state_dict()


def refusal(state: dict[str, Any], *given: Any, **config: Any) -> str:
    with pytest.raises(UserError) as raised:
        loader(*given, **config).load_state_dict(state)
    message = str(raised.value)
    assert "\n" not in message and "data.on_changed_data = 'continue'" in message and "exclude_from_loading" in message
    return message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [OTHERS, TEXTS[::-1], [*TEXTS[:39], TEXTS[39].replace("alpha", "alphe")]])
def test_other_documents_or_another_order(tmp_path: Path, kind: str, texts: list[str]) -> None:
    state = state_after(3, write(tmp_path / "data", TEXTS, kind))
    loader(write(tmp_path / "data", TEXTS, kind)).load_state_dict(state)
    message = refusal(state, write(tmp_path / "data", texts, kind))
    assert "content (the documents and their order) was" in message and "documents was" not in message


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "text"])
def test_another_key(tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "data", TEXTS, kind)
    assert "text_key was 'text', is 'body'" in refusal(state_after(3, data), data, text_key="body")


def test_a_key_that_says_nothing_of_text_files_may_change(tmp_path: Path) -> None:
    data = write(tmp_path / "data", TEXTS, "text")
    loader(data, text_key="body").load_state_dict(state_after(3, data))


def test_files_that_change_places(tmp_path: Path) -> None:
    data = write(tmp_path / "data", TEXTS[:20])
    (data / "b.jsonl").write_text((write(tmp_path / "more", TEXTS[20:]) / "a.jsonl").read_text())
    state = state_after(3, data)
    (data / "a.jsonl").rename(data / "c.jsonl")
    assert "content" in refusal(state, data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_documents_elsewhere_go_on_and_are_noted(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    begun = loader(write(tmp_path / "here", TEXTS, kind))
    list(islice(begun, 5))
    again = loader(write(tmp_path / "there" / "deep", TEXTS, kind))
    again.load_state_dict(begun.state_dict())
    assert [flat(batch) for batch in islice(again, 4)] == [flat(batch) for batch in islice(begun, 9)][:4]
    assert "dataset was" in caplog.text and "the same documents, elsewhere" in caplog.text


def test_other_documents_elsewhere(tmp_path: Path) -> None:
    state = state_after(3, write(tmp_path / "here", TEXTS))
    message = refusal(state, write(tmp_path / "there", OTHERS))
    assert "dataset was" in message and "content" in message


def test_what_is_not_read_may_come_and_go(tmp_path: Path) -> None:
    data = write(tmp_path / "data", TEXTS)
    state = state_after(3, data)
    for name in ("README.md", "empty.jsonl", "picture.png"):
        (data / name).write_text("" if name.startswith("empty") else "# x")
    (data / "a.jsonl").touch()
    loader(data).load_state_dict(state)


def test_another_tokenizer_of_the_same_size(tmp_path: Path) -> None:
    data = write(tmp_path / "data", TEXTS)
    first, second = train_bpe(tmp_path / "first", TEXTS, 262), train_bpe(tmp_path / "second", OTHERS, 262)
    state = state_after(3, data, str(first))
    loader(data, str(first)).load_state_dict(state)
    message = refusal(state, data, str(second))
    assert "tokenizer (its file) was" in message and "vocabulary" not in message
    assert "tokenizer" in refusal(state, data, "byte")


def test_other_marks(tmp_path: Path) -> None:
    data, folder = write(tmp_path / "data", TEXTS), train_bpe(tmp_path / "bpe", TEXTS, 262)
    state = state_after(3, data, str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    assert "marks was [0, 1], is [0, None]" in refusal(state, data, str(folder))


def test_another_part_of_the_vocabulary(tmp_path: Path) -> None:
    data = write(tmp_path / "data", TEXTS)
    for name, texts in (("first", ["abc"]), ("second", ["xyz"])):
        save_vocabulary(tmp_path / f"{name}.json", "byte", texts)
    state = state_after(3, data, "byte", str(tmp_path / "first.json"))
    loader(data, "byte", str(tmp_path / "first.json")).load_state_dict(state)
    assert "tokenizer" in refusal(state, data, "byte", str(tmp_path / "second.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: write(path, OTHERS), "content"),
        (lambda path: write(path, [*TEXTS, *OTHERS]), "documents was 40, is 80"),
        (lambda path: write(path, TEXTS[:3]), "documents was 40, is 3"),
    ],
)
def test_going_on_all_the_same(
    tmp_path: Path, change: Callable[[Path], Path], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_after(20, write(tmp_path / "data", TEXTS))
    again = loader(change(tmp_path / "data"), on_changed_data="continue")
    again.load_state_dict(state)
    assert said in caplog.text and "going on all the same (data.on_changed_data)" in caplog.text
    assert documents_in(islice(again, 30))
    place = pickle.loads(pickle.loads(state["ranks"])["dp_rank_0"])["dataset_state"]["place"]
    assert place >= 15


def test_going_on_with_another_tokenizer_keeps_the_document(tmp_path: Path) -> None:
    data, bpe = write(tmp_path / "data", TEXTS), train_bpe(tmp_path / "bpe", TEXTS, 262)
    state = state_after(10, data, shuffle=False)
    again = loader(data, str(bpe), shuffle=False, on_changed_data="continue")
    again.load_state_dict(state)
    list(islice(again, 1))
    before, now = (
        pickle.loads(pickle.loads(each["ranks"])["dp_rank_0"])["dataset_state"]["place"]
        for each in (state, again.state_dict())
    )
    assert before <= now <= before + 6


def test_a_stream_of_other_files(tmp_path: Path) -> None:
    state = state_after(3, f"hf:{write(tmp_path / 'data', TEXTS)}")
    loader(f"hf:{tmp_path / 'data'}").load_state_dict(state)
    write(tmp_path / "data", OTHERS)
    for action in ("error", "continue"):
        with pytest.raises(UserError, match="content .* was .*exclude_from_loading"):
            loader(f"hf:{tmp_path / 'data'}", on_changed_data=action).load_state_dict(state)


def test_a_state_from_before_there_were_fingerprints(tmp_path: Path) -> None:
    data = write(tmp_path / "data", TEXTS)
    state = state_after(5, data)
    settings = {
        key: value
        for key, value in json.loads(state["settings"]).items()
        if key not in ("dataset", "content", "text_key", "tokenizer", "marks")
    }
    assert settings["split"] == "all"
    again, now = loader(data), loader(data)
    again.load_state_dict(state | {"settings": json.dumps(settings)})
    now.load_state_dict(state)
    assert flat(next(iter(again))) == flat(next(iter(now)))


@pytest.mark.parametrize("place", [0, 100_000, 3_000_000, 5_999_000])
def test_a_corpus_too_large_to_be_read_whole_is_known_by_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 1 << 21)
    content = bytearray(os.urandom(3_000_000).hex().encode())
    (tmp_path / "a.txt").write_bytes(content[:2_000_000])
    (tmp_path / "b.txt").write_bytes(content[2_000_000:])
    before = open_corpus(str(tmp_path)).fingerprint()
    assert open_corpus(str(tmp_path)).fingerprint() == before
    path, within = (tmp_path / "a.txt", place) if place < 2_000_000 else (tmp_path / "b.txt", place - 2_000_000)
    changed = bytearray(path.read_bytes())
    changed[within : within + 300_000] = bytes(b ^ 1 for b in changed[within : within + 300_000])
    path.write_bytes(changed)
    assert open_corpus(str(tmp_path)).fingerprint() != before


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_change_under_a_run(tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "data", TEXTS, kind)
    running = iter(loader(data, shuffle_buffer=4))
    next(running)
    write(data, [text + " changed" for text in OTHERS], kind)
    if kind in ("packed", "csv"):
        assert "A0" in "".join(documents_in(islice(running, 30))), "what is read is a copy"
        return
    with pytest.raises(UserError, match="has changed since this run began to read it"):
        list(islice(running, 60))
