"""Flags > site > file > flavor > torchtitan, and what a site is made of."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_ext.config import load_run, load_site
from titan_ext.config.resolved import origin_of
from titan_ext.config.settings import Origin
from titan_ext.errors import UserError

from .conftest import GOOD

PLAIN = '[[site]]\nname = "alpha"\ndata = "builtin:code"\n'


@pytest.fixture
def flavored(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model module of the user's own whose one flavor sets ``training.steps`` and ``metrics.log_freq``."""
    from torchtitan.config import TrainingConfig

    from titan_ext.models import llama3
    from titan_ext.trainer.trainer import Trainer

    def tiny() -> Trainer.Config:
        config = Trainer.Config(training=TrainingConfig(steps=77, disable_cuda_graphs=True))
        config.metrics.log_freq = 3
        return config

    package, registry = types.ModuleType("own_models.tiny"), types.ModuleType("own_models.tiny.config_registry")
    package.__path__, package.model_registry = [], llama3.model_registry
    registry.tiny_debugmodel = tiny
    registry.__spec__ = types.SimpleNamespace(name=registry.__name__)
    parent = types.ModuleType("own_models")
    parent.__path__, parent.tiny = [], package
    for module in (parent, package, registry):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return '[model]\nname = "own_models.tiny"\n'


def test_torchtitans_default_is_the_weakest(write: Callable, flavored: str) -> None:
    site = load_site(write(flavored + PLAIN))
    assert site.config.training.max_norm == 1.0
    assert origin_of(site, "training.max_norm") is Origin.TORCHTITAN


def test_ours_comes_before_torchtitans(write: Callable, flavored: str) -> None:
    site = load_site(write(flavored + PLAIN))
    assert site.config.debug.seed == 0 and origin_of(site, "debug.seed") is Origin.TITAN_EXT


def test_the_flavor_comes_before_ours(write: Callable, flavored: str) -> None:
    site = load_site(write(flavored + PLAIN))
    assert site.config.training.steps == 77 and origin_of(site, "training.steps") is Origin.FLAVOR
    assert site.config.metrics.log_freq == 3 and origin_of(site, "metrics.log_freq") is Origin.FLAVOR


def test_the_file_comes_before_the_flavor(write: Callable, flavored: str) -> None:
    site = load_site(write(f"{flavored}[training]\nsteps = 5\n{PLAIN}"))
    assert site.config.training.steps == 5 and origin_of(site, "training.steps") is Origin.FILE


def test_the_site_comes_before_the_file(write: Callable, flavored: str) -> None:
    site = load_site(write(f"{flavored}[training]\nsteps = 5\nseq_len = 64\n{PLAIN}[site.training]\nsteps = 6\n"))
    assert site.config.training.steps == 6 and origin_of(site, "training.steps") is Origin.SITE
    assert site.config.training.seq_len == 64 and origin_of(site, "training.seq_len") is Origin.FILE


def test_a_flag_comes_before_the_site(write: Callable, flavored: str) -> None:
    text = f"{flavored}[training]\nsteps = 5\n{PLAIN}[site.training]\nsteps = 6\n"
    site = load_site(write(text), "alpha", ["--training.steps", "7"])
    assert site.config.training.steps == 7 and origin_of(site, "training.steps") is Origin.FLAG


def test_flags_reach_every_site(write: Callable) -> None:
    run = load_run(write(), ["--training.steps=9", "--compile.enable", "--compile.components=[]", "--weight", "2"])
    assert [site.config.training.steps for site in run.sites] == [9, 9]
    assert [site.config.compile.enable for site in run.sites] == [True, True]
    assert [site.config.compile.components for site in run.sites] == [[], []]
    assert [site.weight for site in run.sites] == [2.0, 2.0]


def test_the_sites_of_a_file(write: Callable) -> None:
    run = load_run(write())
    alpha, beta = run.sites
    assert [site.name for site in run.sites] == ["alpha", "beta"] and run.dump_folder == "runs/demo"
    assert (beta.index, beta.count, beta.weight, beta.nproc) == (1, 2, 1.0, 1)
    assert beta.config.site.name == "beta" and beta.config.site.index == 1 and beta.config.site.count == 2
    assert beta.config.dump_folder == "runs/demo/beta"
    assert beta.config.dataloader.dataset == "builtin:docs"
    assert beta.config.semi_sync.outer_lr == 0.7
    ids = alpha.config.tokenizer.build(tokenizer_path="").get_vocab_size()
    assert 0 <= alpha.config.model_spec.model.vocab_size - ids < 8
    assert alpha.config.loss.loss_fn.global_vocab_size == alpha.config.model_spec.model.vocab_size


def test_a_site_loads_without_the_others(write: Callable) -> None:
    file = write(GOOD.replace('data = "builtin:docs"', 'data = "builtin:docs"\ntokenizer = "only/at/beta"'))
    assert load_site(file, "alpha").config.site.count == 2
    with pytest.raises(UserError, match="only/at/beta"):
        load_site(file, "beta")


def test_a_file_without_sites_is_one_site_that_syncs_with_nobody(write: Callable) -> None:
    site = load_site(write('data = "builtin:code"\n[training]\nseq_len = 64\n'))
    assert (site.name, site.count, site.config.semi_sync.method) == ("site0", 1, "none")


