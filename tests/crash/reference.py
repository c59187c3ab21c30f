"""The reference cache that small runs make again."""

from kdcache.cache.writer import CacheWriter
from tests.cache.samples import TOKENS, sample_plan, sample_sequences

SIZES = (3, 5, 2, 4)


def make_reference(directory):
    """Make a complete cache of four shards in ``directory``, undisturbed, in one process."""
    contents = [sample_sequences(sequences=n, seed=i) for i, n in enumerate(SIZES)]
    writer = CacheWriter(directory, sample_plan(contents), TOKENS)
    for index, content in enumerate(contents):
        writer.commit(index, content)
    writer.finalise()
    return directory
