"""The example data: what is bundled, every folder layout, every way a folder can be wrong."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.common.data import BUNDLED, DataError, load_images, load_text

FULL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def full(folder: str) -> Path:
    """The folder of full data sets, or a skipped test."""
    if not (FULL / folder).is_dir():
        pytest.skip(f"no full data set beside the repository: ../shared/data/{folder}")
    return FULL


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A tiny MNIST folder: gzipped images, unpacked labels."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        images = np.arange(n * 784).reshape(n, 28, 28) % 251
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(n) % 10))
    return tmp_path


def test_bundled_mnist_is_balanced_and_small() -> None:
    data = load_images()
    assert "subset" in data.name
    assert data.train_x.shape == (10_000, 1, 28, 28) and data.test_x.shape == (2_000, 1, 28, 28)
    assert data.train_x.dtype == torch.uint8 and data.train_y.dtype == torch.int64
    assert torch.bincount(data.train_y).tolist() == [1000] * 10
    assert torch.bincount(data.test_y).tolist() == [200] * 10
    assert sum(f.stat().st_size for f in BUNDLED.iterdir()) < 3_000_000


def test_bundled_mnist_are_the_first_images_of_each_class() -> None:
    everything, data = load_images("mnist", full("MNIST")), load_images()
    for digit in range(10):
        original = everything.train_x[everything.train_y == digit][:1000]
        assert torch.equal(data.train_x[data.train_y == digit], original)


def test_pixels_are_normalised() -> None:
    data = load_images()
    pixels = data.pixels(data.train_x)
    assert pixels.dtype == torch.float32
    assert abs(pixels.mean()) < 0.02 and abs(pixels.std() - 1) < 0.02


def test_head_cuts_both_splits() -> None:
    data = load_images().head(100, 50)
    assert len(data.train_x) == len(data.train_y) == 100
    assert len(data.test_x) == len(data.test_y) == 50


def test_bundled_text() -> None:
    text = load_text()
    assert len(text) == 1_115_394 and len(set(text)) == 65
    assert text.startswith("First Citizen:")


def test_idx_folder(mnist: Path) -> None:
    data = load_images("mnist", mnist)
    assert data.name == "MNIST"
    assert data.train_y.tolist() == [i % 10 for i in range(20)]
    assert data.train_x.flatten().tolist() == [i % 251 for i in range(20 * 784)]
    assert len(data.test_y) == 10


def test_idx_missing_file_is_named(mnist: Path) -> None:
    (mnist / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load_images("mnist", mnist)


@pytest.mark.parametrize("damage", ["truncated gzip", "truncated idx", "not idx"])
def test_idx_damaged(mnist: Path, damage: str) -> None:
    path = mnist / "MNIST/raw/train-images-idx3-ubyte.gz"
    packed = path.read_bytes()
    plain = gzip.decompress(packed)
    path.write_bytes(
        {
            "truncated gzip": packed[:-20],
            "truncated idx": gzip.compress(plain[:-1]),
            "not idx": gzip.compress(b"<html>404</html>"),
        }[damage]
    )
    with pytest.raises(DataError, match="train-images"):
        load_images("mnist", mnist)


def test_idx_counts_must_agree(mnist: Path) -> None:
    path = mnist / "MNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.zeros(19)))
    with pytest.raises(DataError, match="20 images but 19 labels"):
        load_images("mnist", mnist)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        load_images("mnist", tmp_path / "absent")
    with pytest.raises(DataError, match="FashionMNIST/raw"):
        load_images("fashion-mnist", tmp_path)
    with pytest.raises(DataError, match="neither cifar-10-batches-py nor cifar10_subset"):
        load_images("cifar10", tmp_path)
    with pytest.raises(DataError, match="--data-dir"):
        load_images("cifar10")
    with pytest.raises(DataError, match="known: mnist"):
        load_images("imagenet", tmp_path)
    with pytest.raises(DataError, match="missing file"):
        load_text(tmp_path / "absent.txt")


def cifar_batch(first: int, key: str) -> bytes:
    """Two samples whose pixels are their plane: red 0, green 1, blue 2."""
    planes = np.repeat(np.arange(3, dtype=np.uint8), 1024)
    return pickle.dumps({"data": np.stack([planes, planes]), key: [first, first + 1]}, protocol=2)


def test_cifar_pickles(tmp_path: Path) -> None:
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    ten.mkdir()
    hundred.mkdir()
    for i in range(1, 6):
        (ten / f"data_batch_{i}").write_bytes(cifar_batch(i, "labels"))
    (ten / "test_batch").write_bytes(cifar_batch(0, "labels"))
    (hundred / "train").write_bytes(cifar_batch(97, "fine_labels"))
    (hundred / "test").write_bytes(cifar_batch(0, "fine_labels"))
    data = load_images("cifar10", tmp_path)
    assert data.name == "CIFAR-10" and data.classes == 10
    assert data.train_y.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert data.train_x.shape == (10, 3, 32, 32)
    assert [int(data.train_x[0, c].unique()) for c in range(3)] == [0, 1, 2]
    data = load_images("cifar100", tmp_path)
    assert data.name == "CIFAR-100" and data.classes == 100
    assert data.train_y.tolist() == [97, 98]
    (ten / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3"):
        load_images("cifar10", tmp_path)
    (hundred / "test").write_bytes(b"\x80\x02garbage")
    with pytest.raises(DataError, match="not a CIFAR batch"):
        load_images("cifar100", tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_cifar_pickle_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="arrays only"):
        load_images("cifar100", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_full_fashion_mnist() -> None:
    data = load_images("fashion-mnist", full("FashionMNIST"))
    assert data.train_x.shape == (60_000, 1, 28, 28) and data.test_x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.train_y).tolist() == [6000] * 10
    assert abs(data.pixels(data.train_x[:5000]).mean()) < 0.05


def test_cifar_subset_and_that_the_full_set_is_preferred(tmp_path: Path) -> None:
    root = full("cifar10_subset")
    data = load_images("cifar10", root)
    assert data.name == "CIFAR-10 subset"
    assert data.train_x.shape == (20_000, 3, 32, 32) and data.test_x.shape == (5_000, 3, 32, 32)
    assert data.train_y[:10].tolist() == list(range(10))
    mean = data.pixels(data.train_x[:5000]).mean(dim=(0, 2, 3))
    assert mean.abs().max() < 0.05  # channels in the right order
    (tmp_path / "cifar10_subset").symlink_to((root / "cifar10_subset").resolve())
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="data_batch_1"):
        load_images("cifar10", tmp_path)
