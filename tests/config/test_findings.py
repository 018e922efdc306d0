"""All mistakes of a file at once, and what this machine lacks as a list of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_ext import cli
from titan_ext.config import load_run, load_site, load_to_start
from titan_ext.errors import InvalidValue, UserError, gather_invalid, require, require_one_of

from .conftest import GOOD
from .test_bad_input import checked

MISTAKES = {
    "section": ("[trainning]\nsteps = 3\n", "trainning: unknown section; did you mean training?"),
    "key of torchtitan's": ("[metrics]\nlogfreq = 3\n", "metrics.logfreq: unknown key; did you mean log_freq?"),
    "key of ours": ("[replica]\nmin_site = 1\n", "replica.min_site: unknown key; did you mean min_sites?"),
    "type": ('[compile]\nenable = "yes"\n', 'compile.enable = "yes": must be true or false'),
    "value of torchtitan's": (
        "[comm]\ntrain_timeout_seconds = 0\n",
        "comm.train_timeout_seconds = 0: must be at least 1",
    ),
    "literal": ('[debug]\n[parallelism]\nspmd_backend = "none"\n', "parallelism.spmd_backend"),
    "torchtitan's own check": ("[checkpoint]\nkeep_latest_k = 1\n", "checkpoint.keep_latest_k = 1"),
    "optimizer": ("[optimizer]\nlr = -1\n", "optimizer.lr = -1.0: must be at least 0"),
    "mode": ('[activation_checkpoint]\nmode = "none"\ndebug = true\n', "activation_checkpoint.debug"),
    "data": ("[data]\nshuffle_buffer = 0\n", "data.shuffle_buffer = 0: must be at least 1"),
    "validation": ("[validator]\nenable = true\n", "validator.dataloader.dataset: is missing"),
    "switch": ("[optimizer_switch]\nstep = -1\n", "optimizer_switch.step = -1: must be at least 0"),
    "name in a list": (
        '[[regularizer.phases]]\nname = "none"\n',
        'regularizer.phases[0].name = "none": must be one of',
    ),
    "table without its key": ('[[source]]\ndataset = "builtin:code"\n', "data.source[0].name: is missing"),
    "key of a table": (
        '[[data.mix_changes]]\nstep = "4"\nmix = {wiki = 1}\n',
        'data.mix_changes[0].step = "4": must be an integer, got a string',
    ),
    "import": ('[override]\nimports = ["no_such.module.f"]\n', "override.imports"),
}


def lines_of(output: str) -> list[str]:
    return output.strip().removeprefix("titan-ext: error: ").splitlines()


def test_every_kind_of_mistake_is_told_in_one_call(write: Callable, capsys: pytest.CaptureFixture) -> None:
    """Static ones first, then what is missing, which hides none of them."""
    text = "".join(snippet for snippet, _ in MISTAKES.values()) + GOOD
    text = text.replace('name = "alpha"', 'name = "alpha"\ntokenizer = "assets/nowhere"').replace(
        "steps = 20", "steps = 0"
    )
    text = text.replace('"builtin:docs"', '"nowhere/text"').replace("sync_every = 5", "sync_every = 0\nbucket_mib = -1")
    code, output = checked([write(text)], capsys)
    head, *rest = lines_of(output)
    assert code == 2
    assert head == f"demo.toml: {len(MISTAKES) + 3} mistakes, 2 things missing on this machine"
    end = rest.index("missing on this machine:")
    for fragment in [fragment for _, fragment in MISTAKES.values()] + [
        "training.steps = 0: must be at least 1",
        "semi_sync.sync_every = 0: must be at least 1",
        "semi_sync.bucket_mib = -1: must be above 0",
    ]:
        assert [line for line in rest[:end] if f"  demo.toml: {fragment}" in line], fragment
    assert 'site "alpha": tokenizer = "assets/nowhere": no such folder' in rest[end + 1]
    assert 'site "beta": data.dataset = "nowhere/text": no such file or folder' in rest[end + 2]


@pytest.mark.parametrize("second", MISTAKES)
@pytest.mark.parametrize("first", ["key of ours", "type", "optimizer"])
def test_no_mistake_hides_another(first: str, second: str, write: Callable) -> None:
    if first == second:
        return
    with pytest.raises(UserError) as caught:
        load_run(write(MISTAKES[first][0] + MISTAKES[second][0] + GOOD))
    assert str(caught.value).startswith("demo.toml: 2 mistakes\n")
    assert MISTAKES[first][1] in str(caught.value) and MISTAKES[second][1] in str(caught.value)


# A name or size without which much of the file could not be judged.
UNKNOWN = {
    "semi_sync.method": ('method = "diloco"', 'method = "dilocoo"'),
    'semi_sync.method = "no.such"': ('method = "diloco"', 'method = "no.such"'),
    "semi_sync.codec": ('method = "diloco"', 'codec = "int5"'),
    "semi_sync.aggregation": ('method = "diloco"', 'aggregation = "men"'),
    "semi_sync.outer_optimizer": ('method = "diloco"', 'outer_optimizer = "sdg"'),
    "model.name": ('name = "llama3"', 'name = "llama4"'),
    "model.flavor": ('flavor = "debugmodel"', 'flavor = "debugmdl"'),
    "model.n_heads": ("n_layers = 2", "n_heads = 7"),
    "optimizer.name": ("[optimizer]", '[optimizer]\nname = "AdamX"'),
    "activation_checkpoint.mode": ("[optimizer]", '[activation_checkpoint]\nmode = "sel"\n[optimizer]'),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_name_hides_no_mistake(key: str, write: Callable) -> None:
    text = GOOD.replace("sync_every = 5", "sync_every = 0\nbucket_mib = -1\noutlier_threshold = 0.5")
    text = text.replace("local_batch_size = 2", "local_batch_size = 2\nglobal_batch_size = 3")
    text = (
        "[optimizer]\nlr = -1.0\nbetas = [0.9, 2.0]\n[lr_scheduler]\ndecay_ratio = 2.0\n[checkpoint]\nload_step = 3\n"
        + text
    )
    others = ["sync_every", "bucket_mib", "outlier_threshold", "training.global_batch_size", "optimizer.lr"]
    others += ["optimizer.betas", "decay_ratio", "load_step"]
    with pytest.raises(UserError) as caught:
        load_run(write(text.replace(*UNKNOWN[key], 1)))
    head, *lines = str(caught.value).splitlines()
    assert head == "demo.toml: 9 mistakes"
    for each in [key, *others]:
        assert any(each in line for line in lines), each


def test_each_value_of_a_section_is_judged(write: Callable) -> None:
    """Also where its dataclass stops at the first that it refuses, and where a table of a list holds it."""
    checkpoint = "[checkpoint]\nenable = true\nkeep_latest_k = 1\ninterval = 0\n"
    scopes = "".join(
        f"[[semi_sync.scopes]]\nname = {name!r}\nparameters = ['norm.*']\n{key} = {value}\n"
        for name, key, value in (("a", "codec", "'int5'"), ("b", "sync_every", "-3"), ("c", "outer_lr", "-1.0"))
    )
    text = checkpoint + GOOD.replace("sync_every = 5", "outer_lr = -1.0\nouter_momentum = 3.0\n" + scopes)
    with pytest.raises(UserError) as caught:
        load_run(write(text))
    found = {line.removeprefix("  demo.toml: ").partition(":")[0] for line in str(caught.value).splitlines()[1:]}
    assert found >= {
        "semi_sync.outer_lr = -1.0",
        "semi_sync.outer_momentum = 3.0",
        'semi_sync.scopes[0].codec = "int5"',
        "semi_sync.scopes[1].sync_every = -3",
        "semi_sync.scopes[2].outer_lr = -1.0",
        "checkpoint.keep_latest_k = 1",
    }


@pytest.mark.parametrize(
    ("change", "to", "told"),
    [
        ("seq_len = 64", "seqlen = 64", "training.seqlen"),  # 2048 are left, which this model cannot have
        ("seq_len = 64", 'seq_len = "64"', 'training.seq_len = "64"'),
        ("[training]", "[trainin]", "trainin: unknown section"),
        ("sync_every = 5", "sync_every = 0\nnum_fragments = 2", "semi_sync.sync_every = 0"),
        ('flavor = "debugmodel"', 'flavor = "debugmodle"', "model.flavor"),
        ('data = "builtin:docs"', 'dat = "builtin:docs"', 'site "beta": dat'),
    ],
)
def test_what_follows_from_a_mistake_is_not_told(change: str, to: str, told: str, write: Callable) -> None:
    text = GOOD.replace("n_layers = 2", "n_layers = 2\nmax_seq_len = 100").replace(change, to)
    with pytest.raises(UserError) as caught:
        load_run(write(text))
    assert "\n" not in str(caught.value) and told in str(caught.value)


def test_a_mistake_of_all_sites_is_told_once(write: Callable) -> None:
    with pytest.raises(UserError) as caught:
        load_run(write(GOOD), ["--parallelism.data_parallel_shard_degree=0", "--training.steps=0"])
    assert str(caught.value).splitlines()[1:] == [
        "  demo.toml: flag --training.steps = 0: must be at least 1",
        "  demo.toml: flag --parallelism.data_parallel_shard_degree = 0: must be -1 (what is left) or at least 1",
    ]


def test_a_file_is_checked_where_its_tokenizer_is_not(write: Callable, capsys: pytest.CaptureFixture) -> None:
    """The costs are those of the flavor's vocabulary; nobody says that there is no mistake."""
    text = GOOD.replace("[training]", "vocab_size = 1000\n[training]").replace(
        'name = "beta"', 'name = "beta"\ntokenizer = "x"'
    )
    assert cli.main(["check", write(text)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("demo.toml: 2 site(s), 1 thing missing on this machine\n\nmissing on this machine:\n")
    assert '  demo.toml: site "beta": tokenizer = "x": no such folder' in output
    assert "no mistakes found" not in output and "cost of alpha, beta" in output
    assert cli.main(["check", "demo.toml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        len(found["missing"]) == 1
        and found["sites"][1]["cost"]["parameters"] == found["sites"][0]["cost"]["parameters"]
    )


def test_sites_that_lack_something_do_not_start(write: Callable, capsys: pytest.CaptureFixture) -> None:
    text = GOOD.replace('"builtin:docs"', '"nowhere"').replace('name = "beta"', 'name = "beta"\ntokenizer = "x"')
    assert cli.main(["launch", write(text)]) == 2
    head, *rest = lines_of(capsys.readouterr().err)
    assert head == "demo.toml: 2 things missing on this machine"
    assert ['site "beta"' in line for line in rest] == [True, True]
    assert not Path("runs").exists()
    with pytest.raises(UserError, match='site "beta": tokenizer'):
        load_to_start("demo.toml", ["beta"], [])
    assert load_to_start("demo.toml", ["alpha"], [])[0].missing == []


def test_a_model_is_loaded_without_the_text_that_it_was_trained_on(write: Callable) -> None:
    """As eval, generate and export do on another machine."""
    site = load_site(write(GOOD.replace('"builtin:docs"', '"nowhere"')), "beta")
    assert [each.need for each in site.missing] == ["data"]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_files_that_people_start_from_are_sound(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On a machine that has nothing of what they name, and nothing is written there."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", str(path)]) == 0
    output = capsys.readouterr().out
    named = [
        name
        for name in ("assets/", "data/", "runs/tiny_dept_trim/global", "docs-tokenizer")
        if name in path.read_text()
    ]
    assert ("missing on this machine:" in output) == bool(named)
    assert ("no mistakes found" in output) != bool(named)
    assert "cost of " in output and "parameters" in output
    assert list(tmp_path.iterdir()) == []


def refuse(values: dict[str, int]) -> None:
    for key, value in values.items():
        require(value >= 1, key, value, "at least 1")
    require_one_of("kind", "sdg", ["sgd", "adam"])
    _ = 1 // values["b"]


def test_what_a_dataclass_refuses_can_be_gathered() -> None:
    with gather_invalid() as found:
        refuse({"a": 0, "b": 0})  # the division fails for the sake of b
    assert [(each.key, each.problem) for each in found] == [
        ("a", "must be at least 1"),
        ("b", "must be at least 1"),
        ("kind", "must be one of sgd, adam (did you mean 'sgd'?)"),
    ]
    with pytest.raises(InvalidValue, match="^a = 0: must be at least 1$"):
        refuse({"a": 0, "b": 1})
    with pytest.raises(ZeroDivisionError), gather_invalid():
        _ = 1 // 0
