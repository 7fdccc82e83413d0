"""What a model trained on synthetic scenes can see: colours, shapes and locations; as JSON.

python benchmarks/scene_skills.py MODEL                              # a pre-trained model
python benchmarks/scene_skills.py MODEL --entailment FINE_TUNED      # and claims by form, of an entailment model
python benchmarks/scene_skills.py --words                            # questions answered without the picture
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tercet
from tercet.config import Config, DataConfig
from tercet.data.class_readers import open_entailments
from tercet.data.scene_files import write_task
from tercet.data.scene_tasks import expressions, questions
from tercet.data.scenes import COLOURS, NUMBERS, SHAPES, SIZES, plural, split_scenes
from tercet.tasks.task import evaluate_task

SINGLES = 60  # scenes of a single object
FRAME = r"^(in this picture |here |as far as one can tell )"
THINGS = r"\b(" + "|".join((*COLOURS, *SHAPES, *map(plural, SHAPES), *SIZES, *NUMBERS.values())) + r"|figures?)\b"
FORMS = {
    "number": "exactly",
    "half": "half",
    "relation": "left of|right of|above|below",
    "size": "is (small|large)$",
    "colour": "^the ",
}


def attributes(predictor: tercet.Predictor) -> dict[str, dict[str, int]]:
    """Single objects whose shape, and whose colour, is chosen among all eight by matching and by similarity."""
    single = list(islice((scene for scene in split_scenes("validation", 500) if len(scene.objects) == 1), SINGLES))
    right: dict[str, Counter[str]] = {"shape": Counter(), "colour": Counter()}
    for scene in single:
        size, colour, shape = scene.objects[0].size, scene.objects[0].colour, scene.objects[0].shape
        texts = {
            "shape": ([f"a {size} {colour} {other}" for other in SHAPES], SHAPES.index(shape)),
            "colour": ([f"a {size} {other} {shape}" for other in COLOURS], COLOURS.index(colour)),
        }
        for name, (options, index) in texts.items():
            for way, score in (("match", predictor.match), ("similarity", predictor.similarity)):
                scores = torch.as_tensor(score(scene.image, options))
                right[name][way] += int(scores.argmax()) == index
    return {name: dict(ways) | {"of": len(single)} for name, ways in right.items()}


def pointing(predictor: tercet.Predictor, count: int = 40) -> dict[str, float]:
    """Percent of the expressions whose map peaks in the right object, in one of its shape, in any."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for scene in split_scenes("validation", count):
        for expression in expressions(scene):
            found = predictor.ground(scene.image, expression.text)
            assert not isinstance(found, list)
            x, y = found.point
            shape = scene.objects[scene.boxes.index(expression.box)].shape
            alike = [box for item, box in zip(scene.objects, scene.boxes, strict=True) if item.shape == shape]
            for name, boxes in (("right", [expression.box]), ("its shape", alike), ("any", scene.boxes)):
                hits[name].append(any(left <= x < right and top <= y < bottom for left, top, right, bottom in boxes))
    return {name: 100.0 * float(np.mean(values)) for name, values in hits.items()} | {"of": len(hits["any"])}


def claims(predictor: tercet.Predictor, count: int = 300) -> dict[str, float]:
    """Accuracy of an entailment model by the form of what is said, in percent."""
    data = DataConfig(workers=0, max_tokens=48)
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), "entailment", count)
        source = open_entailments([f"{folder}/entailment-test.jsonl"], data, "test")
        predictions = evaluate_task("entailment", predictor.model, source, Config(data=data)).predictions
    right: dict[str, list[bool]] = defaultdict(list)
    for index, found in enumerate(predictions):
        text = re.sub(FRAME, "", source.sample(index).text)
        form = next((name for name, pattern in FORMS.items() if re.search(pattern, text)), "colour and shape")
        right["neutral" if found["gold"] == "neutral" else form].append(found["label"] == found["gold"])
    return {name: 100.0 * float(np.mean(values)) for name, values in right.items()}


def words_alone() -> dict[str, float]:
    """Percent of the test questions answered by the commonest training answer to their form, without the picture."""
    common: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in split_scenes("train", 4000):
        for text, answer, _ in questions(scene):
            common[re.sub(THINGS, "X", text)][answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for scene in split_scenes("test", 500):
        for text, answer, kind in questions(scene):
            guess = common[re.sub(THINGS, "X", text)].most_common(1)
            for name in ("all", kind):
                right[name].append(bool(guess) and guess[0][0] == answer)
    return {kind: 100.0 * float(np.mean(values)) for kind, values in right.items()}


def main() -> None:
    """Look at what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--entailment", help="a model fine-tuned by demo-entailment")
    parser.add_argument("--words", action="store_true", help="answer questions without the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if arguments.words:
        found["words_alone"] = words_alone()
    if arguments.model:
        predictor = tercet.load(arguments.model)
        found |= {"attributes": attributes(predictor), "pointing": pointing(predictor)}
    if arguments.entailment:
        found["claims"] = claims(tercet.load(arguments.entailment))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
