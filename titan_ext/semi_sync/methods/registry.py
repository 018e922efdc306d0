"""The methods by name; each is a file of its own that registers a function from settings to rules.

Registering makes ``method = "name"`` work everywhere: TOML, ``titan-ext check``, the engine. A method from outside
the package is named by its dotted path, whose module registers it when it is imported.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_ext.optim.moments import Moment
from titan_ext.semi_sync.plan.plan import ScopePatterns
from titan_ext.semi_sync.plan.rule import SyncRule, Wire
from titan_ext.semi_sync.registry import Registry
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer

MomentsKept = Callable[[], Iterable[tuple[int, Mapping[str, Moment]]]]
"""For each trained parameter of the site its elements and the moments that the inner optimizer keeps of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodContext:
    """What a method makes its rules from: the settings that all methods share, resolved."""

    sync_every: int
    """Inner steps between two syncs of the same parameters (K, H)."""
    num_fragments: int = 1
    delay: int = 0
    """Inner steps that overlap an exchange (tau)."""
    mixing: float = 0.0
    """Share of the local parameters kept when a result is applied (alpha)."""
    outer_optimizer: OuterOptimizer | None = None
    """None is the plain mean."""
    wire: Wire = Wire()
    moments: MomentsKept | None = None
    """The moments of the inner optimizer, where it is known; asked where a method's rules follow from them."""
    settings: Any = None
    """The method's own: an instance of the dataclass that it is registered with."""

    @property
    def spacing(self) -> int:
        """Inner steps between the launches of two fragments."""
        return self.sync_every // self.num_fragments

    def staggered_offset(self, fragment: int) -> int:
        """Offset of a fragment: the last is due after every multiple of a period, the others so many steps earlier."""
        return -(self.num_fragments - 1 - fragment) * self.spacing


Scopes = Callable[[Any], Sequence[ScopePatterns]]
"""From the method's own settings to the scopes that its rules speak of."""

MakeRules = Callable[[MethodContext], Sequence[SyncRule]]
Notes = Callable[[Sequence[Mapping[str, Any]]], list[str]]
"""What a user should know of a method's use with an inner optimizer of these settings, by group of parameters."""


@dataclass(frozen=True, slots=True)
class Method:
    """A registered method."""

    rules: MakeRules
    settings: type | None = None
    """Frozen dataclass of the method's own settings: ``[semi_sync.NAME]``."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values of ``SemiSyncConfig`` fields that the method does not let the user choose."""
    outer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By outer optimizer what the method takes for its settings where the user set none."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that the method takes where the user set none."""
    inner: str = ""
    """The inner optimizer of the paper where the method is nothing without it; empty for any."""
    notes: Notes = lambda groups: []
    """For ``titan-ext check`` and the start of a run."""
    scopes: Scopes = lambda settings: ()
    """Scopes of the method's own, for which some of its rules are; they come after the user's."""
    own_fragment: Callable[[Any], Sequence[str]] = lambda settings: ()
    """From the method's own settings to patterns of parameters that are a fragment by themselves, unless the user lists the
    fragments."""


METHODS: Registry[Method] = Registry("method")


def register_method(
    name: str,
    *,
    settings: type | None = None,
    fixed: Mapping[str, Any] | None = None,
    outer: Mapping[str, Mapping[str, Any]] | None = None,
    inner: str = "",
    notes: Notes = lambda groups: [],
    scopes: Scopes = lambda settings: (),
    own_fragment: Callable[[Any], Sequence[str]] = lambda settings: (),
    **defaults: Any,
) -> Callable[[MakeRules], MakeRules]:
    """Decorate the function that makes a method's rules.

    Args:
        name: the value of ``method`` that selects it.
        settings: frozen dataclass of the method's own settings; ``[semi_sync.NAME]`` sets its fields, and the function
            finds an instance in ``context.settings``.
        fixed: values of ``SemiSyncConfig`` fields that the method does not let the user choose.
        outer: by outer optimizer what the method takes for ``outer_lr``, ``outer_momentum`` and ``nesterov`` where the
            user set none, in the stead of the optimizer's own defaults.
        inner: the inner optimizer that the method is made for; around others the user is told.
        notes: what a user should know of the method's use with an inner optimizer.
        scopes: from the method's own settings to scopes of its own, such as key layers, by whose names (with a "." in
            them, so that no user's has one) its rules say what they cover.
        own_fragment: from the method's own settings to patterns of parameters that are a fragment by themselves.
        **defaults: values of such fields that the method takes where the user set none; ``sync_every`` must be there.

    Raises:
        ValueError: the name is taken.
    """

    def register(rules: MakeRules) -> MakeRules:
        METHODS.add(
            name, Method(rules, settings, fixed or {}, outer or {}, defaults, inner, notes, scopes, own_fragment)
        )
        return rules

    return register
