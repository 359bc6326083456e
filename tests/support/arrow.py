"""Strategies of hypothesis for columns of any Arrow type."""

import datetime
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
EPOCH = datetime.datetime(1970, 1, 1)
LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *((kind, st.integers(-128, 127)) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *((kind, st.integers(0, 255)) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    (pa.float16(), st.floats(width=16)),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    (pa.decimal128(9, 2), st.decimals(-999, 999, places=2)),
    (pa.decimal256(40, 2), st.decimals(-999, 999, places=2)),
    *((kind, TEXTS) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, st.binary(max_size=4)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.date32(), st.dates()),
    (pa.timestamp("us"), st.datetimes(EPOCH, EPOCH.replace(year=2200))),
    (pa.timestamp("us", "UTC"), st.datetimes(EPOCH, EPOCH.replace(year=2200))),
    (pa.time64("us"), st.times()),
    (pa.duration("us"), st.timedeltas(datetime.timedelta(0), datetime.timedelta(9))),
]


def _lists(child: tuple[Any, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    kind, values = child
    return st.sampled_from(
        [
            *((make(kind), st.lists(values, max_size=3)) for make in (pa.list_, pa.large_list, pa.list_view)),
            (pa.list_(kind, 2), st.lists(values, min_size=2, max_size=2)),
            (pa.map_(pa.string(), kind), st.dictionaries(TEXTS, values, max_size=2).map(lambda pairs: list(pairs.items()))),
            (pa.struct([("bytes", kind), ("b", pa.int8())]), st.fixed_dictionaries({"bytes": values, "b": st.none()})),
        ]
    )


NESTED = st.recursive(
    st.sampled_from([(kind, st.none() | values) for kind, values in LEAVES]),
    lambda children: children.flatmap(_lists).map(lambda child: (child[0], st.none() | child[1])),
    max_leaves=3,
)
# pyarrow makes invalid arrays of dictionaries within null structures.
ANY_KIND = NESTED | st.just((pa.dictionary(pa.int8(), pa.string()), st.none() | TEXTS))


@st.composite
def columns(draw: st.DrawFn, rows: int = 8) -> pa.Array:
    """A column of any Arrow type, nested types included, with any values and nulls."""
    kind, values = draw(ANY_KIND)
    return pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), kind)
