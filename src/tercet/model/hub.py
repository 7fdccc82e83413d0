"""A model as a folder, on this machine or on the Hugging Face Hub.

```
folder/
  config.json        library, library_version, format_version, model (the dump of ModelConfig), and where known
                     objectives (what trained the encoders)
  model.safetensors  every parameter under its name in Tercet, float32
  tokenizer.json     absent from a model converted without one; such a model only embeds images
  answers.json       the answers to questions that the model chooses from, where it has such a list
  README.md          model card
```
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tercet.config import ModelConfig
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.files import atomic_folder
from tercet.model.tercet import Tercet
from tercet.model.vision import IMAGE_MEAN, IMAGE_STD
from tercet.version import __version__

FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
ANSWERS = "answers.json"
_FILES = (CONFIG, WEIGHTS, TOKENIZER, ANSWERS, CARD)
# What the reader of safetensors raises on a damaged file.
WEIGHTS_ERRORS = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_AGAIN = "copy or download the model again"


def save_model(model: Tercet, folder: str | Path, card: str | None = None) -> Path:
    """Write `model`, its tokenizer and its answers as a folder, atomically; an earlier model folder is replaced.

    Args:
        model: on any device, of any floating type; written as float32.
        folder: a new folder, an empty one, or a model folder.
        card: text of README.md; default the model's `card`, or else its `model_card`.

    Raises:
        TercetError: `folder` holds other files, the tokenizer does not fit the model, or the disk is full.
    """
    folder = Path(folder).expanduser().absolute()
    _check_replaceable(folder)
    if model.tokenizer is not None:
        _check_tokenizer(model.tokenizer, model.config, "the tokenizer")
    config = {
        "library": "tercet",
        "library_version": __version__,
        "format_version": FORMAT_VERSION,
        "model": model.config.model_dump(mode="json"),
        **({} if model.objectives is None else {"objectives": model.objectives}),
    }
    weights = {name: value.detach().float().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        try:
            save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise TercetError(f"cannot write {folder / WEIGHTS}: {error}; free some space") from error
        if model.tokenizer is not None:
            model.tokenizer.save(partial)
        if model.answers is not None:
            (partial / ANSWERS).write_text(json.dumps(model.answers, ensure_ascii=False) + "\n", "utf-8")
        (partial / CARD).write_text(card or model.card or model_card(model), "utf-8")
    return folder


def load_model(
    source: str | Path, device: str | torch.device = "cpu", revision: str | None = None, local_only: bool = False
) -> Tercet:
    """Load a model, in evaluation mode, with its tokenizer, answers, objectives and card as attributes.

    The modules are built without memory and take the tensors of the file as they are, so loading costs little more than
    reading.

    Args:
        source: a model folder, a run folder (its `model/` is read), or the id of a model on the Hugging Face Hub.
        device: where the weights go.
        revision: branch, tag or commit on the hub.
        local_only: take a hub id from the cache, without asking the hub.

    Raises:
        TercetError: no such folder or id; a file that is missing, malformed, cut short or of a newer format; a key
            that is missing, unexpected or of another shape; a tokenizer that does not fit.
    """
    folder = find_model_folder(source, revision, local_only)
    config, objectives = read_config(folder / CONFIG)
    model = empty_model(config)
    model.load_state_dict(_read_weights(folder / WEIGHTS, model, device), assign=True)
    model.objectives = objectives
    if (folder / TOKENIZER).is_file():
        model.tokenizer = Tokenizer.load(folder / TOKENIZER)
        _check_tokenizer(model.tokenizer, config, str(folder / TOKENIZER))
    if (folder / ANSWERS).is_file():
        model.answers = _read_answers(folder / ANSWERS)
    if (folder / CARD).is_file():
        model.card = (folder / CARD).read_text("utf-8", errors="replace")
    return model.to(device).eval()


def push_model(
    model: Tercet,
    repo_id: str,
    card: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload `model` to the Hugging Face Hub, creating the repository where there is none.

    Args:
        model: what to upload.
        repo_id: `organisation/name`.
        card: as in `save_model`.
        private: whether a new repository is private; default the organisation's own.
        message: commit message.
        token: access token; default the one of `hf auth login`.

    Returns:
        Address of the commit.

    Raises:
        TercetError: not logged in, no right to write there, no connection.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="tercet", library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary, _hub_errors(f"cannot push to {repo_id}"):
        folder = save_model(model, Path(temporary) / "model", card)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message or f"Upload with tercet {__version__}"
        )
    return str(commit.commit_url)


def find_model_folder(source: str | Path, revision: str | None = None, local_only: bool = False) -> Path:
    """The local folder of a path or hub id; a hub id is downloaded into the hub's cache.

    Raises:
        TercetError: neither a model folder nor a model on the hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
            folder = folder / "model"
        missing = next((name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()), None)
        if missing is None:
            return folder
        foreign = next((file for kind in ("*.pth", "*.bin", "*.safetensors") for file in folder.glob(kind)), None)
        fix = "name the folder that holds config.json and model.safetensors"
        fix = fix if foreign is None else f"`tercet convert {foreign} --output DIR` converts weights of others"
        raise TercetError(f"{folder} is not a model folder: it has no {missing}; {fix}")
    if folder.exists():
        raise TercetError(
            f"{folder} is a file, not a model folder; `tercet convert {folder} --output DIR` converts weights"
        )
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise TercetError(f"no model folder at {source}; check the path")
    from huggingface_hub import snapshot_download

    with _hub_errors(f"no folder {source} here, and no such model on the hub"):
        downloaded = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(_FILES),
            library_name="tercet",
            library_version=__version__,
            local_files_only=local_only,
        )
    return find_model_folder(Path(downloaded))


