"""What should lie in a run directory, and where its student started from, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from kdcache.errors import ModelError
from kdcache.model_identity import identify
from kdcache.models import refuse_missing_folder
from kdcache.recipe_student import StudentSection
from kdcache.reinforce_record import is_reinforcement, load_reinforced
from kdcache.run_record import read_json
from kdcache.student.initial import is_made
from kdcache.student.start import refuse_missing_base


def refuse_missing_student(path: Path, student: StudentSection) -> None:
    """The saved student of a run, and the model it started from, should be there; nothing is loaded. The adapter of a
    reinforcement is often of a base that lies in another run; that it is still the same one is found by its weights' hash.

    Raises:
        ModelError: a folder or a file of it is not, or the base is another one by now.
    """
    saved, again = path / "model", "reinforce it again" if is_reinforcement(path) else "train it again"
    if not saved.is_dir():
        raise ModelError(f"{path} has no saved student (expected the folder {saved}); {again}")
    if student.lora is not None:
        needed = ["adapter_config.json", "adapter_model.safetensors"]
    else:
        needed = ["config.json", *_weight_files(saved)]
    lacking = [name for name in needed if not (saved / name).is_file()]
    if lacking:
        raise ModelError(f"the saved student {saved} is not whole: it lacks {', '.join(lacking[:3])}; {again}")
    if is_made(student):
        refuse_missing_base(student, path)
    else:
        refuse_missing_folder(student.model)
    if is_reinforcement(path):
        known = load_reinforced(path).get("base_fingerprint")
        if known is not None and known != identify(student.model, student.revision).fingerprint:
            raise ModelError(
                f"{student.model}, the base that {path} was reinforced on, holds another model by now; bring the earlier one back, or "
                "reinforce it again"
            )


def _weight_files(saved: Path) -> list[str]:
    """Where a model's weights should lie: in one file, or in those that its index names."""
    index = saved / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    try:
        return sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{index} is not readable ({exc!r}); train the student again") from exc
