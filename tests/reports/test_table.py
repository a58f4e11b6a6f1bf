"""The schedule table: readable units, folding of equal layers, totals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.reports.table import WIDTH, schedule_table
from hetegen_compile.rows import Row, Totals

TOTALS = Totals(
    resident_bytes=5 * 2**20,
    streamed_bytes=100 * 2**20,
    host_bytes=3 * 2**29,
    predicted_step_s=0.0125,
    floor_s=0.01,
    baselines={"streamed": 0.025, "per_module": 0.05, "host_only": 0.03, "resident": None},
)

LINEAR = Row(
    node="linear", module="", op="linear", placement="split", host_share=0.6, streamed_share=0.4,
    resident_share=0.0, flops=2.5e9, weight_bytes=3 * 2**20, host_s=1.5e-3, accelerator_s=2e-4,
    link_s=12.345e-3, start_s=0.0, end_s=0.013,
)  # fmt: skip
RESIDENT = replace(LINEAR, placement="resident", host_share=0.0, streamed_share=0.0, resident_share=1.0)
SEGMENT = Row(
    node="segment", module="", op="segment", placement="accelerator", host_share=None, streamed_share=None,
    resident_share=None, flops=1e6, weight_bytes=0, host_s=0.0, accelerator_s=3e-5, link_s=0.0,
    start_s=0.0, end_s=3e-5,
)  # fmt: skip


def layer(number: int, linear: Row = LINEAR) -> list[Row]:
    """Rows of one layer that starts at ``number`` seconds."""
    rows = [
        replace(linear, module=f"model.layers.{number}.self_attn.q_proj"),
        replace(SEGMENT, module=f"model.layers.{number}.self_attn"),
        replace(linear, module=f"model.layers.{number}.mlp.up_proj", flops=5e9),
    ]
    return [replace(row, node=f"{row.op}_{number}_{i}", start_s=float(number)) for i, row in enumerate(rows)]


def body(rows: Sequence[Row], *, unfold: bool = False) -> list[str]:
    """The table's lines below its rule and above the totals."""
    text = schedule_table(rows, TOTALS, title="title", unfold=unfold)
    assert max(map(len, text.splitlines())) <= WIDTH
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    return lines[start : lines.index("", start)]


def test_a_row_in_readable_units() -> None:
    text = schedule_table([replace(LINEAR, module="lm_head")], TOTALS, title="graph 1, 1 token")
    lines = text.splitlines()
    assert lines[0] == "graph 1, 1 token"
    assert lines[2].split() == (
        ["module", "op", "where", "host", "link", "res.", "work", "weight"] + ["host", "accel", "link", "start", "end"]
    )
    assert lines[3].split() == ["%", "%", "%", "GFLOP", "MiB", "ms", "ms", "ms", "ms", "ms"]
    assert lines[5].split() == (
        ["lm_head", "linear", "split", "60", "40", "0", "2.50", "3.00"] + ["1.50", "0.200", "12.3", "0.00", "13.00"]
    )


def test_what_a_row_does_not_have_is_left_blank() -> None:
    (line,) = body([replace(SEGMENT, node="segment_4")])
    assert line.split() == ["segment_4", "segment", "accel", "0.0010", "0.030", "0.00", "0.03"]


def test_work_too_small_to_print_is_not_zero() -> None:
    (line,) = body([replace(SEGMENT, node="s", flops=3.0, accelerator_s=1e-9)])
    assert line.split()[3:5] == ["~0", "~0"]


def test_equal_layers_are_shown_once_with_their_count() -> None:
    rows = [replace(SEGMENT, module="model.rotary_emb"), *(row for i in range(30) for row in layer(i))]
    lines = body(rows)
    assert [line.split()[0] for line in lines] == [
        "model.rotary_emb",
        "model.layers.{0..29}.self_attn.q_proj",
        "model.layers.{0..29}.self_attn",
        "model.layers.{0..29}.mlp.up_proj",
    ]
    assert [line.split()[1] for line in lines] == ["segment", "x30", "x30", "x30"]
    assert lines[1].split()[-2:] == ["0.00", "13.00"]


