"""Sums in another order: the same numbers within what the order of FP32 sums may change, and really another order.

Where every sum is exact, no bit may change: that tells apart another order from other numbers. On random data of the
sizes of a release some bit has to change, and no result by more than `assert_same_numbers` allows.
"""

from dataclasses import replace

import pytest
import torch

from tests.model.references import named, relative_error, streamed
from v4quant.config import V4Config
from v4quant.kernels.indexer_scores import visible_entries
from v4quant.kernels.sparse_attention import Picked
from v4quant.model.arithmetic import Products
from v4quant.model.operations import Operations
from v4quant.model.release import Release
from v4quant.model.reordered import Reordered
from v4quant.model.streaming import run_block
from v4quant.model.weights import HyperWeights
from v4quant.testing.releases import synth_config

CONFIG = V4Config.from_json(synth_config("flash")[0], "flash")
BOTH = RELEASE, REORDERED = Release(CONFIG), Reordered(CONFIG)
BF16_STEP = 2.0**-7  # from 1 to the next number


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(17)


def normal(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=random)


def bf16(random: torch.Generator, *shape: int) -> torch.Tensor:
    return normal(random, *shape).to(torch.bfloat16)


def integers(random: torch.Generator, most: int, *shape: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=random).float()


def assert_same_numbers(found: torch.Tensor, plain: torch.Tensor, terms: torch.Tensor, count: int) -> None:
    """Require what two orders of an FP32 sum may give.

    Args:
        terms: sum of the magnitudes of the summed terms, in the shape of the results or one that broadcasts.
        count: terms of a sum. Each of so many additions is off by 2^-24 of a partial sum at most, in either direction:
            together by about the square root of their number, of which four times are allowed for each order.
    """
    assert found.dtype == plain.dtype and found.shape == plain.shape
    bound = 8 * count**0.5 * 2**-24 * terms.float()
    if plain.dtype == torch.bfloat16:
        bound = bound + BF16_STEP * plain.float().abs()
    far = (found.float() - plain.float()).abs() - bound
    assert float(far.max()) <= 0, f"{int((far > 0).sum())} too far, by {float(far.max())}"


def assert_another_order(found: torch.Tensor, plain: torch.Tensor, terms: torch.Tensor, count: int) -> None:
    """The same numbers, and not the same bits."""
    assert_same_numbers(found, plain, terms, count)
    assert not torch.equal(found, plain), "every bit is equal: the order is the same"


@pytest.mark.parametrize(("rows", "tokens"), [(300, 20), (1, 1), (3, 200)])
def test_plain_linear(rows: int, tokens: int, random: torch.Generator) -> None:
    """More rows than are turned round at a time, and one alone."""
    exact = [integers(random, 4, *shape).to(torch.bfloat16) for shape in ((tokens, 4096), (rows, 4096))]
    assert torch.equal(REORDERED.plain_linear(*exact), RELEASE.plain_linear(*exact))
    x, weight = bf16(random, tokens, 4096), bf16(random, rows, 4096)
    found, plain = REORDERED.plain_linear(x, weight), RELEASE.plain_linear(x, weight)
    assert_same_numbers(found, plain, x.float().abs() @ weight.float().abs().T, 4096)
    if rows * tokens > 1000:
        assert not torch.equal(found, plain)


@pytest.mark.parametrize("rows", [1, 256, 700])
def test_wide_linear(rows: int, random: torch.Generator) -> None:
    exact = [integers(random, 8, *shape) for shape in ((20, 4096), (rows, 4096))]
    assert torch.equal(REORDERED.wide_linear(*exact), RELEASE.wide_linear(*exact))
    x, weight = normal(random, 20, 4096), normal(random, rows, 4096)
    terms = x.abs() @ weight.abs().T
    assert_another_order(REORDERED.wide_linear(x, weight), RELEASE.wide_linear(x, weight), terms, 4096)


