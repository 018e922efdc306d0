"""The methods of the package, one file each; importing it registers them."""

from titan_ext.semi_sync.methods import (  # noqa: F401
    decoupled_diloco,
    demo,
    des_loc,
    diloco,
    eager_diloco,
    local_sgd,
    lordo,
    mt_dao,
    noloco,
    sparsyfed,
    sparta,
    worldlm,
)
