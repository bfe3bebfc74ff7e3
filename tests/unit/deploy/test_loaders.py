from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, TensorDataset

from lightning_prune.deploy.loaders import batches_in_turn, batches_together, fixed_rng, leaves_of, whole

DATA = TensorDataset(torch.arange(12.0))


def values(pairs):
    return [(batch[0].tolist(), index) for batch, index in pairs]


def seen(loaders):
    with fixed_rng():
        return values(batches_in_turn(loaders))


def test_a_shuffling_loader_gives_the_same_batches_each_time_and_goes_on_as_if_untouched():
    loader = DataLoader(DATA, 4, shuffle=True)
    torch.manual_seed(7)
    undisturbed = [b[0].tolist() for b in loader]
    torch.manual_seed(7)
    first = seen(loader)
    torch.rand(100)
    assert seen(loader) == first
    torch.manual_seed(7)
    seen(loader)
    assert [b[0].tolist() for b in loader] == undisturbed


def test_a_sampler_with_a_generator_of_its_own_is_put_back():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(DATA, 4, sampler=RandomSampler(DATA, generator=generator))
    state = generator.get_state()
    first = seen(loader)
    list(loader)
    assert seen(loader) == first
    generator.set_state(state)
    seen(loader)
    assert torch.equal(generator.get_state(), state)


class ByEpoch(Sampler):
    """Shuffles by the epoch that Lightning tells it."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self):
        return 12


def test_a_sampler_that_shuffles_by_the_epoch_gives_the_same_batches_at_any_epoch():
    loader = DataLoader(DATA, 4, sampler=ByEpoch())
    first = seen(loader)
    loader.sampler.set_epoch(9)
    assert seen(loader) == first
    assert loader.sampler.epoch == 9


def test_data_that_is_augmented_with_any_generator_is_the_same_each_time():
    class Noisy(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.rand(1) + random.random() + np.random.rand()

    def look():
        with fixed_rng():
            return [batch.tolist() for batch, _ in batches_in_turn(DataLoader(Noisy(), 2))]

    first = look()
    random.random()
    np.random.rand()
    torch.rand(1)
    assert look() == first


def test_validation_goes_through_loaders_in_turn_and_training_through_all_at_once():
    one, two = DataLoader(DATA, 6), DataLoader(DATA, 4)
    assert [index for _, index in batches_in_turn([one, two])] == [0, 0, 1, 1, 1]
    together = [batch for batch, _ in batches_together({"a": one, "b": [two]})]
    assert len(together) == 2
    assert together[0]["b"][0][0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert leaves_of({"a": one, "b": [two, None]}) == [one, two]
    assert list(batches_in_turn(None)) == []


def test_a_share_of_the_data_becomes_the_whole_again():
    sampler = DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False)
    share = DataLoader(DATA, 3, sampler=sampler)
    assert sum(len(b[0]) for b in share) == 6
    (again,) = whole([share])
    assert [v for b in again for v in b[0].tolist()] == list(range(12))
    plain = DataLoader(DATA, 3)
    assert whole(plain) is plain
    assert whole(None) is None