def empty_model(config: ModelConfig) -> Tercet:
    """A model whose parameters have shapes but no memory (device `meta`); its constant buffers are real."""
    with torch.device("meta"), _NoInitialisation():
        model = Tercet(config)
    # These two are not in the file, being constants.
    model.vision.image_mean = torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    model.vision.image_std = torch.tensor(IMAGE_STD).view(1, 3, 1, 1)
    return model


class _NoInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are.

    Random numbers on `meta` would be no work, but the first of them imports PyTorch's compiler: two seconds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def require_tokenizer(model: Tercet) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        TercetError: the model was made without one.
    """
    if model.tokenizer is None:
        raise TercetError(
            f"this model has no {TOKENIZER}, so it cannot read text; convert it again with --tokenizer vocab.txt, "
            f"or put the {TOKENIZER} that it was trained with into its folder"
        )
    return model.tokenizer


def model_card(model: Tercet) -> str:
    """A model card with what the model itself tells: its sizes and how to load it."""
    vision, text = model.config.vision, model.config.text
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    image_size = f"{vision.image_size} px in patches of {vision.patch_size} px"
    return f"""---
library_name: tercet
tags:
- image-text-retrieval
- vision-language
---
# Tercet model

An image-text model of {parameters:.1f} million parameters, made for triple contrastive learning
([arXiv 2202.10401](https://arxiv.org/abs/2202.10401)).

| part | size |
|---|---|
| image encoder | {vision.depth} layers of width {vision.width}, {image_size} |
| text encoder | {text.fusion_layer} layers of width {text.width}, {text.vocabulary_size} word pieces |
| fusion encoder | {text.depth - text.fusion_layer} layers of width {text.width} |
| shared space | {model.config.embed_dim} dimensions |

```python
import tercet

predictor = tercet.load("path/of/this/folder")
```
"""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TercetError(f"{path}: not valid JSON ({error}); {_AGAIN}") from error


def read_config(path: Path) -> tuple[ModelConfig, list[str] | None]:
    """The sizes, and the objectives; None where the folder does not have them, being converted or made by hand."""
    config = _read_json(path)
    if not isinstance(config, dict) or config.get("library") != "tercet" or not isinstance(config.get("model"), dict):
        raise TercetError(f"{path}: not the config of a Tercet model; `tercet convert` reads weights of others")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise TercetError(
            f"{path}: format_version {version!r} is newer than the {FORMAT_VERSION} that tercet {__version__} reads; "
            f"upgrade tercet (the model was written by {config.get('library_version')})"
        )
    try:
        sizes = ModelConfig.model_validate(config["model"])
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(["model", *map(str, detail["loc"])])
        raise TercetError(f"{path}: {key}: {detail['msg']}; {_AGAIN}") from error
    objectives = config.get("objectives")
    return sizes, [str(name) for name in objectives] if isinstance(objectives, list) else None


def _read_weights(path: Path, model: Tercet, device: str | torch.device) -> dict[str, Tensor]:
    try:
        weights = load_file(path, device=str(device))
    except WEIGHTS_ERRORS as error:
        raise TercetError(f"{path}: cut short or not a safetensors file ({error}); {_AGAIN}") from error
    problems = _mismatches(weights, model.state_dict())
    if problems:
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise TercetError(f"{path}: {problems[0]}{more}; the weights and {CONFIG} must come from the same model")
    return {name: value.float() for name, value in weights.items()}


def _mismatches(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Keys that are missing, unexpected, of another shape or not of floats."""
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in wanted]
    for name, value in wanted.items():
        if name in weights and weights[name].shape != value.shape:
            shape = list(weights[name].shape)
            problems.append(f"{name} has shape {shape}, the config asks for {list(value.shape)}")
        elif name in weights and not weights[name].is_floating_point():
            problems.append(f"{name} holds {str(weights[name].dtype).removeprefix('torch.')} values, not floats")
    return problems


def _read_answers(path: Path) -> list[str]:
    answers = _read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise TercetError(f"{path}: not a list of answers; {_AGAIN}")
    return answers


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, origin: str) -> None:
    text, fix = config.text, "use the tokenizer that the model was trained with"
    if tokenizer.vocabulary_size > text.vocabulary_size:
        raise TercetError(
            f"{origin} has {tokenizer.vocabulary_size} word pieces, the model {text.vocabulary_size} "
            f"(model.text.vocabulary_size); {fix}"
        )
    for name in ("pad_id", "cls_id", "sep_id", "mask_id"):
        own, wanted = getattr(tokenizer, name), getattr(text, name)
        if own != wanted:
            raise TercetError(f"{origin} has {name} {own}, the model {wanted} (model.text.{name}); {fix}")


