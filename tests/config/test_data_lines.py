"""What ``check`` and ``launch`` say of a site's data and tokenizer before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.conftest import GOOD
from tests.data.tokenizers.vocabularies import train_bpe
from titan_ext.cli import main, run
from titan_ext.commands import launch as command
from titan_ext.config import load_run


@pytest.fixture
def corpus(write: Callable) -> Path:
    """The data of the site alpha: one file that is read, three that are not."""
    write(GOOD.replace("builtin:code", "corpus"))
    folder = Path("corpus")
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": "text"}) + "\n")
    for name in ("a.png", "b.png", "README.md"):
        (folder / name).write_text("x")
    return folder


def test_check_says_what_is_read_and_what_is_not(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "demo.toml"]) == 0
    out = capsys.readouterr().out
    assert "alpha: data corpus: reads 1 .jsonl; not read: 2 .png, README.md (a dataset card)" in out
    assert "beta: data builtin:docs: " in out
    assert main(["check", "demo.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["data"][0].startswith("alpha: data corpus: reads 1 .jsonl")


@pytest.mark.parametrize(
    ("spec", "said"), [("corpus", ""), ("texts", "not looked for"), ("builtin:code", "not looked for")]
)
def test_a_key_of_texts_that_nothing_has_is_said(spec: str, said: str, corpus: Path) -> None:
    Path("texts").mkdir()
    Path("texts", "one.txt").write_text("text")
    flags = [f"--data.dataset={spec}", "--data.text_key=text"]
    (line,) = load_run("demo.toml", flags).sites[0].data
    assert ("data.text_key = 'text'" in line) == bool(said) and said in line


def test_the_validation_data_has_a_line_of_its_own(corpus: Path) -> None:
    flags = [
        "--validator.enable",
        "true",
        "--validator.dataloader.dataset",
        "corpus/a.jsonl",
        "--validator.dataloader.infinite",
        "false",
    ]
    assert load_run("demo.toml", flags).sites[0].data[1] == "alpha: validator.dataloader corpus/a.jsonl: reads 1 .jsonl"


def launch(*flags: str) -> int:
    return run(["launch", "demo.toml", *flags])


def test_data_that_is_elsewhere_is_no_mistake_of_the_file_but_cannot_be_trained_on(
    write: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(GOOD.replace("builtin:code", "/data/of/alpha"))
    assert main(["check", "demo.toml"]) == 0
    output = capsys.readouterr().out
    assert "1 thing missing on this machine" in output and "alpha: data " not in output
    assert 'data.dataset = "/data/of/alpha": no such file or folder' in output
    monkeypatch.setattr(command, "run_jobs", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(
        ValueError, match='demo.toml: site "alpha": data.dataset = "/data/of/alpha": no such file or folder'
    ):
        launch()


@pytest.mark.parametrize("use", [lambda: main(["check", "demo.toml"]), launch])
def test_data_that_cannot_be_meant_is_refused_before_anything_starts(
    corpus: Path, use: Callable[[], int], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_jobs", lambda *_, **__: pytest.fail("started"))
    (corpus / "a.jsonl.gz").write_bytes(b"x")
    try:
        assert use() == 2
        said = capsys.readouterr().err
    except ValueError as error:
        said = str(error)
    assert 'demo.toml: site "alpha": data.dataset = "corpus": ' in said and "packed and unpacked" in said


def test_launch_says_the_same(corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_jobs", lambda *_, **__: 0)
    assert launch() == 0
    assert "alpha: data corpus: reads 1 .jsonl; not read: 2 .png" in capsys.readouterr().out


def test_notes_on_a_tokenizer(write: Callable, capsys: pytest.CaptureFixture) -> None:
    write()
    folder = train_bpe(Path("bpe"), ["some text"], 262)
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert main(["check", "demo.toml", "--tokenizer", "bpe"]) == 0
    assert "note: tokenizer bpe: it marks no text's end" in capsys.readouterr().out


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_with_the_mark_of_windows(write: Callable, mark: bytes, capsys: pytest.CaptureFixture) -> None:
    path = Path(write())
    path.write_bytes(mark + path.read_bytes())
    assert main(["check", "demo.toml"]) == 0 and "2 site(s)" in capsys.readouterr().out
    assert main(["check", "demo.toml", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["sites"][0]["config"]
    Path("config.json").write_bytes(mark + json.dumps(run).encode())
    assert main(["check", "config.json"]) == 0
