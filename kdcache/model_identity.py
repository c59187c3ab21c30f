"""Who a model is: a folder by its weights, one on the Hub by the commit that lies on this machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import ModelError
from kdcache.hub_access import refuse_unreachable
from kdcache.models import first_line, quiet_libraries, refuse_missing_folder

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True)
class ModelIdentity:
    """Name without a machine's paths, commit where there is one, and a hash of configuration and weights."""

    name: str
    revision: str | None
    fingerprint: str
    architecture: str
    head_width: int


def identify(model: str, revision: str | None = None) -> ModelIdentity:
    """Who a model is, without loading it.

    Raises:
        ModelError: no such folder, no configuration or no weights.
    """
    import transformers

    quiet_libraries()
    refuse_missing_folder(model)
    try:
        config = transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as exc:
        refuse_unreachable(model, revision, exc)
        raise ModelError(f"cannot read the configuration of {model}: {first_line(exc)}") from exc
    architecture = (config.architectures or ["unknown"])[0]
    width = int(config.get_text_config().vocab_size)
    folder = Path(model)
    if not folder.is_dir():
        commit = _commit_of(model, revision)
        identity = hashlib.sha256(f"{model}@{commit}".encode()).hexdigest()
        return ModelIdentity(model, commit, identity, architecture, width)
    weights = sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern))
    if not weights:
        raise ModelError(f"{model} has no weights (expected model.safetensors)")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        with path.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return ModelIdentity(folder.absolute().name, None, digest.hexdigest(), architecture, width)


def _commit_of(model: str, revision: str | None) -> str:
    """The commit that a revision of a model on the Hub stands for on this machine, by where its configuration was put.

    Raises:
        ModelError: that does not show.
    """
    from transformers.utils.hub import cached_file

    place = Path(str(cached_file(model, "config.json", revision=revision)))
    if place.parent.parent.name != "snapshots":
        raise ModelError(f"it is not known which commit of {model} lies in {place.parent}; name one with revision")
    return place.parent.name
