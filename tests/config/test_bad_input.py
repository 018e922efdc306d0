"""Broken files: each ends in one line with the file, the key and what would be right, exit code 2."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_ext.config import load_run
from titan_ext.config.disk import check_dump_folder, check_outputs
from titan_ext.errors import UserError

from .conftest import GOOD

ONE_SITE = GOOD[: GOOD.index("[[site]]")]


def with_(change: str, to: str = "") -> str:
    """``GOOD`` with one passage changed; with nothing given to change, ``to`` goes before the sites."""
    if not change:
        return GOOD.replace("[[site]]", f"{to}\n[[site]]", 1)
    assert change in GOOD
    return GOOD.replace(change, to)


CASES = {
    "unknown section": (with_("[training]", "[trainning]"), ["trainning: unknown section", "did you mean training?"]),
    "unknown key": (with_("seq_len", "seqlen"), ["training.seqlen: unknown key", "did you mean seq_len?"]),
    "key of another section": (
        with_("steps = 20", "tensor_parallel_degree = 2"),
        ["training.tensor_parallel_degree: unknown key", "did you mean parallelism.tensor_parallel_degree?"],
    ),
    "key outside its section": (
        f"steps = 3\n{GOOD}",
        ["steps: unknown key", "did you mean training.steps or validator.steps or batch_warmup.steps?"],
    ),
    "seed too large": (f"[debug]\nseed = {2**63}\n{GOOD}", [f"debug.seed = {2**63}", "below 2**63"]),
    "negative seed": (f"[debug]\nseed = -1\n{GOOD}", ["debug.seed = -1", "from 0"]),
    "wrong type": (with_("seq_len = 64", 'seq_len = "long"'), ['training.seq_len = "long"', "must be an integer"]),
    "float for int": (with_("steps = 20", "steps = 2.5"), ["training.steps = 2.5", "must be an integer, got a float"]),
    "value for section": (f"metrics = 3\n{GOOD}", ["metrics = 3", "must be a table"]),
    "wrong literal": (
        with_("steps = 20", 'steps = 20\ndtype = "float16"'),
        ['training.dtype = "float16"', "did you mean bfloat16? (allowed: bfloat16, float32)"],
    ),
    "not TOML": (with_("steps = 20", "steps = = 20"), ["line 9, column 9", "not valid TOML"]),
    "table gone on with": (
        with_("[training]", "[training.more]\nx = 1\n[model]\n[training]"),
        ["not valid TOML: Cannot declare", "put all of its keys in one [table]"],
    ),
    "short form gone on with": (
        with_('data = "builtin:docs"', 'data = {dataset = "x"}\n[[site.data.mix_changes]]\nstep = 4'),
        ["not valid TOML: Cannot mutate", "put all of its keys in one [table]"],
    ),
    "key twice": (with_("steps = 20", "steps = 20\nsteps = 21"), ["line 10", "not valid TOML"]),
    "site without data": (with_('data = "builtin:docs"\n'), ['site "beta": data', "is missing"]),
    "site without name": (with_('name = "beta"\n'), ["[[site]] number 2: name is missing"]),
    "two sites of one name": (with_('"beta"', '"alpha"'), ['site "alpha": name = "alpha"', "number 1 has this name"]),
    "bad name": (with_('"beta"', '"be/ta"'), ["[[site]] number 2: name = 'be/ta'", "letters, digits"]),
    "single brackets": (f'{ONE_SITE}[site]\nname = "a"\n', ["site: must be [[site]] tables"]),
    "name outside a site": (f'name = "a"\n{GOOD}', ["name", "belongs in a [[site]] table"]),
    "unknown key of a site": (
        with_('data = "builtin:docs"', 'dta = "x"'),
        ['site "beta": dta: unknown key', "did you mean data?"],
    ),
    "unknown model": (with_('"llama3"', '"lama3"'), ['model.name = "lama3"', "did you mean llama3?"]),
    "unknown module": (with_('"llama3"', '"no.such.model"'), ['model.name = "no.such.model"', "can be imported"]),
    "unknown flavor": (
        with_('"debugmodel"', '"debugmodle"'),
        ['model.flavor = "debugmodle"', "did you mean debugmodel?"],
    ),
    "unknown size": (with_("n_layers = 2", "n_layer = 2"), ["model.n_layer", "unknown", "n_layers"]),
    "size of wrong type": (with_("n_layers = 2", 'n_layers = "two"'), ['model.n_layers = "two"', "must be an integer"]),
    "tokenizer and vocabulary": (
        with_("n_layers = 2", "n_layers = 2\nvocab_size = 100"),
        ["model.vocab_size = 100", "too small for the site's tokenizer of"],
    ),
    "ranks that do not divide": (
        with_("", "[parallelism]\ntensor_parallel_degree = 2\n").replace('name = "beta"', 'name = "beta"\nnproc = 3'),
        ['site "beta": nproc = 3', "must be a multiple of the other parallel degrees' product (2)"],
    ),
    "ranks that do not match": (
        with_("", "[parallelism]\ndata_parallel_shard_degree = 2\n").replace('"alpha"', '"alpha"\nnproc = 3'),
        ['site "alpha": nproc = 3', "must be 2, the product of the parallel degrees (data_parallel_shard_degree 2)"],
    ),
    "degree 0": (
        with_("", "[parallelism]\ntensor_parallel_degree = 0\n"),
        ["parallelism.tensor_parallel_degree = 0", "at least 1"],
    ),
    "heads": (
        with_("", "[parallelism]\ntensor_parallel_degree = 3\n").replace("seq_len = 64", "seq_len = 96"),
        ["parallelism.tensor_parallel_degree = 3", "attention heads"],
    ),
    "vocabulary that tensor parallelism cannot cut": (
        with_("n_layers = 2", "n_layers = 2\nvocab_size = 301").replace(
            "[semi_sync]", "[parallelism]\ntensor_parallel_degree = 2\n[semi_sync]"
        ),
        ["model.vocab_size = 301", "must be a multiple of parallelism.tensor_parallel_degree (2), such as 302"],
    ),
    "too many stages": (
        with_("", "[parallelism]\npipeline_parallel_degree = 8\n"),
        ["parallelism.pipeline_parallel_degree = 8", "does not fit a model of 2 layers"],
    ),
    "unknown schedule": (
        with_("", '[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = "1F1F"\n'),
        ['parallelism.pipeline_parallel_schedule = "1F1F"', "did you mean 1F1B?"],
    ),
    "global batch": (
        with_("steps = 20", "steps = 20\nglobal_batch_size = 5"),
        ["training.global_batch_size = 5", "multiple of local_batch_size x data-parallel ranks (2 x 1 = 2)"],
    ),
    "pipeline microbatch": (
        with_("", "[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_microbatch_size = 3\n"),
        ["pipeline_parallel_microbatch_size", "must be evenly divisible"],
    ),
    "sequence parallel": (
        with_("", "[parallelism]\ntensor_parallel_degree = 2\n").replace("seq_len = 64", "seq_len = 63"),
        ["training.seq_len = 63", "must be a multiple of 2"],
    ),
    "loss chunks": (
        with_("", "[loss]\nnum_chunks = 7\n"),
        ["loss.num_chunks = 7", "must divide training.seq_len (64)"],
    ),
    "too long": (with_("seq_len = 64", "seq_len = 10000000"), ["training.seq_len = 10000000", "must be at most"]),
    "sync_every 0": (with_("sync_every = 5", "sync_every = 0"), ["semi_sync.sync_every = 0", "must be at least 1"]),
    "delay": (
        with_("sync_every = 5", "sync_every = 5\nfragment_sync_delay = 5"),
        ["semi_sync.fragment_sync_delay = 5", "must be from 0 to 4"],
    ),
    "fragments": (
        with_("sync_every = 5", "sync_every = 60\nnum_fragments = 60"),
        ["semi_sync.num_fragments = 60", "must be between 1 and the number of layers"],
    ),
    "unknown module in a fragment": (
        with_("sync_every = 5", 'sync_every = 6\nfragments = [["layers.7"], ["norm"]]'),
        ["semi_sync", "layers.7", "matches no parameter"],
    ),
    "unknown method": (with_('"diloco"', '"dilocco"'), ['semi_sync.method = "dilocco"', "diloco"]),
    "min_sites": (
        with_("", "[replica]\nmin_sites = 3\n"),
        ["replica.min_sites = 3", "must be at most 2, the number of sites"],
    ),
    "timeouts": (
        with_("", "[replica]\nquorum_timeout_seconds = 0\n"),
        ["replica.quorum_timeout_seconds = 0", "above 0"],
    ),
    "weight 0": (
        with_('name = "beta"', 'name = "beta"\nweight = 0'),
        ['site "beta": weight = 0.0', "from 1e-06 to 1e+06"],
    ),
    "weight nan": (
        with_('name = "beta"', 'name = "beta"\nweight = nan'),
        ['site "beta": weight', "must be a number, got nan"],
    ),
    "no steps": (with_("steps = 20", "steps = 0"), ["training.steps = 0", "must be at least 1"]),
    "sites of two layouts": (
        with_("[semi_sync]", '[semi_sync]\npairing = "rank"') + "[site.parallelism]\ndata_parallel_shard_degree = 2\n",
        ['sites "alpha" and "beta" differ in parallelism.shard degree: 1 and 2', "ranks are paired"],
    ),
    "sites of two models": (f"{GOOD}[site.model]\nn_layers = 3\n", ["differ in model.n_layers: 2 and 3"]),
    "sites of two schedules": (
        f"{GOOD}[site.semi_sync]\nsync_every = 4\n",
        ["differ in semi_sync.sync_every: 5 and 4"],
    ),
    "sites that end at two steps": (
        f"{GOOD}[site.training]\nsteps = 30\n",
        ["differ in training.steps: 20 and 30"],
    ),
    "half a share": (
        with_('data = "builtin:docs"', 'data = {dataset = "builtin:docs", share_index = 1}'),
        ['site "beta": data.share_index', "go together"],
    ),
    "share out of range": (
        with_('data = "builtin:docs"', 'data = {dataset = "builtin:docs", share_index = 2, share_count = 2}'),
        ["data.share_index = 2", "must be from 0 to"],
    ),
    "optimizer": (with_("", '[optimizer]\nname = "AdmW"\n'), ['optimizer.name = "AdmW"', "did you mean AdamW?"]),
    "optimizer key": (with_("", "[optimizer]\nlearning_rate = 1\n"), ["optimizer.learning_rate: unknown key", "lr"]),
    "optimizer value": (with_("", "[optimizer]\nlr = -1\n"), ["optimizer.lr = -1.0", "must be at least 0"]),
    "two forms of optimizer": (
        with_("", '[optimizer]\nlr = 1e-3\n[[optimizer.param_groups]]\npattern = ".*"\noptimizer_name = "AdamW"\n'),
        ["optimizer.lr", "not both"],
    ),
    "activation checkpointing": (
        with_("", '[activation_checkpoint]\nmode = "none"\nmemory_budget = 0.3\n'),
        ["activation_checkpoint.memory_budget = 0.3", 'has no meaning with mode = "none"'],
    ),
    "torchtitan's own check": (
        with_("", "[checkpoint]\nkeep_latest_k = 1\n"),
        ["checkpoint.keep_latest_k = 1", "at least 2 checkpoint replicas"],
    ),
    "combination": (
        with_("", '[activation_checkpoint]\nmode = "memory_budget"\n'),
        ["compile.enable", "Memory budget activation checkpointing requires"],
    ),
    "no validation data": (with_("", "[validator]\nenable = true\n"), ["validator.dataloader.dataset", "is missing"]),
}


def checked(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and standard error of ``titan-ext check`` in this process."""
    from titan_ext import cli

    try:
        code = cli.main(["check", *arguments])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_broken_files_end_in_one_clear_line(case: str, write: Callable, capsys: pytest.CaptureFixture) -> None:
    text, fragments = CASES[case]
    code, output = checked([write(text)], capsys)
    assert code == 2
    (line,) = output.strip().splitlines()
    assert line.startswith("titan-ext: error: demo.toml: ")
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--training.stepz", "3"], ["flag --training.stepz: unknown key", "did you mean steps?"]),
        (["--trainin.steps", "3"], ["flag --trainin: unknown section", "did you mean training?"]),
        (
            ["--steps", "3"],
            ["flag --steps: unknown key", "did you mean training.steps or validator.steps or batch_warmup.steps?"],
        ),
        (["--training.steps", "many"], ['flag --training.steps = "many"', "must be an integer"]),
        (["--training.steps"], ["flag --training.steps", "needs a value"]),
        (["--semi_sync.sync_every=0"], ["flag --semi_sync.sync_every", "must be at least 1"]),
        (["--site", "gamma"], ['no site "gamma"', "allowed: alpha, beta"]),
    ],
)
def test_broken_flags_end_in_one_clear_line(
    flags: list[str], fragments: list[str], write: Callable, capsys: pytest.CaptureFixture
) -> None:
    code, output = checked([write(), *flags], capsys)
    assert code == 2
    (line,) = output.strip().splitlines()
    assert "demo.toml: " in line
    for fragment in fragments:
        assert fragment in line


