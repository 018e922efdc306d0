"""``titan-ext help``: every key can be asked for, and the page of all of them is up to date."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titan_ext import cli
from titan_ext.config.defaults import DEFAULTS
from titan_ext.config.reference.choices import choices
from titan_ext.config.reference.collect import all_keys, sections
from titan_ext.config.reference.text import key_text
from titan_ext.config.reference.torchtitan_keys import TEXTS

ROOT = Path(__file__).parents[2]


def test_every_key_has_a_text_a_type_and_a_file() -> None:
    names = [key.name for key in all_keys()]
    assert len(names) == len(set(names)) and len(names) > 200
    for key in all_keys():
        assert key.text and key.type, key
        package = ROOT / key.file
        assert key.file.startswith("torchtitan/") or package.is_file(), key
        assert key.section in ("", *sections()), key
        assert key_text(key, choices(key.name)).startswith(key.name + "\n")
    assert set(TEXTS) <= set(names)
    assert [default.key for default in DEFAULTS if callable(default.value) and not default.said] == []


def test_every_field_of_a_config_of_ours_has_a_text_under_it() -> None:
    bare = []
    for path in sorted((ROOT / "titan_ext").rglob("*.py")):
        if path.relative_to(ROOT).parts[1] in ("bench", "experiments"):
            continue  # no configuration of a user's
        for owner in ast.walk(ast.parse(path.read_text())):
            if isinstance(owner, ast.ClassDef) and (
                owner.name.endswith(("Config", "Settings")) or owner.name in ("Sizes", "SiteHeader")
            ):
                bare += [f"{path.name}: {owner.name}.{name}" for name in undocumented(owner)]
    assert bare == []


def undocumented(owner: ast.ClassDef) -> list[str]:
    if any(isinstance(base, ast.Name) and base.id == "Protocol" for base in owner.bases):
        return []  # of fields that are described where they are
    pairs = zip(owner.body, [*owner.body[1:], None])
    return [
        field.target.id
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and not (
            isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        )
    ]


def test_the_page_of_all_keys_is_up_to_date() -> None:
    """In a process of its own: other tests register methods. ``titan-ext help --markdown`` writes the page."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "titan_ext.cli", "help", "--markdown"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (ROOT / "train_configs" / "README.md").read_text() == ended.stdout


@pytest.mark.parametrize(
    ("key", "fragments"),
    [
        ("training.seq_len", ["training.seq_len", "Tokens of a sequence.", "an integer", "2048", "torchtitan says:"]),
        ("--training.seq-len", ["training.seq_len"]),
        ("semi_sync.sync_every", ["(K, H)", "by method: ", "semi_sync/config.py"]),
        ("semi_sync.method", ["allowed  none, ", "diloco"]),
        ("model.flavor", ["allowed  abbie: ", "llama3: tiny debugmodel"]),
        ("nproc", ["site.nproc", "Ranks of the site"]),
        ("enable", ["checkpoint.enable", "compile.enable", "validator.enable"]),
        ("data", ["[data]", 'data.text_key = "text"']),
        ("semi_sync.scopes", ["semi_sync.scopes.parameters (must be given)"]),
        ("optimizer.omegas", ["Weight of each momentum", "a list of numbers"]),
        ("activation_checkpoint.memory_budget", ["(mode memory_budget)"]),
    ],
)
def test_a_key_is_explained(key: str, fragments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["help", "--", key]) == 0
    output = capsys.readouterr().out
    in_one_line = " ".join(output.split())  # lines are as long as the terminal allows
    assert all(fragment in output or fragment in in_one_line for fragment in fragments), output


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("training.seqlen", "did you mean seq_len?"),
        ("seqlen", "did you mean training.seq_len?"),
        ("trainng", "did you mean training?"),
        ("validator.dataset", "did you mean validator.dataloader.dataset?"),
        ("checkpoint.enable_checkpoint", "did you mean checkpoint.enable? (an older name)"),
        ("float8.recipe_name", "no home here"),
        ("elephant", "allowed: site, region, model, data"),
    ],
)
def test_what_is_no_key_is_answered(key: str, advice: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["help", key]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"titan-ext: error: help {key}: ") and advice in line and "\n" not in line


def test_without_a_key_the_sections_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{output}" for name in sections())
