"""What a page of results says of the machine that it was made on."""

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Processor, cores, threads and torch version in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"
