"""What a model trained on drawn scenes can see: colours, shapes, places and figures; as JSON.

python benchmarks/scene_skills.py MODEL                              # a pre-trained model
python benchmarks/scene_skills.py MODEL --entailment FINE_TUNED      # and claims by form, of an entailment model
python benchmarks/scene_skills.py --learn                            # shapes, to encoders of five kinds
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tercet
from tercet.config import Config, DataConfig, VisionConfig
from tercet.data.entailment_files import draw_entailments
from tercet.data.scene_captions import NUMBERS, plural
from tercet.data.scene_expressions import expressions
from tercet.data.scene_layout import BACKGROUNDS, COLOURS, SHAPES, SIZES, pick, place, random_kind
from tercet.data.scenes import Scene, SceneSource, scene_generator
from tercet.data.vqa_files import draw_questions
from tercet.model.tercet import Tercet
from tercet.model.vision import ConvolutionStem, VisionTransformer, to_patches
from tercet.tasks.grounding import inside
from tercet.tasks.task import evaluate_task

SINGLE_OF = 60  # scenes of a single figure
FRAME = r"^(in this picture |here |as far as one can tell )"
THINGS = r"\b(" + "|".join((*COLOURS, *SHAPES, *map(plural, SHAPES), *SIZES, *NUMBERS.values())) + r"|figures?)\b"
FORMS = {
    "number": "exactly",
    "half": "half",
    "relation": "left of|right of|above|below",
    "size": "is (small|large)$",
    "colour": "^the ",
}


def attributes(model: Tercet) -> dict[str, dict[str, int]]:
    """Single figures whose shape, and whose colour, is told among all eight by matching and by similarity."""
    source = SceneSource(1000, "validation")
    single = [scene for scene in map(source.scene, range(1000)) if len(scene.objects) == 1][:SINGLE_OF]
    right = {"shape": defaultdict(int), "colour": defaultdict(int)}
    for scene in single:
        size, colour, shape = scene.objects[0].size, scene.objects[0].colour, scene.objects[0].shape
        texts = {
            "shape": ([f"a {size} {colour} {other}" for other in SHAPES], SHAPES.index(shape)),
            "colour": ([f"a {size} {other} {shape}" for other in COLOURS], COLOURS.index(colour)),
        }
        for name, (options, told) in texts.items():
            for way, score in (("match", model.match), ("similarity", model.similarity)):
                scores = score(scene.image, options)
                assert isinstance(scores, Tensor)
                right[name][way] += int(scores.argmax()) == told
    return {name: dict(ways) | {"of": len(single)} for name, ways in right.items()}


@torch.no_grad()
def places(model: Tercet) -> dict[str, float]:
    """How large the position table is, and whether final tokens tell the column of their patch."""
    vision = model.vision
    images = torch.stack([_pixels(SceneSource(64, "test").array(index)) for index in range(64)])
    tokens = vision(images)[:, 1:]
    pixels = vision.normalise(images)
    convolves = isinstance(vision.patch_embed, ConvolutionStem)
    embedded = vision.patch_embed(pixels if convolves else to_patches(pixels, vision.patch_size))
    column = (torch.arange(tokens.shape[1]) % model.config.vision.grid).repeat(64).float()
    read = F.pad(tokens.flatten(0, 1), (0, 1), value=1.0)
    half = len(read) // 2
    found = (read[half:] @ torch.linalg.lstsq(read[:half], column[:half, None]).solution)[:, 0]
    return {
        "position_table_deviation": vision.position_embed[0, 1:].std(0).mean().item(),
        "patch_embed_deviation": embedded.std(0).mean().item(),
        "column_r2": 1 - ((found - column[half:]) ** 2).mean().item() / column.var().item(),
    }


def pointing(predictor: tercet.Predictor, count: int = 40) -> dict[str, float]:
    """Percent of the expressions whose map peaks in the right figure, in one of its shape, in any."""
    hits: dict[str, list[bool]] = defaultdict(list)
    source = SceneSource(500, "validation", distinct=True)
    for scene in map(source.scene, range(count)):
        for expression in expressions(scene):
            found = predictor.ground(scene.image, expression.text)
            assert not isinstance(found, list)
            shape = scene.objects[scene.boxes.index(expression.box)].shape
            alike = [box for item, box in zip(scene.objects, scene.boxes, strict=True) if item.shape == shape]
            for name, boxes in (("right", [expression.box]), ("its shape", alike), ("any", scene.boxes)):
                hits[name].append(inside(found.point, boxes))
    return {name: 100.0 * float(np.mean(values)) for name, values in hits.items()} | {"of": len(hits["any"])}


def claims(model: Tercet, count: int = 300) -> dict[str, float]:
    """Accuracy of an entailment model by the form of what is said, in percent."""
    data = DataConfig(workers=0, max_tokens=48)
    source = draw_entailments(count, "test")
    predictions = evaluate_task("entailment", model, source, Config(data=data)).predictions
    right: dict[str, list[bool]] = defaultdict(list)
    for index, row in enumerate(predictions):
        text = re.sub(FRAME, "", source.sample(index).text)
        form = next((name for name, pattern in FORMS.items() if re.search(pattern, text)), "colour and shape")
        right["neutral" if row["gold"] == "neutral" else form].append(row["label"] == row["gold"])
    return {name: 100.0 * float(np.mean(values)) for name, values in right.items()}


def words_alone() -> dict[str, float]:
    """Percent of the test questions answered by the commonest training answer to their form, without the picture."""
    train, test = draw_questions(4000, "train"), draw_questions(500, "test")
    common: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(train.sample_count):
        sample = train.sample(index)
        common[re.sub(THINGS, "X", sample.text)][sample.target["answers"][0]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for index in range(test.sample_count):
        sample = test.sample(index)
        guess = common[re.sub(THINGS, "X", sample.text)].most_common(1)
        for kind in ("all", sample.target["answer_type"]):
            right[kind].append(bool(guess) and guess[0][0] == sample.target["answers"][0])
    return {kind: 100.0 * float(np.mean(values)) for kind, values in right.items()}


class Convolutions(nn.Module):
    """Four stages of two 3x3 convolutions, and the maximum over places, in the form of image tokens."""

    def __init__(self, channels: tuple[int, ...] = (3, 16, 32, 64, 128)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairs)
        self.same = nn.ModuleList(nn.Conv2d(b, b, 3, 1, 1, bias=False) for _, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for _, b in pairs for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `[batch, 3, height, width]` to `[batch, 1, width]`."""
        hidden = (images.float() / 255 - 0.5) * 4
        for stage, (down, same) in enumerate(zip(self.down, self.same, strict=True)):
            hidden = F.relu(self.norms[2 * stage](down(hidden)))
            hidden = hidden + F.relu(self.norms[2 * stage + 1](same(hidden)))
        return hidden.flatten(2).amax(2)[:, None]


