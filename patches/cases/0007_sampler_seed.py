"""The order in which a loader draws depends on `seed` and on the epoch, and on nothing else."""

from semilearn import get_data_loader
from small import images, settings


def order(seed, epoch=0):
    args = settings(seed=seed)
    sampler = get_data_loader(args, images(args.algorithm), args.batch_size, num_workers=0).sampler
    sampler.set_epoch(epoch)
    return list(sampler)


assert order(0) == order(0)
assert order(0) != order(0, epoch=1)
assert order(0) != order(1), "seeds 0 and 1 draw the images in the same order"
