"""What every reader of annotations shares: refused rows with their reasons, the choice of a split, collected pairs."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from tercet.data.packed import PackedStrings, StringPacker, encode
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError

MESSAGES_KEPT = 1000
WORD = re.compile(r"\w")
SPLIT_ALIASES = {"validation": "val", "dev": "val"}


class Problems(Sequence[str]):
    """Messages of refused rows.  Its length counts all of them; only the first thousand are kept to be read."""

    def __init__(self) -> None:
        self._total = 0
        self._messages: list[str] = []

    def add(self, message: str) -> None:
        """Count one refused row."""
        self._total += 1
        if len(self._messages) < MESSAGES_KEPT:
            self._messages.append(message)

    def extend(self, other: Sequence[str]) -> None:
        """Count the refused rows of another source."""
        self._messages += list(other)[: MESSAGES_KEPT - len(self._messages)]
        self._total += len(other)

    def extend_counted(self, messages: Sequence[str], total: int) -> None:
        """Count `total` refused rows, of which `messages` tell the first."""
        self._messages += messages[: MESSAGES_KEPT - len(self._messages)]
        self._total += total

    def __len__(self) -> int:
        return self._total

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._messages[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def lines(self, limit: int = 20) -> list[str]:
        """What to print: the first `limit` messages and how many more there are."""
        shown = self._messages[:limit]
        if len(self) > len(shown):
            shown.append(f"and {len(self) - len(shown)} more")
        return shown


class SplitFilter:
    """Which rows of a file to take, by their `split` field: `flickr8k.json#test`, `coco.json#train+restval`, `#all`.

    Without a suffix every row is taken, unless the rows carry different splits: then training on the file would
    silently train on its test rows, so that is refused.
    """

    def __init__(self, suffix: str | None) -> None:
        self.suffix = suffix
        self.wanted = None if suffix in (None, "", "all") else {_canonical(name) for name in (suffix or "").split("+")}
        self.seen: Counter[str] = Counter()

    def accepts(self, split: object) -> bool:
        """Whether a row with this `split` value (None: the row has none) is taken."""
        name = "" if split is None else str(split)
        self.count(name, 1)
        return self.wants(name)

    def count(self, name: str, rows: int) -> None:
        """Count rows of a split, '' for none."""
        self.seen[name] += rows

    def wants(self, name: str) -> bool:
        """Whether rows of a split, '' for none, are taken."""
        return self.wanted is None or _canonical(name) in self.wanted

    def check(self, file: str) -> None:
        """Raise TercetError when the suffix matched no row, or none was given for rows of several splits."""
        there = ", ".join(f"{name or '(none)'} ({count})" for name, count in self.seen.items())
        if self.wanted is not None:
            if self.seen and not any(_canonical(name) in self.wanted for name in self.seen):
                raise TercetError(f"{file}: no row of split {self.suffix!r}; the splits there are {there}")
        elif self.suffix != "all" and len(self.seen) > 1:
            first = next(name for name in self.seen if name)
            raise TercetError(
                f"{file} holds several splits, {there}; say which, as in {file}#{first}, or {file}#all for every row"
            )


@dataclass(frozen=True)
class Pairs:
    """Images of one source and their captions.

    Attributes:
        keys: name of each image [images].
        captions: every caption [captions], those of one image beside each other.
        first_caption: int64 [images + 1]; image i has the captions first_caption[i] to first_caption[i + 1].
        image_ids: int64 [images]; equal for images that the file gives the same `image_id`.
        rows: int64 [images]; which accepted row an image came from (the first, when several rows name it).
    """

    keys: PackedStrings
    captions: PackedStrings
    first_caption: np.ndarray
    image_ids: np.ndarray
    rows: np.ndarray


class PairCollector:
    """Takes rows one by one, refuses the bad ones with a reason, and gathers the rows of one image."""

    def __init__(self, problems: Problems, max_words: int) -> None:
        self.problems = problems
        self._max_words = max_words
        self._keys = StringPacker()
        self._captions = StringPacker()
        self._counts = array("q")
        self._identities = array("Q")
        self._given_ids = array("Q")

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, where: str, key: str, captions: object, image_id: object = None) -> bool:
        """Take one row and say whether it was accepted.

        Args:
            where: names the row in messages: file and row number.
            key: what tells the image from others of the source; rows with the same key are one image.
            captions: a string or a list of strings; anything else is refused.
            image_id: when given, images with equal ids count as the same for the targets of training.
        """
        texts = self._checked(where, captions)
        if not texts:
            return False
        self._keys.add(key)
        for text in texts:
            self._captions.add(text.encode("utf-8", "replace"))
        self._counts.append(len(texts))
        identity = digest(encode(key))
        self._identities.append(identity)
        self._given_ids.append(identity if image_id is None else digest_of_id(image_id))
        return True

    def _checked(self, where: str, captions: object) -> list[str]:
        given = captions if isinstance(captions, list) else [captions]
        if not given:
            self.problems.add(f"{where}: the list of captions is empty")
        texts: list[str] = []
        for caption in given:
            if caption is None:
                self.problems.add(f"{where}: no caption")
            elif not isinstance(caption, str):
                self.problems.add(f"{where}: the caption is {type(caption).__name__} {_short(caption)}, not text")
            elif is_empty(caption, self._max_words):
                self.problems.add(f"{where}: the caption {_short(caption)} is empty after cleaning")
            else:
                texts.append(caption)
        return texts

    def finish(self) -> Pairs:
        """The accepted rows as images in the order of their first row."""
        counts = np.array(self._counts, np.int64)
        identities = np.array(self._identities, np.uint64)
        _, first_row, image_of_row = np.unique(identities, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first_row)
        rank = np.empty_like(by_appearance)
        rank[by_appearance] = np.arange(len(by_appearance))
        image_of_row = rank[image_of_row]
        rows = first_row[by_appearance].astype(np.int64)
        keys, captions = self._keys.pack(), self._captions.pack()
        image_of_caption = np.repeat(image_of_row, counts)
        if len(rows) < len(counts):
            keys = keys.take(rows)
            captions = captions.take(np.argsort(image_of_caption, kind="stable"))
        per_image = np.bincount(image_of_caption, minlength=len(rows))
        first_caption = np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64)
        given = np.array(self._given_ids, np.uint64)[rows]
        _, first_image, group = np.unique(given, return_index=True, return_inverse=True)
        return Pairs(keys, captions, first_caption, first_image[group].astype(np.int64), rows)


def is_empty(caption: str, max_words: int) -> bool:
    """Whether nothing is left of a caption after cleaning.  A letter or digit survives it, so most need no cleaning."""
    return WORD.search(caption) is None and not clean_caption(caption, max_words)


def described(row: object, column: str, where: str) -> str:
    """The reason why `row` has no usable `column`."""
    if not isinstance(row, dict):
        return f"{where}: {type(row).__name__} {_short(row)} is not an object with an image and a caption"
    there = ", ".join(map(str, row))
    if column not in row:
        return f"{where}: no {column!r}; the keys there are {there}"
    return f"{where}: {column!r} is {type(row[column]).__name__} {_short(row[column])}, not a file name"


def require_pairs(collector: PairCollector, file: str, looked_for: str) -> None:
    """Raise TercetError, saying what was looked for and why rows were refused, when a file gave no pair at all."""
    if len(collector):
        return
    problems = collector.problems
    refused = f"; {len(problems)} refused, the first: {problems[0]}" if problems else ""
    raise TercetError(f"{file}: no image with a caption found; looked for {looked_for}{refused}")


def _canonical(split: str) -> str:
    return SPLIT_ALIASES.get(split, split)


def digest(data: bytes) -> int:
    """64 bits that stand for `data`; among 100 million rows two differ wrongly with a chance of 0.03 %."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def digest_of_id(image_id: object) -> int:
    """64 bits that stand for an `image_id`, whatever JSON made of it."""
    return digest(repr(image_id).encode("utf-8", "replace"))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
