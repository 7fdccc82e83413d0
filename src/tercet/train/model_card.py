"""The model card of a run: training data and settings, results, intended use and limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tercet.config import Config
from tercet.model.hub import model_card
from tercet.model.tercet import Tercet
from tercet.train.log import METRICS

RECALLS = {
    "image_r1": "text→image R@1",
    "image_r5": "R@5",
    "image_r10": "R@10",
    "text_r1": "image→text R@1",
    "text_r5": "R@5",
    "text_r10": "R@10",
    "r_mean": "mean",
}
RANKINGS = {"dual": "dual encoder", "reranked": "re-ranked"}
INTENDED_USE = {
    "pretrain": "Finding images by text and text by image; telling whether a sentence fits an image; a start for "
    "fine-tuning",
    "retrieval": "Finding images by text and text by image; telling whether a sentence fits an image",
    "vqa": "Answering short questions about an image",
    "entailment": "Telling whether a sentence follows from an image, contradicts it, or neither",
    "nlvr_pretrain": "A start for fine-tuning on statements about two images",
    "nlvr": "Telling whether a statement about two images is true",
    "grounding": "Showing where in an image a phrase is seen",
}
PIPELINES = {"vqa": "visual-question-answering"}

Line = dict[str, Any]


def run_card(model: Tercet, config: Config, folder: Path) -> str:
    """README.md of the model that the run in `folder` trained; unknown facts are omitted."""
    metrics, facts = folder / METRICS, folder / "run.json"
    text = metrics.read_text("utf-8") if metrics.is_file() else ""
    lines: list[Line] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    known: Line = json.loads(facts.read_text("utf-8")) if facts.is_file() else {}
    steps = max((line["step"] for line in lines), default=0)
    evaluations = {line["data"]: line for line in lines if line.get("kind") == "evaluate" and "data" in line}
    introduction = model_card(model).split("---\n", 2)[2].strip().split("\n", 1)[1].strip()
    sections = [
        f"# {config.name}\n\n{introduction}",
        f"## Intended use\n\n{INTENDED_USE[config.task]}, on images and texts like those it was trained on.",
        "## Training data\n\n" + _data(config, known),
        "## Training\n\n" + _training(config, known, steps),
        "## Evaluation\n\n" + _evaluation(config, evaluations),
        "## Limits\n\n" + _limits(config, model),
    ]
    return f"---\n{_front_matter(config, evaluations)}---\n" + "\n\n".join(sections) + "\n"


def _data(config: Config, known: Line) -> str:
    pairs = f"{known['pairs']:,} texts with their images, " if "pairs" in known else ""
    sources = ", ".join(f"`{Path(source).name if '://' not in source else source}`" for source in config.data.train)
    start = "It started from random weights."
    if config.init is not None:
        start = f"It started from the weights of `{config.init}`, whose own training data counts as well."
    return f"{pairs}from {sources}. {start}\n\nSay here where the data comes from, its licence, and who is shown in it."


def _training(config: Config, known: Line, steps: int) -> str:
    objectives, optim, train = config.objectives, config.optim, config.train
    rows = {
        "recipe": f"`{config.name}` (task {config.task})",
        "steps": f"{steps:,} of {train.batch_size * optim.grad_accum_steps} pairs each",
        "learning rate": f"{optim.lr:g} to {optim.min_lr:g} ({optim.schedule}), weight decay {optim.weight_decay:g}",
        "augmentation": f"{config.data.augment}, flip {'on' if config.data.flip else 'off'}",
        "seed": str(train.seed),
    }
    if config.task in ("pretrain", "retrieval", "grounding"):
        rows["objectives"] = ", ".join(f"{name} {getattr(objectives, name):g}" for name in objectives.enabled)
    if "machine" in known:
        rows["machine"] = str(known["machine"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n\nThe run's `config.yaml` holds every setting."


def _evaluation(config: Config, evaluations: dict[str, Line]) -> str:
    parts = []
    for data, line in evaluations.items():
        sources = getattr(config.data, data, []) if data in ("validation", "test") else []
        sizes = ", ".join(f"{count:,} {what}" for what, count in (line.get("size") or {}).items())
        parts.append(f"**{data}** ({', '.join(Path(source).name for source in sources)}; {sizes})")
        rankings = [ranking for ranking in RANKINGS if isinstance(line.get(ranking), dict)]
        if rankings:
            head = "| | " + " | ".join(RECALLS.values()) + " |\n|---" + "|---" * len(RECALLS) + "|"
            numbers = {ranking: " | ".join(f"{line[ranking][key]:.1f}" for key in RECALLS) for ranking in rankings}
            parts.append("\n".join([head, *(f"| {RANKINGS[ranking]} | {row} |" for ranking, row in numbers.items())]))
            continue
        for group, metrics in _groups(line):
            rows = [f"| {name} | {value:.2f} |" for name, value in metrics.items()]
            parts.append("\n".join([f"| {group} | |", "|---|---|", *rows]))
    return "\n\n".join(parts) if parts else "It was not evaluated: the run names no held-out data."


def _groups(line: Line) -> list[tuple[str, dict[str, float]]]:
    """The groups of metrics of an evaluation, without what is not a number."""
    return [
        (group, {name: value for name, value in metrics.items() if value is not None})
        for group, metrics in line.items()
        if isinstance(metrics, dict) and group not in ("size", "embeddings")
    ]


def _limits(config: Config, model: Tercet) -> str:
    data = config.data
    limits = [
        "It knows what its training captions name, in their language and words; elsewhere its scores mean little.",
        "It repeats the biases and mistakes of its training data.",
        "A match probability compares captions for one image; it does not measure truth, and is not calibrated.",
        f"Texts are cut after {data.max_words} words or {min(data.max_tokens, model.config.text.max_positions)} word "
        f"pieces; images are resized to {model.config.vision.image_size} px, so that small details are lost.",
        "Not for decisions about people, nor for identifying them.",
    ]
    if config.task in ("pretrain", "retrieval") and not config.objectives.itm:
        limits.append("Its matching head was not trained: use similarity, not match, and do not re-rank.")
    if data.flip:
        limits.append("Images were mirrored in training, so that it may not tell left from right.")
    return "\n".join(f"- {limit}" for limit in limits)


def _front_matter(config: Config, evaluations: dict[str, Line]) -> str:
    matter: Line = {"library_name": "tercet", "tags": ["image-text-retrieval", "vision-language", "tercet"]}
    if config.task in PIPELINES:
        matter["pipeline_tag"] = PIPELINES[config.task]
    for data, line in list(evaluations.items())[-1:]:
        metrics = [
            {"type": name, "name": f"{group} {name}", "value": round(value, 2)}
            for group, numbers in _groups(line)
            for name, value in numbers.items()
        ]
        task = {"type": PIPELINES.get(config.task, "image-text-retrieval")}
        result = {"task": task, "dataset": {"type": data, "name": data}, "metrics": metrics}
        if metrics:
            matter["model-index"] = [{"name": config.name, "results": [result]}]
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
