"""Search a folder of pictures with an exported model: onnxruntime, tokenizers, numpy and Pillow, without torch.

tercet export runs/demo/model --output exported --format onnx
python examples/search_onnx.py exported pictures/ "a red circle above a star"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer

BATCH = 32
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Searcher:
    """An exported model that finds pictures by words.

    Args:
        folder: what `tercet export` wrote.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "export.json").read_text("utf-8"))
        self.size: int = facts["image"]["size"]
        self.rules: dict = facts["text"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        graphs = ("vision", "text", "image_kv", "fusion")
        self.graphs = {name: InferenceSession(str(folder / f"{name}.onnx")) for name in graphs}

    def embed_images(self, files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
        """`image_feats` `[images, embed_dim]` and `image_embeds` `[images, 1 + patches, width]`."""
        feats, embeds = [], []
        for start in range(0, len(files), BATCH):
            pixels = np.stack([self._pixels(file) for file in files[start : start + BATCH]])
            image_embeds, image_feats = self.graphs["vision"].run(None, {"images": pixels})
            feats.append(image_feats)
            embeds.append(image_embeds)
        return np.concatenate(feats), np.concatenate(embeds)

    def embed_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`text_feats` `[1, embed_dim]` and `text_embeds` `[1, tokens, width]`."""
        ids = np.array([self.tokenizer.encode(self._clean(text)).ids[: self.rules["max_tokens"]]], np.int64)
        text_embeds, text_feats = self.graphs["text"].run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        return text_feats, text_embeds

    def match(self, text_embeds: np.ndarray, image_embeds: np.ndarray) -> np.ndarray:
        """Probabilities `[images]` that one text fits each image, by the fusion encoder."""
        (image_kv,) = self.graphs["image_kv"].run(None, {"image_embeds": image_embeds})
        texts = np.repeat(text_embeds[:, None], len(image_embeds), axis=0)  # one text for each image
        inputs = {
            "text_embeds": texts,
            "attention_mask": np.ones(texts.shape[:3], np.int64),
            "image_kv": image_kv,
        }
        logits = self.graphs["fusion"].run(["itm_logits"], inputs)[0][:, 0]
        return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))

    def _pixels(self, file: Path) -> np.ndarray:
        """uint8 `[3, size, size]`."""
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    def _clean(self, text: str) -> str:
        """As captions are cleaned before training."""
        rules = self.rules
        table = str.maketrans(rules["to_space"], " " * len(rules["to_space"]), rules["to_nothing"])
        return " ".join(text.lower().translate(table).split()[: rules["max_words"]])


def main() -> None:
    """Print the pictures that fit the words best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that `tercet export` wrote")
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("text", help="what to look for")
    parser.add_argument("--candidates", type=int, default=16, help="pictures that the fusion encoder looks at again")
    arguments = parser.parse_args()

    searcher = Searcher(arguments.model)
    files = sorted(file for file in arguments.pictures.rglob("*") if file.suffix.lower() in PICTURES)
    image_feats, image_embeds = searcher.embed_images(files)
    text_feats, text_embeds = searcher.embed_text(arguments.text)
    cosines = image_feats @ text_feats[0]
    best = np.argsort(-cosines)[: arguments.candidates]
    chances = searcher.match(text_embeds, image_embeds[best])
    for index in np.argsort(-chances):
        print(f"{chances[index]:.4f}  {cosines[best[index]]:.4f}  {files[best[index]]}")


if __name__ == "__main__":
    main()
