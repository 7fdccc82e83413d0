"""From a folder of pictures to a model that finds them by words and answers questions about them.

    python examples/tutorial.py                          # makes its own pictures; a few minutes on two CPU cores
    python examples/tutorial.py --pictures my_folder/    # each picture with a .txt of its name that holds its caption
    python examples/tutorial.py --pictures my_folder/ --questions questions.json

questions.json is a list of {"image": "a.jpg", "question": "what is it?", "answer": "a boat"}.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import tercet
from tercet.config_io import load_config
from tercet.data.scene_files import encode_jpeg, write_task
from tercet.data.scenes import split_scenes
from tercet.report.page import write_report
from tercet.train.loop import train

HELD_OUT = 8  # one picture of so many is kept from training


def draw_pictures(folder: Path, count: int) -> Path:
    """Step 0, without pictures of your own: synthetic scenes with captions."""
    folder.mkdir(parents=True)
    for index, scene in enumerate(split_scenes("train", count)):
        (folder / f"{index:05}.jpg").write_bytes(encode_jpeg(scene.image))
        (folder / f"{index:05}.txt").write_text("\n".join(scene.captions) + "\n", "utf-8")
    return folder


def write_questions(folder: Path, count: int) -> Path:
    """Step 0, without questions of your own: questions about synthetic scenes."""
    write_task(folder, "vqa", count)
    return folder / "vqa.jsonl"


def split(folder: Path, work: Path) -> tuple[Path, Path]:
    """Step 1: keep some pictures from training, so that the model can be measured on what it never saw."""
    parts = work / "train", work / "held_out"
    for part in parts:
        part.mkdir(parents=True)
    captions = sorted(folder.rglob("*.txt"))
    for index, caption in enumerate(captions):
        part = parts[index % HELD_OUT == 0]
        for file in caption.parent.glob(f"{caption.stem}.*"):
            shutil.copy(file, part / file.name)
    return parts


def train_search(pictures: Path, held_out: Path, questions: Path, work: Path, steps: int | None) -> Path:
    """Step 2: train the encoders and the matching head on pictures and captions."""
    keys = {
        "data.train": [str(pictures)],
        "data.test": [str(held_out)],
        "data.tokenizer_texts": [f"vqa={questions}"],
        "train.epochs": 30,
        "train.max_steps": steps,
        "output": str(work / "search"),
    }
    run = train(load_config("demo", {**keys, "data.validation": []}))
    print(f"Look at {write_report(run)}.")
    return run


def search(predictor: tercet.Predictor, folder: Path, query: str, count: int = 5) -> list[tuple[float, str]]:
    """Step 3: compare all pictures with the words, then let the fusion encoder look at the best again."""
    files = sorted(file for file in folder.iterdir() if file.suffix != ".txt")
    cosines = predictor.embed_images(files) @ predictor.embed_texts(query)
    best = [files[index] for index in cosines.topk(min(4 * count, len(files))).indices.tolist()]
    scores = predictor.match_each(best, [[query]] * len(best))
    return sorted(((score.match, str(file)) for (score,), file in zip(scores, best, strict=True)), reverse=True)[:count]


def search_index(predictor: tercet.Predictor, run: Path, pictures: Path, index: Path, query: str) -> None:
    """Step 4: the same with an index on disk, which grows with its folder and is searched without reading it again."""
    if importlib.util.find_spec("lancedb") is None:
        print("Skipped the index: it needs LanceDB; pip install 'tercet[search]'")
        return
    from tercet.search.build import build_index
    from tercet.search.search import Query, Searcher

    made, _ = build_index([str(pictures)], predictor, str(run.absolute()), str(index))
    print(f"{index}: {made.count} pictures")
    for hit in Searcher(made, predictor).search(Query(query, k=3)):
        print(f"{hit.match:.3f}  {hit.uri}")


def train_answers(run: Path, questions: Path, work: Path, steps: int | None) -> tercet.Predictor:
    """Step 5: fine-tune on questions."""
    keys = {"data.train": [str(questions)], "data.validation": [], "data.test": [], "init": str(run / "model")}
    answering = train(load_config("demo-vqa", {**keys, "train.max_steps": steps, "output": str(work / "answers")}))
    return tercet.load(answering)


def main() -> None:
    """All steps, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of pictures with captions; default: synthetic scenes")
    parser.add_argument("--questions", type=Path, help="JSON list of questions; default: about synthetic scenes")
    parser.add_argument("--work", type=Path, default=Path("runs/tutorial"), help="a new folder for everything made")
    parser.add_argument("--scenes", type=int, default=1000, help="how many scenes are made")
    parser.add_argument("--steps", type=int, help="stop each training after so many steps")
    parser.add_argument("--query", default="a large red circle", help="what is searched for")
    parser.add_argument("--question", default="what colour is the circle", help="what is asked")
    arguments = parser.parse_args()

    work: Path = arguments.work
    pictures = arguments.pictures or draw_pictures(work / "pictures", arguments.scenes)
    training, held_out = split(pictures, work)
    questions = arguments.questions or write_questions(work / "data", arguments.scenes)
    run = train_search(training, held_out, questions, work, arguments.steps)

    predictor = tercet.load(run)
    found = search(predictor, held_out, arguments.query)
    for chance, file in found:
        print(f"{chance:.3f}  {file}")
    search_index(predictor, run, held_out, work / "index", arguments.query)

    answering = train_answers(run, questions, work, arguments.steps)
    answer = answering.answer(found[0][1], arguments.question)
    assert not isinstance(answer, list)
    print(json.dumps({"picture": found[0][1], "question": arguments.question, "answer": answer.text}))


if __name__ == "__main__":
    main()