def test_grouped_linear(random: torch.Generator) -> None:
    exact = [integers(random, 4, *shape).to(torch.bfloat16) for shape in ((5, 3, 4096), (3, 7, 4096))]
    assert torch.equal(REORDERED.grouped_linear(*exact), RELEASE.grouped_linear(*exact))
    x, weight = bf16(random, 40, 8, 4096), bf16(random, 8, 64, 4096)
    terms = torch.einsum("tgk,gnk->tgn", x.float().abs(), weight.float().abs())
    assert_another_order(REORDERED.grouped_linear(x, weight), RELEASE.grouped_linear(x, weight), terms, 4096)


def test_rms_norm(random: torch.Generator) -> None:
    weight = bf16(random, 4096)
    exact = integers(random, 9, 50, 4096).to(torch.bfloat16)
    assert torch.equal(REORDERED.rms_norm(exact, weight), RELEASE.rms_norm(exact, weight))
    x = bf16(random, 500, 4096)
    found, plain = REORDERED.rms_norm(x, weight), RELEASE.rms_norm(x, weight)
    # The mean of squares, all of one sign, scales everything.
    assert_another_order(found, plain, plain.abs(), 4096)
    assert found.is_contiguous()


def test_query_norm(random: torch.Generator) -> None:
    """In place; the mean is rounded to BF16, so that another order moves a head in some ten thousands, if any."""
    exact = integers(random, 9, 6, 64, 512).to(torch.bfloat16)
    assert torch.equal(REORDERED.query_norm_(exact.clone()), RELEASE.query_norm_(exact.clone()))
    q = bf16(random, 100, 64, 512)
    plain, own = RELEASE.query_norm_(q.clone()), q.clone()
    found = REORDERED.query_norm_(own)
    assert found is own
    heads = (found != plain).any(2)
    assert int(heads.sum()) < 10
    apart = (found[heads].float() - plain[heads].float()).abs()
    assert bool((apart <= 2 * BF16_STEP * plain[heads].float().abs()).all())


def test_query_norm_is_summed_in_another_order() -> None:
    """A sum of squares of 2^24 + 2^16 + 15, where 2^24 + 2^16 is a tie of BF16: behind 2^24 ones are lost."""
    q = torch.zeros(1, 64, 512)
    q[:, :, 0], q[:, :, 1], q[:, :, 32::32] = 4096, 256, 1
    plain, found = (ops.query_norm_(q.to(torch.bfloat16)) for ops in (RELEASE, REORDERED))
    assert bool((plain != found).any(2).all())


def test_pick(random: torch.Generator) -> None:
    """All entries in order: where sums are exact the same, else as good as the same."""
    visible = visible_entries(torch.arange(300, 400), 4)
    q, keys = integers(random, 6, 100, 64, 128).to(torch.bfloat16), integers(random, 6, 100, 128).to(torch.bfloat16)
    powers = 2.0 ** integers(random, 3, 100, 64).to(torch.bfloat16)
    found, plain = (ops.pick(q, keys, powers, visible, 100) for ops in (REORDERED, RELEASE))
    assert torch.equal(found, plain)
    weights = bf16(random, 100, 64)
    found, plain = (ops.pick(q, keys, weights, visible, 100) for ops in (REORDERED, RELEASE))
    products = (q.double() @ keys.double().T).to(torch.bfloat16).relu() * weights[:, :, None]
    best, picked = products.double().sum(1), plain >= 0
    assert torch.equal(picked, found >= 0)
    first, second = (best.gather(1, own.clamp(min=0).long()) for own in (found, plain))
    # The sum of the heads is rounded to BF16.
    assert bool(((first - second).abs() <= BF16_STEP * second.abs())[picked].all())


def test_pick_sums_heads_in_another_order() -> None:
    """Entry 0 has 2^30, -2^30 and 62 times 1: about 31 or 0, by where the large ones stand; entry 1 has 16."""
    q, keys = torch.zeros(1, 64, 128), torch.eye(2, 128).to(torch.bfloat16)
    q[0, :, 0], q[0, 2, 1] = 1, 16
    weights = torch.tensor([[2.0**30, -(2.0**30), *[1.0] * 62]]).to(torch.bfloat16)
    picks = [ops.pick(q.to(torch.bfloat16), keys, weights, torch.tensor([2], dtype=torch.int32), 1) for ops in BOTH]
    assert [pick.item() for pick in picks] == [0, 1]


