"""What titan_ext writes, read by others: an exported folder by transformers and lm-eval, a checkpoint by torch alone."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from titan_ext.bench.conformance.checks import Check, Part, close
from titan_ext.data import ByteTokenizer
from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.models import small_sizes
from titan_ext.export.folder import write_folder
from titan_ext.models import get_model_spec
from titan_ext.models.attention import use_packed_attention

_TOKENS, _LENGTH = 24, 64

# Run in a process of its own, in which importing titan_ext fails.
_READER = """
import sys
sys.modules["titan_ext"] = None
import torch, torch.distributed.checkpoint as dcp
reader = dcp.FileSystemReader(sys.argv[1])
metadata = reader.read_metadata().state_dict_metadata
state = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in metadata.items() if hasattr(each, "size")}
dcp.load(state, storage_reader=reader, no_dist=True)
torch.save(state, sys.argv[2])
"""


def _transformers(part: str) -> Iterator[Check]:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(VOCABULARY, (2, _TOKENS), generator=torch.Generator().manual_seed(8))
    positions = torch.arange(_TOKENS).expand(2, -1)
    with _exported() as (folder, model), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        ours = model(tokens, positions, model.get_attention_masks(positions))
    yield close(
        part, "logits of an exported model in AutoModelForCausalLM", ours[..., : theirs.shape[-1]], theirs, 1e-4
    )


def _lm_eval(part: str) -> Iterator[Check]:
    """lm-evaluation-harness's own reader of the folder against the model in memory, which ``titan-ext eval`` gives it."""
    from titan_ext.inference.tasks import prepare_harness

    prepare_harness()
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from titan_ext.inference.harness import HarnessModel

    pairs = [("def f(self):\n    return", " self"), ("ab", " a longer continuation"), ("import os\nimport", " sys")]
    asked = {
        "loglikelihood": [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)],
        "loglikelihood_rolling": [
            Instance("loglikelihood_rolling", {}, (first * 9,), place) for place, (first, _) in enumerate(pairs)
        ],
    }
    with _exported() as (folder, model):
        ours = HarnessModel(model, ByteTokenizer(), VOCABULARY, iterations=None, length=_LENGTH, batch_size=2)
        for kind, requests in asked.items():
            # HFLM puts the mark of the beginning before windows by itself; asked for, it would stand there twice.
            marked = kind == "loglikelihood"
            theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", add_bos_token=marked, max_length=_LENGTH)
            our_scores, their_scores = (torch.tensor(_likelihoods(each, kind, requests)) for each in (ours, theirs))
            yield close(part, f"{kind} of an exported model by HFLM", our_scores, their_scores, 1e-4)


def _likelihoods(model: Any, kind: str, requests: list[Any]) -> list[float]:
    found = getattr(model, kind)(requests, disable_tqdm=True)
    return [each[0] if isinstance(each, tuple) else each for each in found]


@contextmanager
def _exported() -> Iterator[tuple[str, Any]]:
    """A folder with a small model in Hugging Face's layout, and the model."""
    spec = get_model_spec("llama3", "tiny", vocab_size=VOCABULARY, **small_sizes(64, 2, _LENGTH))
    model = use_packed_attention(spec.model).build()
    torch.manual_seed(7)
    with torch.no_grad():
        model.init_weights()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), model, spec, tokenizer=ByteTokenizer(), assets="")
        yield folder, model


def _plain_checkpoint(part: str) -> Iterator[Check]:
    """The outer loop's state after rounds, as torchtitan's checkpointer writes it, read without titan_ext."""
    from titan_ext.semi_sync import SemiSyncConfig
    from titan_ext.semi_sync.testing import InProcessSites

    torch.manual_seed(9)
    first = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    models = [first, nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))]
    models[1].load_state_dict(first.state_dict())
    sites = InProcessSites(2)
    outer = sites.outer_loops(SemiSyncConfig(method="diloco", sync_every=1), models)
    for _ in range(3):
        for place, model in enumerate(models):
            for parameter in model.parameters():
                parameter.data.add_(0.1 * (place + 1))
        sites.at_once(lambda site: outer[site].step())
    expected = {name: value.clone() for name, value in outer[0].global_parameters().items()}
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(
            {"model": models[0].state_dict(), "semi_sync": outer[0].state_dict()},
            checkpoint_id=f"{folder}/step",
            no_dist=True,
        )
        command = [sys.executable, "-c", _READER, f"{folder}/step", f"{folder}/read.pt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            yield Check(part=part, name="all", outcome="differs", detail=done.stderr.strip().splitlines()[-1])
            return
        state = torch.load(f"{folder}/read.pt")
    sites.at_once(lambda site: outer[site].finish())
    sites.close()
    for name, value in expected.items():
        found = [
            each for key, each in state.items() if key.startswith("semi_sync.") and name in key and _is(each, value)
        ]
        held = bool(found) and _is(state[f"model.{name}"], value)
        text = (
            "bit-equal in the model's and in the outer loop's part"
            if held
            else f"not found; keys: {', '.join(state)[:200]}"
        )
        yield Check(part=part, name=f"global {name}", outcome="holds" if held else "differs", detail=text)


def _is(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.equal(found, wanted)


LM_EVAL = Part({"lm_eval": "lm-eval", "transformers": "transformers", "accelerate": "accelerate"}, _lm_eval)
TRANSFORMERS = Part({"transformers": "transformers"}, _transformers)
PLAIN_CHECKPOINT = Part({}, _plain_checkpoint)
