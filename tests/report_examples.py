"""Run and sweep directories as train-student, sweep, evaluate and bench-inference leave them, made without a model."""

import copy
import json
import math

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> $x$ `|` ]]> --> 中文 \x1b[31m\u202e"
CACHE_ID = "c0ffee" + "0" * 58
RECIPE = {
    "output": "runs/example/base",
    "seed": 0,
    "cache": {"directory": "runs/no-such-cache", "positions_per_shard": 8192},
    "student": {"model": "models/student", "lora": {"r": 16, "alpha": 32.0}},
    "loss": {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.5},
    "training": {"learning_rate": 0.004, "epochs": 3.0, "optimizer": "adamw_torch"},
}
LOG = "step,epoch,loss,ce,kl,eval_loss,eval_perplexity\n" + "".join(
    f"{s},{s / 100},{3 - s / 100 + (s % 20) / 50},{2 - s / 150},{1 - s / 200},,\n"
    + (f"{s},{s / 100},,,,{2 - s / 200},{math.exp(2 - s / 200)}\n" if s % 20 == 0 else "")
    for s in range(5, 105, 5)
)


def score(loss, kl, tokens=3342):
    return {
        "loss": loss, "perplexity": math.exp(loss), "kl_to_teacher": kl, "kl_temperature": 1.0, "kl_is_bound": False,
        "tokens": tokens,
    }  # fmt: skip


def recipe_with(changes, output="runs/example/base"):
    values = copy.deepcopy(RECIPE)
    values["output"] = str(output)
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return values


def make_run(folder, loss=1.9, *, changes=None, cache_id=CACHE_ID, tokens=3342, log=LOG, **other):
    """A finished run; ``other`` replaces fields of run.json, None removes them."""
    folder.mkdir(parents=True)
    values = {
        "format": "kdcache-run",
        "kdcache": "0.1.0",
        "recipe": recipe_with(changes or {}, folder),
        "cache_id": cache_id,
        "scores": {
            "student before": score(2.0750420306129844, 1.07, tokens),
            "student after": score(loss, loss / 2, tokens),
            "teacher": score(0.9133717387397442, 0.0, tokens),
        },
        "steps": 100,
        "resumed_at": 0,
        "seconds": 90.5,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"device": {"name": "cpu", "capability": "AVX512"}, "cpus": 2, "system": "Linux"},
        **other,
    }
    (folder / "run.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    (folder / "log.csv").write_text(log)
    return folder


def make_sweep(folder, rows, **other):
    """A sweep of rows (name, changes, loss); a row whose loss is text failed with it, one without a loss waits."""
    folder.mkdir(parents=True)
    listed = []
    for i, (name, changes, loss) in enumerate(rows):
        directory = f"row{i}"
        state = "waiting" if loss is None else "failed" if isinstance(loss, str) else "finished"
        if state == "finished":
            make_run(folder / directory, loss, changes=changes)
        listed.append({
            "name": name, "changes": changes, "directory": directory, "state": state,
            "error": loss if state == "failed" else None, "seconds": 93.25,
        })  # fmt: skip
    values = {
        "format": "kdcache-sweep", "kdcache": "0.1.0", "name": "example", "recipe": recipe_with({}),
        "factors": ["loss.temperature", "training.learning_rate"], "rows": listed, "seconds": 400.0, "jobs": 1, **other,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(values))
    return folder


def example_sweep(folder):
    """Four students, one that failed and one that waits; two were evaluated and one measured."""
    make_sweep(folder, [
        ("A1", {"loss.temperature": 1.0}, 1.95), ("A2", {"loss.temperature": 2.0}, 1.8123456789012345),
        ("A10", {"loss.temperature": 1.0, "training.learning_rate": 1e-05}, 2.3),
        ("A4", {"loss.temperature": 2.0, "training.learning_rate": 1e-05}, 2.01),
        ("A5", {"training.learning_rate": 10.0}, "the loss is not a number since step 12"),
        ("A6", {"loss.temperature": 4.0}, None),
    ])  # fmt: skip
    make_evaluation(folder / "row0", 0.31)
    make_evaluation(folder / "row1", 0.42)
    rows = [
        {
            "model": "student, nf4 + adapter", "tokens_per_second": 31.25, "time_to_first_token": 0.25,
            "memory_bytes": 3 << 20, "memory_of": "process", "disk_bytes": 1 << 20, "error": None,
        },
        {"model": "merged, int8", "error": "int8 needs a package that is not there"},
    ]  # fmt: skip
    (folder / "row1" / "inference.json").write_text(json.dumps({
        "format": "kdcache-inference", "kdcache": "0.1.0", "hardware": {}, "prompt_tokens": 64, "new_tokens": 32,
        "batch_size": 1, "rows": rows,
    }))  # fmt: skip
    return folder


def make_evaluation(folder, value, **other):
    scores = json.loads((folder / "run.json").read_text())["scores"]
    models = {"student before": 0.2, "student after": value, "teacher": 0.5}
    values = {
        "format": "kdcache-evaluation", "kdcache": "0.1.0", "cache_id": CACHE_ID,
        "scores": {m: {**s, "top_1_agreement": models.get(m, 0)} for m, s in scores.items()},
        "generation": {
            "examples": 64, "max_new_tokens": 32, "retention": {"rouge_l": 100 * value / 0.5, "exact_match": None},
            "models": {m: {"rouge_l": v, "rouge_l_stderr": 0.02, "exact_match": v, "exact_match_stderr": 0.01} for m, v in models.items()},
        },
        "tasks": {"facts": {"metric": "acc", "examples": 50, "shots": 8, "models": {m: {"value": v, "stderr": 0.05} for m, v in models.items()}}},
        "samples": [{"prompt": f"Question {i}", "reference": "Paris", "answers": {m: f"{m} says {i}" for m in models}} for i in range(5)],
        **other,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(values))


def hostile_sweep(folder):
    """A sweep in which every string that a report shows tries to be more than a string."""
    make_sweep(
        folder,
        [(EVIL, {EVIL: EVIL, "training.optimizer": EVIL}, 1.9), (EVIL + "2", {}, EVIL), ("plain", {}, 2.0)],
        name=EVIL,
        factors=[EVIL, "training.optimizer"],
    )
    run = folder / "row0"
    record = json.loads((run / "run.json").read_text())
    record |= {
        "kdcache": EVIL,
        "versions": {EVIL: EVIL},
        "hardware": {"device": {"name": EVIL}},
        "cache_id": EVIL,
        "steps": EVIL,
    }
    record["scores"][EVIL] = record["scores"]["teacher"]
    (run / "run.json").write_text(json.dumps(record))
    make_evaluation(
        run, 0.4, cache_id=EVIL, tasks={EVIL: {"metric": EVIL, "models": {"teacher": {"value": 1}}}},
        samples=[{"prompt": EVIL, "reference": EVIL, "answers": {"teacher": EVIL}}],
    )  # fmt: skip
    rows = [{"model": EVIL, "memory_of": EVIL, "memory_bytes": 1}, {"model": EVIL, "error": EVIL}]
    (run / "inference.json").write_text(json.dumps({"format": "kdcache-inference", "rows": rows}))
    return folder
