"""What is proposed for a name that nobody knows: never another run."""

from collections.abc import Callable

import pytest

from titan_ext.config import load_run
from titan_ext.errors import UserError, nearest

from .conftest import GOOD

HINTS = [
    # The section's own tables come before others, exact names before similar ones.
    ("validator.dataset", '"x"', "did you mean validator.dataloader.dataset?"),
    ("validator.split", '"train"', "did you mean validator.dataloader.split?"),
    ("training.text_key", '"x"', "did you mean data.text_key or validator.dataloader.text_key?"),
    ("training.lighthouse", '"x"', "did you mean replica.lighthouse?"),
    ("metrics.sync_every", "3", "did you mean semi_sync.sync_every?"),
    ("checkpoint.steps", "3", "did you mean training.steps or validator.steps or batch_warmup.steps?"),
    ("checkpoint.checkpoint_interval", "3", "did you mean interval?"),
    ("training.training_steps", "3", "did you mean steps?"),
    ("training.tensor_paralel_degree", "2", "did you mean parallelism.tensor_parallel_degree?"),
    ("model.tokenizer", '"x"', "did you mean tokenizer?"),
    ("semi_sync.sync_evry", "3", "did you mean sync_every?"),
    # Settings of one method or codec.
    ("semi_sync.density", "0.1", "did you mean semi_sync.topk.density?"),
    # Older torchtitan's names.
    ("checkpoint.enable_checkpoint", "true", "did you mean checkpoint.enable? (an older name)"),
    ("training.batch_size", "8", "did you mean training.local_batch_size? (an older name)"),
    ("training.compile", "true", "did you mean compile.enable? (an older name)"),
    ("training.dataset", '"c4"', "did you mean data.dataset? (an older form"),
    ("model.tokenizer_path", '"x"', "did you mean tokenizer? (an older form"),
    ("optimizer.beta1", "0.9", "did you mean optimizer.betas? (an older form"),
    ("lr_scheduler.lr_min", "0.1", "did you mean lr_scheduler.min_lr_factor? (an older name)"),
    ("validation.dataset", '"c4"', "did you mean validator.dataloader.dataset? (an older form"),
    ("profiling.profile_freq", "3", "did you mean profiler.profile_freq? (an older name)"),
    ("job.dump_folder", '"x"', "did you mean dump_folder? (an older name)"),
    ("float8.recipe_name", '"rowwise"', "no home here: quantized layers are [[model.converters]] tables"),
    # Other outer loops' names.
    ("semi_sync.sync_steps", "3", "did you mean semi_sync.sync_every? (another outer loop's name)"),
    ("semi_sync.should_quantize", "true", "did you mean semi_sync.codec?"),
    ("semi_sync.bucket_cap_mb", "3", "did you mean semi_sync.bucket_mib?"),
    ("fault_tolerance.num_fragments", "3", "did you mean semi_sync.num_fragments?"),
    ("diloco.inner_steps", "3", "did you mean semi_sync.sync_every?"),
    ("diloco.outer_lr", "0.7", "did you mean semi_sync.outer_lr?"),
]


@pytest.mark.parametrize(("key", "value", "advice"), HINTS)
def test_hints(key: str, value: str, advice: str, write: Callable) -> None:
    section, _, name = key.rpartition(".")
    with pytest.raises(UserError) as caught:
        load_run(write(GOOD), [f"--{key}={value}"])
    assert str(caught.value).startswith(f"demo.toml: flag --{section}.{name}: unknown key; "), caught.value
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("key", "advice"), [("densty", "did you mean density?"), ("sync_every", "did you mean semi_sync.sync_every?")]
)
def test_hints_in_the_table_of_a_codec(key: str, advice: str, write: Callable) -> None:
    with pytest.raises(UserError) as caught:
        load_run(write(GOOD), ["--semi_sync.codec=topk", f"--semi_sync.topk.{key}=3"])
    line = str(caught.value)
    assert line.startswith(f"demo.toml: flag --semi_sync.topk.{key}: unknown key; {advice}") and "\n" not in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.flavor", "7B"),
        ("model.flavor", "13B"),
        ("model.flavor", "1.5B"),
        ("model.name", "llama4"),
        ("semi_sync.codec", "int2"),
        ("semi_sync.codec", "fp8"),
        ("training.dtype", "float64"),
    ],
)
def test_another_number_is_another_thing(key: str, value: str, write: Callable) -> None:
    with pytest.raises(UserError) as caught:
        load_run(write(GOOD), [f"--{key}={value}"])
    text = str(caught.value)
    assert f'{key} = "{value}"' in text and "did you mean" not in text
    assert "allowed: " in text or "must be one of " in text


@pytest.mark.parametrize(
    ("name", "allowed", "found"),
    [
        ("seqlen", ["seq_len", "steps"], "seq_len"),
        ("AdmW", ["Adam", "AdamW", "SGD"], "AdamW"),
        ("adamw", ["Adam", "AdamW", "SGD"], "AdamW"),
        ("7B", ["8B", "70B", "7b"], "7b"),
        ("7B", ["8B", "70B"], None),
        ("int4", ["int8"], None),
        ("llama-3.1-8b", ["llama-3.1-70b", "llama-3.2-8b"], None),
        ("1f1", ["1F1B", "GPipe"], "1F1B"),
        ("elephant", ["Adam", "SGD"], None),
    ],
)
def test_nearest_names(name: str, allowed: list[str], found: str | None) -> None:
    assert nearest(name, allowed) == found


def test_many_old_keys_point_at_the_command(write: Callable) -> None:
    with pytest.raises(UserError) as caught:
        load_run(write('[job]\ndump_folder = "x"\n[profiling]\nprofile_freq = 3\n' + GOOD))
    head = str(caught.value).splitlines()[0]
    assert head.endswith("2 mistakes (for a file of torchtitan 0.1 or 0.2: titan-ext migrate demo.toml -o NEW.toml)")