def _check_replaceable(folder: Path) -> None:
    """Replacing a folder deletes what is in it, so only model folders and empty ones are replaced."""
    if folder.exists() and not folder.is_dir():
        raise TercetError(f"{folder} is a file; choose a new folder for the model")
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.name not in _FILES:
            raise TercetError(f"{folder} holds other files ({entry.name}); choose a new folder, not to lose them")


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Errors of the hub's library as a `TercetError`: `what`, the reason, the fix."""
    from huggingface_hub import errors

    # The error of the HTTP client beneath differs between versions of the hub's library.
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # pyright: ignore[reportAssignmentType]
    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    other = (errors.EntryNotFoundError, errors.HfHubHTTPError, OSError, ValueError, transport)
    try:
        yield
    except errors.GatedRepoError as error:
        raise TercetError(f"{what}: ask for access on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        message = f"{what}: no such repository, or a private one; check the name, or `hf auth login`"
        raise TercetError(message) from error
    except errors.RevisionNotFoundError as error:
        raise TercetError(f"{what}: no such revision; check its name on the repository's page") from error
    except offline as error:
        message = f"{what}: the hub cannot be reached and the cache has no copy; check the connection"
        raise TercetError(message) from error
    except other as error:
        reason = " ".join(str(error).split())
        if isinstance(error, transport) and not isinstance(error, errors.HfHubHTTPError):
            reason = f"the hub cannot be reached ({reason}); check the connection"
        raise TercetError(f"{what}: {reason}") from error
