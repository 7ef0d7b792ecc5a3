"""DistributedDataParallel on two gloo processes: gradients, and maps that stay the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import grapefx
from grapefx.runtime import distributed
from tests.zoo import compiled, gradients, loss_of, make

dist = torch.distributed
if not (dist.is_available() and dist.is_gloo_available()):  # pragma: no cover
    pytest.skip("torch was built without gloo", allow_module_level=True)

pytestmark = pytest.mark.slow  # two processes that import torch
WORLD = 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grape": ("grape", {"calib_unit": "step", "calib_every": 3}),
    "fdfa": ("fdfa", {"calib_unit": "step", "calib_every": 3}),
    "grape-never": ("grape", {"calib_every": None}),
    "fdfa-never": ("fdfa", {"calib_every": None}),
    "auto": ("grape", {"calib_every": "auto", "calib_budget": 0.5, "calib_refit": "weights"}),
    "remembers": ("dfa", {"calib_unit": "step", "calib_every": 1, "calib_forget": 0.7}),
    "mean field": ("dfa", {"calib_every": None, "mean_field": 2}),
    "own-sgd": ("grape", {"calib_unit": "step", "calib_every": 2, "calib_update": "sgd"}),
    "late": ("grape", {"calib_every": None, "exact_rows": 0.5, "exact_late": True}),
}


SHARDED = {
    "bp": ("bp", {"calib_every": None}),
    "dfa": ("dfa", {"calib_unit": "step", "calib_every": 2}),
    "grape": ("grape", {"calib_unit": "step", "calib_every": 2}),
    "late": ("dfa", {"calib_every": None, "exact_rows": 0.5, "exact_late": True}),
}


class Tokens(nn.Module):
    """A map a token: shared by sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.table(x)
        out: Tensor = self.head(h + torch.tanh(self.mix(h)))
        return out


class Pixels(nn.Module):
    """A map of all pixels: another image size has another map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.next, self.last = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(2, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.next(torch.tanh(self.first(x)))).mean((2, 3)))
        return out


def parts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return list(torch.randn(WORLD, 6, 8, generator=generator, dtype=torch.float64))


def work(rank: int, folder: str) -> None:
    """One process: every scenario in turn; what it saw goes to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    seen: dict[str, Any] = {}
    x = parts()[rank]
    for method in ("bp", "dfa"):
        net = compiled(make("mlp")[0], method, calib_every=None)
        ddp = nn.parallel.DistributedDataParallel(net)
        loss_of(ddp(x)).backward()
        seen[method] = gradients(net)
    model = grapefx.compile(make("mlp")[0], method="bp", backend="eager", inplace=True)
    ddp = nn.parallel.DistributedDataParallel(model)
    loss_of(ddp(x)).backward()
    seen["inplace"] = gradients(model)
    for name, (method, options) in CASES.items():
        net = compiled(make("mlp")[0], method, **options)
        ddp = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        maps = []
        for step in range(6):
            optimizer.zero_grad()
            loss_of(ddp(x * (1 + step))).backward()
            optimizer.step()
            maps.append(net.feedback)
        seen[name] = {
            "maps": maps,
            "weights": net.state_dict(),
            "alignment": net.alignment(),
            "schedule": net.feedback_state_dict()["schedule"],
        }
    net = compiled(make("mlp")[0], "grape", calib_every=None)
    ddp = nn.parallel.DistributedDataParallel(net)
    kept = []
    for step in range(4):
        scale = float("inf") if step == 2 and rank == 1 else 1.0
        (ddp(x).sum() * scale).backward()
        net.zero_grad()
        kept.append((net.feedback, net.skipped_updates))
    seen["skip"] = kept
    net = compiled(Tokens(), "grape", calib_unit="step", calib_every=3)
    ddp = nn.parallel.DistributedDataParallel(net)
    kept = []
    for step in range(5):  # another number of samples, and of tokens, on each rank and in each step
        tokens = torch.arange(3 + rank)[:, None] + torch.arange(4 + (rank + step) % 2)
        loss_of(ddp(tokens % 7)).backward()
        net.zero_grad()
        kept.append(net.feedback)
    seen["lengths"] = kept
    net = compiled(Pixels(), "grape", calib_every=None)
    image = torch.linspace(0, 1, 3 * 36, dtype=torch.float64).view(3, 1, 6, 6)
    loss_of(net(image)).backward()
    before = net.feedback
    try:
        loss_of(net(image[..., : 6 - rank, :])).backward()
    except grapefx.InputError as e:
        same = all(torch.equal(v, net.feedback[k]) for k, v in before.items())
        seen["shapes"] = (str(e), same)
    loss_of(net(image)).backward()  # and goes on
    seen["after"] = net.feedback
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, (method, options) in SHARDED.items():
        net = compiled(make("mlp")[0], method, **options)
        fully_shard(net, mesh=mesh)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        maps = []
        for step in range(4):
            optimizer.zero_grad()
            loss_of(net(x * (1 + step))).backward()
            optimizer.step()
            maps.append({k: v.clone() for k, v in net.feedback.items()})
        weights = {n: p.full_tensor() for n, p in net.named_parameters()}  # type: ignore[attr-defined]
        seen[f"sharded-{name}"] = {"maps": maps, "weights": weights}
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), WORLD)
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(WORLD)]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for k, v in a.items():
        assert torch.equal(v, b[k]), k


