"""What a site takes from this machine: its text, files, packages and accelerator, looked for without reading them."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.tools.utils import device_type

from titan_ext.checkpoint_place import checkpoint_folder, files_below
from titan_ext.config.checks.run import BF16_STATES
from titan_ext.config.findings import Need, SettingError
from titan_ext.config.layout import Layout
from titan_ext.config.losses import name_of
from titan_ext.config.settings import Settings
from titan_ext.data.corpora.listing import Listing, NotThere
from titan_ext.data.corpora.stream import PREFIX, StreamName
from titan_ext.data.mix import corpus_of
from titan_ext.data.sources import corpora_that_fit
from titan_ext.errors import ReadError, RunError, UserError
from titan_ext.object_store import is_url


def check_machine(settings: Settings, config: Any, layout: Layout) -> list[str]:
    """Note what the site's config names and this machine does not have, and what there can be nowhere.

    Args:
        settings: of the site; its findings take the complaints.
        config: the site's ``Trainer.Config``.
        layout: its parallel layout.

    Returns:
        what is read of each corpus that is here, in a line.
    """
    for look in (_store, _weights, _files, _packages, _imports):
        with settings.findings.check():
            look(settings, config)
    if device_type == "cpu":
        with settings.findings.check():
            _accelerator(settings, config, layout)
    return _data(settings, config)


def _data(settings: Settings, config: Any) -> list[str]:
    corpora: dict[str, Any] = {}
    with settings.findings.check():
        corpora |= _corpora(config.dataloader)
    if config.validator.enable:
        corpora["validator.dataloader"] = config.validator.dataloader
    lines = []
    if pattern := getattr(config.dataloader, "sources", ""):
        with settings.findings.check():
            _, cards = corpora_that_fit(pattern, config.dataloader.retry_seconds)
            lines += [
                f"{config.site.name}: data.sources {pattern}: not read: {card} (a dataset card)" for card in cards
            ]
    named = [(key, f"{key}.dataset", data) for key, data in corpora.items()]
    if (loss := name_of(config.loss)) is not None:
        own = config.loss.corpora()
        named += [(f"loss.{loss}.{field}", f"loss.{loss}.{field}", data) for field, data in own.items()]
    for key, dotted, data in named:
        if getattr(data, "dataset", ""):  # one without has been refused
            with settings.findings.check():
                listed = _listed(settings, dotted, data)
                lines.append(f"{config.site.name}: {key} {listed}{_unused_key(settings, key, listed)}")
    return lines


def _unused_key(settings: Settings, key: str, listed: Any) -> str:
    """That the key of the texts is not looked for, where the user has named one and no file has fields."""
    named = settings.get(f"{key}.text_key")
    if named is None or not isinstance(listed, Listing) or any(file.format != "text" for file in listed.files):
        return ""
    return f"; {key}.text_key = {named!r} is not looked for: each file is one text"


def _corpora(data: Any) -> dict[str, Any]:
    """What the site trains on, by key: one corpus, those of a mix, or that of each data source.

    Raises:
        UserError: no file or folder fits the pattern of the sources, or a name of the mix.
    """
    if not getattr(data, "has_sources", False):
        # A server is asked as a corpus is listed, where its failure is told.
        mix = {} if is_url(data.dataset) else getattr(data, "mix", {})
        parts = {f"data.mix.{name}": corpus_of(data, name) for name in mix}
        return {key: replace(data, dataset=part, mix={}, mix_changes=[]) for key, part in parts.items()} or {
            "data": data
        }
    return {
        f"data.source[{place}]": replace(data, dataset=source.dataset, source=[], sources="")
        for place, source in enumerate(data.all_sources())
    }


def _listed(settings: Settings, key: str, data: Any) -> Any:
    """The files of a corpus, of which nothing is read but the beginnings.

    Raises:
        Missing: it is not on this machine, or cannot be read by what is installed.
        UserError: what is there cannot be meant.
    """
    spec = data.dataset
    try:
        if spec.startswith(PREFIX):
            _stream(settings, key, spec)
        return data.listing()
    except NotThere as error:
        raise settings.missing(Need.DATA, key, _problem(error, spec), spec) from None
    except (UserError, RunError) as error:
        if isinstance(error, SettingError):
            raise
        if isinstance(error, ReadError) and is_url(spec):
            settings.refuse(settings.missing(Need.STORE, key, _problem(error, spec), spec))
            return f"{spec}: {_problem(error, spec)}; the site waits for it"
        raise settings.error(key, _problem(error, spec), spec) from None


def _problem(error: Exception, spec: str) -> str:
    return str(error).removeprefix(f"data = {spec!r}: ")


def _exists(spec: str) -> bool:
    return Path(spec).expanduser().exists()


def _stream(settings: Settings, key: str, spec: str) -> None:
    name = StreamName.parse(spec).name
    if importlib.util.find_spec("datasets") is None:
        raise settings.missing(Need.PACKAGE, key, "the package datasets is not installed", spec)
    if name.startswith(("/", "./", "../", "~")) and not _exists(name):
        raise settings.missing(Need.DATA, key, "no such file or folder", spec)


def _store(settings: Settings, config: Any) -> None:
    """What is behind the URL of the checkpoints, of which those of another site are not looked at."""
    checkpoint = config.checkpoint
    if checkpoint.enable and is_url(checkpoint.folder) and "checkpoint.folder" not in settings.findings.doubtful:
        _stored(
            settings, "checkpoint.folder", checkpoint.folder, checkpoint_folder(config.dump_folder, checkpoint.folder)
        )


def _stored(settings: Settings, key: str, value: str, url: str) -> dict[str, int]:
    """The sizes of the files below a URL.

    Raises:
        Missing: it cannot be reached from this machine.
        UserError: there can be nothing.
    """
    try:
        return files_below(url)
    except ReadError as error:
        raise settings.missing(Need.STORE, key, str(error).removeprefix(f"{url!r}: "), value) from None
    except UserError as error:
        raise settings.error(key, str(error).removeprefix(f"{url!r}: "), value) from None


def _weights(settings: Settings, config: Any) -> None:
    """A checkpoint of torchtitan's that a run which begins would load; a run that resumes loads its own instead."""
    checkpoint = config.checkpoint
    key, path = "checkpoint.initial_load_path", checkpoint.initial_load_path
    if path is None or not checkpoint.enable or checkpoint.initial_load_in_hf:
        return
    if _has_checkpoint(settings, checkpoint.folder, checkpoint_folder(config.dump_folder, checkpoint.folder)):
        return
    if is_url(path):
        if ".metadata" not in _stored(settings, key, path, path):
            raise settings.missing(Need.WEIGHTS, key, "no checkpoint there (.metadata); a step-N folder of a run", path)
        return
    if not os.path.isdir(os.path.expanduser(path)):
        problem = "no such folder; a step-N folder of a run, or one of Hugging Face's with initial_load_in_hf"
        raise settings.missing(Need.WEIGHTS, key, problem, path)


