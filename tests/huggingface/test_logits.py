"""A folder's model computes here what its files say, whatever kind of Llama it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.huggingface.llamas import LLAMA_31, Llama, logits, write_llama
from titan_ext.config import load_site
from titan_ext.inference.checkpoint import find_checkpoint
from titan_ext.inference.model import load_model, logits_of

BASE = Llama()
KINDS = {
    "Llama 2": replace(BASE, kv_heads=4, theta=10000.0, scaling=None),
    "Llama 3": replace(BASE, scaling=None),
    "Llama 3.1": BASE,
    "Llama 3.2": replace(BASE, scaling=LLAMA_31 | {"factor": 32.0}, tied=True),
    "other factors": replace(
        BASE,
        scaling=LLAMA_31
        | {"factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0, "original_max_position_embeddings": 200},
    ),
    "rope_parameters": replace(BASE, rope_parameters=True),
    "rope_parameters of Llama 2": replace(BASE, kv_heads=4, theta=10000.0, scaling=None, rope_parameters=True),
    "one head of keys": replace(BASE, kv_heads=1),
    "as many heads of keys": replace(BASE, kv_heads=4),
    "wide heads": replace(BASE, head_dim=32),
    "large eps": replace(BASE, eps=0.03),
    "tied": replace(BASE, tied=True),
    "more rows than tokens": replace(BASE, vocabulary=301),
    "three files": replace(BASE, files=3),
    "bf16": replace(BASE, dtype=torch.bfloat16),
    "fp16, two files": replace(BASE, dtype=torch.float16, files=2),
    "other sizes": Llama(dim=96, layers=3, heads=6, kv_heads=3, ffn_dim=160),
}

RUN = """
[model]
name = "NAME"
EXTRA
[training]
seq_len = 96
mixed_precision_param = "float32"
[[site]]
name = "a"
data = "builtin:code"
"""
TOKENS = torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(96).expand(2, 96)


def computed(folder: Path, config: Path, name: str = "llama3", extra: str = "") -> torch.Tensor:
    """Logits of the folder's model by a run that says nothing of its sizes."""
    config.write_text(RUN.replace("NAME", name).replace("EXTRA", extra))
    site = load_site(config, weights=folder)
    with torch.no_grad():
        return logits_of(load_model(site, find_checkpoint(str(folder), Path())), TOKENS, POSITIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_equations_give_the_same_logits(kind, tmp_path):
    llama = KINDS[kind]
    folder = write_llama(tmp_path / "model", llama)
    expected = logits(folder, llama, TOKENS)
    assert expected.std() > 1
    torch.testing.assert_close(computed(folder, tmp_path / "run.toml").double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_logits(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_llama(tmp_path / "model", KINDS[kind])
    with torch.no_grad():
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(computed(folder, tmp_path / "run.toml"), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["Llama 2", "Llama 3.2", "wide heads"])
def test_what_transformers_writes_is_read(kind, tmp_path):
    """Its ``config.json`` has other fields, and other names of them, than the folders here."""
    transformers = pytest.importorskip("transformers")
    folder = write_llama(tmp_path / "model", KINDS[kind])
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    expected = logits(folder, KINDS[kind], TOKENS)
    found = computed(tmp_path / "theirs", tmp_path / "run.toml")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, extra", [("dept", ""), ("abbie", "iterations = 1")])
@pytest.mark.parametrize("kind", ["Llama 2", "Llama 3.2"])
def test_models_of_the_same_layout_take_the_sizes_too(name, extra, kind, tmp_path):
    folder = write_llama(tmp_path / "model", KINDS[kind])
    expected = logits(folder, KINDS[kind], TOKENS)
    found = computed(folder, tmp_path / "run.toml", name, extra)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_the_reference_tells_kinds_apart(tmp_path):
    """What a kind has of its own moves the logits by far more than the tolerance."""
    folder = write_llama(tmp_path / "model", BASE)
    same_weights = ["Llama 3", "other factors", "large eps"]
    expected = logits(folder, BASE, TOKENS)
    for kind in same_weights:
        assert (logits(folder, KINDS[kind], TOKENS) - expected).abs().max() > 0.1, kind
