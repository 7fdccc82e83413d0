"""What the documentation makes from the code when it is built: its navigation and the reference pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tercet.arguments import CommandParser
from tercet.cli import COMMANDS, load_command
from tercet.config import Config, Section
from tercet.config_io import load_config, recipe_meaning, recipe_names
from tercet.train.dry_run import measure_step

# Section titles and their pages in order; a page that is not there (yet) is left out, one not named here comes last.
NAVIGATION: dict[str, list[str]] = {
    "": ["index.md", "start.md"],
    "How to": [
        "data.md", "training.md", "tasks.md", "search.md", "serving.md", "moving.md", "distributed.md", "faq.md",
    ],
    "Reference": ["reference/cli.md", "reference/config.md", "api.md", "reference/changelog.md"],
    "Inside": [
        "architecture.md", "method.md", "results.md", "performance.md", "reliability.md", "dependencies.md",
    ],
}  # fmt: skip

# Pairs an epoch, as the papers and the data sets' own pages give them.
PAIRS = {
    "pretrain-4m": 4_000_000,
    "pretrain-14m": 14_000_000,
    "retrieval-coco": 566_747,
    "retrieval-flickr": 145_000,
}
PEAK, DEVICES, UTILISATION = 312e12, 8, 0.4  # bf16 FLOP/s of an A100


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Build the navigation of the pages that are there."""
    docs = Path(config.docs_dir)
    named = {page for pages in NAVIGATION.values() for page in pages}
    rest = sorted(page.name for page in docs.glob("*.md") if page.name not in named)
    navigation: list[Any] = []
    for title, pages in {**NAVIGATION, "More": rest}.items():
        there = [page for page in pages if page.startswith("reference/") or (docs / page).is_file()]
        navigation += [{title: there}] if title and there else there
    config.nav = navigation
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    changelog = Path(config.config_file_path).with_name("CHANGELOG.md").read_text("utf-8")
    pages = {"cli": cli_reference(), "config": config_reference(), "changelog": changelog}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put generated tables where a page asks for them."""
    for name, table in (("recipes", recipe_table), ("hours", hours)):
        comment = f"<!-- table of {name} -->"
        if comment in markdown:  # the hours take seconds to count
            markdown = markdown.replace(comment, table())
    return markdown


def cli_reference() -> str:
    """Every command with its help."""
    parts = ["# Commands", "Every key of a config is a flag of `train` and `demo` as well: see [Config](config.md)."]
    for name, command in COMMANDS.items():
        parts.append(f"## tercet {name}\n\n{command.summary}\n\n```text\n{_help(name)}\n```")
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    """The help of a command, without its config keys."""
    parser = CommandParser(load_command(name), name)
    sections = "|".join(sorted({key.rpartition(".")[0] or "run" for key in parser.keys}))
    text = parser.format_help().rstrip()
    return re.split(rf"\n\n(?:{sections}):\n", text)[0] if sections else text


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def config_reference() -> str:
    """Every key with type, default and meaning, section by section."""
    parts = [
        "# Config",
        "`--section.key value` sets a key on the command line, `section: {key: value}` in a YAML file.",
    ]
    parts += _section("", Config)
    return "\n\n".join(parts) + "\n"


def _section(prefix: str, section: type[Section]) -> list[str]:
    rows, below = [], []
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        if _is_section(annotation):
            below += [
                f"## {prefix}{name}\n\n{(annotation.__doc__ or '').strip()}",
                *_section(f"{prefix}{name}.", annotation),
            ]
            continue
        default = field.get_default(call_default_factory=True)
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        kind = re.sub(r"typing\.|tercet\.\w+\.|^Literal", "", kind).replace("NoneType", "None").replace("|", "or")
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {kind} | `{default!r}` | {meaning} |".replace("`''`", "–"))
    table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
    return ([table] if rows else []) + below


def recipe_table() -> str:
    """The packaged recipes with their meanings."""
    rows = [f"| `{name}` | {load_config(name).task} | {recipe_meaning(name)} |" for name in recipe_names()]
    return "\n".join(["| recipe | task | what it does |", "|---|---|---|", *rows])


def hours() -> str:
    """FLOPs and estimated hours of the paper's recipes."""
    rows = []
    for name, pairs in PAIRS.items():
        config = load_config(name)

        flops = measure_step(config, config.train.batch_size, "bf16", cuda=True).flops / config.train.batch_size
        total = flops * pairs * config.train.epochs
        spent = total / (PEAK * DEVICES * UTILISATION) / 3600
        counted = f"{flops / 1e9:,.0f} | {total / 1e18:,.1f} | {spent:,.1f}"
        rows.append(f"| `{name}` | {pairs:,} | {config.train.epochs} | {counted} |")
    head = "| recipe | pairs an epoch | epochs | GFLOP a pair | EFLOP in all | hours, estimated |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])
