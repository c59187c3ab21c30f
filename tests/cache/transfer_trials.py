"""Many transfers of small caches through a bad network, and what became of each: for the test and for the benchmark."""

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from kdcache.cache.pace import Retry
from kdcache.cache.share import pull, push
from kdcache.cache.writer import CacheWriter
from kdcache.errors import KdcacheError
from tests.cache.fault_proxy import Fault, FaultProxy, at_random
from tests.cache.samples import TOKENS, sample_plan, sample_sequences
from tests.cache.servers import s3_client

# One request in ten fails openly, three in a hundred break off or arrive broken.
RATES = {
    Fault.ERROR: 0.10,
    Fault.RESET: 0.006,
    Fault.TRUNCATED: 0.006,
    Fault.SHORT: 0.006,
    Fault.ZEROS: 0.006,
    Fault.OTHER: 0.006,
}
QUICK = Retry(attempts=6, first=0.002, ceiling=0.02)


def make_cache(directory, sizes=(3, 5, 2)):
    """A small complete cache with one shard for each size."""
    contents = [sample_sequences(sequences=n, seed=n) for n in sizes]
    writer = CacheWriter(directory, sample_plan(contents), TOKENS)
    for index, content in enumerate(contents):
        writer.commit(index, content)
    writer.finalise()
    return directory


def files(directory):
    """Contents by relative path; temporary files too."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def run_trials(count, *, server, seed=0, rates=None, retry=QUICK, cache=None):
    """Push and pull a cache ``count`` times through a `FaultProxy`, each time into another bucket.

    Args:
        count: how many round trips.
        server: URL of an S3 server; the credentials of `servers.KEYS` are in the environment.
        seed: of the faults.
        rates: `Fault` -> share of the requests, `RATES` by default.
        retry: how patient the transfers are.
        cache: a cache directory, or none for a small one.

    Returns:
        ``(outcomes, faults)``: a Counter with "ok" (arrived byte for byte), "typed" (a KdcacheError said what is wrong)
        and "wrong" (arrived with other bytes, or another exception), and a Counter of the faults that were dealt out.
    """
    outcomes, faults = Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(cache) if cache is not None else make_cache(Path(folder) / "source")
        truth = files(source)
        for trial in range(count):
            bucket, arrived = f"trial-{seed}-{trial}", Path(folder) / f"arrived-{trial}"
            s3_client(server).create_bucket(Bucket=bucket)
            with FaultProxy(server, at_random(rates or RATES, seed=f"{seed}.{trial}")) as proxy:
                before = os.environ.get("AWS_ENDPOINT_URL")
                os.environ["AWS_ENDPOINT_URL"] = proxy.url
                try:
                    push(source, f"s3://{bucket}/cache", retry=retry)
                    pull(f"s3://{bucket}/cache", arrived, retry=retry)
                    outcomes["ok" if files(arrived) == truth else "wrong"] += 1
                except KdcacheError:
                    outcomes["typed"] += 1
                except Exception:
                    outcomes["wrong"] += 1
                finally:
                    if before is None:
                        del os.environ["AWS_ENDPOINT_URL"]
                    else:
                        os.environ["AWS_ENDPOINT_URL"] = before
                faults += proxy.counts
            shutil.rmtree(arrived, ignore_errors=True)
    return outcomes, faults
