"""The strict binder on dataclasses of every kind of field."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest

from titan_ext.config.binder import Binder
from titan_ext.config.flags import FlagText, parse_flags
from titan_ext.config.settings import Origin, Settings
from titan_ext.errors import UserError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(kw_only=True)
class Inner:
    depth: int = 1


@dataclass(kw_only=True)
class Everything:
    flag: bool = False
    count: int = 0
    rate: float = 0.0
    either: float | int = 0
    name: str = "a"
    choice: Literal["one", "two"] = "one"
    seed: int | None = 7
    label: str | None = "x"
    words: list[str] = field(default_factory=list)
    grid: list[list[str]] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 0.0)
    many: tuple[int, ...] = ()
    table: dict[str, Any] = field(default_factory=dict)
    colour: Colour = Colour.RED
    inner: Inner = field(default_factory=Inner)
    inners: list[Inner] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("count must not be\n unlucky")


def bind(table: dict, origin: Origin = Origin.FILE) -> Everything:
    settings = Settings("f.toml").merge({"section": table}, origin)
    return Binder(settings).section("section", Everything())


@pytest.mark.parametrize(
    ("key", "given", "bound"),
    [
        ("flag", True, True),
        ("count", 3, 3),
        ("rate", 3, 3.0),
        ("rate", 1e38, 1e38),
        ("either", 2, 2),
        ("name", "b", "b"),
        ("choice", "two", "two"),
        ("seed", 5, 5),
        ("seed", "none", None),
        ("label", "none", None),
        ("words", ["a", "b"], ["a", "b"]),
        ("grid", [["a"], ["b"]], [["a"], ["b"]]),
        ("pair", [1, 2.5], (1.0, 2.5)),
        ("many", [1, 2, 3], (1, 2, 3)),
        ("table", {"x": [1]}, {"x": [1]}),
        ("colour", "blue", Colour.BLUE),
        ("inner", {"depth": 4}, Inner(depth=4)),
        ("inners", [{"depth": 1}, {}], [Inner(depth=1), Inner()]),
    ],
)
def test_accepts(key: str, given: object, bound: object) -> None:
    found = getattr(bind({key: given}), key)
    assert found == bound and (type(found) is type(bound) or key == "either")


@pytest.mark.parametrize(
    ("key", "given", "complaint"),
    [
        ("flag", 1, "f.toml: section.flag = 1: must be true or false, got an integer"),
        ("count", 1.5, "f.toml: section.count = 1.5: must be an integer, got a float"),
        ("count", True, "f.toml: section.count = true: must be an integer, got a boolean"),
        ("rate", True, "f.toml: section.rate = true: must be a number, got a boolean"),
        ("rate", float("nan"), "f.toml: section.rate: must be a number, got nan"),
        ("rate", "1", 'f.toml: section.rate = "1": must be a number, got a string'),
        ("name", 1, "f.toml: section.name = 1: must be a string, got an integer"),
        ("choice", "tow", "did you mean two? (allowed: one, two)"),
        ("seed", "x", 'section.seed = "x": must be an integer'),
        ("words", "a", 'section.words = "a": must be a list of strings, got a string'),
        ("words", ["a", 1], "section.words[1] = 1: must be a string"),
        ("pair", [1], "section.pair = [1]: must be a list of numbers"),
        ("table", 1, "section.table = 1: must be a table, got an integer"),
        ("colour", "bleu", "did you mean blue? (allowed: red, blue)"),
        ("inner", 3, "section.inner = 3: must be a table, got an integer"),
        ("inner", {"dept": 3}, "section.inner.dept: unknown key; did you mean depth? (allowed: depth)"),
        ("inners", [{"depth": "x"}], 'section.inners[0].depth = "x": must be an integer'),
        ("cuont", 3, "section.cuont: unknown key; did you mean count?"),
        ("count", 13, "section.count = 13: count must not be unlucky"),
    ],
)
def test_refuses_in_one_line(key: str, given: object, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        bind({key: given})
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "key", "bound"),
    [
        (["--section.count", "3"], "count", 3),
        (["--section.count=-3"], "count", -3),
        (["--section.rate", "1e-3"], "rate", 1e-3),
        (["--section.rate", ".5"], "rate", 0.5),
        (["--section.flag"], "flag", True),
        (["--section.flag=False"], "flag", False),
        (["--section.flag", "true"], "flag", True),
        (["--section.name", "plain words"], "name", "plain words"),
        (["--section.name=12"], "name", "12"),
        (["--section.name", '"quoted"'], "name", "quoted"),
        (["--section.label=none"], "label", None),
        (["--section.words", '["a", "b"]'], "words", ["a", "b"]),
        (["--section.pair=[0.9, 0.95]"], "pair", (0.9, 0.95)),
        (["--section.choice", "two"], "choice", "two"),
        (["--section.inner.depth", "9"], "inner", Inner(depth=9)),
        (["--section.count", "1", "--section.count", "2"], "count", 2),
    ],
)
def test_flags_are_read_by_the_type_of_their_key(arguments: list[str], key: str, bound: object) -> None:
    assert getattr(bind(parse_flags(arguments)["section"], Origin.FLAG), key) == bound


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--section.count", "abc"], 'flag --section.count = "abc": must be an integer, got a string'),
        (["--section.count"], "flag --section.count: needs a value: an integer"),
        (["--section.words", "a"], "must be a list"),
        (["--section.cuont=1"], "did you mean count?"),
    ],
)
def test_wrong_flags_name_the_flag(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match="f.toml: flag --section") as caught:
        bind(parse_flags(arguments)["section"], Origin.FLAG)
    assert complaint in str(caught.value)


def test_arguments_that_are_no_flags_are_refused() -> None:
    with pytest.raises(UserError, match="command line: unexpected argument 'steps'"):
        parse_flags(["steps", "3"])


def test_a_flag_cannot_choose_a_site() -> None:
    with pytest.raises(UserError, match="applies to every site.*--weight"):
        parse_flags(["--site.weight", "2"])


def test_dashes_in_flags_are_underscores() -> None:
    assert parse_flags(["--training.seq-len", "8"]) == {"training": {"seq_len": FlagText("8")}}
