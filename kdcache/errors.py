"""Every error a user can meet, as one tree.

::

    KdcacheError                 base; the command line prints it as one line and exits with 2
    ├── RecipeError              a recipe key or value
    ├── DataError                a data set: missing, empty, wrong columns, wrong encoding
    ├── ModelError               a model folder or repository
    │   └── TokenizerError       its tokenizer, or two tokenizers that differ
    ├── DeviceError              a device that is asked for and not there
    ├── StorageError             the disk: full, unwritable, failing
    ├── TrainingError            a training run that cannot go on or be resumed
    │   └── BrokenRunError       its record cannot be read
    ├── TransferError            a URL: unreachable, refused, missing, or not fit for what is asked
    │   └── DamagedObjectError   it answers, and again and again with other bytes than it should
    └── CacheError               a cache directory
        ├── PlanMismatchError    it belongs to another plan
        ├── IncompleteCacheError the teacher run that makes it has not finished
        └── CorruptCacheError    its bytes are not what its plan and manifest promise

A message says what was expected, what was found and the way out. Foreign exceptions are translated
once, where they enter, with ``raise ... from exc``.
"""


class KdcacheError(Exception):
    """Base of every error that kdcache raises on purpose."""


class RecipeError(KdcacheError):
    """A recipe has an unknown key, a value out of range, or keys that contradict each other."""


class DataError(KdcacheError):
    """A data set cannot be read, or holds nothing that can be trained on."""


class ModelError(KdcacheError):
    """A model cannot be loaded, or cannot be used as a teacher or student."""


class TokenizerError(ModelError):
    """A tokenizer is missing, lacks what is needed, or differs from the cache's."""


class DeviceError(KdcacheError):
    """A device was asked for that this machine does not have."""


class StorageError(KdcacheError):
    """Writing failed: disk full, quota, permission, or an input/output error."""


class TrainingError(KdcacheError):
    """A training run cannot start, go on, or be resumed."""


class BrokenRunError(TrainingError):
    """A run directory's record is there, and is damaged or of a version that this one does not read."""


class TransferError(KdcacheError):
    """Something could not be moved to or from another machine."""


class DamagedObjectError(TransferError):
    """An object arrives short, long or with other bytes than its cache promises, however often it is fetched."""


class CacheError(KdcacheError):
    """A cache directory cannot be used."""


class PlanMismatchError(CacheError):
    """A cache directory was made from another plan than the one asked for."""


class IncompleteCacheError(CacheError):
    """A cache lacks shards or its manifest: the teacher run has not finished."""


class CorruptCacheError(CacheError):
    """Bytes in a cache are not what its plan and manifest promise."""