def test_unfold_shows_every_row() -> None:
    rows = [row for i in range(4) for row in layer(i)]
    lines = body(rows, unfold=True)
    assert [line.split()[0] for line in lines] == [row.module for row in rows]
    assert not any(re.search(r"\bx\d", line) for line in lines)


def test_layers_that_differ_are_groups_of_their_own() -> None:
    rows = [row for i in range(30) for row in layer(i, RESIDENT if i < 3 else LINEAR)]
    lines = body(rows)
    assert [(line.split()[0], line.split()[1]) for line in lines] == [
        ("model.layers.{0..2}.self_attn.q_proj", "x3"),
        ("model.layers.{0..29}.self_attn", "x30"),
        ("model.layers.{0..2}.mlp.up_proj", "x3"),
        ("model.layers.{3..29}.self_attn.q_proj", "x27"),
        ("model.layers.{3..29}.mlp.up_proj", "x27"),
    ]
    assert " resident " in lines[0]
    assert " split " in lines[3]


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [([7], "layers.7.q"), ([3, 4], "layers.{3..4}.q"), ([0, 2, 4, 6], "layers.{0,2..6}.q"),
     ([0, 1, 2, 6, 8, 9], "layers.{0..2,6,8..9}.q"), ([5, 9], "layers.{5,9}.q"),
     ([1, 0, 2], "layers.{0..2}.q"), ([2, 4, 5, 9, 12, 20, 23], "layers.{7 of 2..23}.q")],
)  # fmt: skip
def test_numbers_of_folded_layers(numbers: list[int], shown: str) -> None:
    (line,) = body([replace(LINEAR, module=f"layers.{number}.q") for number in numbers])
    assert line.startswith(f"{shown} ")


def test_a_set_of_layers_that_is_not_written_out_is_explained() -> None:
    few, many = (
        schedule_table([replace(LINEAR, module=f"layers.{n}.q") for n in numbers], TOTALS, title="")
        for numbers in ([1, 2, 3], [2, 4, 5, 9, 12, 20, 23])
    )
    assert ("n of the layers" in few, "n of the layers from a to b" in many) == (False, True)


