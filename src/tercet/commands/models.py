"""Commands that change the form of a model, `convert`, `export` and `push`, and the model that other commands load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tercet.errors import TercetError

if TYPE_CHECKING:
    from tercet.config import Config
    from tercet.predictor import Predictor

DEMO_MODEL = "runs/demo/model"
LOCAL_PREFIXES = ("./", "../", "/", "~")


def convert(
    file: str,
    *,
    output: Path,
    layout: Literal["tercet", "published"] = "tercet",
    style: Literal["pretraining", "downstream"] | None = None,
    base: str | None = None,
    tokenizer: Path | None = None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """Convert weights of others (TCL, ALBEF, BERT, DeiT, ViT) to a model folder, or a model to a TCL checkpoint.

    BERT and ViT weights make one model in two calls, the second with --base and the folder of the first.
    With --layout published, FILE is a model of Tercet and --output the checkpoint to write.

    Args:
        file: the checkpoint: .pth, .bin or .safetensors, or a Hugging Face folder of one.
        output: model folder to write.
        layout: published: write a model folder, run folder or hub id as a checkpoint that the code of TCL and ALBEF
            loads.
        style: with --layout published: the form of a pre-trained or of a fine-tuned checkpoint; default: by its heads.
        base: model folder or hub id that gives what FILE does not hold; default: random weights.
        tokenizer: vocab.txt, tokenizer.json or a folder of one; default: the one beside FILE.
        image_size: side of the images that the position embeddings are resized for; default: as in FILE.
        vision_heads: attention heads of the vision transformer; default: 64 channels a head.
        text_heads: attention heads of the text stack; default: what a config.json beside FILE says, else 64 channels a
            head.
    """
    if layout == "published":
        flags = {
            "--base": base,
            "--tokenizer": tokenizer,
            "--image-size": image_size,
            "--vision-heads": vision_heads,
            "--text-heads": text_heads,
        }
        for flag, value in flags.items():
            if value is not None:
                raise TercetError(f"{flag} is for checkpoints of others; remove it, or --layout published")
        _write_published(file, output, style)
        return
    if style is not None:
        raise TercetError("--style needs --layout published")

    from tercet.model.convert import convert as convert_weights

    result = convert_weights(
        Path(file),
        output,
        base=base,
        tokenizer=tokenizer,
        image_size=image_size,
        vision_heads=vision_heads,
        text_heads=text_heads,
    )
    print(result.summary())
    print(f"The model is {output}.")


def _write_published(model: str, file: Path, style: Literal["pretraining", "downstream"] | None) -> None:
    from tercet.model.hub import load_model
    from tercet.model.weights import write_published

    written = write_published(load_model(model), file, style)
    print(f"{written.entries} tensors in the published form of {written.style} are in {written.file}.")
    if written.skipped:
        print(f"Note: that form cannot hold {', '.join(written.skipped)}.")


def export(model: str, *, output: Path, format: Literal["all", "onnx", "program"] = "all", checks: int = 10) -> None:
    """Write the parts of a model (image encoder, text encoder, keys and values, fusion encoder) as separate graphs.

    Their batch and length are free.  Every graph is run on random inputs of many sizes, and DIR is written only when
    they give what the model gives, to 1e-4.

    Args:
        model: model folder, run folder, or hub id.
        output: folder to write; one of an earlier export is replaced.
        format: onnx: NAME.onnx for onnxruntime; program: NAME.pt2 for torch.export.load.
        checks: random inputs that every graph is compared on; 0: none.
    """
    from tercet.export import FORMATS, export_model
    from tercet.model.hub import load_model

    report = export_model(load_model(model), output, FORMATS if format == "all" else (format,), checks)
    print(f"{', '.join(report.files)} are in {report.folder}.")
    for kind, difference in report.differences.items():
        print(f"{kind}: at most {difference:.1e} from the model, over {report.checks} random inputs.")


def push(model: Path, *, output: str, private: bool = False, message: str | None = None) -> None:
    """Upload a model to the Hugging Face Hub, with its card; the repository is created where there is none.

    Log in first with `hf auth login`, or set HF_TOKEN.  An --output that begins with ./, / or ~ is a folder of this
    machine, which the model is written into instead.

    Args:
        model: model folder or run folder.
        output: repository on the hub, ORGANISATION/NAME, or ./FOLDER.
        private: make a new repository private.
        message: commit message.
    """
    from tercet import load

    predictor = load(model)  # a path, so that a missing folder is not looked for on the hub
    if output.startswith(LOCAL_PREFIXES):
        print(f"The model is in {predictor.save(Path(output).expanduser())}.")
    else:
        print(predictor.push_to_hub(output, private=private or None, message=message))


def load_predictor(model: str, *, local_only: bool = False) -> Predictor:
    """The model that a command names, on the best device; `local_only` never asks the hub."""
    if model == DEMO_MODEL and not Path(model).is_dir():
        raise TercetError(f"name a model with --model; the default, {DEMO_MODEL}, is what `make demo` trains")

    from tercet import load
    from tercet.device import resolve_device

    return load(model, resolve_device().device, local_only=local_only)


def model_and_config(model: str, overrides: dict[str, Any]) -> tuple[str, Config]:
    """The model folder or hub id, and the config of its run where it has one; a run folder stands for its model."""
    from tercet.config_io import default_config, load_config

    folder = Path(model)
    if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
        return str(folder / "model"), load_config(folder, overrides)
    if folder.name == "model" and (folder.parent / "config.yaml").is_file():
        return model, load_config(folder.parent, overrides)
    return model, default_config(overrides)


def warn_untrained_matching(predictor: Predictor, consequence: str) -> None:
    """Warn where the model's matching head was not trained."""
    if not predictor.model.matches:
        print(f"this model's matching head was not trained (itm was off): {consequence}", file=sys.stderr)