@pytest.mark.parametrize("name", ["bp", "dfa", "inplace"])
def test_gradients_are_those_of_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    model, _ = make("mlp")
    net = compiled(model, "dfa" if name == "dfa" else "bp", calib_every=None)
    whole = torch.cat(parts())
    # loss_of weighs samples: each rank weighs its own six alike
    halves = [loss_of(h) for h in net(whole).chunk(WORLD)]
    (sum(halves) / WORLD).backward()  # type: ignore[union-attr]
    expected = gradients(net)
    for r in ranks:
        for k, v in r[name].items():
            torch.testing.assert_close(v, expected[k])


@pytest.mark.parametrize("name", CASES)
def test_maps_and_weights_stay_the_same_on_all_ranks(
    ranks: list[dict[str, Any]], name: str
) -> None:
    first, *others = [r[name] for r in ranks]
    for other in others:
        for a, b in zip(first["maps"], other["maps"], strict=True):
            assert_equal(a, b)
        assert_equal(first["weights"], other["weights"])
        assert first["alignment"] == other["alignment"]
        assert first["schedule"] == other["schedule"]
    assert not torch.equal(first["maps"][0]["layers.0/B"], first["maps"][-1]["layers.0/B"])


@pytest.mark.parametrize("name", ["grape-never", "fdfa-never", "fdfa", "grape", "late"])
def test_the_new_maps_are_the_mean_of_what_the_ranks_learned(
    ranks: list[dict[str, Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise of its own on each rank. The first step of the last two is a calibration."""
    method, options = CASES[name]
    learned = []
    for r in range(WORLD):
        monkeypatch.setattr(distributed, "rank", lambda r=r: r)
        net = compiled(make("mlp")[0], method, **options)
        loss_of(net(parts()[r])).backward()
        learned.append(net.feedback)
    for k, v in ranks[0][name]["maps"][0].items():
        assert not torch.equal(learned[0][k], learned[1][k]) or "/scale" in k or "/m" in k, k
        if not k.endswith("/scale"):
            torch.testing.assert_close(v, (learned[0][k] + learned[1][k]) / 2, msg=k)


def test_ranks_that_remember_fit_all_samples(ranks: list[dict[str, Any]]) -> None:
    """The first fit is that of one process on the whole batch: Gram matrices are added up."""
    method, options = CASES["remembers"]
    net = compiled(make("mlp")[0], method, **options)
    halves = [loss_of(h) for h in net(torch.cat(parts())).chunk(WORLD)]
    (sum(halves) / WORLD).backward()  # type: ignore[union-attr]
    for r in ranks:
        for k, v in r["remembers"]["maps"][0].items():
            if k.endswith("/B"):
                torch.testing.assert_close(v, net.feedback[k], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_is_as_data_parallel(ranks: list[dict[str, Any]], name: str) -> None:
    """``fully_shard(grapefx.compile(m))``: maps are equal on all ranks, weights those of DDP."""
    first, *others = [r[f"sharded-{name}"] for r in ranks]
    for other in others:
        for a, b in zip(first["maps"], other["maps"], strict=True):
            assert_equal(a, b)
        for k, v in first["weights"].items():
            torch.testing.assert_close(v, other["weights"][k])
    if name == "bp":  # against one process on the whole batch
        model, _ = make("mlp")
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(4):
            optimizer.zero_grad()
            halves = [loss_of(h) for h in model(torch.cat(parts()) * (1 + step)).chunk(WORLD)]
            (sum(halves) / WORLD).backward()  # type: ignore[union-attr]
            optimizer.step()
        for k, p in model.named_parameters():
            torch.testing.assert_close(first["weights"][k], p.detach())


def test_the_scale_of_a_fitted_map_is_that_of_the_mean(ranks: list[dict[str, Any]]) -> None:
    maps = ranks[0]["grape"]["maps"][0]
    for k in [k for k in maps if k.endswith("/B")]:
        torch.testing.assert_close(maps[k].norm(dim=0, keepdim=True), maps[k[:-1] + "scale"])


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(
    ranks: list[dict[str, Any]],
) -> None:
    for r in ranks:
        (one, _), (two, before), (three, after), (four, end) = r["skip"]
        assert (before, after, end) == (0, 1, 1)
        assert_equal(two, three)
        assert not torch.equal(one["layers.0/B"], two["layers.0/B"])
        assert not torch.equal(three["layers.0/B"], four["layers.0/B"])
    assert_equal(ranks[0]["skip"][-1][0], ranks[1]["skip"][-1][0])


def test_ranks_may_have_sequences_of_their_own_length(ranks: list[dict[str, Any]]) -> None:
    first, second = (r["lengths"] for r in ranks)
    for a, b in zip(first, second, strict=True):
        assert_equal(a, b)
    assert not torch.equal(first[1]["mix/B"], first[-1]["mix/B"])


def test_shapes_with_different_maps_are_refused_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for r, found in enumerate(ranks):
        message, same = found["shapes"]
        assert "first" in message and f"rank {r}" in message and "pad or crop" in message
        assert same
    first, second = (r["after"] for r in ranks)
    assert_equal(first, {k: second[k] for k in first})  # beside the map of the refused shape


def test_one_process_alone_asks_nobody() -> None:
    assert not distributed.parallel() and distributed.rank() == 0
