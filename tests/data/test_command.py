"""``titan-ext data show`` and ``titan-ext data tokenizer``, as a person calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_disk import room_for
from titan_ext.cli import main, run
from titan_ext.errors import UserError


def call(*arguments: str) -> int:
    return run(["data", *arguments])


def test_show(lines: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "--corpus", str(lines), "--documents", "40", "--width", "1000") == 0
    out = capsys.readouterr().out
    assert "documents  40" in out and f"stored     {lines.stat().st_size - 40:,} bytes" in out
    size = sum(len(text.encode()) for text in texts)
    assert f"40 documents with text, {size:,} bytes" in out
    assert f"{size + 80:,} of 'byte' (259 in its vocabulary)" in out
    assert all(text in out for text in texts)


def test_a_tokenizer_is_trained_shown_and_not_overwritten(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "tokenizer"
    train = ("tokenizer", "--corpus", str(lines), "--vocab-size", "280", "--out", str(out))
    assert call(*train) == 0
    assert "280 tokens" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    with pytest.raises(UserError, match="--force"):
        call(*train)
    assert call(*train, "--force") == 0
    assert call("show", "--corpus", str(lines), "--tokenizer", str(out)) == 0
    assert "280 in its vocabulary" in capsys.readouterr().out


def test_a_full_disk_leaves_no_half_tokenizer(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokenizer"
    with room_for(1000):
        code = main(["data", "tokenizer", "--corpus", str(lines), "--vocab-size", "280", "--out", str(out)])
    assert code == 1
    assert f"--out '{out}': cannot be written: File too large; make room on its disk" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["tokenizer_config.json"]


def test_text_that_yields_fewer_tokens_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("ab ab ab")
    assert call("tokenizer", "--corpus", str(tmp_path), "--vocab-size", "5000", "--out", str(tmp_path / "out")) == 0
    assert "not 5000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tokenizer", "--vocab-size", "258", "--out", "x"), "at least 259"),
        (("tokenizer", "--vocab-size", "300", "--out", "taken"), "cannot make the folder"),
        (("show", "--tokenizer", "nowhere"), "no such folder"),
        (("show", "--text-key", "body"), "no key 'body'"),
    ],
)
def test_bad_arguments(lines: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str) -> None:
    monkeypatch.chdir(lines.parent)
    Path("taken").write_text("a file")
    with pytest.raises(UserError, match=words):
        call(*arguments, "--corpus", str(lines))


def test_reading_the_command_does_not_wait_for_torch() -> None:
    code = "import sys, titan_ext.commands.data; sys.exit('torch' in sys.modules or 'torchtitan' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