@pytest.mark.parametrize(
    "change",
    [{"op": "other"}, {"placement": "host"}, {"host_share": 0.61}, {"streamed_share": 0.41},
     {"resident_share": 0.01}, {"flops": 2.6e9}, {"weight_bytes": 1}, {"host_s": 1.52e-3},
     {"accelerator_s": 2.03e-4}, {"link_s": 12.6e-3}, {"module": "layers.1.k"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_any_other_figure_keeps_rows_apart(change: dict[str, str | float]) -> None:
    first, second = replace(LINEAR, module="layers.0.q"), replace(LINEAR, module="layers.1.q")
    assert len(body([first, second])) == 1
    assert len(body([first, replace(second, **change)])) == 2  # type: ignore[arg-type]


def test_times_within_a_hundredth_and_measured_times_do_not_keep_rows_apart() -> None:
    rows = [
        replace(LINEAR, module="layers.0.q", measured_s=2e-3),
        replace(LINEAR, module="layers.1.q", measured_s=4e-3, host_s=1.51e-3, link_s=12.4e-3),
    ]
    (line,) = body(rows)
    assert line.split()[1] == "x2"
    assert line.split()[-1] == "3.00"


def test_two_numbers_in_a_path_fold_both() -> None:
    rows = [replace(LINEAR, module=f"layers.{i}.experts.{j}.up") for i in range(4) for j in range(8)]
    (line,) = body(rows)
    assert line.split()[:2] == ["layers.{0..3}.experts.{0..7}.up", "x32"]


def test_equal_rows_between_layers_fold_without_a_number() -> None:
    rows = [replace(SEGMENT, module="model.layers") for _ in range(5)]
    assert [line.split()[:2] for line in body(rows)] == [["model.layers", "x5"]]
    without_module = [replace(SEGMENT, node=f"segment_{i}") for i in range(3)]
    assert [line.split()[:3] for line in body(without_module)] == [["segment_0,", "...", "x3"]]


def test_the_measured_column_is_there_only_after_a_step() -> None:
    rows = [*layer(0), replace(SEGMENT, module="norm", measured_s=1.5e-3)]
    assert "measured" not in schedule_table(rows[:-1], TOTALS, title="")
    assert schedule_table(rows, TOTALS, title="").splitlines()[2].split()[-1] == "measured"
    assert [line.split()[-1] for line in body(rows)] == ["13.00", "0.03", "13.00", "1.50"]


def test_long_names_wrap_at_their_separators_and_lose_nothing() -> None:
    module = ".".join(f"a_rather_long_module_{i}" for i in range(6))
    lines = body([replace(SEGMENT, module=module, op="scaled_dot_product_attention", measured_s=1.0)])
    assert len(lines) > 2
    assert "".join(line.split()[0] for line in lines if line[0] != " ") == module
    assert "".join(re.findall(r"\b(?:scaled_dot|_product|_attention)\b", " ".join(lines))) == (
        "scaled_dot_product_attention"
    )


def test_folded_layers_wrap_between_their_numbers() -> None:
    module = "model.layers.{" + ",".join(f"{i}..{i + 3}" for i in range(100, 200, 6)) + "}.mlp.down_proj"
    lines = body([replace(SEGMENT, module=module, measured_s=1.0)])
    names = [line.split()[0] for line in lines]
    assert "".join(names) == module
    assert len(names) > 2
    assert not any(name.endswith(".") or name.startswith("..") for name in names)
    assert all(name[-1] == "," or after[0] == "." for name, after in pairwise(names))


def test_totals_say_where_weights_are_consumed_and_what_else_would_take() -> None:
    text = schedule_table(layer(0), TOTALS, title="")
    assert "5.00 MiB resident, 100.00 MiB streamed, 1.50 GiB on the host" in text
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines()[-8:-2]]
    assert lines == [
        ["this schedule", "12.5", "1.00x"],
        ["floor", "10.0", "0.80x"],
        ["all streamed, prefetched", "25.0", "2.00x"],
        ["module by module, no prefetch", "50.0", "4.00x"],
        ["CPU only", "30.0", "2.40x"],
        ["all resident on the accelerator", "does not fit"],
    ]


@pytest.mark.parametrize(
    ("baselines", "says"),
    [
        ({"streamed": 0.025, "host_only": 0.03, "resident": 0.001}, "2.00 times as fast as the best alternative"),
        ({"streamed": 0.0125, "host_only": 0.03}, "splitting buys nothing: the host adds nothing to the link here"),
        ({"streamed": 0.025, "per_linear": 0.0125}, "2.00 times as fast as the best alternative"),
        ({"streamed": 0.025, "host_only": 0.0126}, "splitting buys nothing: the link adds nothing to the host here"),
        ({"streamed": 0.025, "host_only": 0.005}, "splitting loses: CPU only is 2.50 times as fast"),
        ({"resident": 0.0125}, "everything fits the budget: there is nothing to split"),
    ],
)
def test_the_last_line_says_what_splitting_buys(baselines: dict[str, float | None], says: str) -> None:
    text = schedule_table(layer(0), replace(TOTALS, baselines=baselines), title="")
    assert says in text.splitlines()[-1]


def test_an_empty_schedule_has_totals_and_no_ratio() -> None:
    nothing = Totals(0, 0, 0, 0.0, 0.0, {"host_only": 0.002})
    text = schedule_table([], nothing, title="")
    assert "0 B resident" in text
    assert [line.split() for line in text.splitlines()[-5:-2]] == [
        ["this", "schedule", "0"], ["floor", "0"], ["CPU", "only", "2.00"],
    ]  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["layers", "blocks"]),
            st.integers(0, 12),
            st.sampled_from([LINEAR, RESIDENT, SEGMENT]),
            st.floats(0, 1),
        ),
        max_size=40,
    )
)
def test_every_row_is_counted_once(drawn: list[tuple[str, int, Row, float]]) -> None:
    rows = [replace(row, module=f"{top}.{number}.q", host_s=host_s) for top, number, row, host_s in drawn]
    counts = [re.search(r" x(\d+) ", line) for line in body(rows) if not line.startswith((".", " "))]
    assert sum(int(match[1]) if match else 1 for match in counts) == len(rows)
    assert len(body(rows, unfold=True)) == len(rows)
