"""Names, constants and limits of the cache format, in the order of ``cache_format.md``."""

from typing import Final

FORMAT: Final = "kdcache"
VERSION: Final = 0

# Directory ---------------------------------------------------------------------------------------
PLAN_FILE: Final = "plan.json"
VOCABULARY_FILE: Final = "vocabulary.json.zst"
SHARD_DIRECTORY: Final = "shards"
SHARD_SUFFIX: Final = ".safetensors.zst"
MANIFEST_FILE: Final = "manifest.json"
CARD_FILE: Final = "README.md"
TEMPORARY_PREFIX: Final = ".tmp-"


def shard_name(index: int) -> str:
    """File name of shard ``index``; names derive from the number alone, never from a file's content."""
    return f"{index:05d}{SHARD_SUFFIX}"


# Container ---------------------------------------------------------------------------------------
METADATA_KEY: Final = "kdcache"
ZSTD_LEVEL: Final = 3
ZSTD_WINDOW_LIMIT: Final = 8 << 20
HEADER_LIMIT: Final = 64 << 10
SHARD_LIMIT: Final = 1 << 30
JSON_LIMIT: Final = 64 << 20
VOCABULARY_LIMIT: Final = 64 << 20
DIGEST_BYTES: Final = 16

# Tensors: name -> (dtype, shape). S sequences, N tokens, P positions, E entries, B temperatures.
# "id" stands for <u2 when the vocabulary has at most 65,536 tokens, and <u4 otherwise.
TENSORS: Final[dict[str, tuple[str, str]]] = {
    "sequence.length": ("<u4", "S"),
    "sequence.digest": ("|u1", "S,16"),
    "token.id": ("id", "N"),
    "token.target": ("|u1", "N"),
    "row.head": ("<u2", "P"),
    "row.tail": ("<u2", "P"),
    "row.log_partition": ("<f4", "P,B"),
    "row.label_log_prob": ("<f4", "P"),
    "entry.id": ("id", "E"),
    "entry.logit": ("<f2", "E"),
}
SAFETENSORS_DTYPES: Final = {"|u1": "U8", "<u2": "U16", "<u4": "U32", "<f2": "F16", "<f4": "F32"}


def id_dtype(vocab_size: int) -> str:
    """The little-endian integer type that token ids are stored in, chosen by the vocabulary."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


# Values ------------------------------------------------------------------------------------------
VOCAB_LIMIT: Final = 1 << 24
# Half precision rounds a logit by at most 2**-11 of its size; a row's kept mass may exceed 1 by the
# sum of those roundings, which for any real row stays below this.
MASS_TOLERANCE: Final = 5e-3
PARTITION_TOLERANCE: Final = 1e-3
LOGIT_FLOOR: Final = -65504.0
HALF_ROUNDING: Final = 2.0**-11
KEPT_MASS_BINS: Final = 1000
