"""Look for files that a reader fails on: `python tests/fuzz/explore.py --seconds 60 [READER ...]`.

Each reader runs in a process of its own under Atheris (libFuzzer), guided by the coverage of Tercet's own code, with at
most 4 GiB of memory and 20 seconds a file.  Prints a JSON line a reader: files tried, and the first error that broke
the property of `property.py`; the file that did it is kept under `--findings`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
MEMORY_MEBIBYTES = 4096


def main() -> int:
    """Run the readers that were named, or all, one after the other; 1 when any was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", help="names of readers; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="time for each")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where files that broke one are kept")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from fuzz.targets import all_targets

    names = options.readers or list(all_targets())
    return max([run(name, options.seconds, options.findings) for name in names])


def run(name: str, seconds: int, findings: Path) -> int:
    """Fuzz one reader in a process of its own; 1 when it was broken."""
    findings.mkdir(parents=True, exist_ok=True)
    prefix = findings / f"{re.sub(r'[^a-z0-9]', '-', name)}-"
    with tempfile.TemporaryDirectory() as corpus:
        command = [
            *(sys.executable, __file__, "--inside", name, corpus),
            f"-max_total_time={seconds}",
            f"-rss_limit_mb={MEMORY_MEBIBYTES}",
            "-timeout=25",
            "-max_len=65536",
            f"-artifact_prefix={prefix}",
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=TESTS.parent, check=False)
    said = done.stdout.decode("utf-8", "replace")
    files = max((int(number) for number in re.findall(r"^#(\d+)", said, re.MULTILINE)), default=0)
    broken = re.search(r"(?:=== Uncaught Python exception: ===\n|ERROR: |Fatal Python error: )([^\n]*)", said)
    line = {"reader": name, "files": files, "broken": broken.group(1) if broken else None}
    print(json.dumps(line), flush=True)
    if broken or done.returncode:
        Path(f"{prefix}output.txt").write_text(said[-20_000:], "utf-8")
    return int(bool(broken or done.returncode))


def fuzz(name: str, arguments: list[str]) -> None:
    """Give one reader what libFuzzer makes; does not return."""
    import atheris

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(TESTS))
    with atheris.instrument_imports(include=["tercet"]):
        from fuzz.property import check
        from fuzz.targets import all_targets
    target = all_targets()[name]
    corpus = Path(arguments[0])
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *arguments], lambda content: check(target, content))
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        fuzz(sys.argv[2], sys.argv[3:])
    sys.exit(main())
