"""Memory of a pre-training step of the base model: what `--dry-run` estimates and what a process took, as JSON.

    python benchmarks/memory.py --batch 8            # base size; two steps in a process of their own
    python benchmarks/memory.py --quick              # a small model
    python benchmarks/memory.py --device cuda --batch 128

On a CPU the measured number is the largest resident size of the process, on a GPU the most that PyTorch had allocated.
`ratio` is the estimate over the measured: 1 is right.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import torch

from step import OurStep, draw_batch, step_config
from tercet.config import DataConfig
from tercet.device import processor_name, resolve_device, tune_malloc
from tercet.train.dry_run import measure_step


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
    """Estimate, then run the steps in another process."""
    cuda = arguments.device == "cuda"
    config = step_config(
        arguments.quick, arguments.batch, arguments.device, grad_checkpointing=arguments.grad_checkpointing
    )
    config = config.model_copy(update={"data": DataConfig(max_tokens=arguments.caption_tokens)})
    precision = resolve_device(config.train.device, config.train.precision).precision
    cost = measure_step(config, arguments.batch, precision, cuda)
    estimated = cost.bytes_on(cuda)
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    return {
        "name": "memory",
        "ours": round(measured / 2**30, 3),
        "plain": round(estimated / 2**30, 3),
        "ratio": round(estimated / measured, 3),
        "unit": "GiB measured, and GiB estimated",
        "size": "small" if arguments.quick else "base",
        "batch": arguments.batch,
        "caption_tokens": arguments.caption_tokens,
        "grad_checkpointing": arguments.grad_checkpointing,
        "parts": {name: round(value / 2**30, 3) for name, value in {**cost.fixed, "passing": cost.passing}.items()},
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else processor_name(),
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