def lists(random: torch.Generator, entries: torch.Tensor, *widths: int) -> list[Picked]:
    """For seven queries one list of each width over the same entries, some of none."""
    found = []
    for width in widths:
        indices = torch.randint(len(entries), (7, width), generator=random, dtype=torch.int32)
        indices[torch.rand(indices.shape, generator=random) < 0.2] = -1
        indices[3] = -1  # a query that looks at nothing in this list
        found.append(Picked(entries, indices))
    return found


WIDTHS = [(128,), (1,), (63,), (64,), (65,), (200,), (128, 512), (128, 7), (32, 80), (5, 3)]
every_width = pytest.mark.parametrize("widths", WIDTHS, ids=str)


@every_width
def test_attend_where_sums_are_exact(widths: tuple[int, ...], random: torch.Generator) -> None:
    """Scores are all 0, so that every key counts the same: the sums are of small integers."""
    entries = integers(random, 8, 600, 512).to(torch.bfloat16)
    picked = lists(random, entries, *widths)
    sink = torch.arange(6.0)  # of each head another
    q = torch.zeros(7, 6, 512, dtype=torch.bfloat16)
    assert torch.equal(REORDERED.attend(q, sink, picked), RELEASE.attend(q, sink, picked))


@every_width
def test_attend(widths: tuple[int, ...], random: torch.Generator) -> None:
    """A weight near the middle of two BF16 numbers may become the other: 2^-8 of that key's part in the result."""
    entries, q, sink = bf16(random, 600, 512), bf16(random, 7, 64, 512), normal(random, 64)
    picked = lists(random, entries, *widths)
    found, plain = REORDERED.attend(q, sink, picked), RELEASE.attend(q, sink, picked)
    assert found.is_contiguous()
    magnitudes = [Picked(keys.entries.abs(), keys.indices) for keys in picked]
    most = max(float(keys.entries.float().abs().max()) for keys in magnitudes)
    assert float((found.float() - plain.float()).abs().max()) <= BF16_STEP / 2 * most + BF16_STEP * most / 4
    assert relative_error(found, plain) < 1e-3
    assert not torch.equal(found, plain) or sum(widths) == 1
    assert torch.equal(found[3], plain[3])


def test_attend_takes_the_keys_of_a_block_backwards() -> None:
    """Values 2^30, -2^30 and 62 times 1, all of one weight: behind 2^30 ones are lost."""
    values = torch.tensor([2.0**30, -(2.0**30), *[1.0] * 62])
    picked = [Picked(values[:, None].repeat(1, 128).to(torch.bfloat16), torch.arange(64, dtype=torch.int32)[None])]
    q, sink = torch.zeros(1, 64, 128, dtype=torch.bfloat16), torch.full((64,), -torch.inf)
    plain, found = (ops.attend(q, sink, picked) for ops in BOTH)
    assert bool((plain != found).all())


def test_attend_keeps_the_blocks_in_order(random: torch.Generator) -> None:
    """The largest score of all is in the last block: the weights of the others were rounded before it was seen.

    With the blocks backwards they would be rounded by it, which moves what they sum to by up to 2^-9.
    """
    entries = torch.eye(128).repeat(2, 1)[: 64 + 64].to(torch.bfloat16)
    q = torch.zeros(1, 64, 128)
    q[0, :, :64] = torch.rand(64, generator=random) * 2
    q[0, :, 127] = 37.3
    picked = [Picked(entries, torch.arange(128, dtype=torch.int32)[None])]
    sink = torch.full((64,), -torch.inf)
    plain, found = (ops.attend(q.to(torch.bfloat16), sink, picked) for ops in BOTH)
    assert torch.equal(found, plain), "each dim has one key, so that no sum has another order"


