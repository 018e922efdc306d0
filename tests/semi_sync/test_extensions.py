"""What a user adds from outside the package: one file and one registration each, selected from TOML by its dotted path.

Each file is written by the test into a package on ``sys.path``, chosen by a configuration that is loaded as ``titan-ext
check`` and ``train`` load it, and run for some rounds; what comes out is compared with the arithmetic written out.
"""

import sys
from contextlib import ExitStack
from textwrap import dedent

import pytest
import torch

from titan_ext import cli
from titan_ext.config import load_site
from titan_ext.semi_sync.methods.registry import METHODS
from titan_ext.semi_sync.plan.weighting import WEIGHTINGS
from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.aggregations import AGGREGATIONS
from titan_ext.semi_sync.wire.codecs import CODECS

PACKAGE = "package_of_a_user"

METHOD = """
from dataclasses import dataclass
import torch
from titan_ext.semi_sync import Apply, MethodContext, SyncRule, register_method
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, SyncedState

@dataclass(frozen=True, kw_only=True)
class ElasticSettings:
    pull: float = 0.5
    '''Share of the way to the mean that a site goes, above 0 and at most 1.'''

    def __post_init__(self):
        if not 0 < self.pull <= 1:
            raise ValueError(f"pull = {self.pull}: must be above 0 and at most 1")

@dataclass(frozen=True, kw_only=True)
class PullTogether(Apply):
    pull: float

    def bind(self, rule, tensors, options=BindOptions()):
        return ElasticParameters(rule, tensors, options)

class ElasticParameters(SyncedState):
    '''Sites keep different parameters; each goes some of the way to their mean.'''

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        means = self.tensors.split(of.mean(total))
        for local, mean in zip(self.tensors.locals(), means, strict=True):
            local.lerp_(mean, self.rule.apply.pull)

@register_method("elastic", settings=ElasticSettings, fixed={"outer_optimizer": "average"}, sync_every=2, outer_optimizer="average")
def elastic(context: MethodContext) -> list[SyncRule]:
    apply = PullTogether(pull=context.settings.pull)
    return [SyncRule(period=context.sync_every, wire=context.wire, apply=apply)]
"""

CODEC = """
from dataclasses import dataclass
import torch
from titan_ext.semi_sync import Codec, register_codec

@register_codec("fixed_point")
@dataclass(frozen=True)
class FixedPoint(Codec):
    '''Two bytes an element: whole multiples of a step.'''

    unit: float = 0.01

    def wire_bytes(self, numel):
        return 2 * numel

    def encode(self, values, message):
        message.view(torch.int16).copy_((values / self.unit).round_())

    def decode(self, message, values):
        torch.mul(message.view(torch.int16), self.unit, out=values)

    def accumulate(self, message, values):
        values.add_(message.view(torch.int16), alpha=self.unit)
"""

OUTER_OPTIMIZER = """
from dataclasses import dataclass
import torch
from titan_ext.semi_sync import OuterOptimizer, register_outer_optimizer

class SignDescent(torch.optim.Optimizer):
    def __init__(self, parameters, lr, dead_zone):
        super().__init__(parameters, {"lr": lr, "dead_zone": dead_zone})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                each.sub_(each.grad.sign() * (each.grad.abs() > group["dead_zone"]), alpha=group["lr"])

@register_outer_optimizer("sign_descent")
@dataclass(frozen=True, kw_only=True)
class SignDescentSettings(OuterOptimizer):
    dead_zone: float = 0.0
    '''Pseudo-gradients up to this size move nothing.'''

    def create(self, parameters):
        return SignDescent(parameters, self.lr, self.dead_zone)
"""

ELEMENTWISE = """
from dataclasses import dataclass
import torch
from titan_ext.semi_sync import ElementwiseAggregation, register_aggregation

@register_aggregation("bounded_mean")
@dataclass(frozen=True)
class BoundedMean(ElementwiseAggregation):
    '''The mean of the contributions, each cut off at a bound.'''

    bound: float = 1.0

    def combine(self, contributions):
        return contributions.clamp_(-self.bound, self.bound).mean(0)
"""

