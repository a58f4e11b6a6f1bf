"""Room that the budget keeps for caches that grow, for more sequences, and up to which sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from hetegen_compile.graph_inputs import sequence_symbols
from hetegen_compile.ir import info
from hetegen_compile.options import Options
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.beside_caches import reserved_bytes
from hetegen_compile.passes.choose_residency import choose_residency
from hetegen_compile.passes.context import Bucket
from hetegen_compile.passes.findings import MemoryNeed
from hetegen_compile.passes.plans import ACTIVATIONS, BATCHES, BESIDE, GROWTH
from hetegen_compile.planning.buckets import largest_sizes
from hetegen_compile.planning.room import Room
from tests.passes.graphs import case

GROWN = nn.Linear(64, 64)


def longer_cache(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    longer = torch.cat([past, GROWN(x).view(1, 1, 4, 16).transpose(1, 2)], -2)
    return longer, longer.sum()


@pytest.mark.parametrize(
    ("limits", "length", "batches"),
    [
        ({}, 14, 1),  # twice what comes in
        ({"max_batch": 3}, 14, 3),
        ({"context": 28}, 28, 1),
        ({"context": 28, "max_batch": 2}, 28, 2),
        ({"context": 7}, 7, 1),
    ],
)
def test_room_for_a_growing_cache_follows_context_and_max_batch(
    limits: dict[str, int], length: int, batches: int
) -> None:
    past = torch.randn(7, 64)
    torch._dynamo.mark_dynamic(past, 0)
    options = Options(print_schedule=False, **limits)  # type: ignore[arg-type]
    found = case(lambda x, past: torch.cat([past, GROWN(x)]), torch.randn(1, 64), past, options=options)
    largest = largest_sizes(sympy.Integer(1), found.context, {}, found.context.sizes, spare=True)
    found.context = replace(found.context, largest=largest)
    budget = found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
    row = 64 * 4
    comes, goes = length * row, (length + 1) * row
    assert budget[GROWTH] == comes - 7 * row
    assert budget[ACTIVATIONS] >= goes
    assert budget[BATCHES] == (batches - 1) * (row + comes + budget[ACTIVATIONS])  # x, the cache, what is made of them


@pytest.mark.parametrize(("limits", "length"), [({}, 14), ({"context": 70}, 70), ({"context": 7, "max_batch": 3}, 7)])
def test_a_prefill_of_fixed_length_keeps_room_for_the_caches_of_the_steps_after_it(
    limits: dict[str, int], length: int
) -> None:
    def prefill(ids: Tensor) -> tuple[Tensor, Tensor]:
        keys = GROWN(torch.nn.functional.one_hot(ids, 64).float())
        return keys.view(1, 7, 4, 16).transpose(1, 2).contiguous(), keys

    options = Options(print_schedule=False, **limits)  # type: ignore[arg-type]
    found = case(prefill, torch.arange(7)[None], options=options, sequences=1, tokens_per_sequence=7)
    budget = found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
    token, ids, made = 64 * 4, 7 * 8, budget[ACTIVATIONS]
    step = (2 * length - 1) * token  # as it comes, as it goes
    assert budget[GROWTH] == 0 or step < made + budget[GROWTH] <= step + 9 * token  # beside it values of a token
    assert made + budget[GROWTH] > step
    more = limits.get("max_batch", 1) - 1
    assert budget[BATCHES] == more * (ids + budget[ACTIVATIONS] + budget[GROWTH])


@pytest.mark.parametrize(("limits", "length", "sequences"), [({}, 14, 1), ({"context": 70, "max_batch": 3}, 70, 3)])
@pytest.mark.parametrize("accelerator", ["cuda", "emulated"])
def test_on_a_gpu_what_shorter_caches_leave_is_counted(
    accelerator: str, limits: dict[str, int], length: int, sequences: int
) -> None:
    """Of a prefill and of the steps after it; where memory is not torch's allocator's nothing is left."""
    options = Options(print_schedule=False, accelerator=accelerator, **limits)  # type: ignore[arg-type]
    cache_bytes = length * 64 * 4

    def prefill(ids: Tensor) -> tuple[Tensor, Tensor]:
        keys = GROWN(torch.nn.functional.one_hot(ids, 64).float()).view(1, 7, 4, 16).transpose(1, 2).contiguous()
        return keys, keys.sum()

    past = torch.randn(1, 4, 7, 16)
    torch._dynamo.mark_dynamic(past, 2)
    first = case(prefill, torch.arange(7)[None], options=options, sequences=1, tokens_per_sequence=7)
    then = case(longer_cache, torch.randn(1, 64), past, options=options, sequences=1, tokens_per_sequence=1)
    largest = largest_sizes(sympy.Integer(1), then.context, {}, then.context.sizes, spare=True)
    then.context = replace(then.context, largest=largest, lengths=frozenset(then.context.sizes))
    for found, token_bytes in ((first, 0), (then, 64 * 4)):  # a step returns one token more than it is given
        budget = found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
        expected = sequences * (cache_bytes + token_bytes)
        assert budget.get(BESIDE, 0) == (expected if accelerator == "cuda" else 0)


def test_of_sequences_whose_number_varies_the_most_are_counted_once() -> None:
    def step(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        longer = torch.cat([past, GROWN(x).view(x.shape[0], 1, 4, 16).transpose(1, 2)], -2)
        return longer, longer.sum()

    x, past = torch.randn(2, 64), torch.randn(2, 4, 7, 16)
    for tensor, dim in ((x, 0), (past, 0), (past, 2)):
        torch._dynamo.mark_dynamic(tensor, dim)
    options = Options(print_schedule=False, accelerator="cuda", max_batch=4)
    found = case(step, x, past, options=options, sequences=2, tokens_per_sequence=1)
    most = {symbol: 4 if int(size) == 2 else 14 for symbol, size in found.context.sizes.items()}
    lengths = frozenset(symbol for symbol, size in most.items() if size == 14)
    largest = {symbol: sympy.Integer(size) for symbol, size in most.items()}
    found.context = replace(found.context, largest=largest, lengths=lengths)
    budget = found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
    assert budget[BESIDE] == 4 * 15 * 64 * 4


def test_of_longer_prompts_no_more_is_counted_than_of_short_ones() -> None:
    def prefill(ids: Tensor) -> tuple[Tensor, Tensor]:
        made = GROWN(torch.nn.functional.one_hot(ids, 64).float())
        keys = made.view(1, ids.shape[1], 4, 16).transpose(1, 2).contiguous()
        return keys, keys.sum()

    options = Options(print_schedule=False, accelerator="cuda", context=64)
    for tokens in (9, 20):
        ids = torch.arange(tokens)[None]
        torch._dynamo.mark_dynamic(ids, 1)
        found = case(prefill, ids, options=options, sequences=1, tokens_per_sequence=tokens)
        (symbol,) = found.context.sizes
        found.context = replace(found.context, largest={symbol: sympy.Integer(64)})
        budget = found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
        assert budget[BESIDE] == 64 * 64 * 4


@pytest.mark.parametrize("written", [True, False])
def test_what_no_step_lengthens_leaves_nothing(written: bool) -> None:
    """Static caches of any length, and what has four dimensions and is no cache."""

    def step(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        if written:
            past[:, :, :1].copy_(GROWN(x).view(1, 1, 4, 16).transpose(1, 2))
        return past if written else past.relu(), GROWN(x)

    past = torch.randn(1, 4, 7, 16)
    torch._dynamo.mark_dynamic(past, 2)
    options = Options(print_schedule=False, accelerator="cuda")
    found = case(step, torch.randn(1, 64), past, options=options, sequences=1, tokens_per_sequence=1)
    found.context = replace(found.context, lengths=frozenset(found.context.sizes if written else ()))
    assert BESIDE not in found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]


def test_the_mask_of_another_sequence_is_counted_at_the_longest_context() -> None:
    """Its length is a size of its own in the graph that comes with it, so that graph keeps room for all of it."""

    def prefill(ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.one_hot(ids, 4096).float()  # more than any step after it takes
        keys = GROWN(torch.nn.functional.one_hot(ids, 64).float())
        return keys.view(1, 7, 4, 16).transpose(1, 2).contiguous(), logits

    room = {}
    for context in (7, 17):
        options = Options(print_schedule=False, context=context, max_batch=2)
        found = case(prefill, torch.arange(7)[None], options=options, sequences=1, tokens_per_sequence=7)
        room[context] = found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
    assert room[7][GROWTH] == room[17][GROWTH] == 0
    assert room[17][BATCHES] - room[7][BATCHES] == 2 * 10 * 8  # of both sequences, ten tokens longer


@pytest.mark.parametrize(("window", "comes", "goes"), [(4, 5, 5), (7, 8, 8), (30, 31, 31), (200, 69, 70)])
def test_a_cache_of_a_window_keeps_room_for_what_it_is_cut_from(window: int, comes: int, goes: int) -> None:
    """A longer context takes no more; prompts longer than the window, as long, shorter."""

    def prefill(ids: Tensor) -> Tensor:
        keys: Tensor = GROWN(torch.nn.functional.one_hot(ids, 64).float()).view(1, 7, 4, 16)
        return keys.transpose(1, 2).contiguous()[:, :, -window:, :]

    options = Options(print_schedule=False, context=70)
    found = case(prefill, torch.arange(7)[None], options=options, sequences=1, tokens_per_sequence=7)
    budget = found.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
    token, made = 64 * 4, budget[ACTIVATIONS]
    step = (comes + goes) * token
    assert budget[GROWTH] == 0 or step < made + budget[GROWTH] <= step + 9 * token
    assert made + budget[GROWTH] > step


def test_sizes_of_caches_are_compared_without_new_guards() -> None:
    """What a cache is compared with may have a symbol where that has a number."""

    def step(ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        made = GROWN(torch.nn.functional.one_hot(ids, 64).float()).view(1, 7, 4, 16).transpose(1, 2).contiguous()
        return made, torch.relu(past)

    past = torch.randn(1, 4, 9, 16)
    torch._dynamo.mark_dynamic(past, 2)
    options = Options(print_schedule=False, context=70)
    found = case(step, torch.arange(7)[None], past, options=options, sequences=1, tokens_per_sequence=7)
    found.run(annotate_costs)
    values = [info(node).value for node in found.module.graph.find_nodes(op="placeholder")]
    (environment,) = {v.node.shape_env for v in values if isinstance(v, torch.SymInt)}
    before = len(environment.guards)
    assert found.apply(choose_residency).budget[GROWTH] > 0
    assert len(environment.guards) == before


def test_caches_of_all_layers_may_come_in_one_tensor() -> None:
    def prefill(ids: Tensor) -> Tensor:
        keys = GROWN(torch.nn.functional.one_hot(ids, 64).float()).view(1, 7, 4, 16).transpose(1, 2)
        return torch.stack([keys, keys.relu()])

    found = case(prefill, torch.arange(7)[None], sequences=1, tokens_per_sequence=7).run(annotate_costs)
    assert found.apply(choose_residency).budget[GROWTH] > 0


def test_without_spare_room_only_what_is_stated_is_kept() -> None:
    def prefill(ids: Tensor) -> Any:
        return GROWN(torch.nn.functional.one_hot(ids, 64).float()).view(1, 7, 4, 16).transpose(1, 2).contiguous()

    found = case(prefill, torch.arange(7)[None], sequences=1, tokens_per_sequence=7, spare=False)
    assert found.run(choose_residency).context.residency.budget[GROWTH] == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bucket", "context", "spare", "largest"),
    [
        (Bucket(5, 16), None, True, (16, 60)),
        (Bucket(5, 16), 100, True, (16, 100)),
        (Bucket(5, 16), 100, False, (None, 100)),
        (Bucket(257, None), None, True, (14, 60)),
        (Bucket(5, 16), None, False, (None, 30)),
    ],
)
def test_largest_sizes(bucket: Bucket, context: int | None, spare: bool, largest: tuple[int | None, int]) -> None:
    tokens, length = sympy.symbols("tokens length", integer=True)
    base = case(nn.Linear(64, 64), torch.randn(1, 64)).context
    options = replace(base.options, context=context)
    sizes = {tokens: sympy.Integer(7), length: sympy.Integer(30)}
    there = replace(base, options=options, sizes=sizes, bucket=bucket)
    found = largest_sizes(tokens, there, {}, {length}, spare=spare)
    assert (found.get(tokens), found[length]) == largest
    limited = largest_sizes(tokens, there, {length: sympy.Integer(31)}, {length}, spare=spare)
    assert (limited.get(tokens), limited[length]) == (largest[0], min(31, largest[1]))


def test_a_number_of_sequences_is_no_length() -> None:
    """A mask has a number of sequences of its own until it meets the tokens; the context is none of its size."""
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    for tensor in (ids, mask):
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.mark_dynamic(mask, 1)
    found = case(lambda ids, mask: (ids + 1, mask.sum()), ids, mask, options=Options(context=4096))
    placeholders = found.module.graph.find_nodes(op="placeholder")
    sequences = sequence_symbols(placeholders, {})
    assert len(sequences) == 2
    lengths = found.context.sizes.keys() - sequences
    assert len(lengths) == 1
    assert set(largest_sizes(sympy.Integer(1), found.context, {}, lengths, spare=True).values()) == {4096}


def appended_prefill(ids: Tensor) -> tuple[Tensor, Tensor]:
    keys = GROWN(torch.nn.functional.one_hot(ids, 64).float()).view(1, ids.shape[1], 4, 16).transpose(1, 2)
    longer = torch.cat([torch.empty(0), keys], -2)
    return longer, longer.sum()


def by_token(tokens: int) -> Tensor:
    """A cache as the steps before returned it."""
    return torch.randn(tokens, 1, 4, 16).permute(1, 2, 0, 3)


@pytest.mark.parametrize(("limits", "length"), [({}, 14), ({"context": 70}, 70)])
@pytest.mark.parametrize("accelerator", ["cuda", "emulated"])
def test_of_a_cache_that_is_lengthened_where_it_lies_there_is_one(
    accelerator: str, limits: dict[str, int], length: int
) -> None:
    """Of a prompt's and of the steps after it: twice as long as it is, or as is stated.

    While one is moved to where it has room there are two, before a step makes anything. On a GPU that leaves pieces,
    where caches have outgrown what they lie in.
    """
    token = 64 * 4
    options = Options(print_schedule=False, accelerator=accelerator, **limits)  # type: ignore[arg-type]
    past = by_token(7)
    torch._dynamo.mark_dynamic(past, 2)
    first = case(appended_prefill, torch.arange(7)[None], options=options, sequences=1, tokens_per_sequence=7)
    then = case(longer_cache, torch.randn(1, 64), past, options=options, sequences=1, tokens_per_sequence=1)
    largest = largest_sizes(sympy.Integer(1), then.context, {}, then.context.sizes, spare=True)
    then.context = replace(then.context, largest=largest, lengths=frozenset(then.context.sizes))
    prompt = first.run(choose_residency).context.residency.budget  # type: ignore[union-attr]
    found = then.run(choose_residency).context.residency
    assert found is not None
    step, left = found.budget, found.budget.get(BESIDE, 0)
    (symbol,) = then.context.sizes
    of_step = int(found.mirrored.subs({symbol: length}))
    assert of_step == (length + 1) * token + 2 * 64 * 4, "the cache with the new token, x and a bias"
    assert step[GROWTH] == of_step - int(found.mirrored.subs({symbol: 7}))
    if accelerator == "cuda":
        outgrown = {} if limits else {"prompt": 7, "step": 8}
        between = [reserved_bytes(tokens * token) - tokens * token for tokens in (length, length + 1)]
        assert prompt[BESIDE] == between[0] + outgrown.get("prompt", 0) * token
        assert left == between[1] + outgrown.get("step", 0) * token, "what it had outgrown when this was planned"
    else:
        assert left == max(0, (length + 1) * token - step[ACTIVATIONS])
        assert BESIDE not in prompt
    two = 2 * length * token
    assert prompt[ACTIVATIONS] + prompt[GROWTH] <= two + 9 * token
    if accelerator == "emulated":
        assert prompt[ACTIVATIONS] + prompt[GROWTH] >= two, "while it is moved"


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        (0, 0), (1, 512), (512 << 10, 512 << 10), (700 << 10, 1 << 20), (1 << 20, 1 << 20), (3 << 20, (20 << 20) // 6),
        ((20 << 20) // 3, (20 << 20) // 2), (8 << 20, 10 << 20), (10 << 20, 10 << 20), ((10 << 20) + 1, 12 << 20),
        (17 << 20, 18 << 20),
    ],
)  # fmt: skip
def test_tensors_share_blocks_of_torchs_allocator(nbytes: int, reserved: int) -> None:
    assert reserved_bytes(nbytes) == reserved


@pytest.mark.parametrize("lengthened", [False, True])
def test_a_forward_that_outgrows_its_plan_needs_room_for_what_shorter_caches_leave(lengthened: bool) -> None:
    past = by_token(7) if lengthened else torch.randn(1, 4, 7, 16)
    torch._dynamo.mark_dynamic(past, 2)
    inputs = {}
    for accelerator in ("cuda", "emulated"):
        options = Options(print_schedule=False, accelerator=accelerator)
        found = case(longer_cache, torch.randn(1, 64), past, options=options, sequences=1, tokens_per_sequence=1)
        (symbol,) = found.context.sizes
        found.context = replace(found.context, lengths=frozenset([symbol]))
        context = replace(found.run(choose_residency).context, memory=MemoryNeed(((0, 1, sympy.Integer(100)),), {}))
        sizes = {symbol: sympy.Integer(9)}
        inputs[accelerator] = int(Room.of(context, 0).inputs.subs(sizes))
        assert Room.of(context, inputs[accelerator] + 100).covers(sizes)
        assert not Room.of(context, inputs[accelerator] + 99).covers(sizes)
    assert inputs["emulated"] == (9 + lengthened) * 64 * 4 + 2 * 64 * 4, "a cache, x and a bias"
    assert inputs["cuda"] - inputs["emulated"] == 10 * 64 * 4
