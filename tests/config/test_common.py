"""What sites must have in common is told in the words of the configuration, whichever setting it follows from."""

import json
from pathlib import Path

import pytest

from tests.config.conftest import GOOD
from titan_ext.config import load_run, load_site
from titan_ext.config.common import beside_outer_loop
from titan_ext.config.outer_loop import plan_of
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.errors import UserError
from titan_ext.semi_sync.plan.resolve import settings_by_key
from titan_ext.semi_sync.round.differences import InCommon, as_text, differences

METHODS = {
    "local_adam": ["--semi_sync.method=local_adam"],
    "half lives": ["--semi_sync.method=des_loc", "--semi_sync.des_loc.half_life_periods"],
    "mt_dao": ["--semi_sync.method=mt_dao", "--optimizer.name=QHAdamW"],
    "lordo": ["--semi_sync.method=lordo", "--optimizer.name=LowRankAdamW"],
    "diloco": ["--semi_sync.method=diloco"],
}
OTHER = [
    ("local_adam", "--optimizer.name=ADOPT", "optimizer.name is"),
    ("local_adam", "--optimizer.betas=[0.8,0.9]", "optimizer.betas is [0.9, 0.95] at a, [0.8, 0.9] at b"),
    ("local_adam", "--optimizer_switch.step=3", "optimizer_switch.step is 0 at a, 3 at b"),
    ("half lives", "--optimizer.betas=[0.8,0.999]", "optimizer.betas is [0.9, 0.95] at a, [0.8, 0.999] at b"),
    (
        "half lives",
        "--semi_sync.des_loc.half_life_periods=false",
        "semi_sync.des_loc.half_life_periods is true at a, false",
    ),
    ("mt_dao", "--optimizer.omegas=[0.5]", "optimizer.omegas is [0.95] at a, [0.5] at b"),
    ("lordo", "--optimizer.rank=4", "optimizer.rank is 32 at a, 4 at b"),
    ("diloco", "--training.steps=7", "training.steps is"),
    ("diloco", "--model.rope_theta=10000", "model.rope_theta is 500000.0 at a, 10000.0 at b"),
    ("diloco", "--model.norm_eps=1e-6", "model.norm_eps is 1e-05 at a, 1e-06 at b"),
    ("diloco", "--model.rope_scaling=none", "model.rope_scaling"),
    ("diloco", "--model.vocab_size=1000", ""),
    ("diloco", "--training.seq_len=64", ""),
    ("diloco", "--optimizer.betas=[0.8,0.9]", ""),
    ("local_adam", "--optimizer.lr=0.5", ""),
]


def in_common(file, flags) -> InCommon:
    config = load_site(file, "alpha", flags).config
    return InCommon(
        plan=plan_of(config).fingerprint(),
        tensors={},
        settings=as_text(beside_outer_loop(config)),
        behind_plan=as_text(settings_by_key(config.semi_sync)),
    )


@pytest.mark.parametrize("method, flag, words", OTHER)
def test_a_difference_is_named_by_key(method, flag, words, write):
    file = write()
    told = differences([in_common(file, METHODS[method]), in_common(file, [*METHODS[method], flag])], ["a", "b"])
    assert told.startswith(words) and "rule " not in told
    assert bool(told) == bool(words)


def test_sites_of_one_file_that_average_unlike_moments_are_refused(write):
    tables = GOOD + "[site.optimizer]\nbetas = [0.8, 0.9]\n"
    with pytest.raises(
        UserError, match=r'sites "alpha" and "beta" differ in optimizer.betas: \[0.9, 0.95\] and \[0.8, 0.9\]'
    ):
        load_run(write(tables), METHODS["local_adam"])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Path]:
    """Two of 265 rows, and the first written anew in another form."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two", "again")]
    train_tokenizer(["some words of a text about words"] * 50, 265, folders[0])
    train_tokenizer(["andere Wörter, anders verteilt: zwölf Boxkämpfer"] * 50, 265, folders[1])
    whole = json.loads((folders[0] / "tokenizer.json").read_text())
    (folders[2] / "tokenizer.json").write_text(json.dumps(whole, indent=4))
    return folders


LOCAL = '\n[[semi_sync.scopes]]\nname = "own"\nparameters = ["tok_embeddings.*", "lm_head.*"]\nshared = "local"\n'


@pytest.mark.parametrize(
    ("places", "extra", "refused"),
    [
        ((0, 1), "", True),
        ((0, 2), "", False),
        ((0, 0), "", False),
        ((0, 1), LOCAL, False),
        ((0, 1), LOCAL.replace('"tok_embeddings.*", ', ""), True),
        ((0, 1), LOCAL.replace('"local"', '"sparse_rows"'), False),
    ],
    ids=["other rows", "other form", "one", "own embeddings", "own heads alone", "by row"],
)
def test_sites_that_share_embeddings_have_tokenizers_of_the_same_rows(places, extra, refused, write, tokenizers):
    text = GOOD
    for name, place in zip(("alpha", "beta"), places, strict=True):
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\ntokenizer = "{tokenizers[place]}"\n')
    head, site, rest = text.partition("\n[[site]]")
    file = write(head + extra + site + rest)
    if not refused:
        load_run(file)
        return
    with pytest.raises(UserError, match="differ in tokenizer: .*two.*rows would stand for other tokens"):
        load_run(file)