def test_attend_looks_at_the_same_dims_heads_and_keys(random: torch.Generator) -> None:
    """Scores so sharp that each query and head copies the one key that it points at."""
    entries = torch.eye(200, 256).to(torch.bfloat16)
    entries[:, 200:] = integers(random, 4, 200, 56).to(torch.bfloat16)
    wanted = torch.randint(200, (9, 3), generator=random)
    q = 4096 * torch.nn.functional.one_hot(wanted, 256).to(torch.bfloat16)
    picked = [Picked(entries, torch.arange(first, first + 100, dtype=torch.int32).expand(9, 100)) for first in (0, 100)]
    found = REORDERED.attend(q, torch.full((3,), -torch.inf), picked)
    assert torch.equal(found, entries[wanted])


def hyper(random: torch.Generator, rows: int, scales: int) -> HyperWeights:
    return HyperWeights(normal(random, rows, 4 * 4096) / 128, normal(random, rows), normal(random, scales))


def test_mix_and_collapse(random: torch.Generator) -> None:
    weights, head = hyper(random, 24, 3), hyper(random, 4, 1)
    exact = integers(random, 4, 9, 4, 4096).to(torch.bfloat16)
    whole = [replace(own, fn=integers(random, 4, *own.fn.shape)) for own in (weights, head)]
    for one, other in zip(REORDERED.mix(exact, whole[0]), RELEASE.mix(exact, whole[0]), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(REORDERED.collapse(exact, whole[1]), RELEASE.collapse(exact, whole[1]))
    x = bf16(random, 130, 4, 4096)
    # A logit of the mix is off by some 2^-24 sqrt(16,384); sigmoid and Sinkhorn do not make it larger.
    for (found, plain), scale in zip(
        zip(REORDERED.mix(x, weights), RELEASE.mix(x, weights), strict=True), (4.0, 2.0, 1.0), strict=True
    ):
        assert_another_order(found, plain, torch.tensor(4 * scale), 4 * 4096)
        assert found.is_contiguous()
    found, plain = REORDERED.collapse(x, head), RELEASE.collapse(x, head)
    assert_another_order(found, plain, torch.tensor(16.0), 4 * 4096)


def test_combine(random: torch.Generator) -> None:
    exact = (
        integers(random, 9, 9, 4096).to(torch.bfloat16),
        integers(random, 9, 9, 4, 4096).to(torch.bfloat16),
        integers(random, 9, 9, 4),
        integers(random, 9, 9, 4, 4),
    )
    assert torch.equal(REORDERED.combine(*exact), RELEASE.combine(*exact))
    f, x, post, comb = (
        bf16(random, 100, 4096),
        bf16(random, 100, 4, 4096),
        normal(random, 100, 4),
        normal(random, 100, 4, 4),
    )
    terms = post.abs()[:, :, None] * f.float().abs()[:, None]
    terms = terms + torch.einsum("tjk,tjd->tkd", comb.abs(), x.float().abs())
    assert_another_order(REORDERED.combine(f, x, post, comb), RELEASE.combine(f, x, post, comb), terms, 5)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_block(layer: int) -> None:
    """Window, CSA and HCA, with pages, prefill and decode steps: within some percent, as noise is, and not equal."""
    reference = named("tiny-flash")
    with torch.inference_mode(), streamed(reference.folder, Products.DECODED) as model:
        schedule = model.schedule([reference.ids], [reference.prefill - 8, 16])
        streams = reference.input_of(layer, model)
        block = next(model.blocks(layer, layer + 1))
        ops: list[Operations] = [model.ops, Reordered(model.config)]
        plain, found = (run_block(block.with_operations(own), streams, schedule) for own in ops)
    assert not torch.equal(found.streams, plain.streams)
    assert relative_error(found.streams, plain.streams) < 0.02
    assert float((found.router_indices == plain.router_indices).double().mean()) > 0.98
    if plain.indexer_topk is not None and found.indexer_topk is not None:
        assert float((found.indexer_topk == plain.indexer_topk).double().mean()) > 0.9
