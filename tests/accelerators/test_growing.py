"""Caches in memory with room: what lies where, who has taken what, on every accelerator that computes here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.null_accelerator import NullAccelerator
from hetegen_compile.accelerators import Accelerator, CudaAccelerator, EmulatedAccelerator, Op
from hetegen_compile.accelerators.base import Value
from hetegen_compile.accelerators.growing import Block, block_of, have_room, room_behind
from hetegen_compile.errors import AcceleratorMemoryError, ScheduleError
from hetegen_compile.geometry import token_strides
from tests.accelerators import fake_cuda

OP = Op("keys")


@pytest.fixture(params=["emulated", "null", "cuda"])
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    if request.param == "cuda":
        fake_cuda.install(monkeypatch)
    made: dict[str, Callable[[], Accelerator]] = {
        "emulated": lambda: EmulatedAccelerator(1 << 20, seed=0), "null": NullAccelerator, "cuda": CudaAccelerator,
    }  # fmt: skip
    found = made[request.param]()
    found.begin_step()
    yield found
    found.close()


def fill(accelerator: Accelerator, cache: Value, first: int, what: Tensor) -> None:
    """Write tokens from ``first`` on."""

    def write(cache: Tensor, what: Tensor) -> tuple[()]:
        cache[:, :, first : first + what.shape[2]].copy_(what)
        return ()

    accelerator.launch(Op("write"), write, (cache, accelerator.upload(OP, what)), outputs=0, mutates=(0,))


def test_a_longer_one_begins_as_the_shorter_one_does(opened: Accelerator) -> None:
    tokens = torch.randn(2, 3, 7, 4)
    cache = opened.new_cache(OP, tokens[:, :, :4].to("meta"), 7)
    assert block_of(cache) is not None
    assert room_behind(cache) == 3
    fill(opened, cache, 0, tokens[:, :, :4])
    longer = opened.lengthen(OP, cache, 1)
    fill(opened, longer, 4, tokens[:, :, 4:5])
    longest = opened.lengthen(OP, longer, 2)
    fill(opened, longest, 5, tokens[:, :, 5:])
    assert [room_behind(one) for one in (cache, longer, longest)] == [0, 0, 0]
    assert block_of(cache) is block_of(longer) is block_of(longest)
    for value, length in ((cache, 4), (longer, 5), (longest, 7)):
        found = opened.download(Op("look"), value)
        assert torch.equal(found, tokens[:, :, :length])
        assert found.stride() == token_strides(found.shape)
    assert opened.share_memory(cache, longest)


@pytest.mark.parametrize(("tokens", "said"), [(4, "has room for 3"), (1, "is in no block")])
def test_where_there_is_no_room_it_is_an_error(opened: Accelerator, tokens: int, said: str) -> None:
    like = torch.ones(1, 2, 4, 8)
    value = opened.new_cache(OP, like, 7) if tokens > 1 else opened.upload(OP, like)
    with pytest.raises(ScheduleError, match=f"keys lengthens a cache by {tokens} tokens, which {said}"):
        opened.lengthen(OP, value, tokens)


def test_what_somebody_has_taken_nobody_else_gets(opened: Accelerator) -> None:
    cache = opened.new_cache(OP, torch.ones(1, 2, 4, 8), 9)
    opened.lengthen(OP, cache, 1)
    assert room_behind(cache) == 0
    with pytest.raises(ScheduleError, match="room for 0"):
        opened.lengthen(OP, cache, 1)


def test_memory_is_never_less_than_the_cache_takes(opened: Accelerator) -> None:
    cache = opened.new_cache(OP, torch.ones(2, 2, 4, 8), 0)
    block = block_of(cache)
    assert block is not None
    assert (block.tokens, block.used, block.nbytes) == (4, 4, 4 * 2 * 2 * 8 * 4)


def test_values_have_room_each_in_a_block_of_its_own(opened: Accelerator) -> None:
    like = torch.ones(1, 2, 4, 8)
    caches = [opened.new_cache(OP, like, 6) for _ in range(2)]
    assert have_room(caches, 2)
    assert not have_room(caches, 3)
    assert not have_room([*caches, caches[0]], 1), "behind one value there is room for one of them"
    assert not have_room([*caches, opened.upload(OP, like)], 0), "it lies in no block"
    opened.lengthen(OP, caches[0], 1)
    assert not have_room(caches, 1)


def test_a_block_gives_each_token_once() -> None:
    block = Block(tokens=8, used=3, token_bytes=16)
    assert not block.take(2, 1), "behind a shorter one"
    assert not block.take(4, 1), "behind what is not there"
    assert not block.take(3, 6)
    assert block.take(3, 5)
    assert not block.take(3, 1)
    assert block.take(8, 0)


def test_emulated_memory_is_that_of_the_block_and_is_refused() -> None:
    accelerator = EmulatedAccelerator(4096)
    cache = accelerator.new_cache(Op("keys", category="mirrors"), torch.ones(1, 1, 4, 8), 64)
    accelerator.synchronize()
    assert accelerator.counters.held_bytes == {"mirrors": 64 * 32}
    longer = accelerator.lengthen(OP, cache, 4)
    accelerator.synchronize()
    del cache
    assert accelerator.counters.held_bytes == {"mirrors": 64 * 32}
    with pytest.raises(AcceleratorMemoryError, match="keys needs 4096 bytes"):
        accelerator.download(Op("look"), accelerator.new_cache(OP, torch.ones(1, 1, 4, 8), 128))
    del longer
    accelerator.synchronize()
    assert accelerator.counters.held_bytes == {"mirrors": 0}
    accelerator.close()


def test_what_no_launch_has_written_is_nan_on_the_emulated_one() -> None:
    accelerator = EmulatedAccelerator(1 << 16)
    cache = accelerator.upload(OP, torch.ones(1, 2, 3, 4))
    longer = accelerator.new_cache(OP, torch.ones(1, 2, 3, 4), 6)
    fill(accelerator, longer, 0, torch.ones(1, 2, 3, 4))
    found = accelerator.download(Op("look"), accelerator.lengthen(OP, longer, 2))
    assert torch.equal(found[:, :, :3], accelerator.download(OP, cache))
    assert found[:, :, 3:].isnan().all()
    accelerator.close()
