"""Memory of a pre-training step of the base model: what `--dry-run` foretells and what a process took, as JSON.

    python benchmarks/memory.py --batch 8            # base size; two steps in a process of their own
    python benchmarks/memory.py --quick              # a small model
    python benchmarks/memory.py --device cuda --batch 128

On a CPU the measured number is the largest resident size of the process, on a GPU the most that PyTorch had allocated.
`ratio` is the foretold over the measured: 1 is right.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import torch

from machine import processor_name
from step import OurStep, draw_batch, step_config
from tercet.device import resolve_device, tune_malloc
from tercet.train.cost import expected_shape
from tercet.train.memory import count_memory


def run_steps(arguments: argparse.Namespace) -> int:
    """Bytes that two steps take at the most; the second has AdamW's moments from its beginning."""
    tune_malloc()
    torch.manual_seed(0)
    config = step_config(
        arguments.quick, arguments.batch, arguments.device, grad_checkpointing=arguments.grad_checkpointing
    )
    step = OurStep(config, draw_batch(config.model, arguments.batch, arguments.caption_tokens))
    for _ in range(2):
        step()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Foretell, then run the steps in another process."""
    config = step_config(
        arguments.quick, arguments.batch, arguments.device, grad_checkpointing=arguments.grad_checkpointing
    )
    half = resolve_device(config.train.device, config.train.precision).precision == "bf16"
    shape = expected_shape(arguments.batch, arguments.caption_tokens, config.objectives.mlm_probability)
    parts = count_memory(
        config.model, config.objectives, shape, half, arguments.device == "cuda", arguments.grad_checkpointing
    )
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    foretold = sum(parts.values())
    return {
        "name": "memory",
        "ours": round(measured / 2**30, 3),
        "plain": round(foretold / 2**30, 3),
        "ratio": round(foretold / measured, 3),
        "unit": "GiB measured, and GiB foretold",
        "size": "small" if arguments.quick else "base",
        "batch": arguments.batch,
        "caption_tokens": arguments.caption_tokens,
        "grad_checkpointing": arguments.grad_checkpointing,
        "parts": {name: round(value / 2**30, 3) for name, value in parts.items()},
        "machine": {
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else processor_name(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, under 50 s on 2 cores")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--caption-tokens", type=int, default=20, help="word pieces of every caption")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--grad-checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    print(run_steps(arguments) if arguments.child else json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
