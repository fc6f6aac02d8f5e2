"""Which tile and how many parts a launch takes: tables, the model for what is not in them, the predicate."""

import json
import shutil

import pytest

from vlmq_vllm.format import BITS, WeightFormat
from vlmq_vllm.kernels import tiles, tuned_tables
from vlmq_vllm.kernels.hardware import INTERPRETER, Hardware
from vlmq_vllm.kernels.layout import Geometry
from vlmq_vllm.kernels.tiles import BUCKETS, Plan, Tile, why_not
from vlmq_vllm.kernels.workspace import COUNTERS, PARTIALS

H200 = Hardware("sm_90", 132, 227 << 10)
MACHINES = [
    INTERPRETER,
    H200,
    Hardware("sm_80", 108, 163 << 10),
    Hardware("sm_86", 84, 99 << 10),
    Hardware("sm_120", 170, 99 << 10),
    Hardware("sm_100", 148, 227 << 10),
    Hardware("gfx942", 304, 64 << 10),
    Hardware("gfx1100", 96, 64 << 10),
]
# Projections of Qwen2-VL-7B and Qwen2.5-VL-72B, a head, and one that is smaller than a tile.
SHAPES = [(4608, 3584), (3584, 18944), (59136, 8192), (8192, 29568), (152064, 3584), (40, 100)]


def geometry(bits=4, rows=3584, columns=3584, group=128, symmetric=True) -> Geometry:
    return Geometry.of(WeightFormat(bits, group, symmetric), rows, columns)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A folder of tables that comes before ours."""
    for cached in (tuned_tables.table_of, tiles._plan):
        cached.cache_clear()
    monkeypatch.setenv("VLMQ_TUNED", str(tmp_path))
    yield tmp_path
    for cached in (tuned_tables.table_of, tiles._plan):
        cached.cache_clear()


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.arch)
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_every_plan_is_legal(bits, group, machine):
    for rows, columns in SHAPES:
        shape = geometry(bits, rows, columns, group)
        for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300, 511):
            plan = tiles.plan_for(m, shape, machine)
            assert why_not(plan, m, shape, machine) is None
            assert m > plan.tile.tokens // 2 or plan.tile.tokens <= 16  # no tile twice as large as the tokens
            assert group != -1 or not plan.tile.scaled


def test_parts_fill_the_gpu():
    """Small layers are divided until every multiprocessor has work, large ones hardly; the figures are the model's."""
    qkv, gate_up = (tiles.plan_for(1, geometry(4, rows), H200) for rows in (4608, 37888))
    assert tiles.output_tiles(1, geometry(4, 4608), qkv.tile) * qkv.splits >= H200.multiprocessors
    assert qkv.splits > gate_up.splits
    for m in (1, 64, 500):
        for rows, columns in SHAPES:
            shape = geometry(4, rows, columns)
            plan = tiles.plan_for(m, shape, H200)
            programs = tiles.output_tiles(m, shape, plan.tile)
            assert plan.splits == 1 or programs <= COUNTERS
            assert plan.splits == 1 or programs * plan.splits * plan.tile.rows * plan.tile.tokens <= PARTIALS


@pytest.mark.parametrize(
    ("plan", "machine", "message"),
    [
        (Plan(Tile(96, 8, 2, 2)), H200, "rows is 96; a tile has 64, 128 or 256"),
        (Plan(Tile(64, 4, 2, 2)), H200, "tokens is 4; a tile has a power of two from 8 on"),
        (Plan(Tile(64, 8, 2, 2)), Hardware("gfx942", 304, 64 << 10), "from 16 on"),
        (Plan(Tile(64, 24, 2, 2)), H200, "tokens is 24"),
        (Plan(Tile(64, 8, 3, 2)), H200, "3 warps"),
        (Plan(Tile(128, 256, 8, 4)), H200, "4 stages keep .* sm_90 has 232448"),
        (Plan(Tile(64, 8, 2, 2), 0), H200, "splits is 0; K has 14 spans"),
        (Plan(Tile(64, 8, 2, 2), 15), H200, "splits is 15; K has 14 spans"),
        (Plan(Tile(64, 8, 2, 2), 6), H200, "6 parts of 14 spans would leave one empty"),
        (Plan(Tile(128, 128, 8, 2), 14), H200, "do not fit into the workspace"),
    ],
)
def test_refused(plan, machine, message):
    assert (
        why_not(Plan(Tile(64, 8, 2, 2) if machine is H200 else Tile(64, 16, 2, 2), 7), 1, geometry(), machine) is None
    )
    assert message.split(" .* ")[-1] in why_not(plan, 128, geometry(), machine)


