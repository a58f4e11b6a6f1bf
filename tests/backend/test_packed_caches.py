"""Caches that are views of one packed projection: a hand-written decoder, with several budgets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hetegen_compile
from tests.models.harness import RecordingBackend, emulated, new_schedules

WIDTH, HEADS, PROMPT, STEPS = 128, 4, 5, 5

Cache = list[tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Two layers of attention; keys and values of a prompt are views of what made the queries, too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        new: Cache = []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            parts = qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS).unbind(2)
            queries, keys, values = (part.transpose(1, 2) for part in parts)
            if past is not None:
                keys, values = torch.cat([past[i][0], keys], 2), torch.cat([past[i][1], values], 2)
            new.append((keys, values))
            seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=past is None)
            x = x + out(seen.transpose(1, 2).reshape(x.shape))
        return self.down(F.gelu(self.up(x))), new


@pytest.mark.parametrize("budget", [430_000, 500_000, 700_000, 900_000])
def test_a_step_behind_a_prompt_has_room_for_what_that_returned(budget: int) -> None:
    """Each of the views had been counted with all of the storage that they share."""
    torch.manual_seed(0)
    model, backend, known = Decoder().eval(), RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=budget, context=32, max_batch=2, seed=1))
    x = torch.randn(2, PROMPT, WIDTH)
    with torch.no_grad():
        found, expected = model(x), model.forward(x)
        for _ in range(STEPS):
            token = expected[0][:, -1:]
            found, expected = model(token, found[1]), model.forward(token, expected[1])
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    schedules = new_schedules(known)
    assert backend.accelerator.counters.peak_bytes <= budget
    assert any(schedule.streamed_bytes for schedule in schedules)
