"""The cache changes how long training takes, and nothing else."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsplit.caching import cache as cache_module
from fxsplit.caching.cache import Cache, CachePolicy, stamp
from fxsplit.caching.feed import Feed
from fxsplit.caching.media import open_rows
from fxsplit.caching.rows import Column
from fxsplit.capture.tracing import trace
from fxsplit.data.augmentation.changes import Changes
from fxsplit.data.batch import Batch
from fxsplit.data.loader import ImageSource, Loader
from fxsplit.data.source import batches_of
from fxsplit.execute.executor import Executor
from fxsplit.execute.forward import Forward
from fxsplit.plan.partition import partition
from fxsplit.plan.schedule import Phase
from fxsplit.report import EpochRecord, Observer
from fxsplit.training.trainer import Trainer
from tests.cuda.simulated import SimulatedRecorder, Tape
from tests.networks import HAZARDS, Chain, LongSkip
from tests.training.test_trainer import TRAIN, same, trainer, weights

# All trains; then the first two of four partitions are settled.
PHASES = (Phase(start=0, stop=4, epochs=1), Phase(start=2, stop=4, epochs=3))


BFLOAT16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


class Run(Observer):
    """A training, finished: what it left, what it was told, and how many images went through the settled partitions."""

    def __init__(
        self,
        medium: str,
        folder: Path,
        *,
        kind: Callable[[], nn.Module] = Chain,
        plan: tuple[Phase, ...] = PHASES,
        limit_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        before_epoch: Callable[[Trainer, int], None] | None = None,
        **changes: Any,
    ) -> None:
        torch.manual_seed(0)
        self.notices: list[str] = []
        self.settled = [0] * sum(phase.epochs for phase in plan)
        self.records: list[EpochRecord] = []
        cache = CachePolicy(medium=medium, folder=str(folder), limit_bytes=limit_bytes, dtype=dtype)
        model = kind()
        self.trainer = trainer(
            model, plan=plan, cache=None if medium == "off" else cache, observer=self, log_interval=1000, **changes
        )
        settle = Executor.settle

        def counted(net: Executor, images: Tensor) -> list[Any]:
            if net.training and net.window[0]:
                self.settled[len(self.records)] += len(images)
            return settle(net, images)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Executor, "settle", counted)
            epochs = self.trainer.epochs()
            for record in epochs:
                self.records.append(record)
                if before_epoch:
                    before_epoch(self.trainer, len(self.records))
        self.weights = weights(model)

    def notice(self, sentence: str) -> None:
        self.notices.append(sentence)

    def same_as(self, other: Run) -> bool:
        losses, others = ([(r.train_loss, r.eval_loss) for r in run.records] for run in (self, other))
        return losses == others and same(self.weights, other.weights)


@pytest.mark.parametrize("medium", ["device", "ram", "disk"])
@pytest.mark.parametrize("kind", [Chain, LongSkip, HAZARDS["InPlace"], HAZARDS["RootParameter"]])
def test_training_from_the_cache_is_the_same_bit_for_bit(
    kind: Callable[[], nn.Module], medium: str, tmp_path: Path
) -> None:
    plain = Run("off", tmp_path, kind=kind)
    threads = set(threading.enumerate())
    cached = Run(medium, tmp_path, kind=kind)
    assert cached.same_as(plain)
    assert plain.settled == [0, 50, 50, 50]
    # The first batch is computed twice again, in other orders, to see that images do not depend on each other.
    assert cached.settled == [0, 82, 0, 0]
    assert cached.notices == []
    assert list(tmp_path.iterdir()) == []
    assert not set(threading.enumerate()) - threads


@pytest.mark.parametrize(
    "changes",
    [
        {"loader": {"channels_last": True}, "kind": lambda: Chain().to(memory_format=torch.channels_last)},
        {"amp_dtype": torch.bfloat16},
    ],
)
def test_layout_and_precision_are_kept(changes: dict[str, Any], tmp_path: Path) -> None:
    assert Run("disk", tmp_path, **changes).same_as(Run("off", tmp_path, **changes))


def test_gradients_accumulate_over_parts_of_rows(tmp_path: Path) -> None:
    phases = tuple(replace(phase, micro_batches=3) for phase in PHASES)
    plain, cached = (Run(medium, tmp_path, plan=phases).records for medium in ("off", "ram"))
    assert [r.train_loss for r in cached] == pytest.approx([r.train_loss for r in plain], rel=1e-5)


@pytest.mark.parametrize("medium", ["device", "ram", "disk"])
def test_half_precision_halves_the_rows_and_hardly_changes_training(medium: str, tmp_path: Path) -> None:
    exact, half = (Run(medium, tmp_path, dtype=dtype) for dtype in (None, torch.float16))
    large, small = (
        (r.cache_resident_bytes or 0) + (r.cache_file_bytes or 0) for r in (exact.records[-1], half.records[-1])
    )
    # Those of 50 training images, while those of the test images stay exact. Files take whole pages.
    halved = 25 * exact.trainer.plan.partitions[2].boundary_bytes
    assert large - small == halved if medium != "disk" else abs(large - small - halved) < 2 * 4096
    assert not half.same_as(exact)
    assert half.records[-1].train_loss == pytest.approx(exact.records[-1].train_loss, rel=1e-2)


@pytest.mark.parametrize("medium", ["device", "ram", "disk"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("settled", "amp"), [(None, None), (BFLOAT16, None), (None, BFLOAT16), (BFLOAT16, BFLOAT16)])
def test_rows_are_kept_in_the_precision_that_computes(
    settled: torch.dtype | None, amp: torch.dtype | None, training: bool, medium: str, tmp_path: Path
) -> None:
    """In evaluation that is full precision, if there is no autocast."""
    torch.manual_seed(0)
    captured = trace(Chain(), (torch.empty(2, 3, 8, 8),))
    net = Executor(captured, partition(captured, count=4), settled_dtype=settled)
    net.enter(PHASES[1])
    net.train(training)
    forward, images = Forward(net, torch.device("cpu"), amp_dtype=amp), ImageSource(Loader(TRAIN, batch_size=16))
    policy = CachePolicy(medium=medium, folder=str(tmp_path))
    cache = policy.open(forward, images, epochs=9, notice=pytest.fail)
    for _ in range(2):
        for plain, batch in zip(images.loader.batches(0), batches_of(cache, 0), strict=True):
            expected = forward.settle(plain, 2)
            assert same(batch.values, expected)
            assert [value.dtype for value in batch.values] == [value.dtype for value in expected]
    numbers = sum(math.prod(value.shape[1:]) for value in expected)
    found = cache.file_bytes if medium == "disk" else cache.resident_bytes
    is_short = amp is not None or (settled is not None and training)
    assert 0 <= found - 50 * numbers * (2 if is_short else 4) < (8192 if medium == "disk" else 1)


def test_memory_and_file_are_reported_apart(tmp_path: Path) -> None:
    ram, disk, off = (Run(medium, tmp_path).records for medium in ("ram", "disk", "off"))
    crossing = sum(partition.boundary_bytes for partition in Run("off", tmp_path).trainer.plan.partitions[2:3])
    assert [(r.cache_resident_bytes, r.cache_file_bytes) for r in ram] == [(None, None), *[(70 * crossing, 0)] * 3]
    assert [r.cache_resident_bytes for r in disk] == [None, 0, 0, 0]
    assert all(70 * crossing <= (r.cache_file_bytes or 0) < 70 * crossing + 2 * 8192 for r in disk[1:])
    assert {(r.cache_resident_bytes, r.cache_file_bytes) for r in off} == {(None, None)}


def test_test_images_go_through_the_settled_partitions_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = []
    settle = Executor.settle

    def counting(self: Executor, images: Tensor) -> list[Any]:
        if not self.training:
            tested.append(len(images))
        return settle(self, images)

    plain = Run("off", tmp_path)
    monkeypatch.setattr(Executor, "settle", counting)
    cached = Run("ram", tmp_path)
    assert cached.same_as(plain)
    # Unsettled, settled, and the first batch twice again, to see that it repeats.
    assert sum(tested) == 20 + 20 + 2 * 16


def test_both_kinds_of_rows_keep_within_the_limit(tmp_path: Path) -> None:
    row = Run("off", tmp_path).trainer.plan.partitions[2].boundary_bytes
    cached = Run("ram", tmp_path, limit_bytes=69 * row)
    assert cached.records[-1].cache_resident_bytes == 50 * row
    (notice,) = cached.notices
    assert notice.startswith("the settled partitions are computed anew for each test batch")


@pytest.mark.parametrize("medium", ["device", "ram", "disk"])
def test_views_are_what_augmentation_would_give(medium: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "plan": (Phase(start=0, stop=4, epochs=1), Phase(start=2, stop=4, epochs=5)),
        "loader": {"augment": "crop-flip", "views": 2},
    }
    plain, cached = Run("off", tmp_path, **changes), Run(medium, tmp_path, **changes)
    assert cached.same_as(plain)
    assert cached.settled == [0, 82, 50, 0, 0, 0]
    # The two views differ, and where nothing is settled each epoch draws anew.
    loader = cached.trainer.feed.train_loader
    first, second, again, free = (
        next(loader.batches(3, view=view)).images for view in (*map(loader.view, (2, 3, 4)), None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(second, free)


def test_random_augmentation_without_views_is_not_cached(tmp_path: Path) -> None:
    changes = {"loader": {"augment": "crop-flip"}}
    plain = Run("off", tmp_path, **changes)
    for medium in ("ram", "auto"):
        cached = Run(medium, tmp_path, **changes)
        assert cached.same_as(plain)
        assert [("changed at random" in sentence) for sentence in cached.notices] == ([True] if medium == "ram" else [])


@pytest.mark.parametrize(("seconds", "settled"), [(math.inf, [82, 50]), (0.0, [82, 0])])
def test_auto_weighs_reading_against_computing(
    seconds: float, settled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxsplit.caching.cache.reading_seconds", lambda *_, **__: seconds)
    plan = (Phase(start=3, stop=4, epochs=2),)
    found = Run("auto", tmp_path, plan=plan)
    assert found.settled == settled
    assert found.notices == []
    assert bool(found.records[-1].cache_file_bytes) == (seconds == 0)
    assert not found.records[-1].cache_resident_bytes
    asked = Run("auto", tmp_path, plan=plan, loader={"augment": "crop-flip", "views": 1})
    assert asked.settled == settled
    assert [notice.partition("cache: ")[2] for notice in asked.notices] == (
        ["reading rows would take longer than computing them"] if seconds else []
    )


def test_what_would_be_read_once_is_not_kept(tmp_path: Path) -> None:
    once = (Phase(start=0, stop=4, epochs=3), Phase(start=2, stop=4, epochs=1))
    assert "only once" in Run("ram", tmp_path, plan=once).notices[0]
    assert Run("auto", tmp_path, plan=once).notices == []


@pytest.mark.parametrize("medium", ["device", "ram", "disk", "auto"])
def test_a_limit_that_is_too_small_is_told_and_loses_nothing(
    medium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxsplit.caching.cache.reading_seconds", lambda *_, **__: 0.0)
    plan = (Phase(start=3, stop=4, epochs=2),)
    (needed,) = {partition.boundary_bytes for partition in Run("off", tmp_path).trainer.plan.partitions[3:]}
    cached = Run(medium, tmp_path, plan=plan, limit_bytes=50 * needed - 1)
    assert cached.same_as(Run("off", tmp_path, plan=plan))
    assert len(cached.notices) == 1
    assert "GiB and may take" in cached.notices[0]
    assert Run(medium, tmp_path, plan=plan, limit_bytes=50 * needed).settled == [82, 0]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "short pwrite"])
def test_a_full_disk_is_told_and_loses_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Run("off", tmp_path)
    if call == "posix_fallocate":
        monkeypatch.setattr(os, call, full)
    else:
        pwrite, written = os.pwrite, []

        def fails_later(file: int, data: Any, offset: int) -> int:
            written.append(offset)
            if len(written) < 20:
                return pwrite(file, data, offset)
            return full() if call == "pwrite" else 7

        monkeypatch.setattr(os, "pwrite", fails_later)
    cached = Run("disk", tmp_path)
    assert cached.same_as(plain)
    assert cached.notices == [
        "the settled partitions are computed anew for each batch, without a cache: No space left on device"
    ]
    assert cached.records[-1].cache_file_bytes == 0


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    cached = Run("disk", tmp_path / "missing")
    assert cached.same_as(Run("off", tmp_path))
    assert "No such file or directory" in cached.notices[0]


class Mixes(Chain):
    """What an image gives depends on the batch that it is in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Sums(Chain):
    """What an image gives depends on those before it in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * x.cumsum(0))


class Noisy(Chain):
    """Random numbers, in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1e-9 * torch.rand_like(x))


