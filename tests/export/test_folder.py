"""The folder of an export: one process at a time, nobody else's files removed, damage seen, finished forms kept."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from kdcache.errors import ModelError, StorageError
from kdcache.export import compare, folder, forms
from kdcache.export.run import export
from kdcache.models import load_model
from kdcache.student.merged import save_whole
from tests.export.test_export import Told


def exported(run, out, names=("adapter",), **options):
    return export(run, out, list(names), compare=False, **options)


def names_in(path):
    return {p.name for p in path.iterdir()}


def test_replacing_an_export_removes_nothing_else(qlora_run, tmp_path):
    out, told = tmp_path / "out", Told()
    exported(qlora_run, out)
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "notes").write_text("keep")
    exported(qlora_run, out, overwrite=True)
    assert names_in(tmp_path) == {"out", "out.replaced"}
    (out / "mine").write_text("keep")
    exported(qlora_run, out, overwrite=True, progress=told)
    assert names_in(tmp_path / "out.replaced") == {"notes"}
    assert names_in(tmp_path / "out.replaced.1") == {"mine"}
    assert any("out.replaced.1 stays: it has files that no export made (mine)" in t for t in told.messages)
    # Another's finished export by that name is not taken for a stopped one.
    exported(qlora_run, tmp_path / "x.partial", base_model="user/base")
    with pytest.raises(StorageError, match="holds a finished export; move it away"):
        exported(qlora_run, tmp_path / "x")
    assert "adapter_model.safetensors" in names_in(tmp_path / "x.partial")


def test_a_finished_export_is_looked_at(qlora_run, tmp_path):
    out = tmp_path / "out"
    rows = exported(qlora_run, out).rows
    card, weights = out / "README.md", out / "adapter_model.safetensors"
    card.write_text(card.read_text() + "\nMore of it.\n")
    assert exported(qlora_run, out).rows == rows
    whole = weights.read_bytes()
    for data, match in (
        (whole[:-1], r"holds this export, damaged: adapter_model\.safetensors is not as it was written; .*--overwrite"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is not as it was written"),
        (None, r"adapter_model\.safetensors is missing"),
    ):
        weights.unlink()
        if data is not None:
            weights.write_bytes(data)
        else:
            weights.mkdir()
        with pytest.raises(StorageError, match=match):
            exported(qlora_run, out)
    exported(qlora_run, out, overwrite=True)
    assert weights.read_bytes() == whole
    values = json.loads((out / "export.json").read_text())
    (out / "export.json").write_text(json.dumps({k: v for k, v in values.items() if k != "files"}))
    with pytest.raises(StorageError, match="does not say which files it has"):
        exported(qlora_run, out)


def test_the_folder_one_stands_in_and_links(qlora_run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes").write_text("keep")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(StorageError, match="holds something that is no export"):
        exported(qlora_run, type(tmp_path)("."))
    with pytest.raises(StorageError, match="holds something that is no export"):
        exported(qlora_run, type(tmp_path)("/"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        exported(qlora_run, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert "adapter_model.safetensors" in names_in(tmp_path / "real")
    assert names_in(tmp_path) == {"here", "real", "link"}


def test_an_error_keeps_what_is_finished(qlora_run, tmp_path, monkeypatch):
    out, told = tmp_path / "out", Told()

    def full(*arguments, **options):
        (tmp_path / "out.partial" / "gguf-f16.making" / "x").write_text("begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forms, "write_gguf", full)
    with pytest.raises(StorageError, match="No space left on device"):
        exported(qlora_run, out, ["merged", "gguf-f16"], progress=told)
    assert names_in(tmp_path) == {"out.partial"}
    assert names_in(tmp_path / "out.partial") == {"merged", "export.json"}
    assert any("keeps what is finished (merged)" in t for t in told.messages)
    monkeypatch.undo()
    monkeypatch.setattr(forms, "load_student", lambda *a: pytest.fail("merged again"))
    assert set(exported(qlora_run, out, ["merged", "gguf-f16"]).rows) == {"merged", "gguf-f16"}


def test_a_form_that_does_not_load_is_made_again(qlora_run, tmp_path, monkeypatch):
    whole = compare.load_model

    def broken(path, **options):
        raise ModelError(f"cannot load {path}")

    monkeypatch.setattr(compare, "load_model", broken)
    with pytest.raises(ModelError, match="cannot load"):
        export(qlora_run, tmp_path / "out", ["merged", "adapter"])
    assert names_in(tmp_path / "out.partial") == {"adapter", "export.json"}
    monkeypatch.setattr(compare, "load_model", whole)
    assert export(qlora_run, tmp_path / "out", ["merged", "adapter"]).rows["merged"]["kl_to_run"] < 2e-3


HOLD = """
import fcntl, os, sys, time
held = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(held, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_two_exports_do_not_share_a_folder(qlora_run, tmp_path):
    beside = tmp_path / "out.partial"
    beside.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(beside)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StorageError, match=r"another process is exporting to .*/out; wait"):
            exported(qlora_run, tmp_path / "out")
        other.send_signal(signal.SIGKILL)
    assert names_in(tmp_path) == {"out.partial"}
    exported(qlora_run, tmp_path / "out")
    assert names_in(tmp_path) == {"out"}
    # The other way round: while it is worked in, nobody else gets it.
    with folder.working_folder(beside, {"format": folder.FORMAT}, Told()), pytest.raises(StorageError, match="another"):
        exported(qlora_run, tmp_path / "out", overwrite=True)


def test_a_saved_model_folder_takes_no_folder_of_others(models, tmp_path):
    model = load_model(str(models / "student"), device="cpu")
    for name in ("m.partial", "m.partial.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("keep")
    (tmp_path / "m.partial.2").symlink_to(tmp_path / "m.partial")
    save_whole(model, None, tmp_path / "m")
    assert names_in(tmp_path) == {"m", "m.partial", "m.partial.1", "m.partial.2"}
    assert names_in(tmp_path / "m.partial") == names_in(tmp_path / "m.partial.1") == {"notes"}
    assert {"config.json", "model.safetensors"} <= names_in(tmp_path / "m")
    assert not [n for n in names_in(tmp_path / "m") if n.startswith(".")]
    # What a killed saving left is known, and goes.
    shutil.rmtree(tmp_path / "m.partial")
    (tmp_path / "m.partial.2").unlink()

    def stop(path):
        raise KeyboardInterrupt

    model.save_pretrained, whole = stop, model.save_pretrained
    with pytest.raises(KeyboardInterrupt):
        save_whole(model, None, tmp_path / "m")
    assert names_in(tmp_path) == {"m", "m.partial", "m.partial.1"}
    model.save_pretrained = whole
    save_whole(model, None, tmp_path / "m")
    assert names_in(tmp_path) == {"m", "m.partial.1"}
