"""Values of the right type that nothing can be set to: each key is named with what is allowed, many in one call."""

import pytest

from titan_ext.config import load_site
from titan_ext.config.settings import hint
from titan_ext.errors import UserError

HUGE = 2**80
RECOMPUTED = "activation_checkpoint.force_recompute_mm_shapes_by_fqns"
REFUSED = {
    "training.steps": (HUGE, "below 2**63"),
    "training.seq_len": (-HUGE, "below 2**63"),
    "model.n_layers": (2**40, "at most 10000"),
    "model.dim": (2**50, "at most 2147483647"),
    "training.max_norm": ("nan", "got nan"),
    "lr_scheduler.stretch": ("inf", "finite"),
    "lr_scheduler.min_lr_factor": ("1e-300", "must be 0 or from 1e-38 to 1e+38"),
    "lr_scheduler.warmup_steps": (-1, "at least 0"),
    "optimizer.lr": ("1e300", "must be 0 or from"),
    "optimizer.eps": (0, "must be above 0: what has had no gradient"),
    "optimizer.weight_decay": ("-inf", "at least 0"),
    "profiler.profiler_active": (0, "at least 1"),
    "profiler.profiler_warmup": (-1, "at least 0"),
    "profiler.profiler_repeat": (-3, "at least 0"),
    "profiler.memory_snapshot_freq": (0, "at least 1"),
    "metrics.save_tb_folder": (r'"a\u0000b"', "NUL"),
    "checkpoint.folder": (r'"\u0000"', "NUL"),
    "semi_sync.bucket_mib": ("inf", "finite"),
    "replica.timeout_seconds": ("inf", "finite"),
    "spikes.deviations": ("nan", "got nan"),
    "activation_checkpoint.determinism_check": ("always", "allowed: default, none"),
    "parallelism.context_parallel_load_balancer": ("headtails", "did you mean headtail?"),
    "hf_assets_path": ("assets/Llama", "the key tokenizer names the tokenizer's folder"),
    "semi_sync.num_fragments": (2**62, "a divisor of sync_every (5)"),
}
OF_DATA = [
    (["--data.num_workers=1000000"], "data.num_workers = 1000000: must be from 0 to 1024"),
    (["--data.prefetch_factor=2"], "data.prefetch_factor = 2: must be left out without data.num_workers"),
    (["--data.persistent_workers"], "data.persistent_workers = true: must be left out without"),
    (["--data.num_workers=1", "--data.prefetch_factor=-1"], "data.prefetch_factor = -1: must be at least 1"),
    (['--data.text_key=" "'], "data.text_key"),
    (['--data.dataset=""'], "data: is missing"),
    (['--data.dataset="  "'], "data: is missing"),
]


def test_values_that_no_key_can_have(write):
    flags = [f"--{key}={value}" for key, (value, _) in REFUSED.items()]
    with pytest.raises(UserError) as raised:
        load_site(write(), "alpha", flags)
    lines = str(raised.value).splitlines()
    for key, (_, words) in REFUSED.items():
        assert any(f"--{key}" in line and words in line for line in lines), key


@pytest.mark.parametrize("flags, words", OF_DATA)
def test_values_of_data_that_no_run_can_have(flags, words, write):
    with pytest.raises(UserError) as raised:
        load_site(write(), "alpha", flags)
    assert words in str(raised.value)


def test_a_product_of_sizes_that_no_memory_holds(write):
    sizes = [
        "--model.dim=2147483646",
        "--model.n_heads=2",
        "--model.ffn_dim=2147483647",
        "--model.vocab_size=2147483647",
    ]
    with pytest.raises(UserError, match=r"\[model\]: cannot be built"):
        load_site(write(), "alpha", [*sizes, "--model.head_dim=2147483646"])


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--model.attn_backend=flax", "must be one of flex, flex_flash, varlen (did you mean 'flex'?)"),
        ("--model.attn_backend=sdpa", "must be one of flex, flex_flash, varlen"),
        (f'--{RECOMPUTED}=["feed_foward"]', "fits no linear layer of a block, such as layers.0."),
        (f'--{RECOMPUTED}=["attention"]', "fits layers.0.attention too, which is no linear layer"),
        (f'--{RECOMPUTED}=["feed_forward.w1"]', ""),
    ],
)
def test_words_of_the_model_that_torchtitan_alone_reads(flag, words, write):
    if not words:
        load_site(write(), "alpha", [flag])
        return
    with pytest.raises(UserError) as raised:
        load_site(write(), "alpha", [flag])
    assert flag.split("=")[0] in str(raised.value) and words in str(raised.value)


def test_infinity_turns_clipping_off(write):
    assert load_site(write(), "alpha", ["--training.max_norm=inf"]).config.training.max_norm == float("inf")


@pytest.mark.parametrize(
    "flags, note",
    [
        (["--lr_scheduler.warmup_steps=99"], "lr_scheduler.warmup_steps (99) is cut to the 20 steps"),
        (["--lr_scheduler.warmup_steps=9", "--lr_scheduler.stretch=3"], "(27) is cut to the 20 steps"),
        (
            ["--lr_scheduler.warmup_steps=9", "--lr_scheduler.decay_ratio=0.8"],
            "decay_ratio (16 steps) is cut to the 11 steps",
        ),
        (["--lr_scheduler.warmup_steps=9", "--lr_scheduler.decay_ratio=0.5"], ""),
    ],
)
def test_a_schedule_that_is_cut_is_noted(flags, note, write):
    notes = [each for each in load_site(write(), "alpha", flags).notes if each.startswith("lr_scheduler")]
    assert (note in notes[0]) if note else not notes


@pytest.mark.parametrize(
    "name, words",
    [
        ("\u0410damW", "did you mean AdamW? (it has a CYRILLIC CAPITAL LETTER A in it; allowed: "),
        ("AdamW\u200b", "did you mean AdamW? (it has a ZERO WIDTH SPACE in it; allowed: "),
    ],
)
def test_letters_that_look_like_others_are_named(name, words):
    assert hint(name, ["AdamW", "SGD"]).startswith(words)
