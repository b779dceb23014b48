"""The device hx, step by step. 3: views share memory, in inference mode and out of it, and come from anywhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch


def test_views_share_memory_and_know_their_base() -> None:
    x = torch.arange(24.0, device="hx").reshape(2, 3, 4)
    views = [x[1], x[:, ::2], x.transpose(0, 2), x.permute(2, 0, 1), x.view(6, 4), x.unfold(2, 2, 1), x.expand(2, 3, 4)]
    views += [*x.unbind(0), *x.split(2, 1), x.diagonal(), x.view(torch.int32), x.squeeze(), x.flatten(), x.detach()]
    for view in views:
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert view.device == x.device
    x[1].zero_()
    assert x.sum().item() == sum(range(12))
    assert torch.view_as_complex(torch.ones(3, 2, device="hx")).real.tolist() == [1, 1, 1]


@pytest.mark.parametrize("inference", [False, True])
def test_views_of_normal_tensors_can_be_made_and_changed_in_any_mode(inference: bool) -> None:
    x = torch.zeros(4, 4, device="hx")
    with torch.inference_mode(inference):
        x.view(16)[3] = 1
        x.view(torch.int32)
        x[2:].add_(1)
        kernels = torch.view_as_complex(x.view(8, 2)).unfold(0, 2, 2)  # made by kernels, not by as_strided
        assert not kernels.is_inference()
        fresh = torch.ones(3, device="hx")
        fresh[1:].mul_(2)
        assert fresh.tolist() == [1, 2, 2]
    assert x.sum().item() == 9
    made = torch.view_as_complex(x.view(8, 2)).unfold(0, 2, 2)
    made.mul_(2)
    assert x.sum().item() == 18
    assert not made.is_inference()


def test_a_changed_view_is_seen_by_autograd() -> None:
    x = torch.ones(4, device="hx", requires_grad=True)
    y = x * 1
    version = y._version
    y[:2].mul_(3)
    assert y._version == version + 1
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3, 1, 1]


def test_copies_pickles_and_deep_copies_stay_on_their_chip() -> None:
    x = torch.arange(6.0, device="hx:2").reshape(2, 3)
    for other in (copy.deepcopy(x), copy.copy(x), pickle.loads(pickle.dumps(x)), x.clone()):
        assert other.device == x.device
        assert other.equal(x)
    both = copy.deepcopy([x, x[0]])
    both[1].zero_()
    assert both[0][0].tolist() == [0, 0, 0]  # still a view of the other


def test_dlpack_hands_over_the_same_memory() -> None:
    x = torch.arange(4.0, device="hx:1")
    assert x.__dlpack_device__() == (12, 1)
    y = torch.from_dlpack(x)
    assert y.device == x.device
    assert y.data_ptr() == x.data_ptr()
    assert torch.ones(2).__dlpack_device__()[1] == 0


def test_a_lazy_clone_is_a_copy_once_one_of_both_is_written_to() -> None:
    x = torch.ones(4, device="hx:3")
    clone = torch._lazy_clone(x)
    clone.add_(1)
    x.mul_(5)
    assert x.tolist() == [5, 5, 5, 5]
    assert clone.tolist() == [2, 2, 2, 2]
    assert clone.device == x.device


def test_storages_can_be_set_resized_and_moved() -> None:
    x = torch.arange(4.0, device="hx")
    y = torch.empty(0, device="hx").set_(x.untyped_storage(), 1, (3,), (1,))
    assert y.tolist() == [1, 2, 3]
    storage = torch.UntypedStorage(16, device="hx")
    storage.resize_(64)
    assert storage.nbytes() == 64
    assert x.untyped_storage().cpu().hx().device == x.device
    assert torch.empty(0, device="hx").set_(x).data_ptr() == x.data_ptr()
