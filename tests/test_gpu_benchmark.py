"""``benchmarks/gpu.py`` at toy size on the CPU, so that it works on the day a GPU is at hand; and what can be known of the
Triton kernels without one."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def workers():
    """The module that measures."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    import gpu_workers

    yield gpu_workers
    patch.undo()


@pytest.fixture(scope="module")
def bench(workers, tmp_path_factory):
    """Toy models and a cache."""
    made = workers.Bench(tmp_path_factory.mktemp("gpu") / "tiny", workers.TINY, "cpu")
    workers.prepare(made)
    return made


def test_models_have_the_published_shapes(workers):
    """Parameters as their model cards state them: 3.09 and 0.49 billion."""

    def parameters(shape):
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
        attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys
        layer = attention + 3 * hidden * inner + 2 * hidden
        return workers.FULL.vocabulary * hidden + shape["num_hidden_layers"] * layer + hidden

    assert parameters(workers.FULL.teacher) / 1e9 == pytest.approx(3.09, abs=0.01)
    assert parameters(workers.FULL.student) / 1e9 == pytest.approx(0.49, abs=0.01)


def test_the_cache_has_the_length_and_the_bytes_that_were_asked_for(workers, bench):
    from kdcache.cache.reader import open_cache

    cache = open_cache(bench.recipe.cache.directory)
    assert cache.vocab_size == workers.TINY.vocabulary
    assert cache.plan.teacher.quantization == "nf4"
    assert {len(s.token_ids) for s in cache["train"]} == {workers.TINY.length}
    rates = workers.prepare(bench)
    assert rates["bytes"] == pytest.approx(64, rel=0.1)
    assert rates["positions"] == sum(shard.positions for shard in cache.plan.shards)
    assert rates["seconds"] > 0


def test_the_contenders_train_the_same_student_on_the_same_tokens(workers, bench):
    """Steps are counted, weights move, and one training after another leaves no wrapper around the model."""
    training = workers.Training(bench, workers.CACHED)
    before = {n: p.detach().clone() for n, p in training.model.named_parameters() if p.requires_grad}
    own = training.model.forward
    assert len(training.run(2, 4, workers=0)) == 3
    assert training.model.forward == own
    assert any(not p.equal(before[n]) for n, p in training.model.named_parameters() if p.requires_grad)
    assert training.fits(1)
    plain = workers.PlainSet(bench.recipe.cache.directory)
    batch = workers.plain_batch([plain[0], plain[1]])
    assert batch["input_ids"].shape == (2, workers.TINY.length)
    assert int((batch["labels"] != -100).sum()) == 2 * (workers.TINY.length - workers.TINY.length // 4)


def test_a_batch_that_does_not_fit_is_no_error(workers, bench, monkeypatch):
    import torch

    training = workers.Training(bench, workers.SFT)

    def refuse(batch, steps, **changes):
        if batch > 3:
            raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(training, "run", refuse)
    assert workers.largest(training.fits, 64) == 3


@pytest.mark.parametrize("true", [*range(20), 37, 63, 64, 100])
def test_the_search_finds_the_largest_batch(workers, true):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= true

    found = workers.largest(fits, 64)
    best = min(true, 64)
    assert found <= best
    assert best - found <= (best // 16 if best > 16 else 0)
    assert len(tried) == len(set(tried)) <= 12


def test_every_table_is_made(workers, bench, monkeypatch, capsys, tmp_path):
    """All parts with real measurements; in this process, which loads torch but once."""
    import gpu

    monkeypatch.setattr(gpu, "in_own_process", lambda request: json.loads(json.dumps(workers.measure(request))))
    report = tmp_path / "gpu.md"
    options = ["--tiny", "--device", "cpu", "--rounds", "1", "--caps", "6"]
    assert gpu.main([*options, "--work", str(bench.work.parent), "--output", str(report)]) == 0
    printed = capsys.readouterr().out
    assert report.read_text() == printed
    assert "these figures mean nothing" in printed
    for name in workers.CONTENDERS:
        assert len(re.findall(rf"^\| {re.escape(name)} \|", printed, flags=re.MULTILINE)) == 2
        assert f"| {name} | 4 or more |" in printed
    assert "| bare forward: decoder and head | " in printed
    assert "not measured: no CUDA device" in printed


def test_a_measurement_is_a_process_of_its_own(workers, monkeypatch):
    import gpu

    assert gpu.in_own_process({"measure": "machine"}) == workers.machine()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(gpu.WorkerError, match="ended with 1"):
        gpu.in_own_process({"measure": "machine"})


def test_tables_are_made_of_what_the_workers_measured(workers, monkeypatch, capsys, tmp_path):
    """Ratios round by round, a contender that ran out of memory, a measurement that failed."""
    import gpu

    seconds = {workers.SFT: iter([0.1, 0.2, 0.4]), workers.CACHED: iter([0.11, 0.2, 0.6])}

    def measured(self, measure, **arguments):
        if measure == "machine":
            return {
                "device": {"name": "a GPU", "memory_bytes": 2**34},
                "cpus": 8,
                "python": "3",
                "cuda": "13",
                "versions": {},
            }
        if measure == "prepare":
            return {"positions": 1000, "seconds": 2.0, "bytes": 64.0}
        if measure == "teacher":
            raise gpu.WorkerError("it broke")
        name = arguments["contender"]
        return {"seconds": next(seconds[name]), "peak": 2.0} if name in seconds else {"out_of_memory": 1.0}

    monkeypatch.setattr(gpu.Workers, "__call__", measured)
    assert gpu.main(["--only", "teacher", "steps", "--output", str(tmp_path / "gpu.md")]) == 1
    printed = capsys.readouterr()
    assert "teacher: not measured" in printed.out
    assert "it broke" in printed.err
    assert f"| {workers.SFT} | 200.0 | 1.000 | 2.00 | 1.000 |" in printed.out
    assert f"| {workers.CACHED} | 200.0 | 1.100 | 2.00 | 1.000 |" in printed.out
    assert f"| {workers.LIVE} | out of memory |" in printed.out


def test_without_a_gpu_it_says_so(monkeypatch, capsys, workers):
    import gpu

    monkeypatch.setattr(gpu.Workers, "__call__", lambda self, measure: {"device": {"name": "cpu"}})
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [75, 80, 90], ids=["Turing", "Ampere", "Hopper"])
def test_the_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    """Triton brings its own assembler: it needs a GPU to run a kernel, not to make one."""
    triton = pytest.importorskip("triton", reason="Triton is not installed; its kernels are not tested")
    from triton.backends.compiler import GPUTarget

    from kdcache.student import row_passes_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (kernels._sums_kernel, kernels._gradient_kernel):
        *pointers, stride, width, inverse, block = kernel.arg_names
        signature = {
            **dict.fromkeys(pointers, "*fp32"),
            stride: "i32",
            width: "i32",
            inverse: "fp32",
            block: "constexpr",
        }
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs={block: kernels._BLOCK})
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(made.asm["cubin"]) > 1000