WHOLE = """
from dataclasses import dataclass
import torch
from titan_ext.semi_sync import WholeAggregation, register_aggregation

@register_aggregation("krum")
@dataclass(frozen=True)
class Krum(WholeAggregation):
    '''The contribution that is nearest to its nearest neighbours (Blanchard et al. 2017, section 4).'''

    byzantine: int = 0
    '''Sites that may send anything.'''

    def combine(self, contributions, rank_sum):
        squares = rank_sum((contributions[:, None] - contributions[None]).square().sum(-1))
        neighbours = max(1, len(contributions) - self.byzantine - 2)
        scores = squares.sort(dim=1).values[:, 1 : 1 + neighbours].sum(1)
        return contributions[scores.argmin()]
"""

WEIGHTING = """
from dataclasses import dataclass
from titan_ext.semi_sync import SiteWeighting, register_weighting

@register_weighting("root_of_tokens")
@dataclass(frozen=True)
class RootOfTokens(SiteWeighting):
    power: float = 0.5

    def own_weight(self, work):
        return work.tokens ** self.power
"""

RUN = """
[model]
flavor = "tiny"
[training]
seq_len = 64
steps = 40
[semi_sync]
{outer}
{sites}
"""
STARTS = torch.tensor([[1.0, -2.0, 0.3, 0.004, -0.7], [2.0, 1.0, -0.3, 0.002, -0.7], [-30.0, 8.0, 90.0, -70.0, 50.0]])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module of the package and a configuration that uses it; afterwards nothing of either is left."""
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def write(module: str, source: str, outer: str, sites: int = 2):
        (package / f"{module}.py").write_text(dedent(source))
        tables = "".join(f'[[site]]\nname = "site{index}"\ndata = "builtin:code"\n' for index in range(sites))
        path = tmp_path / "run.toml"
        path.write_text(RUN.format(outer=outer, sites=tables))
        return path

    with ExitStack() as registries:
        for registry in (METHODS, CODECS, AGGREGATIONS, OUTER_OPTIMIZERS, WEIGHTINGS):
            registries.enter_context(registry.isolated())
        yield write
    for name in [each for each in sys.modules if each.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def run_rounds(path, sites: int, rounds: int = 1):
    """The parameters of every site, by round: [rounds, sites, 5]. Each site adds its start to them in every round."""
    config = load_site(path, "site0").config.semi_sync
    simulated = InProcessSites(sites)
    models = [torch.nn.Linear(5, 1, bias=False) for _ in range(sites)]
    for model in models:
        model.weight.data.zero_()
    outer = simulated.outer_loops(config, models)
    seen = []
    for _ in range(rounds):
        for model, start in zip(models, STARTS):
            model.weight.data += start
        for _ in range(config.sync_every):
            simulated.at_once(lambda site: outer[site].step(tokens=site + 1))
        seen.append(torch.stack([model.weight.detach()[0] for model in models]).clone())
    simulated.at_once(lambda site: outer[site].finish())
    simulated.close()
    return torch.stack(seen), outer


def checked(path, capsys) -> str:
    assert cli.main(["check", str(path)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("pull", [0.25, 1.0])
def test_a_method_with_a_setting_of_its_own(write, capsys, pull):
    outer = f'method = "{PACKAGE}.elastic"\nsync_every = 3\n[semi_sync.elastic]\npull = {pull}'
    path = write("elastic", METHOD, outer)
    seen, _ = run_rounds(path, 2, rounds=3)
    local = torch.zeros(2, 5)
    for round_ in range(3):
        local = local + STARTS[:2]
        local = local + pull * (local.mean(0) - local)
        torch.testing.assert_close(seen[round_], local)
    shown = checked(path, capsys)
    assert f'method = "{PACKAGE}.elastic"' in shown and f"elastic.pull = {pull} " in shown


def test_a_codec_with_a_setting_of_its_own(write, capsys):
    unit = 0.25
    outer = (
        f'method = "local_sgd"\nsync_every = 2\ncodec = "{PACKAGE}.fixed_point"\n[semi_sync.fixed_point]\nunit = {unit}'
    )
    path = write("fixed_point", CODEC, outer)
    seen, loops = run_rounds(path, 2)
    # What travels is the difference to the global value, here minus the start.
    total = (-STARTS[:2] / unit).round().mul(unit).sum(0)
    torch.testing.assert_close(seen[0], (-total / 2).expand(2, 5))
    # Two bytes an element, of which there are five.
    assert loops[0].ledger.bytes_sent == 2 * 5
    assert f"fixed_point.unit = {unit} " in checked(path, capsys)


def test_an_outer_optimizer_with_a_setting_of_its_own(write, capsys):
    outer = (
        f'method = "diloco"\nsync_every = 2\nouter_optimizer = "{PACKAGE}.sign_descent"\nouter_lr = 0.125\n'
        "[semi_sync.sign_descent]\ndead_zone = 0.01"
    )
    path = write("sign_descent", OUTER_OPTIMIZER, outer)
    seen, _ = run_rounds(path, 2, rounds=2)
    value = torch.zeros(5)
    for round_ in range(2):
        gradient = -STARTS[:2].mean(0)  # global minus local: what the sites added
        value = value - 0.125 * gradient.sign() * (gradient.abs() > 0.01)
        torch.testing.assert_close(seen[round_], value.expand(2, 5))
    shown = checked(path, capsys)
    assert "sign_descent.dead_zone = 0.01 " in shown and "outer_lr = 0.125 " in shown


def test_an_elementwise_aggregation_with_a_setting_of_its_own(write, capsys):
    outer = (
        f'method = "local_sgd"\nsync_every = 2\nbucket_mib = 8e-6\naggregation = "{PACKAGE}.bounded_mean"\n'
        "[semi_sync.bounded_mean]\nbound = 1.5"
    )
    path = write("bounded_mean", ELEMENTWISE, outer)
    seen, _ = run_rounds(path, 2)
    torch.testing.assert_close(seen[0], STARTS[:2].clamp(-1.5, 1.5).mean(0).expand(2, 5))
    assert "bounded_mean.bound = 1.5 " in checked(path, capsys)


def test_an_aggregation_that_sees_whole_contributions(write, capsys):
    """In buckets of two elements: which site is nearest to another is not decided bucket by bucket."""
    outer = (
        f'method = "local_sgd"\nsync_every = 2\noutlier_threshold = 0.0\nbucket_mib = 8e-6\naggregation = "{PACKAGE}.krum"\n'
        "[semi_sync.krum]\nbyzantine = 1"
    )
    path = write("krum", WHOLE, outer, sites=3)
    seen, _ = run_rounds(path, 3)
    scores = [min((STARTS[a] - STARTS[b]).square().sum().item() for b in range(3) if b != a) for a in range(3)]
    chosen = scores.index(min(scores))
    assert chosen != 2, "the third site is far from both others"
    assert torch.equal(seen[0], STARTS[chosen].expand(3, 5))
    assert "krum.byzantine = 1 " in checked(path, capsys)


def test_a_policy_of_weights_with_a_setting_of_its_own(write, capsys):
    outer = (
        f'method = "local_sgd"\nsync_every = 2\nweighting = "{PACKAGE}.root_of_tokens"\n'
        "[semi_sync.root_of_tokens]\npower = 2.0"
    )
    path = write("root_of_tokens", WEIGHTING, outer)
    seen, _ = run_rounds(path, 2)
    torch.testing.assert_close(seen[0], ((4 * STARTS[0] + 16 * STARTS[1]) / 20).expand(2, 5))
    assert "root_of_tokens.power = 2.0 " in checked(path, capsys)


@pytest.mark.parametrize(
    ("module", "source", "outer", "problem"),
    [
        ("elastic", METHOD, 'method = "{}.elastic"\n[semi_sync.elastic]\npull = 1.5', "pull = 1.5: must be above 0"),
        (
            "elastic",
            METHOD,
            'method = "{}.elastic"\n[semi_sync.elastic]\npul = 0.5',
            "semi_sync.elastic.pul: unknown key",
        ),
        ("krum", WHOLE, 'aggregation = "{}.krum"\n[semi_sync.krum]\nbyzantine = "two"', "semi_sync.krum.byzantine"),
        ("krum", WHOLE, 'aggregation = "{}.multi_krum"', "multi_krum"),
        ("broken", "import no_such_package_at_all", 'codec = "{}.broken"', "no_such_package_at_all"),
        ("empty", "", 'codec = "{}.empty"', "registers no codec"),
    ],
    ids=["value", "key", "type", "name", "import", "registration"],
)
def test_what_is_wrong_with_it_is_said_in_one_line(write, capsys, module, source, outer, problem):
    path = write(module, source, outer.format(PACKAGE))
    assert cli.main(["check", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert problem in line and str(path) in line