def test_batch_invariant():
    """One plan for all, and as many tokens at once as its parts leave room for."""
    shape = geometry(4, 3584, 18944)
    plan = tiles.plan_for(tiles.INVARIANT, shape, H200)
    step = tiles.tokens_at_once(plan, shape)
    assert plan.splits > 1 and step % plan.tile.tokens == 0
    assert why_not(plan, step, shape, H200) is None
    assert "workspace" in why_not(plan, step + 1, shape, H200)


@pytest.mark.parametrize("path", sorted(tuned_tables.TUNED.iterdir()), ids=lambda path: path.stem)
def test_tables(path):
    """Every file has every entry, says where it comes from, and claims no measurement that it does not hold."""
    table = json.loads(path.read_text())
    assert set(table) == {"origin", "dequantise_from", "tiles", "measured"}
    assert set(table["tiles"]) == set(map(str, BITS))
    assert all(list(map(int, row)) == list(BUCKETS) for row in table["tiles"].values())
    assert table["measured"] or "without a GPU" in table["origin"]


def test_measured_plans_come_first(tuned):
    table = json.loads((tuned_tables.TUNED / "sm_90.json").read_text())
    tile = {"rows": 128, "tokens": 8, "warps": 4, "stages": 3}
    table["measured"] = {tuned_tables.key_of(geometry(), 8): {"tile": tile, "splits": 7}}
    (tuned / "sm_90.json").write_text(json.dumps(table))
    assert tiles.plan_for(5, geometry(), H200) == Plan(Tile(**tile), 7)
    assert tiles.plan_for(9, geometry(), H200).tile.tokens == 16
    assert tiles.plan_for(5, geometry(3), H200).tile == Tile(64, 8, 2, 3)


def test_measured_plan_that_cannot_be(tuned):
    table = json.loads((tuned_tables.TUNED / "sm_90.json").read_text())
    tile = {"rows": 96, "tokens": 8, "warps": 4, "stages": 3}
    table["measured"] = {tuned_tables.key_of(geometry(), 8): {"tile": tile, "splits": 7}}
    (tuned / "sm_90.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="sm_90.json has no usable entry for 4 128 symmetric 3584x3584 8: rows is 96"):
        tiles.plan_for(5, geometry(), H200)


def test_the_table_of_an_unknown_gpu():
    """The newest of those with as much shared memory; never Hopper's, whose instructions nobody else has."""
    known = {
        arch: tuned_tables.path_of(Hardware(arch, 100, size << 10)).stem
        for arch, size in (
            ("sm_90", 227),
            ("sm_86", 99),
            ("sm_87", 163),
            ("sm_103", 227),
            ("sm_110", 227),
            ("sm_120", 99),
            ("gfx950", 160),
        )
    }
    assert known == {
        "sm_90": "sm_90",
        "sm_86": "sm_89",
        "sm_87": "sm_80",
        "sm_103": "sm_100",
        "sm_110": "sm_100",
        "sm_120": "sm_89",
        "gfx950": "gfx942",
    }


@pytest.mark.parametrize("damage", ["{", "{}", '{"tiles": {}}', '{"tiles": 1, "dequantise_from": 1}'])
def test_damaged_table(tuned, damage):
    (tuned / "sm_90.json").write_text(damage)
    with pytest.raises(ValueError, match="sm_90.json is no table of tiles"):
        tiles.plan_for(1, geometry(), H200)


def test_narrow_slices_have_fewer_threads():
    """A slice of 16 columns by 8 tokens has 4 bytes for 64 threads, and what has less is not copied asynchronously."""
    narrow = geometry(3, columns=3600)
    assert narrow.slice == 16
    assert tiles.plan_for(1, narrow, H200).tile == Tile(64, 8, 2, 3)
    assert tiles.plan_for(9, narrow, H200).tile == tiles.plan_for(9, geometry(3), H200).tile


def test_less_shared_memory_than_the_table_knows(tuned):
    """Stages first, then tokens, until it fits."""
    shutil.copy(tuned_tables.TUNED / "sm_90.json", tuned / "sm_86.json")
    small = Hardware("sm_86", 84, 99 << 10)
    for bits in BITS:
        for m in BUCKETS:
            assert why_not(tiles.plan_for(m, geometry(bits), small), m, geometry(bits), small) is None
