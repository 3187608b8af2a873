"""Index maps between the logical and the physical sequence."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.engine.layout import Layout, compact, expansion, take
from foveate.engine.mask_translation import translate_mask
from foveate.engine.slots import Slots


@st.composite
def cuts(draw):
    """Which columns of each row are alive, at least one in each."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    rows = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(batch)]
    for row in rows:
        row[draw(st.integers(0, length - 1))] = True
    return torch.tensor(rows)


def cut(alive):
    layout = Layout.full(*alive.shape, torch.device("cpu"))
    return compact(layout, alive, alive.sum(1).tolist())


@given(cuts())
def test_compaction_keeps_order_and_pads_on_the_left(alive):
    layout, source = cut(alive)
    for row, columns in enumerate(layout.index.tolist()):
        kept = alive[row].nonzero()[:, 0].tolist()
        assert columns == [-1] * (len(columns) - len(kept)) + kept
    assert layout.ragged == bool((layout.index < 0).any())
    x = torch.arange(alive.numel()).view(*alive.shape, 1)
    taken = take(x, source)[..., 0] % alive.shape[1]
    real = layout.index >= 0
    assert torch.equal(taken[real], layout.index[real])


@given(cuts())
def test_expansion_gives_the_nearest_kept_column_before(alive):
    layout, _ = cut(alive)
    columns = expansion(layout, alive.shape[1])
    for row in range(len(alive)):
        kept = alive[row].nonzero()[:, 0].tolist()
        for position in range(alive.shape[1]):
            before = [k for k in kept if k <= position]
            wanted = before[-1] if before else kept[0]
            assert layout.index[row, columns[row, position]] == wanted


@given(cuts(), st.integers(0, 3))
def test_masks_follow_both_maps(alive, past):
    """Every entry of the physical mask is the logical one of its query and key."""
    layout, _ = cut(alive)
    batch, length = alive.shape
    slots = Slots.full(batch, past, torch.device("cpu")).extend(layout, length, None)
    logical = torch.rand(batch, 1, length, past + length) > 0.4
    physical = translate_mask(logical, layout, slots, length, two_d=False)
    additive = translate_mask(logical.float().log(), layout, slots, length, two_d=False)
    for row in range(batch):
        for i, query in enumerate(layout.index[row].tolist()):
            for j, key in enumerate(slots.index[row].tolist()):
                if query >= 0:
                    wanted = key >= 0 and bool(logical[row, 0, query, key])
                    assert bool(physical[row, 0, i, j]) == wanted
                    assert bool(additive[row, 0, i, j] > -1e30) == wanted
    padding = physical[:, 0][layout.index < 0]
    assert padding.all(), "a padding query must see something, or kernels may give NaN"


@given(cuts())
def test_no_mask_means_causal_by_position(alive):
    layout, _ = cut(alive)
    batch, length = alive.shape
    slots = Slots.full(batch, 0, torch.device("cpu")).extend(layout, length, None)
    physical = translate_mask(None, layout, slots, length, two_d=False)
    if not layout.ragged:
        assert physical is None
        return
    for row in range(batch):
        for i, query in enumerate(layout.index[row].tolist()):
            seen = physical[row, 0, i if physical.shape[2] > 1 else 0].tolist()
            if query >= 0:
                assert seen == [0 <= key <= query for key in slots.index[row].tolist()]
            elif physical.shape[2] > 1:
                assert all(seen), "a padding query must see something, or kernels may give NaN"


@given(cuts())
def test_no_mask_of_a_kernel_that_looks_both_ways_means_all_that_is_there(alive):
    layout, _ = cut(alive)
    batch, length = alive.shape
    slots = Slots.full(batch, 0, torch.device("cpu")).extend(layout, length, None)
    physical = translate_mask(None, layout, slots, length, two_d=False, causal=False)
    if not layout.ragged:
        assert physical is None
        return
    there = (slots.index >= 0)[:, None, None]
    assert torch.equal(physical, there)
    assert torch.equal(
        translate_mask(None, layout, slots, length, two_d=True, causal=False), there[:, 0, 0]
    )


