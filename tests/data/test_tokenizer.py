from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tercet.data.tokenizer import SPECIAL_TOKENS, Tokenizer, clean_caption, clean_question
from tercet.errors import TercetError

CAPTIONS = [
    "a red cube left of a blue ball",
    "a blue cube above a red ball",
    "two green cylinders and a red ball",
    "a green ball behind a blue cylinder",
]


@pytest.fixture(scope="module")
def published(parity_dir: Path) -> dict[str, Any]:
    return json.loads((parity_dir / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def vocabulary_file(published: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(published["vocabulary"]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary_file: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary_file)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 200)


def test_cleaning_equals_the_published_one(parity_dir: Path) -> None:
    cases = json.loads((parity_dir / "text_cleaning.json").read_text())["cases"]
    assert len(cases) == 34
    for case in cases:
        for key, expected in case.items():
            if key == "input":
                continue
            clean = clean_caption if key.startswith("pre_caption") else clean_question
            assert clean(case["input"], int(key.rpartition("max")[2])) == expected, (key, case["input"])


@settings(deadline=None)
@given(st.text(), st.integers(1, 40))
def test_cleaned_captions_have_no_punctuation_and_keep_the_limit(text: str, max_words: int) -> None:
    once = clean_caption(text, max_words)
    assert len(once.split(" ")) <= max_words
    assert not set(once) & set(",.'!?\"()*#:;~-/")
    assert once == once.strip(" ")


def test_single_texts_equal_the_published_ids(tokenizer: Tokenizer, published: dict[str, Any]) -> None:
    assert published["single"]
    for case in published["single"]:
        input_ids, attention_mask = tokenizer.encode([case["text"]], None)
        assert input_ids.tolist() == [case["input_ids"]], case["text"]
        assert tokenizer.tokens(input_ids[0]) == case["tokens"]
        assert attention_mask.all()
        assert tokenizer.encode([case["text"]], 8)[0].tolist() == [case["input_ids_truncated_max8"]], case["text"]


BATCHES = {
    "pretrain: padding longest, truncation, max_length 25": (25, None),
    "retrieval evaluation: padding max_length, truncation, max_length 30": (30, 30),
    "vqa answers / ve / nlvr: padding longest only": (None, None),
    "longest, truncation, max_length 6": (6, None),
    "retrieval training: padding longest, max_length=8, no truncation argument (nothing is cut)": (None, None),
}


def test_batches_equal_the_published_ids(tokenizer: Tokenizer, published: dict[str, Any]) -> None:
    batches = published["batches_of_first_six_texts_or_answers"]
    assert batches.keys() == BATCHES.keys()
    first_six = [case["text"] for case in published["single"][:6]]
    for name, expected in batches.items():
        texts = ["yes[SEP]", "red shirt[SEP]"] if name.startswith("vqa") else first_six
        max_tokens, pad_to = BATCHES[name]
        input_ids, attention_mask = tokenizer.encode(texts, max_tokens, pad_to)
        assert input_ids.dtype == torch.int64 and attention_mask.dtype == torch.bool
        assert input_ids.tolist() == expected["input_ids"], name
        assert attention_mask.int().tolist() == expected["attention_mask"], name


def test_special_ids(tokenizer: Tokenizer, published: dict[str, Any]) -> None:
    expected = published["special_ids"]
    found = {name: getattr(tokenizer, f"{name}_id") for name in expected}
    assert found == expected
    assert tokenizer.vocabulary_size == len(published["vocabulary"])


def test_a_file_that_adds_sep_itself_still_gives_none(vocabulary_file: Path, published: dict[str, Any], tmp_path: Path):
    plain = Tokenizer.load(vocabulary_file)
    plain.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    theirs.enable_truncation(5)
    theirs.enable_padding(length=40)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("a dog").ids[-1] == 0 and 4 in theirs.encode("a dog").ids
    loaded = Tokenizer.load(tmp_path)
    for case in published["single"]:
        assert loaded.encode([case["text"]], None)[0].tolist() == [case["input_ids"]]


def test_the_saved_file_gives_others_the_same_ids(tokenizer: Tokenizer, published: dict[str, Any], tmp_path: Path):
    path = tokenizer.save(tmp_path / "model")
    others = tokenizers.Tokenizer.from_file(str(path))
    ours = Tokenizer.load(path)
    for case in published["single"]:
        assert others.encode(case["text"]).ids == case["input_ids"]
        assert ours.encode([case["text"]], None)[0].tolist() == [case["input_ids"]]


def test_cased_vocabulary_beside_its_settings(vocabulary_file: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(vocabulary_file.read_text(encoding="utf-8") + "Café\n", encoding="utf-8")
    uncased = Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Tokenizer.load(tmp_path)
    assert uncased.tokens(uncased.encode(["Café"], None)[0][0]) == ["[CLS]", "cafe"]
    assert cased.tokens(cased.encode(["Café"], None)[0][0]) == ["[CLS]", "Café"]


def test_windows_line_ends_and_unicode_separators_in_vocab_txt(tmp_path: Path) -> None:
    lines = [*SPECIAL_TOKENS, "\u2028", "dog"]
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*lines, ""]).encode())
    assert Tokenizer.load(tmp_path).encode(["dog"], None)[0].tolist() == [[2, 6]]