class Sizes(Chain):
    """A tensor crosses that has nothing to do with images."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm1.weight.view(1, -1, 1, 1) * 2
        return self.head((self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu() * scale).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Mixes, "do not deliver the same for an image each time"),
        (Sums, "do not deliver the same for an image each time"),
        (Noisy, "do not deliver the same for an image each time"),
        (HAZARDS["CountsCalls"], "do not deliver the same for an image each time"),
        (Sizes, "not one row for each image"),
    ],
)
def test_rows_that_would_be_wrong_are_refused(kind: type[nn.Module], reason: str, tmp_path: Path) -> None:
    plan = (Phase(start=1 if kind is Sizes else 3, stop=4, epochs=3),)
    cached = Run("ram", tmp_path, kind=kind, plan=plan)
    assert reason in cached.notices[0]
    if kind is not HAZARDS["CountsCalls"]:
        assert cached.same_as(Run("off", tmp_path, kind=kind, plan=plan))


def test_values_that_are_no_rows_are_not_divided_into_parts(tmp_path: Path) -> None:
    """Not in the batch at which this is found out, either."""
    plan = (Phase(start=1, stop=4, epochs=2, micro_batches=4),)
    cached = Run("ram", tmp_path, kind=Sizes, plan=plan)
    assert "not one row for each image" in cached.notices[0]
    assert cached.same_as(Run("off", tmp_path, kind=Sizes, plan=plan))


class Whitens(nn.Sequential):
    """Statistics of the batch, of which each image has one value a channel, in evaluation too."""

    def __init__(self) -> None:
        norm = nn.BatchNorm1d(4, track_running_stats=False)
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(nn.Conv2d(3, 4, 3), *pool, norm, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))


def test_settled_statistics_of_a_batch_of_two_are_not_asked_of_one_image(tmp_path: Path) -> None:
    options = {"kind": Whitens, "plan": (Phase(start=3, stop=4, epochs=2),), "loader": {"batch_size": 2}}
    cached = Run("ram", tmp_path, **options)
    assert "norm" not in cached.trainer.plan.partitions[3].name
    assert "do not deliver the same for an image each time" in cached.notices[0]
    assert cached.same_as(Run("off", tmp_path, **options))


@pytest.mark.parametrize("medium", ["device", "ram"])
def test_weights_that_change_empty_the_cache(medium: str, tmp_path: Path) -> None:
    def scale(net: Trainer, epoch: int) -> None:
        if epoch == 3:
            with torch.no_grad():
                next(net.executor.parameters()).mul_(2)

    plain, cached = (Run(each, tmp_path, before_epoch=scale) for each in ("off", medium))
    assert cached.same_as(plain)
    assert cached.settled == [0, 82, 0, 82]


def test_the_stamp_is_that_of_settled_weights() -> None:
    torch.manual_seed(0)
    executor = trainer(Chain(), plan=PHASES).executor
    executor.enter(PHASES[1])
    found = [stamp(executor, executor.window[0])]

    def is_another() -> bool:
        found.append(stamp(executor, executor.window[0]))
        return found[-1] not in found[:-1] and found[-1] == stamp(executor.train().eval(), executor.window[0])

    assert stamp(executor, executor.window[0]) == found[0]
    state = list(executor.settled_state().values())
    for tensor in (state[0], executor.get_buffer("norm1.running_var")):
        with torch.no_grad():
            tensor.view(-1)[0] += 1e-6
        assert is_another()
    executor.conv1.weight = nn.Parameter(executor.conv1.weight.detach().clone(), requires_grad=False)
    assert is_another()
    executor.load_state_dict(executor.state_dict())
    assert is_another()
    executor.enter(Phase(start=1, stop=4, epochs=1))
    assert is_another()
    # Weights that train do not matter.
    with torch.no_grad():
        executor.get_parameter("head.weight").add_(1)
    assert stamp(executor, executor.window[0]) == found[-1]


def test_a_cut_that_stays_keeps_its_rows(tmp_path: Path) -> None:
    plan = (Phase(start=2, stop=4, epochs=2), Phase(start=2, stop=4, epochs=2), Phase(start=3, stop=4, epochs=2))
    cached = Run("disk", tmp_path, plan=plan)
    # Those at the next cut come from them, without images.
    assert cached.settled == [82, 0, 0, 0, 0, 0]
    assert cached.same_as(Run("off", tmp_path, plan=plan))


@pytest.mark.parametrize("medium", ["device", "ram"])
def test_epochs_of_some_images_are_kept_as_far_as_they_go(medium: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "plan": (Phase(start=0, stop=4, epochs=1), Phase(start=2, stop=4, epochs=12)),
        "loader": {"limit": 1},
    }
    cached = Run(medium, tmp_path, **changes)
    assert cached.same_as(Run("off", tmp_path, **changes))


def recorded_epochs(folder: Path, count: int, **loader: Any) -> list[list[int]]:
    """Go through epochs with a cache on the device, and return which recording delivers each batch; 0 for none.

    Each key has one recording, of the first batch that it is given for, which all further ones replay.
    """
    torch.manual_seed(0)
    net = trainer(Chain(), plan=(Phase(start=2, stop=4, epochs=9),), loader=loader)
    loaders = net.feed.train_loader, net.feed.test_loader
    feed = Feed(net.forward, *loaders, policy=CachePolicy(medium="device", folder=str(folder)))
    net.executor.enter(net.plan.phases[0])
    net.executor.train()
    feed.enter(2, epochs=9, notice=pytest.fail)

    def fetch() -> list[Any]:
        batch = feed.fetch()
        return [*batch.values, batch.labels, batch.ids]

    tapes: dict[Hashable, Tape[list[Any]]] = {}
    found: list[list[int]] = []
    for epoch in range(count):
        found.append([])
        for expected, key in zip(net.feed.training(epoch), feed.put(epoch), strict=True):
            if key is not None:
                tapes[key] = tapes.get(key) or SimulatedRecorder().record(fetch)
                tapes[key].replay()
            values = fetch() if key is None else tapes[key].result
            assert all(map(torch.equal, values, [*net.executor.settle(expected.images), expected.labels, expected.ids]))
            found[-1].append(0 if key is None else [*tapes].index(key) + 1)
    return found


def test_recorded_steps_fill_rows_on_the_device_and_gather_them(tmp_path: Path) -> None:
    # The first batch opens the cache, and the last one is smaller.
    assert recorded_epochs(tmp_path, 4) == [[0, 1, 1, 0], [2, 2, 2, 0], [2, 2, 2, 0], [2, 2, 2, 0]]
    views = recorded_epochs(tmp_path, 4, augment="crop-flip", views=2)
    assert views == [[0, 1, 1, 0], [1, 1, 1, 0], [2, 2, 2, 0], [2, 2, 2, 0]]


def test_a_few_missing_rows_are_filled_by_steps_that_are_not_recorded(tmp_path: Path) -> None:
    # Of 50 images in batches of 7, one is left out in each epoch.
    assert recorded_epochs(tmp_path, 3, batch_size=7)[0] == [0, 1, 1, 1, 1, 1, 1]
    (second,) = recorded_epochs(tmp_path, 2, batch_size=7)[1:]
    assert sorted(second) == [0, 2, 2, 2, 2, 2, 2]


def test_columns_come_back_in_their_layout_and_type() -> None:
    cpu = torch.device("cpu")
    value = torch.randn(4, 3, 5, 2)
    for each in (
        value,
        value.contiguous(memory_format=torch.channels_last),
        value.transpose(1, 3),
        value.to(torch.bfloat16),
        value[:, 0, 0, 0].contiguous(),
        torch.arange(4),
        value > 0,
    ):
        column = Column.of(each, None)
        back = column.unpack(column.pack(each, cpu))
        assert torch.equal(back, each)
        assert back.dtype is each.dtype
        assert back.stride() == each.stride()
        half = Column.of(each, torch.float16)
        assert half.kept is (torch.float16 if each.is_floating_point() else each.dtype)
        assert half.unpack(half.pack(each, cpu)).dtype is each.dtype


@pytest.mark.parametrize("medium", ["device", "ram", "disk"])
def test_rows_are_copies(medium: str, tmp_path: Path) -> None:
    values = [torch.randn(3, 2, 5), torch.randn(3).to(torch.bfloat16), torch.tensor([[True], [False], [True]])]
    columns = [Column.of(value, None) for value in values]
    rows = open_rows(medium, 7, columns, torch.device("cpu"), str(tmp_path))
    places = torch.tensor([6, 0, 3])
    rows.write(places, values)
    found = rows.read(places)
    assert same(found, values)
    found[0].fill_(0)
    assert same(rows.read(places), values)
    assert torch.equal(rows.read(torch.tensor([3]))[0], values[0][2:])


def test_settling_and_resuming_is_running() -> None:
    net = trainer(Chain(), plan=PHASES).executor
    images = torch.randn(4, 3, 8, 8)
    for start in (0, 1, 2):
        net.enter(Phase(start=start, stop=4, epochs=1))
        net.eval()
        assert torch.equal(net.resume(net.settle(images)), net(images))
    loss = F.cross_entropy(net.train().resume(net.settle(images)), torch.tensor([0, 1, 2, 3]))
    assert loss.requires_grad


@pytest.mark.parametrize("medium", ["ram", "disk"])
@pytest.mark.parametrize("views", [None, 2])
def test_rows_are_filled_again_in_the_order_in_which_they_were(
    medium: str, views: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in the company in which it was computed; the medium is not chosen again."""

    def made() -> Trainer:
        torch.manual_seed(0)
        loader = {"limit": 2, "augment": "none" if views is None else "crop-flip", "views": views}
        return trainer(Chain(), cache=CachePolicy(medium="auto", folder=str(tmp_path)), loader=loader)

    def cache_of(net: Trainer) -> Cache:
        net.executor.enter(PHASES[1])
        net.executor.train()
        net.feed.enter(2, epochs=9, notice=pytest.fail)
        return net.feed._levels[0].train

    monkeypatch.setattr(cache_module, "choose", lambda *_, **__: medium)
    one, other = made(), made()
    cache = cache_of(one)
    for epoch in (3, 5, 4):
        for _ in cache.put(epoch, int(epoch == 5)):  # a batch that is left out keeps its rows empty
            cache.fetch()
    state = cache.state_dict()
    assert state["medium"] == medium
    assert [fill[:2] for fill in state["fills"]] == [(True, 3), (True, 5), (True, 4)]

    monkeypatch.setattr(cache_module, "choose", lambda *_, **__: pytest.fail("it is chosen again"))
    again = cache_of(other)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert torch.equal(again._filled, cache._filled)
    filled = cache._filled.nonzero()[:, 0]
    assert 0 < len(filled) < len(cache._filled)
    assert cache._rows is not None
    assert again._rows is not None
    assert all(map(torch.equal, cache._rows.read(filled), again._rows.read(filled)))
    one.feed.close()
    other.feed.close()


