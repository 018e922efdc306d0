"""Many sites in one process: to develop a method, codec or aggregation, and to test it, without a network.

Each site has a model, an optimizer and the real outer loop; what stands in for the network copies tensors between
threads. Inner steps are the caller's. The outer loops' calls (``join``, ``step``, ``finish``) wait for all sites, so all
sites make them at once:

>>> import torch
>>> from titan_ext.semi_sync import SemiSyncConfig
>>> from titan_ext.semi_sync.testing import InProcessSites
>>> models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
>>> for model in models:
...     model.weight.data.fill_(0.0)  # doctest: +ELLIPSIS
tensor(...
tensor(...
>>> sites = InProcessSites(2)
>>> outer = sites.outer_loops(SemiSyncConfig(method="local_sgd", sync_every=2), models)
>>> for step in range(1, 5):
...     for site, model in enumerate(models):
...         model.weight.data += site + 1  # the inner step: 1 at one site, 2 at the other
...     _ = sites.at_once(lambda site: outer[site].step())
...     print(step, [model.weight.item() for model in models])
1 [1.0, 2.0]
2 [3.0, 3.0]
3 [4.0, 5.0]
4 [6.0, 6.0]
>>> outer[0].ledger.rounds, outer[0].ledger.bytes_sent
(2, 8)
>>> _ = sites.at_once(lambda site: outer[site].finish())
>>> sites.close()

An optimizer is given as the third argument where a method syncs its states. A method of your own is in the
configuration by its registered name or its dotted path, as in a file; a configuration that ``titan_ext.config.load_site``
has loaded has one in ``.config.semi_sync``. The sites never fail, come or go, and they have one rank each: what happens
then is tested with processes (``titan-ext bench chaos``).
"""

from titan_ext.semi_sync.testing.simulator import InProcessManager, InProcessSites

__all__ = ["InProcessManager", "InProcessSites"]
