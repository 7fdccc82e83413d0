"""One module for the commands of one purpose; each command is a dataclass of arguments and a function of the same name.

`COMMANDS` names them without importing them, so that `tercet --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """Where a command lies.

    Attributes:
        module: its module in `tercet.commands`.
        meaning: one sentence for `tercet --help`, which is also the first line of its docstring.
    """

    module: str
    meaning: str

    def load(self, name: str) -> Callable[[list[str]], None]:
        """The function of that name (`data pack`: `data_pack`), which takes the arguments behind it."""
        return getattr(import_module(f"tercet.commands.{self.module}"), name.replace(" ", "_"))


# A name of two words is a command of a group: `tercet data pack`.
COMMANDS = {
    "demo": Command("training", "Train a small model on drawn scenes, evaluate it and write a report."),
    "train": Command("training", "Train a model by a recipe; every key of a recipe is a flag as well."),
    "evaluate": Command(
        "evaluation", "Measure a model on held-out data, in retrieval or in the task that it was fine-tuned for."
    ),
    "match": Command("prediction", "Tell how well texts fit an image."),
    "classify": Command("prediction", "Choose the label that fits an image best."),
    "ask": Command("prediction", "Answer a question about an image."),
    "explain": Command("prediction", "Draw where in an image each word of a text is seen."),
    "index": Command("searching", "Embed images into an index that can be searched, or bring one up to date."),
    "search": Command("searching", "Find images of an index by words, by an image, or both."),
    "serve": Command("serving", "Serve an index over HTTP, with a page to search it."),
    "score": Command("evaluation", "Score a file of predictions against annotations, without a model."),
    "convert": Command(
        "preparation",
        "Turn weights of others (TCL, ALBEF, BERT, DeiT, ViT) into a model folder, or a model into a TCL checkpoint.",
    ),
    "export": Command("exporting", "Write a model as ONNX graphs and torch.export programs, checked against it."),
    "push": Command("exporting", "Upload a model to the Hugging Face Hub, with its card."),
    "tokenizer": Command("preparation", "Train a word-piece tokenizer on captions."),
    "data pack": Command("collection", "Write pairs as WebDataset shards, resumable, images resized if asked."),
    "data inspect": Command(
        "collection", "Show counts, broken images, sizes, duplicates and a contact sheet of pairs."
    ),
    "data filter": Command("collection", "Keep the pairs that a model finds to belong together."),
    "recipes": Command("preparation", "List the recipes that come with the package."),
    "report": Command("reporting", "Write a run's report.html anew, or compare several runs on one page."),
}