def test_without_a_clock_a_cache_is_chosen_by_bytes_and_multiply_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is the same each time; rows pay where the settled partitions compute much for few bytes."""
    monkeypatch.setattr(cache_module, "reading_seconds", lambda *_, **__: pytest.fail("it is measured"))
    for rate, kept in ((1e3, True), (1e18, False)):
        monkeypatch.setitem(cache_module.MACS_PER_SECOND, "cpu", rate)
        net = trainer(Chain(), plan=PHASES, cache=CachePolicy(medium="auto", folder=str(tmp_path), measured=False))
        files = [record.cache_file_bytes for record in net.epochs()]
        assert [bool(size) for size in files] == [False, kept, kept, kept]


SLIDING = (
    Phase(start=1, stop=4, epochs=2),
    Phase(start=2, stop=4, epochs=2),
    Phase(start=3, stop=4, epochs=3),
)


@pytest.mark.parametrize("medium", ["device", "ram", "disk"])
@pytest.mark.parametrize("views", [None, 2])
def test_a_cut_that_moves_on_needs_no_images(medium: str, views: int | None, tmp_path: Path) -> None:
    """Training and test images go through each settled partition once, or once for each view."""
    loader = {} if views is None else {"augment": "crop-flip", "views": views}
    plan = SLIDING if views is None else (Phase(start=1, stop=4, epochs=3), *SLIDING[1:])
    plain, cached = (Run(each, tmp_path, plan=plan, loader=loader) for each in ("off", medium))
    assert cached.same_as(plain)
    assert sum(cached.settled) == 32 + 50 * (views or 1)
    assert cached.notices == []
    assert list(tmp_path.iterdir()) == []


def test_rows_at_an_earlier_cut_are_freed_when_all_are_read(tmp_path: Path) -> None:
    cached = Run("ram", tmp_path, plan=SLIDING)
    sizes = [partition.boundary_bytes for partition in cached.trainer.plan.partitions]
    # Of 50 training images and 20 test images, which are tested in the epoch in which the cut moves.
    both = [70 * size for size in sizes]
    kept = [record.cache_resident_bytes for record in cached.records]
    assert kept == [both[1], both[1], both[1] + both[2], both[2], both[2] + both[3], both[3], both[3]]


@pytest.mark.parametrize("last", [(), (Phase(start=0, stop=4, epochs=2, thaws=True),)], ids=["settled", "thawed"])
def test_a_phase_before_an_earlier_cut_fills_its_rows(
    last: tuple[Phase, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the classifier trains alone at first: the images that it sees go through what is settled later.

    Also where everything trains again in the end.
    """
    torch.manual_seed(0)
    phases = (Phase(start=3, stop=4, epochs=2), Phase(start=1, stop=4, epochs=2), Phase(start=2, stop=4, epochs=2))
    net = trainer(Chain(), plan=phases[:1])
    feed = Feed(
        net.forward,
        net.feed.train_loader,
        net.feed.test_loader,
        policy=CachePolicy(medium="ram", folder=str(tmp_path)),
    )
    size = [70 * partition.boundary_bytes for partition in net.plan.partitions]
    kept, images = [], 0
    settle_to = Executor.settle_to

    def counted(executor: Executor, stop: int, /, given: Tensor) -> list[Any]:
        nonlocal images
        images += len(given)
        return settle_to(executor, stop, given)

    monkeypatch.setattr(Executor, "settle_to", counted)
    for index, phase in enumerate(phases):
        net.executor.enter(phase)
        feed.enter(phase.start, epochs=phase.epochs, notice=pytest.fail, later=(*phases[index + 1 :], *last))
        for epoch in range(phase.epochs):
            net.executor.train()
            found = list(feed.training(epoch))
            plain = list(feed.train_loader.batches(epoch))
            net.executor.eval()
            assert len(list(batches_of(feed.test_source, 0))) == 2
            kept.append(feed.resident_bytes)
            net.executor.train()
            before = images
            for batch, given in zip(found, plain, strict=True):
                assert batch.cut == phase.start
                for one, other in zip(batch.values, net.forward.settle(given, phase.start), strict=True):
                    torch.testing.assert_close(one, other)
            images = before
    # Each image once, and the first batches of both sets twice again.
    assert images == 50 + 20 + 2 * (16 + 16)
    # Beside the rows that are read now lie those that are read later.
    assert kept == [size[1] + size[3]] * 2 + [size[1]] * 2 + [size[1] + size[2], size[2]]


