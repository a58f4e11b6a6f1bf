"""Pinned buffers for small uploads: lent again when nobody holds them, against a fake of torch.cuda."""

import pytest
import torch

from hetegen_compile.accelerators.cuda import lending as cuda_lending
from hetegen_compile.accelerators.cuda.lending import ALIGNMENT_BYTES, LEAST_BYTES, Lending
from tests.accelerators import fake_cuda

CPU = torch.device("cpu")


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> Lending:
    fake_cuda.install(monkeypatch)
    return Lending(CPU)


def test_tensors_lie_apart_in_one_buffer_with_their_geometry(lending: Lending) -> None:
    sources = [torch.arange(6).view(2, 3).t(), torch.tensor([True]), torch.tensor(2.5), torch.ones(3).expand(2, 3)]
    lent = lending.lend(sources)
    for one, source in zip(lent, sources, strict=True):
        assert torch.equal(one, source)
        assert (one.dtype, one.stride()) == (source.dtype, source.stride())
        assert one.data_ptr() % ALIGNMENT_BYTES == lent[0].data_ptr() % ALIGNMENT_BYTES
    assert len({one.untyped_storage().data_ptr() for one in lent}) == 1
    assert len({one.data_ptr() for one in lent}) == len(lent)


def test_a_buffer_is_lent_again_when_it_was_taken_back(lending: Lending) -> None:
    first = lending.lend([torch.ones(4)])[0].data_ptr()
    assert lending.lend([torch.ones(4)])[0].data_ptr() != first  # the first may not have been read yet
    lending.take_back()
    assert lending.lend([torch.zeros(4)])[0].data_ptr() == first


def test_each_turn_has_its_buffer_whatever_becomes_of_the_others(lending: Lending) -> None:
    """Recorded launches read it where it was: the second is kept by a caller, the third has grown, a fourth is new."""

    def step(lengths: list[int]) -> list[torch.Tensor]:
        lending.take_back()
        return [lending.lend([torch.ones(length)])[0] for length in lengths]

    before = [one.data_ptr() for one in step([4, 4, 4, 4])]
    kept = step([4, 4, 4, 4])[1]
    after = [one.data_ptr() for one in step([4, 4, 4000, 4, 4])]
    assert [after[i] == before[i] for i in range(4)] == [True, False, False, True]
    assert [one.data_ptr() for one in step([4, 4, 4, 4])] == after[:4], "what is longer than needed serves, too"
    assert kept.tolist() == [1.0] * 4


def test_what_somebody_still_holds_is_never_lent_again(lending: Lending) -> None:
    """A result that is uploaded as it is may become the twin of a tensor that the caller got."""
    (kept,) = lending.lend([torch.ones(4)])
    lending.take_back()
    for _ in range(3):
        lending.lend([torch.zeros(4)])
    assert kept.tolist() == [1.0] * 4


def test_few_buffers_are_made_where_lengths_vary(lending: Lending, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def view(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
        made.append(buffer.numel())
        return buffer

    monkeypatch.setattr(cuda_lending, "cuda_view", view)
    for length in (1, 5, 1000, 1024, 1025, 3000, 1500):
        lending.lend([torch.ones(length)])
        lending.take_back()
    assert made == [LEAST_BYTES, 2 * LEAST_BYTES, 4 * LEAST_BYTES]
    lending.close()
    lending.lend([torch.ones(1)])
    assert made[3:] == [LEAST_BYTES]