def test_unfilled_slots_of_a_static_cache_are_never_seen():
    one = Layout.full(2, 1, torch.device("cpu"))
    slots = Slots.full(2, 3, torch.device("cpu")).extend(one, 1, None)
    mask = translate_mask(None, one, slots, 1, two_d=False, width=6)
    assert mask[:, 0, 0].tolist() == [[True] * 4 + [False] * 2] * 2
    mask = translate_mask(None, one, slots, 1, two_d=False, width=6, causal=False)
    assert mask[:, 0, 0].tolist() == [[True] * 4 + [False] * 2] * 2


@given(cuts(), st.integers(1, 4))
def test_cropping_undoes_extending(alive, more):
    layout, _ = cut(alive)
    batch, length = alive.shape
    slots = Slots.full(batch, 2, torch.device("cpu")).extend(layout, length, None)
    longer = slots.extend(Layout.full(batch, more, torch.device("cpu")), more, None)
    assert longer.length == slots.length + more
    assert longer.tail == slots.tail + more
    back = longer.crop(more)
    assert torch.equal(back.index, slots.index)
    assert (back.length, back.tail) == (slots.length, slots.tail)


def test_the_tail_ends_where_something_was_removed():
    layout, _ = cut(torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]]).bool())
    slots = Slots.full(2, 0, torch.device("cpu")).extend(layout, 5, None)
    assert slots.tail == 2


@given(cuts(), st.integers(1, 4), st.data())
def test_cropping_reaches_as_far_as_all_rows_are_whole(alive, more, data):
    """Also where the host was not told how far that is."""
    layout, _ = cut(alive)
    batch, length = alive.shape
    untold = Slots.full(batch, 0, torch.device("cpu")).extend(replace(layout, tail=0), length, None)
    whole = int(alive.all(0).flip(0).long().cumprod(0).sum())
    assert (untold.tail, untold.whole) == (length if alive.all() else 0, whole)
    longer = untold.extend(Layout.full(batch, more, torch.device("cpu")), more, None)
    assert longer.whole == whole + more
    count = data.draw(st.integers(0, whole + more))
    back = longer.crop(count)
    assert torch.equal(back.index, longer.index[:, : longer.count - count])
    assert (back.length, back.whole) == (longer.length - count, longer.whole - count)


def test_layers_that_share_slots_go_on_sharing():
    slots = Slots.full(2, 4, torch.device("cpu"))
    order, layout = torch.tensor([1, 0]), Layout.full(2, 1, torch.device("cpu"))
    assert slots.extend(layout, 1, None) is slots.extend(layout, 1, None)
    assert slots.crop(2) is slots.crop(2)
    reordered = slots.rows(order, lambda x: x[order])
    assert slots.rows(order, lambda x: x[order]) is reordered
    assert slots.rows(order.clone(), lambda x: x[order]) is not reordered


@given(cuts(), cuts(), st.integers(0, 3))
def test_slots_forget_positions(alive, kept, past):
    """What is left is in order and padded on the left, also where slots were ragged before."""
    layout, _ = cut(alive)
    batch, length = alive.shape
    slots = Slots.full(batch, past, torch.device("cpu")).extend(layout, length, None)
    gone = torch.zeros(batch, past + length, dtype=torch.bool)
    gone[: len(kept), past : past + kept.shape[1]] = ~kept[:batch, :length]
    left, source = slots.without(gone)
    for row, index in enumerate(left.index.tolist()):
        want = [i for i in slots.index[row].tolist() if i >= 0 and not gone[row, i]]
        assert index == [-1] * (len(index) - len(want)) + want
        assert slots.index[row, source[row]].tolist()[len(index) - len(want) :] == want
    assert left.ragged == bool((left.index < 0).any())
    assert left.length == slots.length
    end = left.index[:, left.index.shape[1] - left.tail :]
    assert (end == torch.arange(slots.length - left.tail, slots.length)).all()