def test_one_of_several_sites_must_be_named(write: Callable) -> None:
    with pytest.raises(UserError, match="has 2 sites; choose one with --site NAME"):
        load_site(write())


def test_one_site_of_a_larger_run(write: Callable) -> None:
    site = load_site(write(f"{PLAIN}index = 2\ncount = 3\n"))
    assert (site.index, site.count) == (2, 3) and site.config.semi_sync.method == "diloco"


def test_sites_on_one_corpus_take_disjoint_shares(write: Callable) -> None:
    text = GOOD.replace("builtin:docs", "builtin:code") + '[[site]]\nname = "gamma"\ndata = "builtin:docs"\n'
    data = [site.config.dataloader for site in load_run(write(text)).sites]
    assert [(each.share_index, each.share_count) for each in data] == [(0, 2), (1, 2), (0, 1)]
    assert load_site("demo.toml", "beta").config.dataloader.share_index == 1


def test_sites_may_set_their_own_shares(write: Callable) -> None:
    table = '{dataset = "builtin:code", share_index = 0, share_count = 1}'
    text = GOOD.replace('"builtin:docs"', table).replace('"builtin:code"\n', f"{table}\n")
    assert [site.config.dataloader.share_count for site in load_run(write(text)).sites] == [1, 1]


def test_the_short_optimizer_is_one_group(write: Callable) -> None:
    text = '[optimizer]\nname = "Adam"\nlr = 1\nbetas = [0.8, 0.9]\nimplementation = "foreach"\n'
    config = load_site(write(text + PLAIN)).config.optimizer
    (group,) = config.param_groups
    assert (group.pattern, group.optimizer_name, config.implementation) == (".*", "Adam", "foreach")
    assert group.optimizer_kwargs["lr"] == 1.0 and group.optimizer_kwargs["betas"] == (0.8, 0.9)


def test_optimizer_groups_one_to_one(write: Callable) -> None:
    text = """
    [[optimizer.param_groups]]
    pattern = "norm"
    optimizer_name = "AdamW"
    optimizer_kwargs = {lr = 1e-3, weight_decay = 0.0}
    [[optimizer.param_groups]]
    pattern = ".*"
    optimizer_name = "AdamW"
    optimizer_kwargs = {lr = 1e-3}
    """
    groups = load_site(write(text + PLAIN)).config.optimizer.param_groups
    assert [group.pattern for group in groups] == ["norm", ".*"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('mode = "none"', "NoneType"),
        ('mode = "full"\npreserve_rng_state = false', "FullAC.Config"),
        ('mode = "selective"', "SelectiveAC.Config"),
    ],
)
def test_activation_checkpointing_by_mode(text: str, name: str, write: Callable) -> None:
    site = load_site(write(f"[activation_checkpoint]\n{text}\n{PLAIN}"))
    assert type(site.config.activation_checkpoint).__qualname__ == name


def test_the_loss_can_be_plain(write: Callable) -> None:
    site = load_site(write(f"[loss]\nchunked = false\n{PLAIN}"))
    assert type(site.config.loss).__qualname__ == "CrossEntropyLoss.Config"
    assert load_site("demo.toml", None, ["--loss.chunked", "--training.seq_len=12"]).config.loss.num_chunks == 4


def test_a_vocabulary_larger_than_the_tokenizer_is_noted(write: Callable) -> None:
    site = load_site(write(), "alpha", ["--model.vocab_size", "512"])
    assert site.config.model_spec.model.vocab_size == 512 and "stay unused" in site.notes[0]


def test_the_tokenizer_decides_the_vocabulary(write: Callable) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    file = write()
    Path("words").mkdir()
    Tokenizer(WordLevel({"a": 0, "b": 1, "c": 40}, unk_token="a")).save("words/tokenizer.json")
    for given in ("words", "words/tokenizer.json"):
        site = load_site(file, "alpha", ["--tokenizer", given])
        assert site.config.model_spec.model.vocab_size == 48 and site.config.hf_assets_path == "words"


def test_ranks_follow_the_layout(write: Callable) -> None:
    file = write()
    assert load_site(file, "alpha", ["--parallelism.tensor_parallel_degree=2"]).nproc == 2
    site = load_site(file, "alpha", ["--parallelism.tensor_parallel_degree=2", "--nproc", "4"])
    assert site.layout.shard == 2 and site.nproc == 4


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (((0, 2), (1, 2)), []),
        (
            ((0, 2), (0, 2)),
            ['reads part 0 of 2 of builtin:code, as site "alpha" does', "part 1 of 2 of builtin:code is"],
        ),
        (((0, 4), (2, 4)), ["part 1, 3 of 4 of builtin:code is read by no site"]),
    ],
)
def test_parts_that_two_sites_read_or_none_are_said(parts, said, write: Callable) -> None:
    text = GOOD
    for data, (index, count) in zip(('"builtin:code"', '"builtin:docs"'), parts, strict=True):
        table = f'{{dataset = "builtin:code", share_index = {index}, share_count = {count}}}'
        text = text.replace(f"data = {data}", f"data = {table}")
    notes = [note for site in load_run(write(text)).sites for note in site.notes if "part " in note]
    assert len(notes) == len(said) and all(any(words in note for note in notes) for words in said)
