"""The pretend accelerator behaves as a card does where the other tests rely on it."""

import on_device
import pytest
import torch
from pretend_accelerator import counted, no_synchronisation
from torch.nn import functional as F

pytestmark = pytest.mark.device


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


def test_the_files_whose_tests_run_here_too_exist() -> None:
    paths = [
        on_device.TESTS / room / f"test_{name}.py" for room, names in on_device.FILES.items() for name in names.split()
    ]
    assert not [path for path in paths if not path.exists()]
