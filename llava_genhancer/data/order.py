"""The order of an epoch: a permutation as a table, or of a large set computed number by number, with nothing held."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

TABLE = 1 << 20  # items up to which a table costs milliseconds and 8 MB in every reader, as it has always done
ROUNDS = 4  # of a Feistel network, whose fourth makes it a permutation that looks drawn (Luby and Rackoff)


def sample_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shuffled(count: int, *seed: object) -> Tensor:
    """A permutation; a tensor, as a list of a data set's length would take seconds and hundreds of megabytes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(sample_seed(*seed)))


class Computed:
    """A permutation of ``count`` items: ``self[i]`` is the item in place ``i``, at a cost of microseconds each.

    A Feistel network turns numbers of an even count of bits, up to four times as many as there are items; what falls
    outside is turned again until it is an item, which keeps it a permutation.
    """

    def __init__(self, count: int, *seed: object):
        self.count = count
        self._key = sample_seed(*seed).to_bytes(8, "big")
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._rounds = [bytes([number]) for number in range(ROUNDS)]

    def __getitem__(self, place: int) -> int:
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = place >> half, place & mask
            for number in self._rounds:
                digest = hashlib.blake2b(number + right.to_bytes(8, "big"), digest_size=8, key=self._key).digest()
                left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
            place = left << half | right
            if place < self.count:
                return place
