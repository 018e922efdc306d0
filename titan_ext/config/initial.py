"""The Hugging Face folder that a model's weights come from, and what it says of the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from titan_ext.config.findings import Need
from titan_ext.config.settings import UNSET, Settings, show
from titan_ext.data.tokenizers.traits import TOKENIZER_FILE
from titan_ext.errors import UserError
from titan_ext.huggingface.description import FILE_NAME, read_description
from titan_ext.huggingface.weights import INDEX
from titan_ext.models.llama3.huggingface import FIELDS, SHAPES, differing, from_huggingface, sizes_of, told_apart

# Words, digits, code and other scripts, which tokenizers cut in ways of their own.
_SAMPLE = "Reading 12,345 documents' words at once,\n\tif x != y: größer als 中文"
_PATH, _HUGGING_FACE = "checkpoint.initial_load_path", "checkpoint.initial_load_in_hf"


@dataclass(frozen=True, slots=True)
class Source:
    """A folder in Hugging Face's format."""

    folder: Path
    description: Mapping[str, Any] | None
    """Content of its ``config.json``; None where it has none."""
    recorded: Mapping[str, Any] | None = None
    """``[model]`` as the run recorded it when it read a folder that is no longer there."""

    @property
    def file(self) -> str:
        """What says what the model is."""
        return str(self.folder / FILE_NAME)

    def sizes(self, module: ModuleType | None) -> dict[str, Any]:
        """What it says, in keys of ``[model]``; empty where it says nothing that the model's module understands.

        Raises:
            UserError: it describes a model that is no such one.
        """
        if self.recorded is not None:
            known = {key: value for key, value in self.recorded.items() if key in FIELDS}
            return {key: value for key, value in known.items() if value is not None or key == "head_dim"}
        read = getattr(module, "from_huggingface", None)
        return {} if read is None or self.description is None else read(self.description, self.file)


def open_source(folder: Path) -> Source:
    """The source that a folder is.

    Raises:
        UserError: its ``config.json`` cannot be read, or it is an adapter's.
    """
    return Source(folder, read_description(folder))


def initial_source(settings: Settings, checkpoint: Any, assets: str, record: Path) -> Source | None:
    """What a run's weights are first read from, where that is in Hugging Face's format.

    Args:
        settings: for the wording of errors.
        checkpoint: the section.
        assets: the run's ``hf_assets_path``, from which torchtitan reads where no other folder is named.
        record: the settings that the run has recorded, if it has begun.

    Raises:
        UserError: the keys do not go together, or the folder is no such one.
        Missing: the folder is not there, and nothing is recorded of it.
    """
    path = checkpoint.initial_load_path
    if not checkpoint.enable and (path or checkpoint.initial_load_in_hf):
        key, value = (_PATH, path) if path else (_HUGGING_FACE, True)
        raise settings.error(key, "nothing is loaded without checkpoint.enable = true", value)
    if not checkpoint.initial_load_in_hf:
        if path and _is_huggingface(Path(path)):
            raise settings.error(_PATH, f"holds Hugging Face's safetensors: set {_HUGGING_FACE} = true", path)
        return None
    if not path and not assets:
        raise settings.error(_HUGGING_FACE, f"needs the folder, as {_PATH} or hf_assets_path", True)
    folder = Path(path or assets)
    if folder.is_dir():
        return open_source(folder)
    known = _recorded(record, path)
    if known is None:
        problem = f"no such folder; the model's sizes are read from its {FILE_NAME}"
        raise settings.missing(Need.MODEL, _PATH if path else "hf_assets_path", problem, str(folder))
    return Source(folder, None, known)


def taken_over(
    settings: Settings, source: Source, module: ModuleType, given: Mapping[str, Any], allowed: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``[model]`` takes over from a folder: what it does not say itself, a flavor standing for its sizes.

    Args:
        settings: the site's.
        source: the folder.
        module: the model's.
        given: what ``[model]`` says.
        allowed: keys that it may say.

    Raises:
        UserError: it says something else than the folder.
    """
    said = source.sizes(module)
    _check_same(settings, source, _known(said), _known(given))
    flavored = SHAPES if settings.get("model.flavor") is not None else ()
    return {key: value for key, value in said.items() if key in allowed and key not in given and key not in flavored}


def check_source(settings: Settings, source: Source, module: ModuleType, spec: Any) -> list[str]:
    """Refuse a model that is not the one that a folder says its weights are of.

    Returns:
        notes for the user.

    Raises:
        UserError: naming what differs, and the key to change.
    """
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

    adapter = spec.state_dict_adapter
    if adapter is None:
        problem = f"{spec.name} {spec.flavor} has no Hugging Face format, so nothing can be read from {source.folder}"
        raise settings.error("model", problem)
    if not issubclass(adapter, Llama3StateDictAdapter):
        return [f"{source.file} is not compared with [model]: what it says is not known for {module.__name__}"]
    if source.description is None and source.recorded is None:
        return [f"{source.folder} has no {FILE_NAME}: heads, norms and rotary embeddings of [model] are not checked"]
    said = source.sizes(module) or from_huggingface(source.description, source.file)
    _check_same(settings, source, said, sizes_of(spec.model))
    return []


def tokenizer_notes(source: Source, tokenizer: str) -> list[str]:
    """A note where the folder has a tokenizer and the site trains with one that makes other tokens of a text."""
    from titan_ext.data.tokenizers.tokenizer import build_tokenizer

    own = source.folder / TOKENIZER_FILE
    if not own.is_file():
        return []
    try:
        both = [build_tokenizer(each) for each in (str(own), tokenizer)]
    except UserError:
        return []  # nobody asked for the folder's
    theirs, ours = (each.encode(_SAMPLE, add_bos=False, add_eos=False) for each in both)
    if theirs == ours:
        return []
    return [f"tokenizer = {show(tokenizer)} is not {own}: rows of the weights' embedding may stand for other tokens"]


def _known(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is to follow from the rest."""
    return {key: value for key, value in sizes.items() if value is not None}


def _check_same(settings: Settings, source: Source, said: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    keys = differing(said, ours)
    if not keys:
        return
    blamed = next((key for key in (*keys, "flavor") if settings.get(f"model.{key}") is not None), "name")
    problem = f"{source.file} says {told_apart(said, ours)}; leave the key out, and what the file says is taken over"
    raise settings.error(f"model.{blamed}", problem, settings.get(f"model.{blamed}", UNSET))


def _is_huggingface(folder: Path) -> bool:
    return not (folder / ".metadata").exists() and ((folder / INDEX).exists() or any(folder.glob("*.safetensors")))


def _recorded(record: Path, path: str | None) -> Mapping[str, Any] | None:
    """``[model]`` of a run that began with the same folder."""
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
        same = settings["checkpoint"]["initial_load_path"] == path and settings["checkpoint"]["initial_load_in_hf"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings["model"] if same else None
