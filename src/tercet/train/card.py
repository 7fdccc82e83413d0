"""The model card of a run: what it was trained on and how, what it reached, what it is for, and where it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tercet.config import Config
from tercet.model.hub import model_card
from tercet.model.tercet import Tercet
from tercet.train.track import METRICS

RECALLS = {
    "image_r1": "text→image R@1",
    "image_r5": "R@5",
    "image_r10": "R@10",
    "text_r1": "image→text R@1",
    "text_r5": "R@5",
    "text_r10": "R@10",
    "r_mean": "mean",
}
WAYS = {"dual": "dual encoder", "reranked": "re-ranked"}
PURPOSES = {
    "pretrain": "Finding images by words and words by image; telling whether a sentence fits a picture; a start for "
    "fine-tuning",
    "retrieval": "Finding images by words and words by image; telling whether a sentence fits a picture",
    "vqa": "Answering short questions about an image",
    "entailment": "Telling whether a sentence follows from a picture, contradicts it, or neither",
    "nlvr_pretrain": "A start for fine-tuning on statements about two images",
    "nlvr": "Telling whether a statement about two images is true",
    "grounding": "Showing where in an image a phrase is seen",
}
PIPELINES = {"vqa": "visual-question-answering"}

Line = dict[str, Any]


def run_card(model: Tercet, config: Config, folder: Path) -> str:
    """README.md of the model that the run in `folder` trained; what is not known is not said."""
    lines = _read(folder / METRICS)
    steps = max((line["step"] for line in lines), default=0)
    evaluations = {line["data"]: line for line in lines if line.get("kind") == "evaluate" and "data" in line}
    facts = _facts(folder)
    start = model_card(model).split("---\n", 2)[2].strip()
    sections = [
        f"# {config.name}\n\n{start.split(chr(10), 1)[1].strip()}",
        f"## Intended use\n\n{PURPOSES[config.task]}, on images and texts like those it was trained on.",
        "## Training data\n\n" + _data(config, facts),
        "## Training\n\n" + _training(config, facts, steps),
        "## Evaluation\n\n" + _evaluation(config, evaluations),
        "## Limits\n\n" + _limits(config, model),
    ]
    return f"---\n{_front_matter(config, evaluations)}---\n" + "\n\n".join(sections) + "\n"


def _read(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]


def _facts(folder: Path) -> Line:
    file = folder / "run.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _data(config: Config, facts: Line) -> str:
    pairs = f"{facts['pairs']:,} texts with their images, " if "pairs" in facts else ""
    sources = ", ".join(f"`{Path(source).name if '://' not in source else source}`" for source in config.data.train)
    notes = [f"{pairs}from {sources}."]
    if any(source.split(":")[0] == "scenes" for source in config.data.train):
        notes.append("Scenes are drawn by Tercet: coloured shapes, with captions that name them.")
    if config.init is not None:
        notes.append(f"It started from the weights of `{config.init}`, whose own training data counts as well.")
    else:
        notes.append("It started from random weights.")
    return " ".join(notes) + "\n\nTell here where the data comes from, its licence, and who is shown in it."


def _training(config: Config, facts: Line, steps: int) -> str:
    objectives, optim, train = config.objectives, config.optim, config.train
    rows = {
        "recipe": f"`{config.name}` (task {config.task})",
        "steps": f"{steps:,}, {train.batch_size * optim.grad_accum_steps} pairs each on a device",
        "learning rate": f"{optim.lr:g} to {optim.min_lr:g} ({optim.schedule}), weight decay {optim.weight_decay:g}",
        "augmentation": f"{config.data.augment}, flip {'on' if config.data.flip else 'off'}",
        "seed": str(train.seed),
    }
    if config.task in ("pretrain", "retrieval", "grounding"):
        rows["objectives"] = ", ".join(f"{name} {getattr(objectives, name):g}" for name in objectives.enabled)
    if "machine" in facts:
        rows["machine"] = str(facts["machine"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n\nThe run's `config.yaml` holds every setting."


def _evaluation(config: Config, evaluations: dict[str, Line]) -> str:
    parts = []
    for data, line in evaluations.items():
        sources = getattr(config.data, data, []) if data in ("validation", "test") else []
        sizes = line.get("size") or {}
        counted = ", ".join(f"{count:,} {what}" for what, count in sizes.items())
        parts.append(f"**{data}** ({', '.join(Path(source).name for source in sources)}; {counted})")
        ways = [way for way in WAYS if isinstance(line.get(way), dict)]
        if ways:
            head = "| | " + " | ".join(RECALLS.values()) + " |\n|---" + "|---" * len(RECALLS) + "|"
            rows = [f"| {WAYS[way]} | " + " | ".join(f"{line[way][key]:.1f}" for key in RECALLS) + " |" for way in ways]
            parts.append("\n".join([head, *rows]))
            continue
        for group, numbers in line.items():
            if isinstance(numbers, dict) and group != "size":
                rows = [f"| {name} | {value:.2f} |" for name, value in numbers.items() if value is not None]
                parts.append("\n".join([f"| {group} | |", "|---|---|", *rows]))
    return "\n\n".join(parts) if parts else "It was not evaluated: the run names no held-out data."


def _limits(config: Config, model: Tercet) -> str:
    data = config.data
    limits = [
        "It knows what its training captions name, in their language and words; elsewhere its scores mean little.",
        "It repeats the biases and mistakes of its training data.",
        "A match probability compares captions for one picture; it is no measure of truth, and not calibrated.",
        f"Texts are cut after {data.max_words} words or {min(data.max_tokens, model.config.text.max_positions)} word "
        f"pieces; images are resized to {model.config.vision.image_size} px, so that small details are lost.",
        "Not for decisions about people, nor for identifying them.",
    ]
    if config.task in ("pretrain", "retrieval") and not config.objectives.itm:
        limits.append("Its matching head was not trained: use similarity, not match, and do not re-rank.")
    if data.flip:
        limits.append("Pictures were mirrored in training, so that it may not tell left from right.")
    return "\n".join(f"- {limit}" for limit in limits)


def _front_matter(config: Config, evaluations: dict[str, Line]) -> str:
    matter: Line = {"library_name": "tercet", "tags": ["image-text-retrieval", "vision-language", "tercet"]}
    if config.task in PIPELINES:
        matter["pipeline_tag"] = PIPELINES[config.task]
    results = []
    for data, line in list(evaluations.items())[-1:]:
        metrics = [
            {"type": name, "name": f"{group} {name}", "value": round(value, 2)}
            for group, numbers in line.items()
            if isinstance(numbers, dict) and group not in ("size", "space")
            for name, value in numbers.items()
            if value is not None
        ]
        if metrics:
            task = {"type": PIPELINES.get(config.task, "image-text-retrieval")}
            results.append({"task": task, "dataset": {"type": data, "name": data}, "metrics": metrics})
    if results:
        matter["model-index"] = [{"name": config.name, "results": results}]
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
