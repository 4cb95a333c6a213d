import pytest
import torch

from trilith.kernels._runtime.rows import as_rows, row_tile


def addressed(rows, which):
    """Every element, found as a kernel finds it."""
    x, strides = rows.tensors[which], rows.strides[which]
    m, n = x.numel() // x.shape[-1], x.shape[-1]
    outer = torch.arange(m) // rows.inner
    starts = outer * strides[0] + (torch.arange(m) - outer * rows.inner) * strides[1]
    offsets = starts[:, None] + torch.arange(n) * strides[2] + x.storage_offset()
    return torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0)[offsets]


LAYOUTS = {
    "contiguous": (lambda: torch.randn(4, 3, 5), True),
    "one-row": (lambda: torch.randn(5), True),
    "padded-rows": (lambda: torch.randn(4, 3, 8)[..., :5], True),
    "some-rows": (lambda: torch.randn(8, 5)[::2], True),
    "transposed": (lambda: torch.randn(3, 4, 5).transpose(0, 1), False),
    "columns-first": (lambda: torch.randn(5, 4, 3).permute(1, 2, 0), True),
    "expanded": (lambda: torch.randn(5).expand(4, 3, 5), True),
    "expanded-outside": (lambda: torch.randn(3, 5).expand(4, 3, 5), False),
    "size-one": (lambda: torch.randn(4, 5).as_strided((4, 1, 5), (5, 77, 1)), True),
    "size-one-outside": (lambda: torch.randn(8, 5).as_strided((1, 4, 5), (77, 10, 1)), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_addresses_every_row_without_a_copy(layout):
    make, one_stride = LAYOUTS[layout]
    x = make()
    rows = as_rows(x)
    assert torch.equal(addressed(rows, 0), x.reshape(-1, x.shape[-1]))
    assert rows.tensors[0].data_ptr() == x.data_ptr()
    assert (rows.inner == 1) == one_stride


def test_tensors_of_one_call_share_the_numbering_of_rows():
    x, dy = torch.randn(3, 4, 5).transpose(0, 1), torch.randn(4, 3, 5)
    rows = as_rows(x, dy)
    assert torch.equal(addressed(rows, 0), x.reshape(12, 5))
    assert torch.equal(addressed(rows, 1), dy.reshape(12, 5))


def test_copies_where_more_than_two_strides_lead():
    x = torch.randn(2, 3, 4, 5).permute(2, 0, 1, 3).transpose(0, 1)
    rows = as_rows(x)
    assert torch.equal(addressed(rows, 0), x.reshape(-1, 5))


@pytest.mark.parametrize("n", [1, 2, 31, 256, 1000, 1024, 4096, 8192, 16384])
def test_tiles_hold_the_row_and_allow_wide_loads(n):
    tile = row_tile(n, per_thread=16, max_warps=16)
    assert tile.block_n >= n
    assert tile.block_m * tile.block_n >= 256 * tile.num_warps
    assert tile.num_warps & (tile.num_warps - 1) == 0
