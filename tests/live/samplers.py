"""Samplers with the attributes and the behaviour that Megatron-LM's have, in plain Python: for tests, which fetch nothing."""

import random


class Sequential:
    """MegatronPretrainingSampler: consecutive samples; each rank takes its part of mbs * size of them."""

    def __init__(self, total_samples, consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size, drop_last=True):
        self.total_samples, self.consumed_samples = total_samples, consumed_samples
        self.micro_batch_size, self.data_parallel_rank, self.drop_last = micro_batch_size, data_parallel_rank, drop_last
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size

    def __len__(self):
        return self.total_samples

    def get_start_end_idx(self):
        start = self.data_parallel_rank * self.micro_batch_size
        return start, start + self.micro_batch_size

    def __iter__(self):
        start, end = self.get_start_end_idx()
        whole = self.micro_batch_times_data_parallel_size
        at = self.consumed_samples
        while at + whole <= self.total_samples:
            yield list(range(at, at + whole))[start:end]
            at += whole
        if at < self.total_samples and not self.drop_last:
            yield list(range(at, self.total_samples))[start:end]


class Shuffled:
    """MegatronPretrainingRandomSampler: one permutation for each epoch, of which ranks take samples in turn, or have a part each
    (data_sharding). Counts what all ranks consume, while it is iterated."""

    def __init__(
        self, dataset, total_samples, consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size, data_sharding
    ):
        self.dataset, self.total_samples, self.consumed_samples = dataset, total_samples, consumed_samples
        self.micro_batch_size, self.data_parallel_rank, self.data_parallel_size = (
            micro_batch_size,
            data_parallel_rank,
            data_parallel_size,
        )
        self.data_sharding = data_sharding
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.last_batch_size = total_samples % self.micro_batch_times_data_parallel_size

    def __len__(self):
        return self.total_samples

    def __iter__(self):
        active = self.total_samples - self.last_batch_size
        self.epoch, done = divmod(self.consumed_samples, active)
        mbs, rank, size = self.micro_batch_size, self.data_parallel_rank, self.data_parallel_size
        n = (
            self.total_samples // self.micro_batch_times_data_parallel_size * mbs
            if self.data_sharding
            else self.total_samples // mbs * mbs
        )
        permutation = list(range(n))
        random.Random(self.epoch).shuffle(permutation)
        mine = [rank * n + x for x in permutation[done // size :]] if self.data_sharding else permutation[done:][rank::size]
        for i in range(0, len(mine) - mbs + 1, mbs):
            self.consumed_samples += self.micro_batch_times_data_parallel_size
            yield mine[i : i + mbs]
