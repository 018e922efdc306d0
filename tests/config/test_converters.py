"""``[[model.converters]]``: the model's parts replaced from a configuration file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import ModelConfigConverter

from titan_ext.config import load_run, save_resolved
from titan_ext.errors import UserError

from .conftest import GOOD

HERE = "tests.config.test_converters"


class Doubled(Linear):
    """A linear layer whose output counts so many times."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        factor: float = 2.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.factor = config.factor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.factor * super().forward(input)


class DoubleHead(ModelConfigConverter):
    """Puts ``Doubled`` in the place of the head."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        factor: float = 2.0
        model_compile_enabled: bool = False

    def __init__(self, config: Config) -> None:
        if config.factor == 0:
            raise ValueError("factor must not be 0")
        self.config = config

    def convert(self, model):
        head = model.lm_head
        model.lm_head = Doubled.Config(
            in_features=head.in_features, out_features=head.out_features, bias=head.bias, param_init=head.param_init,
            factor=self.config.factor,
        )  # fmt: skip
        return model


def with_converters(*tables: str) -> str:
    return GOOD.replace("[training]", "\n".join(f"[[model.converters]]\n{table}" for table in tables) + "\n[training]")


def test_a_converter_changes_the_model_and_is_recorded(write: Callable) -> None:
    table = f'name = "{HERE}.DoubleHead"\nfactor = 3.0'
    site = load_run(write(with_converters(table)), ["--compile.enable"]).sites[0]
    head = site.config.model_spec.model.lm_head
    assert type(head) is Doubled.Config and head.factor == 3.0
    Path(site.config.dump_folder).mkdir(parents=True)
    save_resolved(site)
    record = Path(site.config.dump_folder) / "config.json"
    assert json.loads(record.read_text())["model"]["converters"] == [{"name": f"{HERE}.DoubleHead", "factor": 3.0}]
    again = load_run(str(record)).sites[0]
    assert again.config.model_spec.model.lm_head.factor == 3.0 and again.model == site.model


def test_lora_is_there_by_its_name(write: Callable) -> None:
    model = load_run(write(with_converters('name = "lora"\nrank = 4'))).sites[0].config.model_spec.model.build()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in name for name in trained)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (['name = "flaot8"'], ['model.converters[0].name = "flaot8"', "did you mean float8?"]),
        (["rank = 4"], ["model.converters[0].name", "is missing", "float8"]),
        (['name = "lora"\nranks = 4'], ["model.converters[0].ranks", "unknown key", "rank"]),
        (['name = "lora"\nrank = "four"'], ["model.converters[0].rank", "must be an integer"]),
        (['name = "no.such.Converter"'], ["model.converters[0].name", "cannot be imported"]),
        (['name = "torch.nn.Linear"'], ["model.converters[0].name", "is no converter"]),
        ([f'name = "{HERE}.DoubleHead"\nfactor = 0.0'], ["model.converters[0]", "factor must not be 0"]),
        (['name = "lora"', 'name = "float8"'], ["model.converters", "must be applied before LoRAConverter"]),
    ],
)
def test_what_cannot_be_converted_is_one_line(tables: list[str], words: list[str], write: Callable) -> None:
    with pytest.raises(UserError) as refusal:
        load_run(write(with_converters(*tables)))
    for word in words:
        assert word in str(refusal.value)


def test_sites_of_differently_converted_models_are_refused(write: Callable) -> None:
    text = GOOD + '[[site.model.converters]]\nname = "lora"\n'
    with pytest.raises(UserError, match="differ in model.converters"):
        load_run(write(text))


def test_float8_says_what_it_needs(write: Callable) -> None:
    with pytest.raises(UserError, match=r"model\.converters\[0\]: .*(torchao|SM89)"):
        load_run(write(with_converters('name = "float8"')))