def test_a_cut_that_comes_back_is_filled_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = trainer(Chain(), plan=(Phase(start=1, stop=4, epochs=9),))
    loaders = net.feed.train_loader, net.feed.test_loader
    feed = Feed(net.forward, *loaders, policy=CachePolicy(medium="ram", folder=str(tmp_path)))
    for start in (1, 2, 1):
        net.executor.enter(Phase(start=start, stop=4, epochs=9))
        feed.enter(start, epochs=9, notice=pytest.fail)
        net.executor.train()
        for epoch in range(3):
            for batch, plain in zip(feed.training(epoch), loaders[0].batches(epoch), strict=True):
                assert same(batch.values, net.forward.settle(plain, start))
    (level,) = feed.state_dict()["levels"]
    assert not level["train"]["spent"]
    assert len(level["train"]["fills"]) == 1


def test_a_row_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an image would be rounded otherwise in other company."""
    torch.manual_seed(0)
    monkeypatch.setattr(cache_module, "repeats", lambda *_, **__: True)
    net = trainer(Chain(), plan=PHASES[1:], loader={"limit": 2})
    net.executor.enter(PHASES[1])
    net.executor.train()
    calls, settle = [0], net.forward.settle

    def rounded_otherwise(batch: Batch, stop: int) -> list[Any]:
        calls[0] += 1
        return [value + calls[0] for value in settle(batch, stop)]

    monkeypatch.setattr(net.forward, "settle", rounded_otherwise)
    images = ImageSource(net.feed.train_loader)
    cache = CachePolicy(medium="ram", folder=str(tmp_path)).open(net.forward, images, epochs=9, notice=pytest.fail)
    first: dict[int, Tensor] = {}
    for epoch in range(6):
        for batch in batches_of(cache, epoch):
            for index, value in zip(batch.ids.tolist(), batch.values[0], strict=True):
                assert torch.equal(first.setdefault(index, value.clone()), value)
    assert calls[0] > 4


def test_images_that_are_mixed_are_not_cached(tmp_path: Path) -> None:
    changes = {"loader": {"changes": Changes(mixup=0.2), "classes": 5}}
    plain = Run("off", tmp_path, **changes)
    for medium in ("ram", "auto"):
        cached = Run(medium, tmp_path, **changes)
        assert cached.same_as(plain)
        assert [("mixed with others" in sentence) for sentence in cached.notices] == [True] * (medium == "ram")


def test_images_mirrored_by_turns_have_two_rows(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "plan": (Phase(start=0, stop=4, epochs=1), Phase(start=2, stop=4, epochs=5)),
        "loader": {"augment": "flip-alternate", "views": 2},
    }
    plain, cached = Run("off", tmp_path, **changes), Run("ram", tmp_path, **changes)
    assert cached.same_as(plain)
    assert cached.settled == [0, 82, 50, 0, 0, 0]
    # The views are what the epochs have by themselves.
    loader = cached.trainer.feed.train_loader
    for epoch in range(3):
        own, view = (next(loader.batches(epoch, view=view)).images for view in (None, loader.view(epoch)))
        assert torch.equal(own, view)
