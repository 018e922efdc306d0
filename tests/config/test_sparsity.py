"""Settings of SparsyFed and of layers under a power that cannot be, refused before a run starts."""

from pathlib import Path

import pytest

from titan_ext.config.load import load_run, load_site
from titan_ext.errors import UserError
from titan_ext.models.power_linear import PowerLinear


def write(folder: Path, converter: str = "") -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'dump_folder = "{folder}"\n[model]\nflavor = "tiny"\n[[model.converters]]\nname = "power_linear"\n{converter}\n'
        '[semi_sync]\nmethod = "sparsyfed"\n[[site]]\nname = "a"\ndata = "builtin:code"\n'
        '[[site]]\nname = "b"\ndata = "builtin:code"\n'
    )
    return path


def test_attention_and_feed_forward_are_under_the_power(tmp_path: Path) -> None:
    layer = load_site(write(tmp_path, "exponent = 1.5"), "a", needs=()).config.model_spec.model.layers[0]
    assert type(layer.feed_forward.w1) is PowerLinear.Config and layer.feed_forward.w1.exponent == 1.5


@pytest.mark.parametrize(
    ("converter", "flags", "message"),
    [
        ("exponent = 0.5", [], r"model.converters\[0\].*exponent = 0.5: must be at least 1"),
        ('modules = ["nothing"]', [], r"model.converters\[0\].*no linear layer"),
        ("exponents = 2", [], r"model.converters\[0\].exponents: unknown key.*exponent"),
        ("", ["--semi_sync.sparsyfed.sparsity=1"], r"semi_sync.sparsyfed.sparsity.*from 0 to below 1"),
        (
            "",
            ['--semi_sync.sparsyfed.parameters=["nope*"]'],
            r"run.toml.*semi_sync.sparsyfed.parameters = .*fit no matrix",
        ),
        ('[[model.converters]]\nname = "power_linear"', [], r"converters\[1\].*no other converter has changed"),
        ("", ["--semi_sync.codec=int8"], r"semi_sync.codec"),
        ("", ["--training.dtype=bfloat16"], r'training.dtype.*must be "float32" with semi_sync.method = "sparsyfed"'),
        (
            "",
            ["--checkpoint.enable", "--checkpoint.last_save_in_hf"],
            r"checkpoint.last_save_in_hf.*no Hugging Face format",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, converter: str, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run(write(tmp_path, converter), flags, needs=())


def test_pruning_without_a_power_is_said_to_be_plain_top_k(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert not any("plain top-k" in note for note in load_site(path, "a", needs=()).notes)
    path.write_text(path.read_text().replace('[[model.converters]]\nname = "power_linear"\n', ""))
    (note,) = [note for note in load_site(path, "a", needs=()).notes if "plain top-k" in note]
    assert 'name = "power_linear"' in note
