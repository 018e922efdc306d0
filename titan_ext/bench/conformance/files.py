"""What titan_ext writes, read by others: an exported folder by transformers, a checkpoint by torch alone."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from titan_ext.bench.conformance.checks import Check, Part, close

_TOKENS = 24

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

    from titan_ext.data import ByteTokenizer
    from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
    from titan_ext.experiments.models import small_sizes
    from titan_ext.export.folder import write_folder
    from titan_ext.models import get_model_spec
    from titan_ext.models.attention import use_packed_attention

    spec = get_model_spec("llama3", "tiny", vocab_size=VOCABULARY, **small_sizes(64, 2, 64))
    model = use_packed_attention(spec.model).build()
    torch.manual_seed(7)
    with torch.no_grad():
        model.init_weights()
    tokens = torch.randint(VOCABULARY, (2, _TOKENS), generator=torch.Generator().manual_seed(8))
    positions = torch.arange(_TOKENS).expand(2, -1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_folder(Path(folder), model, spec, tokenizer=ByteTokenizer(), assets="")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        ours = model(tokens, positions, model.get_attention_masks(positions))
    yield close(
        part, "logits of an exported model in AutoModelForCausalLM", ours[..., : theirs.shape[-1]], theirs, 1e-4
    )


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


TRANSFORMERS = Part({"transformers": "transformers"}, _transformers)
PLAIN_CHECKPOINT = Part({}, _plain_checkpoint)
