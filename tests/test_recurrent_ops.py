"""Recurrent operators, each alone in a program, against loops in float64.

Their law: a sequence has the same bits in any steps, any batch, with any number of threads, on every instruction set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fabula import _native, ops
from fabula._native import F32, KvLayer, PagePool
from fabula._program import BatchSequence, Heads, Op, Program, Shape
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import DType
from fabula.models import builder as kinds
from recurrent import CASES, CONVS, DELTAS, ISAS, SSMS, Case, Machine, Text, program_of, random, tokens_of

N = 45
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_a_loop_gives_the_same(case: Case) -> None:
    tokens = tokens_of(1, N)
    expected = case.reference(tokens)
    ours = Machine(case).run(tokens, [N])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@every_case
def test_every_instruction_set_gives_the_same_bits(case: Case) -> None:
    tokens = tokens_of(2, N)
    machines = [Machine(case, isa) for isa in ISAS]
    first, *others = [(machine.run(tokens, [20, 1, N - 21]), machine.states.read(0)) for machine in machines]
    for isa, (rows, state) in zip(ISAS[1:], others, strict=True):
        np.testing.assert_array_equal(rows, first[0], err_msg=isa)
        np.testing.assert_array_equal(state, first[1], err_msg=isa)


@every_case
def test_steps_do_not_change_a_bit(case: Case) -> None:
    tokens = tokens_of(3, N)
    machine = Machine(case)
    whole = machine.run(tokens, [N])
    state = machine.states.read(0)
    for steps in ([1] * N, [16, 16, 13], [3, 30, 12], [1, 2, N - 3], [44, 1]):
        np.testing.assert_array_equal(machine.run(tokens, steps), whole, err_msg=str(steps))
        np.testing.assert_array_equal(machine.states.read(0), state, err_msg=str(steps))


@every_case
def test_threads_do_not_change_a_bit(case: Case) -> None:
    tokens = tokens_of(4, N)
    alone = Machine(case).run(tokens, [30, 15])
    for n_threads in (2, 3):
        np.testing.assert_array_equal(Machine(case, n_threads=n_threads).run(tokens, [30, 15]), alone)


@every_case
def test_a_batch_does_not_change_a_bit(case: Case) -> None:
    machine = Machine(case, n_threads=2)
    texts = [Text(tokens_of(5 + i, n), i) for i, n in enumerate((N, 33, 7))]
    alone = [machine.run(text.tokens, [len(text.tokens)], slot=9) for text in texts]
    machine.step([(texts[0], 20), (texts[1], 1), (texts[2], 5)])
    machine.step([(texts[2], 1), (texts[0], 1), (texts[1], 1)])
    machine.step([(texts[1], 31), (texts[0], N - 21), (texts[2], 1)])
    for text, rows in zip(texts, alone, strict=True):
        np.testing.assert_array_equal(text.result(), rows)


@every_case
def test_kept_states_are_those_of_shorter_sequences(case: Case) -> None:
    tokens = tokens_of(6, N)
    machine = Machine(case, n_threads=2)
    text = Text(tokens, 0)
    machine.step([(text, 3)])
    machine.step([(text, 40)], keeps=[((1, 3), (2, 4), (16, 5), (17, 6), (39, 7))])
    for n, slot in ((1, 3), (2, 4), (16, 5), (17, 6), (39, 7)):
        machine.run(tokens[: 3 + n], [3 + n], slot=1)
        np.testing.assert_array_equal(machine.states.read(slot), machine.states.read(1))
    machine.step([(text, 2)])
    np.testing.assert_array_equal(text.result(), machine.run(tokens, [N], slot=1))


@every_case
def test_another_slot_leaves_the_first_as_it_was(case: Case) -> None:
    tokens = tokens_of(7, N)
    machine = Machine(case)
    text = Text(tokens, 0)
    machine.step([(text, 20)])
    state = machine.states.read(0)
    machine.step([(text, N - 20)], to=5)
    np.testing.assert_array_equal(machine.states.read(0), state)
    branch = Text([*tokens[:20], *tokens_of(8, 9)], 0, n_done=20)  # goes on from it
    machine.step([(branch, 9)], to=6)
    np.testing.assert_array_equal(text.result(), machine.run(tokens, [N], slot=1))
    np.testing.assert_array_equal(branch.result(), machine.run(branch.tokens, [29], slot=1)[20:])
    machine.states.copy(8, 5)
    np.testing.assert_array_equal(machine.states.read(8), machine.states.read(5))


@every_case
def test_a_slot_of_zeros_is_the_state_before_the_first_token(case: Case) -> None:
    tokens = tokens_of(9, 12)
    machine = Machine(case)
    first = machine.run(tokens, [12])
    machine.states.zero(0)
    batch = BatchSequence(np.arange(1, dtype=np.int32), 0, np.array(tokens, np.int32), state_in=0, state_out=0)
    again = machine.program.run(machine.pages, [batch], np.arange(12), states=machine.states)
    np.testing.assert_array_equal(again, first)


def test_extreme_gates_stay_finite() -> None:
    """Decays and updates at the ends of their ranges, where e^x overflows or vanishes."""
    for case in (DELTAS[0], SSMS[0]):
        rows, gates = case.tables
        gates = np.sign(gates) * np.float32(600)
        machine = Machine(Case(case.name, [rows, gates], case.op, case.width, case.floats, case.expected))
        tokens = tokens_of(10, 20)
        ours = machine.run(tokens, [20])
        expected = case.expected([rows[tokens].astype(np.float64), gates[tokens].astype(np.float64)])
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---- Gated norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("n_groups", "shared"), [(1, False), (5, True), (5, False)])
@pytest.mark.parametrize("in_place", [False, True])
def test_gated_norm(gate_first: bool, n_groups: int, shared: bool, in_place: bool) -> None:
    width, column, eps = 340, 3, 1e-5
    x, gates = random(1, 9, width), random(2, 9, width + 8)
    weight = random(3, width // n_groups if shared else width)
    op = Op(
        kind=kinds.GATED_NORM, input=0, out=0 if in_place else 2, residual=1, column=column, n_groups=n_groups,
        vector=weight, eps=eps, activation=kinds.ACTIVATIONS["silu"], flags=kinds.GATE_FIRST * gate_first,
    )  # fmt: skip
    ends = [
        Op(kind=kinds.GATHER_OUTPUTS, input=op.out, out=3),
        Op(kind=kinds.LOGITS, input=3, weight=ops.pack(np.eye(width, dtype=np.float32))),
    ]
    embeds = [Op(kind=kinds.EMBED, out=i, weight=ops.pack(table)) for i, table in enumerate((x, gates))]
    shape = Shape(n_layers=1, vocab_size=9, max_tokens=9, heads=(Heads(1, 1, 8, 8, -1),), ropes=())

    def run(isa: _native.Isa) -> F32:
        program = Program(shape, [width, width + 8, width, width], [*embeds, op, *ends], n_threads=1, isa=isa)
        pages = PagePool(DType.F32, 1, [KvLayer(1, 8, 8)])
        return program.run(pages, [BatchSequence(np.zeros(1, np.int32), 0, np.arange(9, dtype=np.int32))], np.arange(9))

    gate = gates[:, column : column + width].astype(np.float64)
    gate = gate / (1 + np.exp(-gate))
    groups = (x * gate if gate_first else x.astype(np.float64)).reshape(9, n_groups, -1)
    normed = (groups / np.sqrt((groups**2).mean(axis=2, keepdims=True) + eps)).reshape(9, width)
    expected = normed * (np.tile(weight, n_groups) if shared else weight) * (1 if gate_first else gate)
    first, *others = [run(isa) for isa in ISAS]
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for other in others:
        np.testing.assert_array_equal(other, first)


# ---- Bad operators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (CONVS[0], {"layer": 1}, r"op 1 \(short_conv\): layer 1 of 1 of the state pool"),
        (CONVS[0], {"width": 0}, "weights for 0 columns"),
        (CONVS[0], {"width": 120}, "120 weights for 120 columns, must be those of 2 .. 64 taps"),
        (CONVS[0], {"column": 1}, "40 columns from 1 on, buffer 0 has 40"),
        (CONVS[0], {"column": -1}, "columns from -1 on"),
        (CONVS[0], {"flags": kinds.CONV_GATED}, "120 columns from 0 on, buffer 0 has 40"),
        (CONVS[0], {"vector2": np.zeros(3, np.float32)}, "3 biases for 40 columns"),
        (CONVS[0], {"activation": kinds.ACTIVATIONS["clamp"]}, "activation 6 is not one of a gate"),
        (DELTAS[0], {"n_groups": 2}, r"op 2 \(delta_rule\): n_heads is 3"),
        (DELTAS[0], {"n_heads": 0}, "n_heads is 0"),
        (DELTAS[0], {"k_dim": 1025}, "k_dim is 1025 and v_dim 20, must be 1 .. 1024"),
        (DELTAS[0], {"k_dim": 23}, "are 106 wide, buffer 0 is 108"),
        (DELTAS[0], {"v_dim": 0}, "v_dim 0"),
        (DELTAS[0], {"eps": 0.0}, "eps must be above 0"),
        (DELTAS[0], {"scale": 0.0}, "scale is 0"),
        (DELTAS[0], {"factors": -1}, "factors are buffer -1"),
        (DELTAS[0], {"factors": 2}, "buffer 2 cannot be its factors"),
        (DELTAS[0], {"column": 1}, "6 gates from column 1 on, buffer 1 has 6"),
        (DELTAS[0], {"vector": np.zeros(2, np.float32)}, "2 and 3 numbers for 3 heads, must be 3 and 3"),
        (SSMS[1], {"vector": np.zeros(3, np.float32)}, "3 and 3 numbers for 3 heads, must be 6 and 3"),
        (SSMS[1], {"limit": 0.25}, "dt is limited to 0.5 .. 0.25"),
        (SSMS[1], {"v_dim": 81}, "buffer 0 is 272"),
        (SSMS[1], {"eps": -1.0}, "eps must be finite and not negative"),
    ],
)
def test_a_bad_operator_is_refused(case: Case, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        program_of(case, **changes)
