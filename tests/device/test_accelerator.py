"""The pretend accelerator behaves as a card does where the other tests rely on it."""

import pytest
import torch
from pretend_accelerator import counted, memory_limit, no_float64, no_synchronisation
from torch.nn import functional as F

pytestmark = pytest.mark.device


def test_tensors_of_two_devices_do_not_mix(device: torch.device) -> None:
    a = torch.ones(2, 2, device=device)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        a @ torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        a + torch.ones(2, 2)
    assert (a + torch.tensor(1.0)).sum() == 8  # a number in a tensor is passed along with the kernel


def test_kernels_are_counted_and_views_are_none(device: torch.device) -> None:
    a = torch.ones(4, 6, device=device)
    with counted() as counts:
        _ = a.T.reshape(4, 6)[1:3, :4].view(2, 2, 2).transpose(0, 1).expand(2, 2, 2)
    assert counts.kernels == {"aten::copy_": 1}  # reshape
    with counted() as counts:
        torch.addmm(a[:, :4], a, a.T)
    assert counts.kernels == {"aten::addmm": 1}
    assert not counts.copies
    assert not counts.synchronisations


WAITING = {
    "item": lambda a: a.sum().item(),
    "copy to the host": lambda a: a.cpu(),
    "copy to the device": lambda a: torch.ones(2).to(a.device),
    "copy to the device from memory that is not pinned": lambda a: torch.ones(2).to(a.device, non_blocking=True),
    "aten::nonzero": lambda a: a[a > 0],
    "aten::index_put_ with a mask": lambda a: a.index_put_((a > 0,), a * 2),
    "aten::index_put_ with indices that lie on the host": lambda a: a.index_put_((torch.tensor([0, 1]),), a * 2),
    "aten::repeat_interleave": lambda a: torch.repeat_interleave(torch.ones_like(a, dtype=torch.int64)),
    "device": lambda a: torch.get_device_module(a.device).synchronize(),
}


@pytest.mark.parametrize("cause", WAITING)
def test_the_host_waits(device: torch.device, cause: str) -> None:
    a = torch.tensor([1.0, 2.0], device=device)
    with counted() as counts:
        WAITING[cause](a)
    assert counts.synchronisations == {cause: 1}
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchronizing"):
        WAITING[cause](a)


def test_the_host_does_not_wait(device: torch.device) -> None:
    a, indices = torch.tensor([1.0, 2.0], device=device), torch.tensor([1, 0], device=device)
    pinned = torch.ones(2).pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    assert not torch.ones(2).is_pinned()
    with no_synchronisation():
        pinned.to(device, non_blocking=True)
        a[a > 1] = 3.0
        assert a[indices].shape == (2,)
        torch.repeat_interleave(a, indices, output_size=1)
        F.cross_entropy(torch.ones(2, 3, device=device), indices)


def test_a_copy_that_does_not_block_has_its_values_after_an_event(device: torch.device) -> None:
    a = torch.tensor([1.0, 2.0], device=device)
    event = torch.Event(device)
    read = a.to("cpu", non_blocking=True)
    event.record()
    assert read.isnan().all()  # too early
    event.synchronize()
    assert read.tolist() == [1.0, 2.0]


def test_random_numbers_have_a_state(device: torch.device) -> None:
    module = torch.get_device_module(device)
    state = module.get_rng_state()
    first = torch.randn(3, device=device)
    module.set_rng_state(state)
    assert torch.equal(torch.randn(3, device=device), first)
    generator = torch.Generator(device).manual_seed(1)
    own = torch.rand(3, device=device, generator=generator)
    assert torch.equal(torch.rand(3, device=device, generator=generator.manual_seed(1)), own)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=device, generator=torch.Generator())
    with torch.random.fork_rng([0], device_type=device.type):
        torch.manual_seed(5)
        inside = torch.randn(3, device=device)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(3, device=device), inside)


def test_memory_is_counted_and_limited(device: torch.device) -> None:
    module = torch.get_device_module(device)
    before = module.memory_allocated()
    module.reset_peak_memory_stats()
    a = torch.zeros(1000, device=device)
    assert module.memory_allocated() == before + 4000
    del a
    assert module.memory_allocated() == before
    assert module.max_memory_allocated() == before + 4000
    free, total = module.mem_get_info()
    assert free == total - before
    with memory_limit(before + 100), pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1000, device=device)


def test_float64_can_be_missing(device: torch.device) -> None:
    a = torch.ones(2, device=device)
    assert a.double().dtype == torch.float64
    with no_float64():
        for make in (
            a.double,
            lambda: torch.zeros(2, dtype=torch.float64, device=device),
            lambda: a.sum(dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()
        assert (a * 2.5).dtype == torch.float32


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_is_one_kernel_in_each_direction(device: torch.device, heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, heads, 5, 8), *torch.randn(2, 1, 2, 5, 8)
    here = [x.to(device).requires_grad_() for x in (q, k, v)]
    there = [x.requires_grad_() for x in (q, k, v)]
    with counted() as counts:
        output = F.scaled_dot_product_attention(*here, is_causal=True, enable_gqa=heads > 2)
        output.backward(torch.ones_like(output))
    assert counts.kernels["aten::scaled_dot_product_attention"] == 1
    assert counts.kernels["aten::scaled_dot_product_attention_backward"] == 1
    expected = F.scaled_dot_product_attention(*there, is_causal=True, enable_gqa=heads > 2)
    expected.sum().backward()
    torch.testing.assert_close(output.cpu(), expected)
    for own, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(own.grad.cpu(), theirs.grad)


def test_autocast_computes_products_in_16_bits(device: torch.device) -> None:
    a = torch.ones(2, 2, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert (a @ a).softmax(-1).dtype == torch.float32


def test_convolutions_have_gradients(device: torch.device) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    layer(x).sum().backward()
    expected = layer.weight.grad
    layer.weight.grad = None
    layer.to(device)(x.to(device)).sum().backward()
    torch.testing.assert_close(layer.weight.grad.cpu(), expected)
