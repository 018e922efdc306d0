"""The ``[dept]`` section: what a variant lays out, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_ext import cli
from titan_ext.commands.check import _as_text
from titan_ext.config import dump_resolved, load_run, load_site, load_to_start
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.errors import UserError
from titan_ext.models.dept.head import MaskedHead

RUN = """
dump_folder = "{folder}"
[model]
flavor = "tiny"
[training]
seq_len = 64
steps = 40
[dept]
variant = "{variant}"
{more}
[[site]]
name = "east"
data = "{folder}/east.txt"
[[site]]
name = "west"
data = "{folder}/west.txt"
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run of two sites whose texts have other letters."""
    (tmp_path / "east.txt").write_text("abcab " * 200)
    (tmp_path / "west.txt").write_text("bcdbcd efg " * 200)

    def write(variant: str, more: str = "") -> Path:
        file = tmp_path / "run.toml"
        file.write_text(RUN.format(folder=tmp_path, variant=variant, more=more))
        return file

    return write


@pytest.mark.parametrize(
    ("variant", "shared", "seeds"),
    [
        ("none", None, [0, 0]),
        ("glob", None, [0, 0]),
        ("trim", "sparse_rows", [0, 0]),
        ("spec", "local", [0, 1]),
        ("spec-opt", "local", [0, 1]),
    ],
)
def test_a_variant_lays_out_scopes_vocabulary_and_rounds(run, variant, shared, seeds):
    sites = load_to_start(run(variant), None, [])
    scopes = sites[0].config.semi_sync.scopes
    assert [scope.shared for scope in scopes] == ([] if shared is None else [shared])
    trimmed = variant in ("trim", "spec")
    assert [bool(site.vocabulary) for site in sites] == [trimmed] * 2
    rows = [site.config.model_spec.model.vocab_size for site in sites]
    assert rows == {"none": [264] * 2, "glob": [320] * 2, "spec-opt": [320] * 2}.get(variant, [64] * 2)
    for site in sites:
        head = site.config.model_spec.model.lm_head
        assert isinstance(head, MaskedHead.Config) == (variant != "none")
        assert site.config.semi_sync.method == ("diloco" if variant == "none" else "local_sgd")
        assert site.config.semi_sync.reset_inner_optimizer == (variant != "none")
    assert [site.config.debug.seed for site in sites] == seeds


def test_the_head_is_masked_behind_the_sites_own_tokens(run):
    used = [site.config.model_spec.model.lm_head.used for site in load_to_start(run("trim"), None, [])]
    # Letters and the blank, and the three marks of the byte tokenizer; "unknown" is a row of its own.
    assert used == [4 + 3 + 1, 7 + 3 + 1]


def test_what_the_variant_brings_can_be_overruled(run):
    more = """
[semi_sync]
method = "des_loc"
[[semi_sync.scopes]]
name = "embeddings"
parameters = ["tok_embeddings.*", "lm_head.*"]
shared = "sparse_rows"
sync_every = 4
codec = "int8"
"""
    outer = load_site(run("trim", more), "east", needs=()).config.semi_sync
    assert (outer.method, outer.reset_inner_optimizer) == ("des_loc", False)
    assert [(scope.sync_every, scope.codec) for scope in outer.scopes] == [(4, "int8")]


def test_cut_tables_need_leaders(run):
    def pairing(variant, *flags):
        return load_site(run(variant), "east", flags, needs=()).config.semi_sync.pairing

    whole, cut = "--parallelism.data_parallel_shard_degree=1", "--parallelism.tensor_parallel_degree=2"
    assert pairing("trim", whole) == "rank"
    assert pairing("trim", whole, cut) == "leader"
    assert pairing("spec-opt", whole, cut) == "rank"
    with pytest.raises(UserError, match='semi_sync.pairing = "rank": must be "leader"'):
        pairing("trim", whole, cut, "--semi_sync.pairing=rank")


def test_the_resolved_configuration_is_the_same_site_again(run, tmp_path):
    (site,) = load_to_start(run("trim"), ["west"], [])
    (tmp_path / "again.json").write_text(json.dumps(dump_resolved(site)))
    again = load_site(tmp_path / "again.json")
    assert dump_resolved(again)["semi_sync"] == dump_resolved(site)["semi_sync"]
    assert again.vocabulary == site.vocabulary
    assert again.config.model_spec.model.vocab_size == site.config.model_spec.model.vocab_size


def test_check_tells_what_each_site_holds_and_sends(run):
    file = run("trim")
    text = _as_text(str(file), load_to_start(file, None, []), False)
    assert "dept.trim        8 of 259 tokens" in text and "dept.trim        11 of 259 tokens" in text
    assert "dept.spec-opt    259 tokens of its own" in _as_text(str(file), load_run(run("spec-opt")).sites, False)


@pytest.mark.parametrize(
    ("variant", "more", "words"),
    [
        ("spe", "", ["dept.variant", '"spe"', "spec"]),
        ("trim", "vocabulary_multiple = 0", ["dept.vocabulary_multiple = 0", "at least 1"]),
        ("trim", 'embeddings = ["nothing.*"]', ["semi_sync", "nothing.*", "fit no parameter"]),
        ("trim", '[semi_sync]\nmethod = "noloco"', ["semi_sync", "noloco"]),
        ("trim", '[semi_sync]\ncodec = "topk"', ["semi_sync", "topk"]),
        ("spec", '[[semi_sync.scopes]]\nname = "embeddings"\nparameters = ["*"]', ["semi_sync.scopes", '"local"']),
    ],
)
def test_what_cannot_be_is_one_line(run, variant, more, words):
    with pytest.raises(UserError) as caught:
        load_run(run(variant, more))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_configuration_is_checked_without_reading_a_text_or_writing_a_file(run, tmp_path, capsys):
    file = run("trim")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "east.txt").chmod(0)
    assert cli.main(["check", str(file)]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    output = capsys.readouterr().out
    assert f"{file}: 2 site(s), no mistakes found" in output
    assert f"the first start reads the site's text and writes {tmp_path}/east/vocabulary.json" in output
    # What is not found yet cannot be evaluated or exported, nor can its size be told.
    with pytest.raises(UserError, match='site "west": vocabulary = "auto": not found yet'):
        load_site(file, "west")


def test_a_vocabulary_of_another_tokenizer_is_refused(run, tmp_path):
    load_to_start(run("trim"), None, [])
    (tmp_path / "bpe").mkdir()
    train_tokenizer(["abc def " * 50], 300, tmp_path / "bpe")
    with pytest.raises(UserError, match="vocabulary.*another tokenizer"):
        load_run(run("trim"), ["--tokenizer", str(tmp_path / "bpe")])


@pytest.mark.parametrize("variant", ["glob", "trim", "spec"])
def test_embeddings_that_fit_nothing_are_refused(variant, run):
    with pytest.raises(UserError, match="fit no parameter"):
        load_to_start(run(variant), None, ['--dept.embeddings=["embed.*"]'])
