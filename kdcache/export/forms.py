"""One form of a student after the other, each made as a folder that is whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.files import write_file
from kdcache.devices import give_back_memory
from kdcache.errors import ModelError
from kdcache.export.formats import Form
from kdcache.export.gguf_file import read_back, write_gguf
from kdcache.export.gguf_metadata import UNKNOWN_PRE, TokenizerTable, refuse_unmapped, require_gguf, tokenizer_table
from kdcache.models import first_line, load_model
from kdcache.progress import Progress
from kdcache.recipe_student import StudentSection
from kdcache.student.assembly import load_student
from kdcache.student.merged import fold_adapter, save_whole
from kdcache.student.start import as_started
from kdcache.token_maps import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MERGED = "merged"


class Maker:
    """Makes the forms of one run; the merged model, which most are made from, once.

    Args:
        run: its directory.
        student: its recipe's section.
        wanted: the forms that will be asked for.
        base: name of the base, as others may know it.
        progress: told of what is worth knowing.
    """

    def __init__(self, run: Path, student: StudentSection, wanted: list[Form], base: str, progress: Progress) -> None:
        self._wanted, self._progress = wanted, progress
        # A made student starts from a folder of the run; what it was made from gives it its name and is not read again.
        self._student = as_started(student, run)
        self._name = base
        self._saved = run / "model"
        self._tokenizer = load_tokenizer(str(self._saved))

    def check(self) -> None:
        """Refuse what can be refused before a model is loaded.

        Raises:
            ModelError: the base has no configuration, or GGUF cannot hold the model or its tokenizer.
        """
        import transformers

        student = self._student
        source, revision = (str(self._saved), None) if student.lora is None else (student.model, student.revision)
        try:
            config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        except Exception as exc:
            raise ModelError(f"cannot read the configuration of {source}: {first_line(exc)}") from exc
        if any(form.gguf for form in self._wanted):
            require_gguf()
            refuse_unmapped(config, source)
            table = tokenizer_table(self._tokenizer, config.vocab_size)
            if table.pre == UNKNOWN_PRE:
                self._progress.warning(
                    "llama.cpp does not know this tokenizer's rule for cutting text into words, so the GGUF file names its default "
                    "one; ids may differ from transformers', the weights are right all the same"
                )

    def make(self, form: Form, beside: Path) -> dict[str, Any]:
        """Make a form in ``beside/NAME``; returns what is known of it without comparing.

        Raises:
            ModelError: the student cannot be loaded.
            StorageError: it cannot be written.
        """
        folder = beside / form.name
        if form.name == "adapter":
            self._adapter(folder)
            return {"bytes": size_of(folder), "base_quantization": self._student.quantization}
        merged = beside / _MERGED
        if not merged.is_dir():
            self._merge(merged)
        if form.quantization is not None:
            model = load_model(str(merged), quantization=form.quantization, device=self._student.device)
            save_whole(_ready(model), self._tokenizer, folder)
            del model
            give_back_memory()
        elif form.gguf is not None:
            return self._gguf(form, merged, folder)
        return {"bytes": size_of(folder)}

    def _merge(self, folder: Path) -> None:
        import torch

        student = self._student
        dtype = torch.float16 if student.dtype == "float16" else torch.bfloat16
        if student.lora is None:
            model: Any = load_student(student, self._saved)
            model = model.to(dtype)
        else:
            try:
                model = fold_adapter(load_student(student), self._saved, dtype)
            except (OSError, ValueError) as exc:
                raise ModelError(f"cannot fold the adapter {self._saved} into its base: {first_line(exc)}") from exc
        save_whole(_ready(model), self._tokenizer, folder)
        del model
        give_back_memory()

    def _adapter(self, folder: Path) -> None:
        """The adapter and its tokenizer, with the base by its name: a path of this machine would mean nothing elsewhere."""
        making = folder.with_name(folder.name + ".making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        config = json.loads((self._saved / _ADAPTER_FILES[0]).read_text())
        config["base_model_name_or_path"] = self._name
        write_file(making / _ADAPTER_FILES[0], json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        shutil.copyfile(self._saved / _ADAPTER_FILES[1], making / _ADAPTER_FILES[1])
        self._tokenizer.save_pretrained(making)
        making.rename(folder)

    def _gguf(self, form: Form, merged: Path, folder: Path) -> dict[str, Any]:
        assert form.gguf is not None
        making = folder.with_name(folder.name + ".making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        name = Path(self._name).name
        path = making / f"{name}-distilled-{form.gguf}.gguf"
        table: TokenizerTable = tokenizer_table(self._tokenizer, _vocabulary(merged))
        write_gguf(path, merged, form.gguf, table, name=f"{name}-distilled", progress=self._progress)
        found = read_back(path, merged)
        size = path.stat().st_size
        # For transformers, which does not read all of it from the file.
        shutil.copyfile(merged / "config.json", making / "config.json")
        making.rename(folder)
        return {
            "bytes": size, "file": path.name, "pre": table.pre,
            "read_back": {"tensors": found.tensors, "relative_error": found.relative_error},
        }  # fmt: skip


def adapter_base(student: StudentSection) -> str:
    """The base of a student as others may know it: an id, or the last name of a folder of this machine."""
    return Path(student.model).absolute().name if Path(student.model).is_dir() else student.model


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _ready(model: Any) -> PreTrainedModel:
    """A model as it is to be saved: training has no use for the cache of keys and values, generation has."""
    model.config.use_cache = True
    ready: PreTrainedModel = model
    return ready


def _vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])