def learn(build: Callable[[], nn.Module], steps: int, rate: float = 1e-3) -> dict[str, Any]:
    """Teach shape and colour of one figure, 32 new drawings a step; accuracy on 256 others, every 100 steps."""
    torch.manual_seed(0)
    model, head = build(), nn.Linear(128, 16)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02)
    images, labels = _drawings(range(10**7, 10**7 + 256))
    shape: dict[int, float] = {}
    started = time.process_time()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 50)
        pixels, told = _drawings(range(32 * (step - 1), 32 * step))
        logits = head(model(pixels)[:, 0])
        loss = F.cross_entropy(logits[:, :8], told[:, 0]) + F.cross_entropy(logits[:, 8:], told[:, 1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            with torch.no_grad():
                shape[step] = 100 * (head(model(images)[:, 0])[:, :8].argmax(1) == labels[:, 0]).double().mean().item()
    return {"shape": shape, "cpu_seconds_a_step": (time.process_time() - started) / steps}


def _drawings(seeds: range) -> tuple[Tensor, Tensor]:
    scenes = []
    for seed in seeds:
        rng = scene_generator(seed, 0)
        scenes.append(Scene(seed, 64, place(rng, [random_kind(rng)]), pick(rng, BACKGROUNDS)))
    labels = [(SHAPES.index(scene.objects[0].shape), COLOURS.index(scene.objects[0].colour)) for scene in scenes]
    return torch.stack([_pixels(scene.image) for scene in scenes]), torch.tensor(labels)


def _pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _transformer(**changes: Any) -> nn.Module:
    sizes = {"image_size": 64, "patch_size": 8, "width": 128, "depth": 4, "heads": 4}
    return VisionTransformer(VisionConfig.model_validate(sizes | changes))


LEARNERS: dict[str, Callable[[], nn.Module]] = {
    "patches, class token": _transformer,
    "patches, maximum": lambda: _transformer(pool="maximum"),
    "convolution stem, class token": lambda: _transformer(stem="convolution", depth=1),
    "convolution stem, maximum": lambda: _transformer(stem="convolution", pool="maximum", depth=1),
    "convolutions alone": Convolutions,
}


def main() -> None:
    """Look at what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--entailment", help="a model fine-tuned by demo-entailment")
    parser.add_argument("--words", action="store_true", help="answer questions without the picture")
    parser.add_argument("--learn", action="store_true", help="teach shapes to encoders of five kinds, some minutes")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if arguments.words:
        found["words_alone"] = words_alone()
    if arguments.learn:
        found["learn"] = {name: learn(build, arguments.steps) for name, build in LEARNERS.items()}
    if arguments.model:
        predictor = tercet.load(arguments.model)
        model = predictor.model
        found |= {"attributes": attributes(model), "places": places(model), "pointing": pointing(predictor)}
    if arguments.entailment:
        found["claims"] = claims(tercet.load(arguments.entailment).model)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
