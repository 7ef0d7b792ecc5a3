"""Cut the small data files in ``examples/data`` from the full data sets.

    python -m tools.make_data_subset DATA_DIR [--out examples/data]

``DATA_DIR`` holds ``MNIST/raw`` (torchvision's layout) and ``tinyshakespeare/input.txt``. The
result is the same, byte for byte, on every run with the same numpy and zlib.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools import ROOT
from tools.common import cli
from tools.common.data import load_images, load_text


def first_per_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the first ``per_class`` samples of every class, in their original order."""
    picks = [np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)]
    return np.sort(np.concatenate(picks))


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``mnist_subset.npz`` and ``tinyshakespeare.txt.gz``."""
    parser = cli.parser("tools.make_data_subset", __doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "data")
    args = parser.parse_args(argv)
    full = load_images("mnist", args.data_dir)
    arrays: dict[str, Any] = {}
    for split, per_class in (("train", 1000), ("test", 200)):
        images = getattr(full, f"{split}_x").squeeze(1).numpy()
        labels = getattr(full, f"{split}_y").numpy().astype(np.uint8)
        keep = first_per_class(labels, per_class)
        arrays |= {f"{split}_images": images[keep], f"{split}_labels": labels[keep]}
    np.savez_compressed(args.out / "mnist_subset.npz", **arrays)
    text = load_text(args.data_dir / "tinyshakespeare" / "input.txt").encode()
    (args.out / "tinyshakespeare.txt.gz").write_bytes(gzip.compress(text, 9, mtime=0))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
