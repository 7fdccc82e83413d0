"""Captions to tokens: cleaning as published, and word pieces with `[CLS]` in front and no `[SEP]` at the end."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from tercet.data.rows import parse_json
from tercet.errors import TercetError
from tercet.files import write_atomic

# A caption is too short to be worth a thread pool, and a pool that exists when workers fork can lock them up.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.txt"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The same five roles in the vocabularies of other tokenizers.
_ALIASES = {
    "[PAD]": ("[PAD]", "<pad>"),
    "[UNK]": ("[UNK]", "<unk>"),
    "[CLS]": ("[CLS]", "<cls>", "<s>"),
    "[SEP]": ("[SEP]", "<sep>", "</s>"),
    "[MASK]": ("[MASK]", "<mask>"),
}
_DELETED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")
_RUN_OF_SPACE = re.compile(r"\s{2,}")
_WORDS_A_LINE = 10_000
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def clean_caption(text: str, max_words: int) -> str:
    """Lower-case a caption, drop its punctuation and keep its first `max_words` words.  It can become empty.

    A single tab or newline inside stays, as in the published code.
    """
    text = text.lower().translate(_DELETED).replace("<person>", "person")
    text = _RUN_OF_SPACE.sub(" ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def clean_question(text: str, max_words: int) -> str:
    """Lower-case a question and drop its punctuation; its spaces stay, and every one of them ends a word."""
    return _first_words(text.lower().translate(_DELETED).rstrip(" "), max_words)


def mentions_sides(text: str) -> bool:
    """Whether a text mentions left or right, which a mirrored image would make false."""
    return _SIDES.search(text) is not None


class Tokenizer:
    """Texts to token ids and back.  Pickles, so that data workers can have it.

    Whatever the loaded file says about special tokens around a text, `encode` puts `[CLS]` in front and nothing at
    the end.  The name of a special token inside a text (an answer's "yes[SEP]") becomes that token.

    Attributes:
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
        sep_token: how this vocabulary writes `[SEP]`; appended to a text it becomes `sep_id`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str = "tokenizer") -> None:
        """Wrap `tokenizer`; `origin` names it in errors.

        Raises:
            TercetError: a special token is missing.
        """
        self._tokenizer = tokenizer
        special = {role: _find_special(tokenizer, role, origin) for role in SPECIAL_TOKENS}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (index for _, index in special.values())
        self.sep_token = special["[SEP]"][0]
        # The saved file then gives others the very ids that `encode` gives.
        first = special["[CLS]"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first[0]} $A", pair=f"{first[0]} $A $B", special_tokens=[first]
        )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a `tokenizer.json`, a BERT `vocab.txt`, or a folder that holds either (the first is preferred).

        A `vocab.txt` is taken as uncased unless a `tokenizer_config.json` beside it says `"do_lower_case": false`.

        Raises:
            TercetError: nothing there, not a tokenizer, or one without the special tokens.
        """
        path = Path(path)
        if path.is_dir():
            path = _find_in_folder(path)
        text = _read(path)
        if path.suffix == ".json":
            return cls(_parse_json(path, text), str(path))
        return cls(_from_vocabulary(path, text), str(path))

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> Tokenizer:
        """Learn an uncased WordPiece vocabulary of at most `size` pieces; the same captions give the same one.

        Args:
            captions: cleaned captions, in any script; read once.
            size: word pieces, the five special tokens included.

        Raises:
            TercetError: no words in the captions, or a `size` too small for any.
        """
        if size <= len(SPECIAL_TOKENS):
            raise TercetError(f"a tokenizer of {size} word pieces cannot hold any word; give it a few hundred at least")
        tokenizer = _word_piece({})
        words = _count_words(tokenizer, captions)
        if not words:
            raise TercetError("no words to train a tokenizer on: every caption is empty; check the caption column")
        alphabet = _choose_alphabet(words, size - len(SPECIAL_TOKENS))
        pieces = _train_pieces(words, alphabet, size)
        return cls(_word_piece({piece: index for index, piece in enumerate(pieces)}), "trained tokenizer")

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into `folder` and return its path."""
        return write_atomic(Path(folder) / TOKENIZER_FILE, self._tokenizer.to_str(pretty=True))

    @property
    def vocabulary_size(self) -> int:
        """Rows that an embedding table needs: the largest id and one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], max_tokens: int | None, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids of a batch of texts, `[CLS]` first.

        Args:
            texts: cleaned texts.
            max_tokens: cut each to this many tokens, `[CLS]` included; None cuts nothing.
            pad_to: pad to this length; default the batch's longest.

        Returns:
            input_ids, int64 `[batch, tokens]`, and attention_mask, bool `[batch, tokens]`, True where not padding.

        Raises:
            TercetError: a text is longer than `pad_to`.
        """
        encodings = self._tokenizer.encode_batch([_well_formed(text) for text in texts], add_special_tokens=False)
        limit = None if max_tokens is None else max_tokens - 1
        rows = [encoding.ids[:limit] for encoding in encodings]
        longest = max((1 + len(row) for row in rows), default=0)
        if pad_to is not None and longest > pad_to:
            raise TercetError(f"a text of {longest} tokens does not fit pad_to {pad_to}; set max_tokens to {pad_to}")
        length = longest if pad_to is None else pad_to
        input_ids = np.full((len(rows), length), self.pad_id, np.int64)
        attention_mask = np.zeros((len(rows), length), np.bool_)
        for index, row in enumerate(rows):
            end = 1 + len(row)
            input_ids[index, 0] = self.cls_id
            input_ids[index, 1:end] = row
            attention_mask[index, :end] = True
        return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids `[tokens]`, without special tokens."""
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self._tokenizer.decode(values, skip_special_tokens=True)

    def tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """The word piece of each id `[tokens]`, special tokens included.

        Raises:
            TercetError: an id that the vocabulary does not have.
        """
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        pieces = []
        for value in values:
            piece = self._tokenizer.id_to_token(value)
            if piece is None:
                raise TercetError(f"token id {value} is not in the vocabulary of {self.vocabulary_size} word pieces")
            pieces.append(piece)
        return pieces


def _first_words(text: str, max_words: int) -> str:
    words = text.split(" ")
    return text if len(words) <= max_words else " ".join(words[:max_words])


def _well_formed(text: str) -> str:
    """`text` without the halves of characters that broken JSON escapes leave; the library refuses them."""
    return text if text.isascii() else text.encode("utf-8", "ignore").decode()


def _find_special(tokenizer: tokenizers.Tokenizer, role: str, origin: str) -> tuple[str, int]:
    """How `tokenizer` writes a special token, which from now on is found inside texts as well, and its id."""
    for name in _ALIASES[role]:
        index = tokenizer.token_to_id(name)
        if index is not None:
            tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
            return name, index
    raise TercetError(f"{origin}: no {role} token among its word pieces; use a tokenizer made for a BERT-like model")


def _find_in_folder(folder: Path) -> Path:
    for name in (TOKENIZER_FILE, VOCABULARY_FILE):
        if (folder / name).is_file():
            return folder / name
    raise TercetError(f"{folder}: neither {TOKENIZER_FILE} nor {VOCABULARY_FILE} in this folder")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise TercetError(
            f"{path}: no such file; give a {TOKENIZER_FILE}, a {VOCABULARY_FILE} or their folder"
        ) from error
    except UnicodeDecodeError as error:
        raise TercetError(f"{path}: not UTF-8 text (byte {error.start}); is it a tokenizer file?") from error
    except OSError as error:
        raise TercetError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse_json(path: Path, text: str) -> tokenizers.Tokenizer:
    content = parse_json(text, str(path))
    if not isinstance(content, dict) or "model" not in content:
        raise TercetError(f"{path}: JSON, but not a tokenizer (no key 'model'); give the {TOKENIZER_FILE} beside it")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        for unknown in ("a", "\N{SNOWMAN}", "\N{CUNEIFORM SIGN A}" * 200):
            tokenizer.encode(unknown)  # fails at once where the vocabulary lacks its own token for unknown words
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and in its panics not even those
        reason = " ".join(str(error).split())[:300]
        raise TercetError(f"{path}: not a tokenizer that can be read ({reason})") from error


def _from_vocabulary(path: Path, text: str) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer whose ids are the lines of `vocab.txt`."""
    # Not splitlines(): some vocabularies hold Unicode line separators as word pieces.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    # Of a piece that stands twice the later line counts, as in every reader of this format.
    vocabulary = {line: index for index, line in enumerate(lines)}
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise TercetError(f"{path}: no line {', '.join(missing)}; a vocab.txt of BERT has one word piece on each line")
    return _word_piece(vocabulary, lowercase=_is_uncased(path.parent / "tokenizer_config.json"))


