"""Tokenizers as their makers leave them: whatever a folder holds, a text is split whole and its marks are found."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from tests.data.tokenizers.vocabularies import train_bpe
from titan_ext.data import vocabulary_size
from titan_ext.data.tokenizers.bpe import BOS, EOS, PAD
from titan_ext.data.tokenizers.counting import count_tokens
from titan_ext.data.tokenizers.tokenizer import build_tokenizer, resolve_tokenizer, tokenizer_notes
from titan_ext.data.tokenizers.traits import fingerprint
from titan_ext.errors import UserError
from titan_ext.inference.sampling import TextStream

CODE = "def f(x):\n    if x:\n        return  1\n\t\tend\n  \n"
LONG = CODE * 200
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 512},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 2,
    "pad_type_id": 0,
    "pad_token": PAD,
}
MARKS = {"bos_token": BOS, "eos_token": EOS}


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    """A folder with a byte-level BPE tokenizer of 300 tokens."""
    return train_bpe(tmp_path / "tokenizer", [*texts, CODE * 9, "## a ## b " * 9])


def change(folder: Path, name: str = "tokenizer.json", **content: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))


def only(folder: Path, **content: Any) -> None:
    """Leaves nothing in tokenizer_config.json but ``content``."""
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ({"truncation": TRUNCATION}, ["truncation to 8 tokens"]),
        ({"padding": PADDING}, ["padding"]),
        ({"truncation": TRUNCATION, "padding": PADDING | {"strategy": "BatchLongest"}}, ["truncation to 8", "padding"]),
    ],
)
def test_truncation_and_padding_are_off_and_said(folder: Path, content: dict[str, Any], notes: list[str]) -> None:
    expected = build_tokenizer(str(folder)).encode(LONG, add_bos=True, add_eos=True)
    change(folder, **content)
    tokenizer = build_tokenizer(str(folder))
    assert tokenizer.encode(LONG, add_bos=True, add_eos=True) == expected
    short = tokenizer.encode("short", add_bos=True, add_eos=True)
    assert int(count_tokens([LONG, "short"], tokenizer).sum()) == len(expected) + len(short)
    said = tokenizer_notes(str(folder))
    assert len(said) == len(notes) and all(note in each and "is off" in each for note, each in zip(notes, said))


def test_merges_left_out_at_random_are_off_and_said(folder: Path) -> None:
    expected = build_tokenizer(str(folder)).encode(LONG)
    change(folder, model=json.loads((folder / "tokenizer.json").read_text())["model"] | {"dropout": 0.5})
    assert build_tokenizer(str(folder)).encode(LONG) == expected
    assert "dropout of 0.5" in tokenizer_notes(str(folder))[0]


@pytest.mark.parametrize(
    "template",
    [
        [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "x"}],
        {"default": "x"},
        "{% generation %}{{ x }}{% endgeneration %}",
        "{{ unclosed",
        None,
        7,
    ],
)
def test_chat_templates_play_no_part(folder: Path, template: object) -> None:
    expected = build_tokenizer(str(folder)).encode(CODE)
    change(folder, "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff unclosed")
    assert build_tokenizer(str(folder)).encode(CODE) == expected


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ({"special_tokens_map.json": MARKS}, "special_tokens_map.json"),
        (
            {"special_tokens_map.json": {key: {"content": token, "lstrip": False} for key, token in MARKS.items()}},
            "special_tokens_map.json",
        ),
        ({"generation_config.json": {"bos_token_id": 0, "eos_token_id": 1}}, "generation_config.json"),
        ({"generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]}}, "generation_config.json"),
        ({"config.json": {"bos_token_id": 0, "eos_token_id": 1}}, "config.json"),
        (
            {
                "special_tokens_map.json": {"eos_token": "<not in the vocabulary>"},
                "config.json": {"bos_token_id": 0, "eos_token_id": 1},
            },
            "config.json",
        ),
        ({}, "its name"),
    ],
)
def test_marks_are_found_wherever_they_stand(folder: Path, files: dict[str, Any], source: str) -> None:
    for without in (False, True):
        if without:
            (folder / "tokenizer_config.json").unlink()
        else:
            only(folder, model_max_length=1024)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        tokenizer = build_tokenizer(str(folder))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1) and vocabulary_size(str(folder)) == 300
        assert tokenizer.encode("a", add_bos=True, add_eos=True)[-1] == 1
        said = tokenizer_notes(str(folder))
        assert len(said) == 2 and repr(EOS) in said[1] and source in said[1]


def test_marks_of_the_tokenizers_own_configuration_win(folder: Path) -> None:
    only(folder, bos_token=None, eos_token=PAD)
    (folder / "special_tokens_map.json").write_text(json.dumps(MARKS))
    tokenizer = build_tokenizer(str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2) and not tokenizer_notes(str(folder))


@pytest.mark.parametrize("named", ["<|endoftext|>", {"content": "<|endoftext|>", "special": True}])
def test_a_mark_that_is_no_token_yet_is_said(folder: Path, named: Any) -> None:
    only(folder, bos_token=BOS, eos_token=named)
    tokenizer = build_tokenizer(str(folder))
    assert tokenizer.eos_id == 300
    assert [note for note in tokenizer.notes if "'<|endoftext|>', is no token of it yet and becomes one" in note]
    only(folder, bos_token=BOS, eos_token=EOS)
    assert not build_tokenizer(str(folder)).notes


def test_no_mark_of_the_end_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    only(folder, eos_token=None)
    assert "marks no text's end" in tokenizer_notes(str(folder))[-1]
    caplog.set_level("INFO")
    (tmp_path / "x.txt").write_text(LONG)
    build_loader_of(folder, tmp_path / "x.txt")
    assert f"tokenizer {folder}: it marks no text's end" in caplog.text


def build_loader_of(folder: Path, data: Path) -> None:
    from titan_ext.data import TextDataLoader

    TextDataLoader.Config(dataset=str(data)).build(
        dp_world_size=1, dp_rank=0, tokenizer=build_tokenizer(str(folder)), seq_len=16, local_batch_size=1
    )


def test_a_template_that_marks_the_end_by_itself_lacks_nothing(folder: Path) -> None:
    only(folder)
    change(
        folder,
        added_tokens=[
            {
                "id": 0,
                "content": "[CLS]",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[SEP]": {"id": "[SEP]", "ids": [5], "tokens": ["[SEP]"]}},
        },
    )
    assert not tokenizer_notes(str(folder))
    assert build_tokenizer(str(folder)).encode("a", add_bos=True, add_eos=True)[-1] == 5


BLANKS = ["    ", "  ", "\t\t"]


@pytest.mark.parametrize("listed", ["both", "configuration", "tokenizer.json"])
def test_added_tokens_that_are_text_are_decoded(folder: Path, listed: str) -> None:
    traits = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = {300 + n: {"content": blank, **traits} for n, blank in enumerate(BLANKS)}
    if listed != "configuration":
        tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        change(folder, added_tokens=[*tokens, *({"id": place, **token} for place, token in added.items())])
    if listed != "tokenizer.json":
        marks = {n: {"content": mark, **traits, "special": True} for n, mark in enumerate((BOS, EOS, PAD))}
        change(folder, "tokenizer_config.json", added_tokens_decoder=marks | added)
    tokenizer = build_tokenizer(str(folder))
    tokens = tokenizer.encode(CODE, add_bos=True, add_eos=True)
    assert {300, 301, 302} <= set(tokens) and vocabulary_size(str(folder)) == 303
    assert tokenizer.decode(tokens) == CODE and not tokenizer_notes(str(folder))
    for start in range(1, len(tokens)):
        stream = TextStream(tokenizer, tokens[:start])
        assert tokenizer.decode(tokens[:start]) + "".join(map(stream.push, tokens[start:])) + stream.flush() == CODE


def test_a_stream_keeps_the_blank_between_the_prompt_and_its_continuation(tmp_path: Path) -> None:
    """SentencePiece's way: a blank is a part of the word behind it, and the first of a text is left out."""
    write_sentence_piece(tmp_path)
    tokenizer = build_tokenizer(str(tmp_path))
    text = "one two  three é\n four"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    for start in range(1, len(tokens)):
        prompt = tokenizer.decode(tokens[:start])
        if "\ufffd" not in prompt:
            stream = TextStream(tokenizer, tokens[:start])
            assert prompt + "".join(map(stream.push, tokens[start:])) + stream.flush() == text