def test_tokenizers_of_other_families_have_the_same_roles(tmp_path: Path) -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "dog"]
    theirs = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    theirs.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.cls_id, loaded.pad_id, loaded.sep_id, loaded.unk_id, loaded.mask_id) == (0, 1, 2, 3, 4)
    assert loaded.encode([f"a dog{loaded.sep_token}"], None)[0].tolist() == [[0, 5, 6, 2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "no such file"),
        ("", None, r"neither tokenizer\.json nor vocab\.txt"),
        ("tokenizer.json", b'{"model": {"type": "Word', "the JSON ends too early"),
        ("tokenizer.json", b'{"hidden_size": 768}', "not a tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "Nonsense"}}', "not a tokenizer that can be read"),
        ("vocab.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog\n", r"no line \[MASK\]"),
    ],
)
def test_unusable_files_are_refused_by_name(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TercetError, match=message) as caught:
        Tokenizer.load(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(TercetError, match=r"no \[CLS\] token"):
        Tokenizer.load(tmp_path)


def test_training_knows_the_words_it_saw(trained: Tokenizer) -> None:
    assert trained.tokens(range(5)) == list(SPECIAL_TOKENS)
    assert trained.tokens(trained.encode(["a red ball"], None)[0][0]) == ["[CLS]", "a", "red", "ball"]
    input_ids, attention_mask = trained.encode(CAPTIONS, 25)
    assert not (input_ids == trained.unk_id).any()
    assert [trained.decode(row) for row in input_ids] == CAPTIONS
    assert ((input_ids != trained.pad_id) == attention_mask).all()


@pytest.mark.parametrize(
    "captions",
    [
        ["红色的球在桌子上", "桌子上的红色杯子"],
        ["красный шар на столе", "красный куб под столом"],
        ["κόκκινη μπάλα", "كرة حمراء على الطاولة"],
        ["a"],
        ["one 🙂 two"],
    ],
)
def test_training_on_tiny_sets_of_any_script(captions: list[str]) -> None:
    trained = Tokenizer.train(captions, 300)
    input_ids, _ = trained.encode(captions, 40)
    assert not (input_ids == trained.unk_id).any()
    assert trained.vocabulary_size <= 300


def test_training_stays_within_its_size_and_keeps_the_frequent_characters() -> None:
    captions = ["e" * 3 + " " + "".join(chr(0x4E00 + i) for i in range(200))] * 3
    trained = Tokenizer.train(captions, 64)
    assert trained.vocabulary_size <= 64
    assert trained.unk_id not in trained.encode(["eee"], None)[0]
    assert trained.unk_id in trained.encode([captions[0]], None)[0]


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    # Nearly every count is a tie: left to the library, four trainings of these give four vocabularies.
    words = ["wing", "sing", "king", "gnik", "gnis", "ab", "ba", "cab", "bac", "abc"]
    captions = [f"{first} {second}{first}" for first in words for second in words]
    files = {Tokenizer.train(captions, 120).save(tmp_path / str(run)).read_bytes() for run in range(4)}
    assert len(files) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trained: trained.train([], 100), "no words"),
        (lambda trained: trained.train(["", " "], 100), "no words"),
        (lambda trained: trained.train(CAPTIONS, 5), "5 word pieces"),
        (lambda trained: trained.encode(CAPTIONS, None, pad_to=3), "does not fit pad_to 3"),
        (lambda trained: trained.tokens([10_000]), "not in the vocabulary"),
    ],
)
def test_refusals(trained: Tokenizer, call: Callable[[Tokenizer], object], message: str) -> None:
    with pytest.raises(TercetError, match=message):
        call(trained)


def test_pickles_for_workers(trained: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(trained))
    assert torch.equal(copy.encode(CAPTIONS, 25)[0], trained.encode(CAPTIONS, 25)[0])
    assert copy.mask_id == trained.mask_id


def test_an_empty_batch_has_no_rows(trained: Tokenizer) -> None:
    input_ids, attention_mask = trained.encode([], 25)
    assert input_ids.shape == attention_mask.shape == (0, 0)


@settings(deadline=None)
@given(st.lists(st.text(st.characters()), min_size=1, max_size=4), st.integers(1, 12))
def test_any_text_gives_cls_and_pieces(texts: list[str], max_tokens: int) -> None:
    trained = Tokenizer.train(CAPTIONS[:1], 60)
    input_ids, attention_mask = trained.encode([*texts, "half \ud83d pair"], max_tokens)
    assert (input_ids[:, 0] == trained.cls_id).all()
    assert input_ids.shape[1] == attention_mask.sum(1).max() <= max_tokens
    assert (input_ids < trained.vocabulary_size).all()
