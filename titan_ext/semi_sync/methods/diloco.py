"""DiLoCo (arXiv 2311.08105), Streaming DiLoCo (arXiv 2501.18512) and MuLoCo (arXiv 2505.23725)."""

from titan_ext.semi_sync.methods.local_sgd import local_sgd
from titan_ext.semi_sync.methods.registry import register_method

# DiLoCo is Local SGD whose averaged pseudo-gradient an outer Nesterov optimizer takes; its
# streaming form staggers the fragments (algorithm 2 with offsets t_p), applies them tau steps late
# and mixes with alpha. The plan is therefore the same table with other defaults.
_NESTEROV = {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True}
register_method("diloco", outer={"sgd": _NESTEROV}, sync_every=32, outer_optimizer="sgd")(local_sgd)

# MuLoCo is DiLoCo around Muon ([optimizer] name = "Muon"); its pseudo-gradients bear 4 bits (codec = "int4").
register_method(
    "muloco",
    outer={"sgd": _NESTEROV | {"outer_momentum": 0.6}},
    inner="Muon",
    sync_every=30,
    outer_optimizer="sgd",
)(local_sgd)