def test_a_missing_file_names_its_neighbour(write: Callable, capsys: pytest.CaptureFixture) -> None:
    write()
    assert checked(["dem.toml"], capsys) == (2, "titan-ext: error: dem.toml: no such file; did you mean demo.toml?\n")


def test_a_malformed_tokenizer_is_named(write: Callable) -> None:
    Path("tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match='flag --tokenizer = "tokenizer.json": .*cannot read its tokenizer.json'):
        load_run(write(), ["--tokenizer", "tokenizer.json"])


def test_the_command_itself_exits_with_2(write: Callable) -> None:
    file = write(CASES["unknown key"][0])
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "titan_ext.cli", "check", file]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith("titan-ext: error: demo.toml: training.seqlen") and ended.stderr.count("\n") == 1


def test_an_unwritable_dump_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="dump_folder .*file/runs: cannot be written: Not a directory"):
        check_dump_folder(tmp_path / "file" / "runs")


@pytest.mark.parametrize(
    ("key", "flags"),
    [
        ("metrics.save_tb_folder", ["--metrics.enable_tensorboard"]),
        ("profiler.save_traces_folder", ["--profiler.enable_profiling", "--profiler.profile_freq=10"]),
        ("profiler.save_memory_snapshot_folder", ["--profiler.enable_memory_snapshot"]),
        ("checkpoint.folder", ["--checkpoint.enable"]),
        ("comm.save_traces_folder", ["--comm.trace_buf_size=10"]),
        ("debug.save_config_file", []),
    ],
)
@pytest.mark.parametrize("place", ["{file}/below", "log.txt/below"])
def test_every_folder_that_cannot_be_written_is_refused_by_its_key(
    key: str, flags: list[str], place: str, write: Callable, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "runs" / "alpha").mkdir(parents=True)
    (tmp_path / "runs" / "alpha" / "log.txt").write_text("")
    folder = place.format(file=tmp_path / "file") + ("/config.json" if key.endswith("file") else "")
    site = load_run(write(), [*flags, f"--{key}={folder}", f"--dump_folder={tmp_path / 'runs'}"]).sites[0]
    with pytest.raises(UserError, match=f"^{key} .*/below: cannot be written: Not a directory$"):
        check_outputs(site.config)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer_switch.betas=[0.9]"], "optimizer_switch.betas = [0.9]: must be 2 number(s)"),
        (
            ["--optimizer_switch.betas=[0.9,2.0]"],
            "optimizer_switch.betas = [0.9, 2.0]: must be numbers from 0 to below 1",
        ),
        (
            ["--optimizer_switch.omegas=[0.9]"],
            "optimizer_switch.omegas = [0.9]: must be left out: the optimizer has no omegas",
        ),
        (["--optimizer_switch.lr_scale=nan"], "optimizer_switch.lr_scale: must be a number, got nan"),
        (["--training.max_norm=nan"], "training.max_norm: must be a number, got nan"),
        (["--semi_sync.sync_every=0"], "semi_sync.sync_every = 0: must be at least 1"),
    ],
)
def test_flags_that_are_checked_before_anything_is_built(flags: list[str], words: str, write: Callable) -> None:
    with pytest.raises(UserError) as refused:
        load_run(write(), ["--optimizer_switch.step=5", *flags])
    assert f"flag --{words}" in str(refused.value)


def test_what_stands_in_a_files_place_is_refused(write: Callable) -> None:
    site = load_run(write()).sites[0]
    taken = Path(site.config.dump_folder) / "commits.jsonl"
    taken.mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"^dump_folder .*: commits.jsonl, which the run writes, is a folder there; move"
    ):
        check_outputs(site.config)
    taken.rmdir()
    taken.symlink_to("nowhere")
    with pytest.raises(UserError, match="commits.jsonl, which the run writes, is a link to nothing there"):
        check_outputs(site.config)
    taken.unlink()
    taken.touch()
    check_outputs(site.config)


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full: .* MiB free, .* MiB needed"):
        check_dump_folder(tmp_path, need_bytes=2**62)


def test_a_good_dump_folder_is_left_clean(tmp_path: Path) -> None:
    check_dump_folder(tmp_path / "runs" / "alpha")
    assert list((tmp_path / "runs" / "alpha").iterdir()) == []
