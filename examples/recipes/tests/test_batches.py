"""The batches of a training: their order, workers, ranks, and images that cannot be read."""

from itertools import chain

import pytest
import torch
from toy_training import Noise

from bapnal_recipes.engine.batches import Batches, steps_per_epoch


def names(dataset, batch_size, steps, **options):
    batches = Batches(dataset, batch_size, 0, **options)
    return [batches[step].names for step in range(steps)]


def test_every_epoch_goes_through_all_images_in_another_order():
    batches = names(Noise(10), 5, 4)
    first, second = (list(chain(*batches[i : i + 2])) for i in (0, 2))
    assert sorted(first) == sorted(second) == sorted(map(str, range(10)))
    assert first != second


def test_an_incomplete_batch_is_dropped_unless_there_is_no_other():
    assert [len(batch) for batch in names(Noise(10), 4, 4)] == [4, 4, 4, 4]
    assert len(set(chain(*names(Noise(10), 4, 2)))) == 8
    assert [len(batch) for batch in names(Noise(3), 4, 2)] == [3, 3]
    assert steps_per_epoch(10, 4) == 2
    assert steps_per_epoch(3, 4) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batch_of_one(ranks):
    whole = Batches(Noise(10), 5, seed=3)
    shares = [Batches(Noise(10), 5, 3, rank, ranks) for rank in range(ranks)]
    for step in range(4):
        together = [share[step] for share in shares]
        assert whole[step].names == list(chain(*(batch.names for batch in together)))
        assert torch.equal(whole[step].images, torch.cat([batch.images for batch in together]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_reads_the_same():
    batches = Batches(Noise(10), 4, seed=1)
    alone = list(batches.load(range(3, 6), workers=0))
    torch.rand(7)  # what else is drawn does not matter
    for batch, other in zip(alone, batches.load(range(3, 6), workers=2), strict=True):
        assert batch.names == other.names
        assert torch.equal(batch.images, other.images)
    assert not torch.equal(alone[0].images, next(Batches(Noise(10), 4, 2).load(range(3, 4))).images)


def test_reading_leaves_random_numbers_and_threads_as_they_were():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    Batches(Noise(10), 4, seed=1)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_images_are_read_by_one_thread_as_in_workers():
    class Threads(Noise):
        def __getitem__(self, index):
            found.append(torch.get_num_threads())
            return super().__getitem__(index)

    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Batches(Threads(), 2, seed=0)[0]
        assert found == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_plain_error(workers):
    with pytest.raises(FileNotFoundError, match=r"^7\.jpg does not exist$"):
        list(Batches(Noise(10, broken=[7]), 5, 0).load(range(2), workers))
