"""What is installed from a built wheel: all of the package, and enough of it to train."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

from titan_ext import __version__

ROOT = Path(__file__).parents[1]
DATA = {"titan_ext/py.typed", "titan_ext/instruments/page.html", "titan_ext/instruments/alerts.toml"}
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network from what belongs to the package, beside which nothing is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "titan_ext", source / "titan_ext", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*_PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content; dependencies are those of this interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*_PIP, "install", "--no-deps", "--no-index", "--target", folder, wheel], check=True)
    return folder


@pytest.fixture
def elsewhere(installed: Path, tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A working folder with nothing but the demo's file, and an environment in which the wheel is what is found."""
    shutil.copy(ROOT / "train_configs" / "demo.toml", tmp_path)
    found = {**os.environ, "PYTHONPATH": str(installed)}
    where = "import titan_ext; print(titan_ext.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=found, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(installed)
    yield tmp_path, found


def test_everything_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "titan_ext").rglob("*.py")}
    names = set(ZipFile(wheel).namelist())
    info = f"titan_ext-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == modules | DATA
    assert f"{info}licenses/LICENSE" in names


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    info = f"titan_ext-{__version__}.dist-info/"
    with ZipFile(wheel) as archive:
        metadata = message_from_string(archive.read(f"{info}METADATA").decode())
        entry_points = archive.read(f"{info}entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("titan_ext", __version__)
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert "titan-ext = titan_ext.cli:main" in entry_points


@pytest.mark.slow
def test_the_demo_is_trained_from_the_wheel(elsewhere: tuple[Path, dict[str, str]], installed: Path) -> None:
    folder, environment = elsewhere
    flags = ["--training.steps=4", "--semi_sync.sync_every=2", "--training.local_batch_size=2", "--plain"]
    done = subprocess.run(
        [str(installed / "bin" / "titan-ext"), "launch", "demo.toml", *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (folder / "runs" / "demo").iterdir()} >= {"code", "docs"}
