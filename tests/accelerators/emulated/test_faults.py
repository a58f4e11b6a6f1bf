"""Every fault of a schedule is an error when it is issued, and names both nodes."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.base import Slot, Transfer, Value
from hetegen_compile.errors import MissingWaitError, ScheduleError, SlotInUseError

ROWS = torch.ones(4, 4)


@pytest.fixture
def slot(accelerator: EmulatedAccelerator) -> Slot:
    accelerator.reserve_ring(4096)
    accelerator.begin_step()
    return accelerator.slot(0, (4, 4), torch.float32)


@pytest.fixture
def fetched(accelerator: EmulatedAccelerator, slot: Slot) -> Transfer:
    return accelerator.prefetch(Op("fetch"), ROWS, slot, ())


@pytest.fixture
def value(accelerator: EmulatedAccelerator, slot: Slot) -> Value:
    return accelerator.upload(Op("x"), torch.ones(4, 4))


def test_use_without_wait(accelerator: EmulatedAccelerator, fetched: Transfer, value: Value) -> None:
    with pytest.raises(MissingWaitError, match=r"linear.* fetch"):
        accelerator.launch(Op("linear"), F.linear, (value, fetched))


def test_nested_use_without_wait(accelerator: EmulatedAccelerator, fetched: Transfer, value: Value) -> None:
    with pytest.raises(MissingWaitError, match=r"cat.* fetch"):
        accelerator.launch(Op("cat"), torch.cat, ([value, fetched],))


def test_future_taken_out_of_its_transfer(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    with pytest.raises(MissingWaitError, match=r"neg .* fetch"):
        accelerator.launch(Op("neg"), torch.neg, (fetched.value,))


def test_download_of_a_prefetch_not_waited_for(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    with pytest.raises(MissingWaitError, match=r"down .* fetch"):
        accelerator.to_host(Op("down"), fetched.value)


def test_upload_not_waited_for(accelerator: EmulatedAccelerator, slot: Slot) -> None:
    up = accelerator.to_accelerator(Op("up"), [torch.ones(1 << 18)])
    with pytest.raises(MissingWaitError, match=r"neg .* up"):
        accelerator.launch(Op("neg"), torch.neg, (up.values[0],))


def test_overwrite_of_a_slot_in_use(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    overlapping = accelerator.slot(0, (2,), torch.float32)
    with pytest.raises(SlotInUseError, match=r"next .* fetch"):
        accelerator.prefetch(Op("next"), torch.ones(2), overlapping, ())


def test_neighbouring_slots_do_not_overlap(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    neighbour = accelerator.slot(256, (2,), torch.float32)
    assert accelerator.prefetch(Op("next"), torch.ones(2), neighbour, ()).node == "next"


def test_overwrite_without_the_token(accelerator: EmulatedAccelerator, slot: Slot, fetched: Transfer) -> None:
    accelerator.wait(Op("wait"), fetched)
    token = accelerator.release(Op("release"), fetched)
    with pytest.raises(SlotInUseError, match=r"next .* fetch .*release"):
        accelerator.prefetch(Op("next"), ROWS, slot, ())
    assert accelerator.prefetch(Op("again"), ROWS, slot, (token,)).node == "again"


def test_later_token_covers_earlier_releases(accelerator: EmulatedAccelerator, slot: Slot) -> None:
    other = accelerator.slot(1024, (4, 4), torch.float32)
    first = accelerator.prefetch(Op("first"), ROWS, slot, ())
    second = accelerator.prefetch(Op("second"), ROWS, other, ())
    for transfer in (first, second):
        accelerator.wait(Op("wait"), transfer)
    accelerator.release(Op("r1"), first)
    token = accelerator.release(Op("r2"), second)
    assert accelerator.prefetch(Op("third"), ROWS, slot, (token,)).node == "third"


def test_use_after_release(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    weight = accelerator.wait(Op("wait"), fetched)
    accelerator.release(Op("release"), fetched)
    with pytest.raises(SlotInUseError, match=r"neg .* fetch .* release "):
        accelerator.launch(Op("neg"), torch.neg, (weight,))
    with pytest.raises(SlotInUseError, match=r"late .* fetch .* release "):
        accelerator.wait(Op("late"), fetched)


def test_use_in_the_next_step(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    weight = accelerator.wait(Op("wait"), fetched)
    accelerator.end_step()
    accelerator.begin_step()
    with pytest.raises(SlotInUseError, match=r"neg .* fetch .* begin_step"):
        accelerator.launch(Op("neg"), torch.neg, (weight,))


def test_double_release(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    accelerator.wait(Op("wait"), fetched)
    accelerator.release(Op("release"), fetched)
    with pytest.raises(SlotInUseError, match=r"twice .* fetch.* release "):
        accelerator.release(Op("twice"), fetched)


def test_release_without_wait(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    with pytest.raises(MissingWaitError, match=r"release .* fetch"):
        accelerator.release(Op("release"), fetched)


def test_release_while_downloading(accelerator: EmulatedAccelerator, fetched: Transfer) -> None:
    down = accelerator.to_host(Op("down"), accelerator.wait(Op("wait"), fetched))
    with pytest.raises(MissingWaitError, match=r"early .* down"):
        accelerator.release(Op("early"), fetched)
    accelerator.wait_host(Op("arrived"), down)
    assert accelerator.release(Op("release"), fetched).node == "release"


def test_mutation_while_downloading(accelerator: EmulatedAccelerator, value: Value) -> None:
    down = accelerator.to_host(Op("down"), value)
    with pytest.raises(MissingWaitError, match=r"add .* down"):
        accelerator.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    accelerator.wait_host(Op("arrived"), down)
    accelerator.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    assert accelerator.download(Op("out"), value)[0].tolist() == [2] * 4


def test_mutation_of_an_alias_while_downloading(accelerator: EmulatedAccelerator, value: Value) -> None:
    alias = accelerator.launch(Op("view"), torch.Tensor.t, (value,))
    accelerator.to_host(Op("down"), alias)
    accelerator.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    with pytest.raises(MissingWaitError, match=r"(add .* down)|(down .* add)"):
        accelerator.end_step()


def test_upload_into_what_is_downloading(accelerator: EmulatedAccelerator, value: Value) -> None:
    accelerator.to_host(Op("down"), value)
    with pytest.raises(MissingWaitError, match=r"upload .* down"):
        accelerator.upload(Op("upload"), torch.zeros(4, 4), into=value)


def test_upload_into_another_geometry(accelerator: EmulatedAccelerator, value: Value) -> None:
    with pytest.raises(ScheduleError, match=r"upload .* x"):
        accelerator.upload(Op("upload"), torch.zeros(2), into=value)


def test_mutation_of_a_host_view(accelerator: EmulatedAccelerator, slot: Slot) -> None:
    (small,) = accelerator.wait(Op("wait"), accelerator.to_accelerator(Op("up"), [torch.ones(4)]))
    with pytest.raises(ScheduleError, match=r"add .* up"):
        accelerator.launch(Op("add"), torch.Tensor.add_, (small, 1), mutates=(0,))


def test_host_gets_a_download_not_waited_for(accelerator: EmulatedAccelerator, value: Value) -> None:
    down = accelerator.to_host(Op("down"), value)
    with pytest.raises(MissingWaitError, match=r"softmax .* down"):
        accelerator.host(Op("softmax"), torch.softmax, (down, -1), {})


def test_host_gets_a_device_value(accelerator: EmulatedAccelerator, value: Value) -> None:
    with pytest.raises(MissingWaitError, match=r"cat .* x"):
        accelerator.host(Op("cat"), torch.cat, (), {"tensors": [value]})


def test_torch_functions_refuse_values(accelerator: EmulatedAccelerator, value: Value) -> None:
    for touch in (lambda: torch.ones(4, 4) + value, lambda: torch.cat([value]), lambda: value.shape):
        with pytest.raises(MissingWaitError, match=r"(add|cat|shape).* x "):
            touch()


@pytest.mark.parametrize("transfer", [None, torch.ones(2)], ids=["none", "tensor"])
def test_wait_for_nothing(accelerator: EmulatedAccelerator, slot: Slot, transfer: Any) -> None:
    for wait in (accelerator.wait, accelerator.wait_host, accelerator.release):
        with pytest.raises(ScheduleError, match=r"lost "):
            wait(Op("lost"), transfer)


def test_wait_of_the_wrong_kind(accelerator: EmulatedAccelerator, slot: Slot, fetched: Transfer, value: Value) -> None:
    down: Any = accelerator.to_host(Op("down"), value)
    with pytest.raises(ScheduleError, match=r"wait .* down"):
        accelerator.wait(Op("wait"), down)
    with pytest.raises(ScheduleError, match=r"arrived .* fetch"):
        accelerator.wait_host(Op("arrived"), fetched)
    with pytest.raises(ScheduleError, match=r"release .* down"):
        accelerator.release(Op("release"), down)
    with pytest.raises(ScheduleError, match=r"next .* down"):
        accelerator.prefetch(Op("next"), ROWS, slot, (down,))


def test_launch_on_a_host_tensor(accelerator: EmulatedAccelerator, value: Value) -> None:
    with pytest.raises(ScheduleError, match="linear"):
        accelerator.launch(Op("linear"), F.linear, (value, torch.ones(4, 4)))


def test_launch_on_a_value_that_was_lost(accelerator: EmulatedAccelerator, value: Value) -> None:
    with pytest.raises(ScheduleError, match="linear gets None for argument 2"):
        accelerator.launch(Op("linear", tensors=(0, 1, 2)), F.linear, (value, value, None))
    without_bias = accelerator.launch(Op("linear", tensors=(0, 1)), F.linear, (value, value, None))
    assert torch.equal(accelerator.download(Op("y"), without_bias), ROWS @ ROWS)


@pytest.mark.parametrize(
    "source",
    [torch.ones(4, 5), torch.ones(4, 4).double(), torch.rand(4, 8)[:, ::2]],
    ids=["shape", "dtype", "strides"],
)
def test_prefetch_that_is_no_plain_copy(accelerator: EmulatedAccelerator, slot: Slot, source: torch.Tensor) -> None:
    with pytest.raises(ScheduleError, match="fetch"):
        accelerator.prefetch(Op("fetch"), source, slot, ())


@pytest.mark.parametrize("offset", [100, 4096, -256])
def test_slot_outside_the_ring(accelerator: EmulatedAccelerator, slot: Slot, offset: int) -> None:
    with pytest.raises(ScheduleError, match=str(offset)):
        accelerator.slot(offset, (4, 4), torch.float32)


def test_packed_downloads_are_checked_one_by_one(accelerator: EmulatedAccelerator, value: Value) -> None:
    other = accelerator.upload(Op("y"), torch.ones(2))
    accelerator.to_host(Op("down"), [other, value])
    with pytest.raises(MissingWaitError, match=r"add .* down"):
        accelerator.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    with pytest.raises(ScheduleError, match=r"down2 "):
        accelerator.to_host(Op("down2"), [other, 3])
