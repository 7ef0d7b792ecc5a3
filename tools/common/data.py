"""Data sets: small ones bundled with the examples, full ones from a folder.

Images stay ``uint8`` until a batch is drawn (:meth:`ImageData.pixels`), so that full CIFAR fits in
little memory. Nothing is ever downloaded.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools import ROOT

BUNDLED = ROOT / "examples" / "data"


class DataError(Exception):
    """A data folder is missing, incomplete or damaged."""


@dataclass(frozen=True)
class ImageData:
    """A labelled image set; images are ``uint8`` tensors of shape (N, channels, height, width)."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, images: Tensor) -> Tensor:
        """``images`` as normalised float32."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std

    def head(self, train: int, test: int) -> ImageData:
        """The same set cut to its first ``train`` and ``test`` images."""
        return replace(
            self,
            train_x=self.train_x[:train],
            train_y=self.train_y[:train],
            test_x=self.test_x[:test],
            test_y=self.test_y[:test],
        )

    def to(self, device: str) -> ImageData:
        """The same set on ``device``."""
        names = ("train_x", "train_y", "test_x", "test_y")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


Split = tuple[np.ndarray, np.ndarray]  # images (N, H, W) or (N, H, W, C), labels (N,)


def load_images(dataset: str = "mnist", data_dir: str | Path | None = None) -> ImageData:
    """Load ``mnist``, ``fashion-mnist``, ``cifar10`` or ``cifar100``.

    Without ``data_dir``: the bundled MNIST subset. With it, the layouts that are understood:

    - ``MNIST/raw`` and ``FashionMNIST/raw`` with idx files, gzipped or not (as torchvision);
    - ``cifar-10-batches-py`` and ``cifar-100-python`` (as torchvision);
    - ``cifar10_subset`` and ``cifar100_subset`` with ``train.npz`` and ``test.npz`` (lossless WebP
      strips, see ``examples/data/README.md``); used when the full set is not there.
    """
    if dataset not in _READERS:
        raise DataError(f"unknown dataset {dataset!r}; known: {', '.join(_READERS)}")
    mean, std, read = _READERS[dataset]
    if data_dir is None:
        if dataset != "mnist":
            raise DataError(f"only an MNIST subset is bundled; --data-dir must point at {dataset}")
        name, train, test = _read_bundled()
    else:
        root = Path(data_dir)
        if not root.is_dir():
            raise DataError(f"no such data folder: {root}")
        name, train, test = read(root)
    train_x, train_y = _tensors(train)
    test_x, test_y = _tensors(test)
    classes = 100 if dataset == "cifar100" else 10
    return ImageData(name, train_x, train_y, test_x, test_y, classes, mean, std)


def load_text(path: str | Path | None = None) -> str:
    """The text at ``path`` (``.gz`` or plain), or the bundled tiny-shakespeare."""
    path = BUNDLED / "tinyshakespeare.txt.gz" if path is None else Path(path)
    return _bytes(path).decode("utf-8")


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    images, labels = split
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images but {len(labels)} labels")
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return (
        torch.from_numpy(np.array(images, order="C")),  # a writable copy
        torch.from_numpy(labels.astype(np.int64)),
    )


def _bytes(path: Path) -> bytes:
    """The content of ``path``, unzipped where its name says so."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"missing file: {path}") from None
    except (EOFError, OSError, gzip.BadGzipFile) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _read_bundled() -> tuple[str, Split, Split]:
    with np.load(io.BytesIO(_bytes(BUNDLED / "mnist_subset.npz"))) as z:
        train = z["train_images"], z["train_labels"]
        test = z["test_images"], z["test_labels"]
    return "MNIST subset (10,000 + 2,000)", train, test


def _idx(folder: Path, stem: str) -> np.ndarray:
    """One array in MNIST's idx format: 2 zero bytes, type, rank, big-endian sizes, data."""
    path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.exists()), None)
    if path is None:
        raise DataError(f"missing file: {folder / stem} (or {stem}.gz)")
    raw = _bytes(path)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"not an idx file of bytes: {path}")
    shape = tuple(np.frombuffer(raw, ">i4", count=raw[3], offset=4).tolist())
    if len(raw) != 4 + 4 * len(shape) + int(np.prod(shape)):
        raise DataError(f"damaged idx file: {path}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _read_idx(folder_name: str, name: str) -> Callable[[Path], tuple[str, Split, Split]]:
    def read(root: Path) -> tuple[str, Split, Split]:
        folder = root / folder_name / "raw"
        if not folder.is_dir():
            raise DataError(f"no {folder_name}/raw in {root}; expected torchvision's layout")
        train, test = (
            (_idx(folder, f"{part}-images-idx3-ubyte"), _idx(folder, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        )
        return name, train, test

    return read


class _ArrayUnpickler(pickle.Unpickler):
    """Loads lists, strings and numpy arrays only: a data file must not be able to run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module.startswith("numpy") and name in {"_reconstruct", "ndarray", "dtype"}
        if is_array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise DataError(f"a CIFAR file should hold arrays only, but names {module}.{name}")


def _read_pickles(paths: list[Path], key: str) -> Split:
    images, labels = [], []
    for path in paths:
        try:
            part = _ArrayUnpickler(io.BytesIO(_bytes(path)), encoding="latin1").load()
            images.append(np.asarray(part["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(np.asarray(part[key]))
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
            raise DataError(f"not a CIFAR batch: {path} ({error!r})") from error
    return np.concatenate(images), np.concatenate(labels)


def _read_webp_strips(path: Path) -> Split:
    from PIL import Image

    with np.load(io.BytesIO(_bytes(path))) as z:
        webp, offsets, labels = z["webp"].tobytes(), z["offsets"], z["labels"]
    strips = [
        np.asarray(Image.open(io.BytesIO(webp[start:stop])).convert("RGB")).reshape(-1, 32, 32, 3)
        for start, stop in pairwise(offsets)
    ]
    return np.concatenate(strips), labels


def _read_cifar(classes: int) -> Callable[[Path], tuple[str, Split, Split]]:
    full, subset = (
        ("cifar-10-batches-py", "cifar10_subset")
        if classes == 10
        else ("cifar-100-python", "cifar100_subset")
    )

    def read(root: Path) -> tuple[str, Split, Split]:
        folder = root / full
        if folder.is_dir() and classes == 10:
            batches = [folder / f"data_batch_{i}" for i in range(1, 6)]
            train = _read_pickles(batches, "labels")
            return "CIFAR-10", train, _read_pickles([folder / "test_batch"], "labels")
        if folder.is_dir():
            train = _read_pickles([folder / "train"], "fine_labels")
            return "CIFAR-100", train, _read_pickles([folder / "test"], "fine_labels")
        folder = root / subset
        if folder.is_dir():
            train = _read_webp_strips(folder / "train.npz")
            return f"CIFAR-{classes} subset", train, _read_webp_strips(folder / "test.npz")
        raise DataError(f"neither {full} nor {subset} in {root}")

    return read


# The usual constants of the full training sets: mean, standard deviation, reader.
_READERS: dict[str, tuple[tuple[float, ...], tuple[float, ...], Callable[[Path], Any]]] = {
    "mnist": ((0.1307,), (0.3081,), _read_idx("MNIST", "MNIST")),
    "fashion-mnist": ((0.2860,), (0.3530,), _read_idx("FashionMNIST", "Fashion-MNIST")),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _read_cifar(10)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), _read_cifar(100)),
}
DATASETS = tuple(_READERS)