def _is_uncased(settings: Path) -> bool:
    if not settings.is_file():
        return True
    content = parse_json(_read(settings), str(settings))
    return not (isinstance(content, dict) and content.get("do_lower_case") is False)


def _word_piece(vocabulary: dict[str, int], lowercase: bool = True) -> tokenizers.Tokenizer:
    """BERT's tokenizer over `vocabulary`: accents go with the capitals, every Chinese character is a word."""
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _count_words(tokenizer: tokenizers.Tokenizer, captions: Iterable[str]) -> Counter[str]:
    normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(word for word, _ in split(normalize(_well_formed(caption))))
    return counts


def _choose_alphabet(words: Counter[str], limit: int) -> dict[str, set[str]]:
    """The most frequent characters, each with its forms ("a" in front of a word, "##a" inside), within `limit`."""
    frequency: Counter[str] = Counter()
    forms: dict[str, set[str]] = {}
    for word, count in words.items():
        for position, character in enumerate(word):
            frequency[character] += count
            forms.setdefault(character, {character}).add(f"##{character}" if position else character)
    alphabet: dict[str, set[str]] = {}
    for character in sorted(frequency, key=lambda item: (-frequency[item], item)):
        limit -= len(forms[character])
        if limit < 0:
            break
        alphabet[character] = forms[character]
    return alphabet


def _train_pieces(words: Counter[str], alphabet: dict[str, set[str]], size: int) -> list[str]:
    """Word pieces in the order of their ids: special tokens, characters, then merges by falling frequency."""
    # The library numbers "##a" as it meets it in a hash table, which differs from run to run, and breaks ties by
    # number. Handed over first, as if they were special tokens, they have fixed numbers.
    characters = sorted(form for forms in alphabet.values() for form in forms)
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[AddedToken(piece) for piece in (*SPECIAL_TOKENS, *characters)],
        limit_alphabet=len(alphabet),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    scratch = tokenizers.Tokenizer(models.WordPiece(vocab={}, unk_token="[UNK]"))
    scratch.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    scratch.train_from_iterator(_repeat_words(words, alphabet), trainer)
    vocabulary = scratch.get_vocab(with_added_tokens=False)
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _repeat_words(words: Counter[str], alphabet: dict[str, set[str]]) -> Iterator[str]:
    """Every word as often as it was counted, in lines of bounded length; words beyond the alphabet are skipped."""
    for word in sorted(words):
        if not alphabet.keys() >= set(word):
            continue
        whole, rest = divmod(words[word], _WORDS_A_LINE)
        for times in [_WORDS_A_LINE] * whole + [rest] * (rest > 0):
            yield " ".join([word] * times)