def write_sentence_piece(folder: Path) -> None:
    """Llama 2's normalizer, byte fallback and decoder over a vocabulary of single letters."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"onetwhrfu"]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "pre_tokenizer": None,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": [],
            "vocab": {token: place for place, token in enumerate(vocabulary)},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    only(folder, bos_token="<s>", eos_token="</s>")


def test_ids_that_two_files_disagree_on_are_said(folder: Path) -> None:
    change(folder, "tokenizer_config.json", added_tokens_decoder={"310": {"content": "<|new|>", "special": True}})
    assert "'<|new|>' has the id 300, while tokenizer_config.json says 310" in tokenizer_notes(str(folder))[0]


def as_gpt2(folder: Path) -> dict[str, int]:
    """vocab.json and merges.txt of the folder's tokenizer, which goes; returns the vocabulary."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    return model["vocab"]


def test_vocab_and_merges_are_read(folder: Path) -> None:
    text = CODE + "漢字 é ## a"
    expected = build_tokenizer(str(folder)).encode(text, add_bos=True, add_eos=True)
    as_gpt2(folder)
    assert "\n# #\n" in (folder / "merges.txt").read_text(), "a rule that looks like a comment"
    for spec in (str(folder), str(folder / "vocab.json")):
        config, assets = resolve_tokenizer(spec)
        tokenizer = config.build(tokenizer_path=assets)
        assert tokenizer.encode(text, add_bos=True, add_eos=True) == expected and tokenizer.decode(expected) == text
        assert vocabulary_size(spec) == 300
    before = fingerprint(tokenizer)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert fingerprint(build_tokenizer(str(folder))) != before


