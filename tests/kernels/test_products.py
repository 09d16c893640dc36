import pytest
import torch

from tailora.core.device import cpu_flags
from tailora.kernels import products
from tailora.kernels.products import add_product, product


def of(rows: int, k: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, k), (k, columns), (rows, columns))
    x, matrix, add = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, matrix, add


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 200, 255, 256])
def test_parts_and_the_whole_give_the_same_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_leaves_core_idle", lambda _: True)
    x, matrix, add = of(rows, 7, 128)
    out = torch.empty_like(add)
    assert product(x, matrix, out=out) is out
    for found, expected in (
        (product(x, matrix), x @ matrix),
        (out, x @ matrix),
        (product(x, matrix, add), add + x @ matrix),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    target = add.clone()
    add_product(target, x, matrix)
    torch.testing.assert_close(target, add + x @ matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (127, 128, []),
        (128, 128, [64, 64]),
        (200, 128, [128, 72]),
        (255, 128, [128, 127]),
        (256, 128, []),
        (1500, 1024, []),
        (20, 16, []),
        (1, 1, []),
    ],
)
def test_only_products_that_keep_one_thread_busy_are_cut(
    rows: int, columns: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_leaves_core_idle", lambda _: True)
    x, matrix = torch.empty(rows, 3), torch.empty(3, columns)
    assert [part.stop - part.start for part in products._parts(x, matrix)] == expected


def test_other_dtypes_and_thread_counts_stay_whole() -> None:
    threads = torch.get_num_threads()
    half, matrix = torch.empty(128, 3, dtype=torch.bfloat16), torch.empty(3, 128, dtype=torch.bfloat16)
    try:
        torch.set_num_threads(2)
        assert not products._parts(half.float(), matrix.float())
        assert bool(products._parts(half, matrix)) == ("amx_bf16" in cpu_flags())
        torch.set_num_threads(1)
        assert not products._parts(half, matrix)
    finally:
        torch.set_num_threads(threads)