def _has_checkpoint(settings: Settings, value: str, folder: str) -> bool:
    if is_url(folder):
        return any(name.startswith("step-") for name in _stored(settings, "checkpoint.folder", value, folder))
    return os.path.isdir(folder) and any(name.startswith("step-") for name in os.listdir(folder))


def _files(settings: Settings, config: Any) -> None:
    for name in ("secret_file", "tls_certificate", "tls_key", "tls_authority"):
        path = getattr(config.replica, name, None)
        if path is not None and not _exists(path):
            settings.refuse(settings.missing(Need.FILE, f"replica.{name}", "no such file", path))


def _packages(settings: Settings, config: Any) -> None:
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        problem = "the package wandb is not installed"
        settings.refuse(settings.missing(Need.PACKAGE, "metrics.enable_wandb", problem, True))
    mode = config.comm.mode
    if mode == "torchcomms" and importlib.util.find_spec("torchcomms") is None:
        settings.refuse(settings.missing(Need.PACKAGE, "comm.mode", "the package torchcomms is not installed", mode))
    if mode in ("fake_backend", "local_tensor"):
        problem = (
            'must be "default" or "torchcomms": a dry run exchanges nothing; titan-ext check tells what a run costs'
        )
        raise settings.error("comm.mode", problem, mode)


def _imports(settings: Settings, config: Any) -> None:
    for entry in config.override.imports:
        target = entry if isinstance(entry, str) else entry[0]
        module = target.rpartition(".")[0]
        if not module:
            settings.refuse(
                settings.error("override.imports", "must be module.function, the path of an override", target)
            )
        elif not _importable(module):
            settings.refuse(settings.error("override.imports", f"no module {module!r} can be imported", target))


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _accelerator(settings: Settings, config: Any, layout: Layout) -> None:
    for key, value in _only_on_gpus(config, layout):
        settings.refuse(settings.missing(Need.DEVICE, key, "needs a GPU, and this machine has none", value))


def _only_on_gpus(config: Any, layout: Layout) -> Iterator[tuple[str, Any]]:
    if layout.context > 1:
        yield "parallelism.context_parallel_degree", layout.context
    if config.profiler.enable_memory_snapshot:
        yield "profiler.enable_memory_snapshot", True
    if config.training.gc_debug:
        yield "training.gc_debug", True
    if config.parallelism.spmd_backend == "full_dtensor":
        yield "parallelism.spmd_backend", "full_dtensor"
    if config.optimizer.implementation == BF16_STATES:
        yield "optimizer.implementation", BF16_STATES
    if config.training.enable_cpu_offload:
        yield "training.enable_cpu_offload", True
    checkpoint = config.checkpoint
    if checkpoint.enable and checkpoint.async_mode == "async_with_pinned_mem":
        yield "checkpoint.async_mode", checkpoint.async_mode