def test_added_tokens_keep_their_ids_where_marks_and_text_take_turns(folder: Path) -> None:
    as_gpt2(folder)
    added = {"300": ("    ", False), "301": ("<|a|>", True), "302": ("  ", False), "303": ("<|b|>", True)}
    change(
        folder,
        "tokenizer_config.json",
        added_tokens_decoder={
            place: {"content": token, "special": special} for place, (token, special) in added.items()
        },
    )
    tokenizer = build_tokenizer(str(folder))
    assert [tokenizer.token_to_id(token) for token, _ in added.values()] == [300, 301, 302, 303]
    assert tokenizer.decode(tokenizer.encode("x    y<|a|>  z")) == "x    y  z" and not tokenizer_notes(str(folder))


def test_a_vocabulary_that_lacks_bytes_is_said(folder: Path) -> None:
    vocabulary = as_gpt2(folder)
    gone = sorted(ByteLevel.alphabet())[-3:]
    (folder / "vocab.json").write_text(
        json.dumps({token: place for token, place in vocabulary.items() if token not in gone})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert any("vocab.json lacks 3 of the 256 bytes" in note for note in tokenizer_notes(str(folder)))


def test_word_piece_is_read_from_vocab_txt(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "some", "word", "##s", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = build_tokenizer(str(tmp_path))
    assert (
        tokenizer.encode("Some words!", add_bos=True, add_eos=True) == [2, 5, 6, 7, 8, 3]
        and vocabulary_size(str(tmp_path)) == 9
    )
    assert tokenizer.encode("some thing") == [2, 5, 1, 3]
    only(tmp_path, do_lower_case=False)
    assert build_tokenizer(str(tmp_path)).encode("Some word") == [2, 1, 6, 3]


def word_model(kind: str, **model: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": None,
        "model": {"type": kind, **model},
    }


WORD_PIECE = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


@pytest.mark.parametrize(
    ("files", "spec", "words"),
    [
        (
            {"tokenizer.model": "x"},
            "",
            ["tokenizer.model (SentencePiece or tiktoken) is not read", "AutoTokenizer.from_pretrained"],
        ),
        ({"tokenizer.model": "x"}, "/tokenizer.model", ["SentencePiece", "save_pretrained"]),
        ({"spiece.model": "x"}, "", ["spiece.model (SentencePiece)", "save_pretrained"]),
        ({"tekken.json": "{}"}, "", ["tekken.json (Mistral's tekken)", "save_pretrained"]),
        ({"cl100k_base.tiktoken": "x"}, "", ["cl100k_base.tiktoken (tiktoken)", "save_pretrained"]),
        ({"vocab.json": "{}"}, "", ["a vocabulary without merges.txt", "save_pretrained"]),
        (
            {"vocab.json": '{"a": 0, "b</w>": 1}', "merges.txt": "#version: 0.2\na b</w>\n"},
            "",
            ["of no byte-level BPE", "</w>"],
        ),
        ({"vocab.txt": "a\nb\n"}, "", ["no [UNK]", "not WordPiece"]),
        ({"vocab.txt": "[UNK]\na\n"}, "", ["cannot read", "not found in the vocabulary"]),
        (
            {"tokenizer.json": json.dumps(word_model("WordPiece", vocab={"a": 0}, **WORD_PIECE))},
            "",
            ["no token for unknown words ('[UNK]')"],
        ),
        (
            {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
            "",
            ["Git LFS pointer", "git lfs pull"],
        ),
        (
            {"tokenizer.json": "{}", "tokenizer_config.json": "version https://git-lfs.github.com/spec/v1\n"},
            "",
            ["Git LFS pointer"],
        ),
        (
            {
                "tokenizer.json": json.dumps(word_model("WordLevel", vocab={"a": 0}, unk_token="a")),
                "tokenizer_config.json": "[]",
            },
            "",
            ["no JSON object"],
        ),
        (
            {"tokenizer.json": json.dumps(word_model("WordLevel", vocab={"a": 0}, unk_token="a")), "config.json": "{"},
            "",
            ["config.json"],
        ),
    ],
)
def test_what_cannot_be_read_says_how_it_can_be(
    tmp_path: Path, files: dict[str, str], spec: str, words: list[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for use in (resolve_tokenizer, vocabulary_size):
        with pytest.raises(UserError) as raised:
            use(str(tmp_path) + spec)
        message = str(raised.value)
        assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (word_model("WordLevel", vocab={"a": 0}, unk_token="<unk>"), "no token for unknown words"),
        (
            word_model("Unigram", vocab=[["a", -1.0]], unk_id=None, byte_fallback=False),
            "no token for unknown characters",
        ),
    ],
)
def test_a_text_that_cannot_be_split_is_one_line(tmp_path: Path, model: dict[str, Any], note: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.encode("a a") == [0, 0] and any(note in each for each in tokenizer.notes)
    (tmp_path / "x.txt").write_text("a zebra " * 50)
    for use in (
        lambda: tokenizer.encode("a zebra"),
        lambda: count_tokens(["a zebra"], tokenizer),
        lambda: build_loader_of(tmp_path, tmp_path / "x.txt"),
    ):
        with pytest.raises(UserError, match="cannot split a document") as raised:
            use()
        assert str(tmp_path) in str(raised.value)


def test_letters_that_a_model_leaves_out_are_said(tmp_path: Path) -> None:
    model = word_model(
        "BPE",
        vocab={"a": 0, "b": 1},
        merges=[],
        dropout=None,
        unk_token=None,
        fuse_unk=False,
        byte_fallback=False,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    assert "characters outside its vocabulary are left out" in tokenizer_notes(str(tmp_path))[0]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_files_with_the_mark_of_windows(folder: Path, name: str) -> None:
    content = (folder / name).read_text() if (folder / name).exists() else "{}"
    (folder / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert build_tokenizer(str(folder)).eos_id == 1


def test_a_tokenizer_is_read_again_when_any_of_its_files_changes(folder: Path) -> None:
    only(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps(MARKS | {"eos_token": PAD}))
    assert "<|padding|>" in tokenizer_notes(str(folder))[1]
    (folder / "special_tokens_map.json").write_text(json.dumps(MARKS))
    assert EOS in tokenizer_notes(str(folder))[1]


def test_the_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nhello\n")
    with pytest.raises(UserError, match="cannot read its vocab.txt: "):
        build_tokenizer(str(tmp_path))
