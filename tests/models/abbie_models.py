"""Tiny AbbIE models for the tests, and the recurrence written out from the papers' table."""

import copy

import torch
from torch import nn

from titan_ext.models import get_model_spec
from titan_ext.models.attention import document_causal_mask, use_packed_attention

ROWS, LENGTH, VOCABULARY = 2, 24, 64
SMALL = {"dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": VOCABULARY}
SPLIT = {"head_layers": 1, "body_layers": 2}


def build(name: str = "abbie", flavor: str = "tiny", seed: int = 0, **overrides) -> nn.Module:
    """An initialised model in evaluation mode."""
    overrides = SMALL | (SPLIT if name == "abbie" else {}) | overrides
    config = get_model_spec(name, flavor, **overrides).model
    return initialised(config, seed)


def initialised(config, seed: int = 0) -> nn.Module:
    config = use_packed_attention(config)
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    with torch.no_grad():
        model.init_weights()
    return model.eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass: two rows of packed documents."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).remainder(17).expand(ROWS, LENGTH)
    return {"tokens": tokens, "positions": positions, "attention_masks": document_causal_mask(positions)}


def unrolled(model: nn.Module, r: int, skip: str, final_skip: bool) -> tuple[torch.Tensor, list[list[nn.Module]]]:
    """Logits by untied copies of the body, one an iteration, and those copies."""
    inputs = batch()
    through = lambda blocks, h: [h := block(h, inputs["attention_masks"], inputs["positions"]) for block in blocks][-1]
    blocks = list(model.layers.values())
    head, body, tail = blocks[:1], blocks[1:3], blocks[3:]
    clones = [copy.deepcopy(body) for _ in range(r)]
    h0 = u = through(head, model.tok_embeddings(inputs["tokens"]))
    for k in range(r):
        y = through(clones[k], u)
        add = k < r - 1 or final_skip
        u = y if skip == "none" or not add else y + (u if skip == "prev" else h0)
    return model.lm_head(model.norm(through(tail, u))), clones
