"""What is kept on the disk comes back as it was."""

from __future__ import annotations

import torch

from unbraid.evaluation.stash import Stash


def test_tensors_come_back_and_what_had_no_room_is_absent() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, 3, 4, generator=generator),
        torch.randn(5, 1, generator=generator).to(torch.bfloat16),
        torch.randn(4, 4, generator=generator).T,
    ]
    with Stash(limit=24 * 4 + 10 + 16 * 4) as stash:
        for tensor in tensors:
            stash.add(tensor)
        stash.add(torch.zeros(1))
        for number in (2, 0, 1):
            found = stash[number]
            assert found is not None and found.dtype == tensors[number].dtype
            assert torch.equal(found, tensors[number])
        assert stash[3] is None


def test_a_tensor_comes_back_where_a_new_one_would_lie() -> None:
    # A product of the same numbers is rounded otherwise where they begin within a cache line.
    with Stash() as stash:
        for n in range(1, 60):
            stash.add(torch.ones(n, 3 * n))
        found = [stash[number] for number in range(59)]
    assert [t.data_ptr() % 64 for t in found if t is not None] == [0] * 59
