"""Names, constants and limits of the cache format, in the order of ``cache_format.md``."""

from typing import Final

FORMAT: Final = "kdcache"
VERSION: Final = 1

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
SHARD_LIMIT: Final = 192 << 20
# A frame may always hold the first; more only within so many times its own size: zeros pack 30,000 : 1, teachers 10 : 1.
EXPANSION_FLOOR: Final = 16 << 20
EXPANSION_LIMIT: Final = 32
JSON_LIMIT: Final = 16 << 20
# Commas and opening brackets: once parsed, each may take a hundred times its byte.
JSON_VALUES: Final = 1 << 18
SHARDS_LIMIT: Final = 40_000
# Writers close a shard here at the latest, so that ids and flags, which may repeat for ever, stay within the floor.
TOKENS_PER_SHARD: Final = 2 << 20
VOCABULARY_LIMIT: Final = 32 << 20
VOCABULARY_VALUES: Final = 2 << 20
DIGEST_BYTES: Final = 16

# Tensors: name -> (dtype, shape). S sequences, N tokens, P positions, H head entries, M tail entries, B temperatures,
# I bytes of an id. Numbers of several bytes lie in planes, the lowest bytes of all of them first: zstd sees more in them.
TENSORS: Final[dict[str, tuple[str, str]]] = {
    "sequence.length": ("<u4", "S"),
    "sequence.digest": ("|u1", "S,16"),
    "token.id": ("|u1", "I,N"),
    "token.target": ("|u1", "N"),
    "row.head": ("|u1", "2,P"),
    "row.tail": ("|u1", "2,P"),
    "row.rest": ("|u1", "2,B,P"),
    "row.label": ("|u1", "2,P"),
    "head.id": ("|u1", "I,H"),
    "head.value": ("|u1", "2,H"),
    "tail.id": ("|u1", "I,M"),
    "tail.value": ("|u1", "2,M"),
    "row.tail_value": ("|u1", "2,P"),
    "head.count": ("|u1", "H"),
    "tail.count": ("|u1", "M"),
}
# What a position's bytes are spent on, for people.
PARTS: Final[dict[str, tuple[str, ...]]] = {
    "ids": ("head.id", "tail.id", "head.count", "tail.count"),
    "values": ("head.value", "tail.value", "row.tail_value"),
    "partition": ("row.rest", "row.head", "row.tail"),
    "text": ("token.id", "token.target", "sequence.length", "sequence.digest", "row.label"),
}
SAFETENSORS_DTYPES: Final = {"|u1": "U8", "<u4": "U32"}


def tensor_names(*, tail_logits: bool, counted: bool) -> list[str]:
    """The tensors of a shard: values of drawn entries or one for all of a row; counts where draws repeat."""
    left_out = {"row.tail_value" if tail_logits else "tail.value"}
    left_out |= set() if counted else {"head.count", "tail.count"}
    return [name for name in TENSORS if name not in left_out]


def id_bytes(vocab_size: int) -> int:
    """Planes of a token id, chosen by the vocabulary."""
    return 2 if vocab_size <= 1 << 16 else 3


# Values ------------------------------------------------------------------------------------------
VOCAB_LIMIT: Final = 1 << 20
# Logits below the row's largest, in steps: exact entries finer than drawn ones, whose value only moves a weight a little.
HEAD_STEP: Final = 2.0**-4
TAIL_STEP: Final = 2.0**-1
LEVEL_LIMIT: Final = (1 << 16) - 1
# Mass outside the head as log(rest / head), in steps, around the middle of 16 bits.
REST_STEP: Final = 2.0**-10
REST_LIMIT: Final = 32.0
LOWEST_TEMPERATURE: Final = 1e-5
HIGHEST_TEMPERATURE: Final = 100.0
# Closer ones differ by rounding alone, which interpolation would blow up.
TEMPERATURE_RATIO: Final = 1.01
# Rows hold up to 2 / floor entries for each temperature.
MINIMUM_FLOOR: Final = 1e-4
HALF_LIMIT: Final = 65504.0
KEPT_MASS_BINS: Final = 1000
