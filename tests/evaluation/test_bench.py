"""Benchmarks: what they report; how long anything takes is nobody's test."""

import json
import sys
import types

import jax
import pytest

from ebt_jax import cli
from ebt_jax.errors import UserError
from ebt_jax.evaluation import bench_compiled, bench_peer, bench_timed
from ebt_jax.evaluation.bench import bench, bench_config
from ebt_jax.evaluation.bench_settings import Settings
from ebt_jax.evaluation.bench_table import Column, render, table

TINY = {"size": "4xs", "layers": 1, "vocab": 17, "seq": 4, "new": 3, "steps": 2}
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]
WHERE = {"device", "jax", "date"}


def run(job, **changes):
    return bench(Settings(job, **{**TINY, **changes}), lambda line: None)


@pytest.fixture(autouse=True, scope="module")
def small_product():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_timed, "MATMUL_SIDE", {"cpu": 16, "accelerator": 16})
        yield


@pytest.fixture(scope="module")
def trained():
    return run("train", model="both")


def test_an_update_is_measured_and_compared_with_what_it_needs(trained):
    assert [row["model"] for row in trained["rows"]] == ["ebt", "transformer_pp"]
    rate = trained["matmul_flops_per_second"]
    for row in trained["rows"]:
        speed = row["batch"] * row["seq"] / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(speed)
        assert row["mfu"] == pytest.approx(row["flops_per_token"] * speed / rate)
        assert row["compile_seconds"] > 0
    ours, baseline = trained["rows"]
    (pair,) = trained["comparisons"]
    assert pair["time_ratio"] == pytest.approx(ours["seconds"] / baseline["seconds"])
    flops = ours["flops_per_token"] / baseline["flops_per_token"]
    assert pair["flop_ratio"] == pytest.approx(flops)
    assert pair["time_over_flops"] == pytest.approx(pair["time_ratio"] / flops)
    assert len(pair["rounds"]) == TINY["steps"]
    assert trained["peak_mib"] > 0
    assert trained["seconds"] == ours["seconds"]  # the first row's, where scripts look


def test_batches_and_prompts_are_rows_with_their_ratios(monkeypatch):
    def generation(kind, vocab, batch, prompt, new):
        calls.append((kind, batch, prompt))
        slow = 2 if kind == "ebt" else 1
        return 0.1, slow * new * prompt * batch**0.5

    calls = []
    monkeypatch.setattr(bench_timed, "_generation", generation)
    monkeypatch.setattr(
        bench_timed, "_generator", lambda config, thinking: config.model.kind
    )
    result = run("decode", model="both", batch=(1, 4), prompt=(2, 5))
    models = ("ebt", "transformer_pp")
    rows = {(r["model"], r["batch"], r["prompt"]): r for r in result["rows"]}
    assert list(rows) == [(m, b, p) for b in (1, 4) for p in (2, 5) for m in models]
    assert calls == list(rows) * (2 + Settings().rounds)  # in alternation, two warm up
    assert [r["growth"] for r in rows.values()] == pytest.approx([1, 1, 2.5, 2.5] * 2)
    ratios = [r["batch_ratio"] for r in rows.values()]
    assert ratios == pytest.approx([1] * 4 + [2] * 4)
    assert rows["ebt", 4, 5]["seconds"] == pytest.approx(20)
    assert rows["ebt", 4, 5]["next_seconds"] == pytest.approx((60 - 0.1) / 2)
    assert [c["time_ratio"] for c in result["comparisons"]] == pytest.approx([2] * 4)
    text = render(result)
    assert "ebt / transformer_pp, batch 4, prompt 5: time 2.00" in text
    assert "x first prompt" in text and "x first batch" in text


def test_memory_is_that_of_the_compiled_step():
    result = run("memory", model="transformer_pp", seq=32, seq_to=64)
    short, long = result["rows"]
    assert (short["seq"], long["seq"]) == (32, 64)
    array = 4 * 2 * 32 * TINY["vocab"] / 2**20
    assert short["arrays"] == pytest.approx(short["temporaries_mib"] / array)
    growth = long["temporaries_mib"] / short["temporaries_mib"]
    assert long["growth"] == pytest.approx(growth) and growth > 1
    assert "growth" not in short


def test_compiling_is_measured_with_more_layers_and_more_steps():
    result = run("compile", model="transformer_pp", layers_to=2)
    for row in result["rows"]:
        both = row["lower_seconds"] + row["compile_seconds"]
        assert row["seconds"] == pytest.approx(both)
    first, second = result["rows"]
    assert (first["layers"], second["layers"]) == (1, 2)
    assert second["ratio"] == pytest.approx(second["seconds"] / first["seconds"])
    assert "compile s" in render(result)


def test_what_is_compiled(monkeypatch):
    seen = []

    def lower(config):
        assert not jax.config.values["jax_enable_compilation_cache"]
        seen.append((config.model.kind, config.model.layers, config.refine.num_steps))
        return types.SimpleNamespace(compile=lambda: None)

    monkeypatch.setattr(bench_compiled, "_lower", lower)
    result = run("compile", model="both", layers_to=2, steps_to=3)
    assert seen[1:] == [  # the first one is not timed
        ("ebt", 1, 2),
        ("ebt", 2, 2),
        ("ebt", 1, 3),
        ("transformer_pp", 1, 2),
        ("transformer_pp", 2, 2),
    ]
    assert [row["refine_steps"] for row in result["rows"]] == [2, 2, 3, 0, 0]
    assert jax.config.values["jax_enable_compilation_cache"]


def test_a_backend_that_tells_no_memory_is_named(monkeypatch):
    compiled = types.SimpleNamespace(memory_analysis=lambda: None)
    lowered = types.SimpleNamespace(compile=lambda: compiled)
    monkeypatch.setattr(bench_compiled, "_lower", lambda config: lowered)
    with pytest.raises(UserError, match="the backend 'cpu' does not tell how much"):
        run("memory")


def test_results_are_tables_for_people(trained):
    lines = render(trained).splitlines()
    assert "job=train" in lines[0] and "vocab=17" in lines[0]
    header, *rows = lines[2:5]
    assert header.split()[:3] == ["model", "batch", "seq"] and "s/update" in header
    assert [row.split()[0] for row in rows] == ["ebt", "transformer_pp"]
    assert {len(line) for line in (header, *rows)} == {len(header)}
    text = "\n".join(lines)
    assert "ebt / transformer_pp, batch 2: time" in text
    assert "time / FLOPs" in text and "peak memory" in text and "FLOP/s" in text


def test_a_table_is_aligned_and_leaves_out_empty_columns():
    columns = (
        Column("name", "name", ""),
        Column("size", "MiB", ",.1f"),
        Column("none", "none", ""),
        Column("ratio", "x", ".2f"),
    )
    rows = [{"name": "a", "size": 1234.5}, {"name": "longer", "size": 2, "ratio": 0.5}]
    assert table(columns, rows).splitlines() == [
        "name        MiB     x",
        "a       1,234.5     -",
        "longer      2.0  0.50",
    ]


def test_json_is_one_line_with_what_scripts_rely_on(capsys):
    thinking = ["--num_steps=3", "--best_of=2"]
    assert cli.run(["bench", "decode", *FLAGS, *thinking, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    result = json.loads(out)
    assert {"seconds", "tokens_per_second", "peak_mib", *WHERE} <= set(result)
    assert not {"rows", "comparisons", "growth", "batch_ratio"} & set(result)
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(2)
    assert (result["num_steps"], result["best_of"]) == (3, 2)
    assert result["first_seconds"] > 0 and result["compile_seconds"] > 0


def test_flags_reach_the_config():
    settings = Settings(
        **{**TINY, "size": "3xs"},
        system=2,
        refine_steps=5,
        candidate_input="anchored",
        conditioning="adaln",
        dtype="bfloat16",
        block=7,
        remat="dots",
        unroll=3,
        attention_block=9,
    )
    config = bench_config(settings, "ebt", 4)
    model, refine = config.model, config.refine
    assert (model.size, model.layers, model.vocab_size) == ("3xs", 1, 17)
    assert (model.candidate_input, model.conditioning) == ("anchored", "adaln")
    assert (model.dtype, model.remat) == ("bfloat16", "dots")
    assert (model.unroll, model.attention_block) == (3, 9)
    assert (refine.num_steps, refine.min_steps, refine.block) == (5, 4, 7)
    assert (refine.backprop, config.objective.loss_steps) == ("truncated", "last")
    assert (config.train.batch_size, config.data.context) == (4, 4)


def test_systems_are_as_published():
    first = bench_config(Settings(), "ebt", 1)
    assert (first.refine.num_steps, first.refine.num_landscapes) == (2, 2)
    assert (first.refine.backprop, first.refine.step_size) == ("per_step", 500)
    assert first.refine.step_size_learnable and first.objective.loss_steps == "all"
    second = bench_config(Settings(system=2), "ebt", 1).refine
    assert (second.min_steps, second.num_steps, second.num_landscapes) == (2, 3, 1)
    assert (second.step_size, second.step_size_jitter, second.noise_std) == (5, 2, 3)
    assert not second.step_size_learnable
    anchored = bench_config(Settings(candidate_input="anchored"), "ebt", 1)
    assert anchored.model.conditioning == "default"


def test_updates_with_a_drawn_number_of_steps_count_by_their_flops(monkeypatch):
    # Updates of two and of three steps that take 0.1 seconds per GFLOP.
    config = bench_config(Settings(**TINY, system=2), "ebt", 2)
    mean = bench_timed._mean_flops(config)
    flops = iter([mean, mean, 0.8 * mean, 1.2 * mean])
    update = lambda: (lambda f: bench_timed.Update(1e-10 * f, f))(next(flops))
    monkeypatch.setattr(bench_timed, "_updates", lambda config, say: update)
    monkeypatch.setattr(bench_timed, "matmul_flops_per_second", lambda dtype: 1e12)
    (row,) = bench_timed.train([[config]], 2, lambda line: None)["rows"]
    assert row["seconds"] == pytest.approx(1e-10 * mean)
    assert row["mfu"] == pytest.approx(2 * 4 * 1e10 / 1e12)


def printing(tmp_path, *lines):
    """A program that prints lines."""
    script = tmp_path / "peer.py"
    script.write_text("".join(f"print({line!r})\n" for line in lines))
    return f"{sys.executable} {script}"


def line(**values):
    whole = {"seconds": 2.0, "tokens_per_second": 4.0, "peak_mib": 100.0}
    return json.dumps(whole | values)


def test_a_peer_is_compared_by_medians_in_alternation(monkeypatch):
    ours, theirs = iter((1.0, 2.0, 4.0)), iter((3.0, 8.0, 4.0))
    asked = []

    def run_json(command, who):
        asked.append((who, command))
        seconds = next(theirs if who == "the peer" else ours)
        peak = 200.0 if who == "the peer" else 50.0
        return {"seconds": seconds, "tokens_per_second": 8 / seconds, "peak_mib": peak}

    monkeypatch.setattr(bench_peer, "run_json", run_json)
    settings = Settings("train", **TINY)
    monkeypatch.setattr(bench_peer.shutil, "which", lambda name: name)
    result = bench_peer.against_peer(settings, "fast 'a b'", lambda line: None)
    assert [who for who, _ in asked] == ["our benchmark", "the peer"] * 3
    assert asked[1][1] == ["fast", "a b"]
    assert asked[0][1][:5] == [sys.executable, "-m", "ebt_jax", "bench", "train"]
    assert set(FLAGS) <= set(asked[0][1])
    assert (result["seconds"], result["tokens_per_second"]) == (2.0, 4.0)
    assert result["peer"] == {
        "command": "fast 'a b'",
        "seconds": 4.0,
        "tokens_per_second": 2.0,
        "peak_mib": 200.0,
    }
    assert result["speedup"] == 2.0 and result["memory_ratio"] == 0.25
    assert result["speedup_rounds"] == [3.0, 4.0, 1.0]
    assert render({"job": "train", **result}).splitlines() == [
        "job=train",
        "",
        "      seconds  tokens/s  peak MiB",
        "ours        2       4.0      50.0",
        "peer        4       2.0     200.0",
        "",
        "peer: fast 'a b'",
        "ours is 2.00 times as fast as the peer (rounds 1.00 to 4.00)",
        "peak memory, ours / peer: 0.25",
    ]


def test_a_peer_runs_against_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    peer = printing(tmp_path, "warming up", line(), "done")
    argv = ["bench", "train", "--model=transformer_pp", *FLAGS, "--rounds=1"]
    assert cli.run([*argv, f"--peer={peer}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"tokens_per_second", "peak_mib", "mfu", "flops_per_token"} <= set(result)
    assert WHERE <= set(result) and result["model"] == "transformer_pp"
    assert result["peer"] == {"command": peer, **json.loads(line())}
    assert result["speedup"] == pytest.approx(2 / result["seconds"])


def test_settings_and_flags_say_the_same():
    settings = Settings(**TINY, batch=(1, 16), system=2, remat="dots")
    verb, job, *flags = bench_peer.command_line(settings)
    values = cli.parse(cli.VERBS[verb], ["bench", job, *flags])
    assert (values.word, values.batch, values.remat) == ("train", "1,16", "dots")
    assert (values.system, values.block, values.vocab) == (2, None, 17)


def test_both_programs_get_the_same_allocator_unless_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, os\n"
        f"print(json.dumps({{**{line()}, 'env': [os.environ[n] for n in {names}]}}))"
    )
    found = bench_peer.run_json([sys.executable, str(script)], "the peer")
    assert found["env"] == ["7", "8589934592"]


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ([], "the peer printed no line of JSON, but 'nothing'"),
        (["[1]", "12 s"], "printed no line of JSON, but '12 s'; it has to print an"),
        (['{"seconds": 1}'], "without 'tokens_per_second', but with seconds; it has"),
        ([line(peak_mib="much")], "printed peak_mib = 'much', but it has to be a pos"),
        ([line(seconds=0)], "the peer printed seconds = 0, but"),
        ([line(seconds=float("nan"))], "the peer printed seconds = nan, but"),
    ],
)
def test_what_a_peer_prints_is_checked(printed, message, tmp_path):
    command = printing(tmp_path, *printed).split()
    with pytest.raises(UserError) as caught:
        bench_peer.run_json(command, "the peer")
    assert message in str(caught.value)


def test_a_peer_that_fails_says_why(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("import sys\nprint('x')\nsys.exit('error: no such card')")
    with pytest.raises(UserError) as caught:
        bench_peer.run_json([sys.executable, str(script)], "the peer")
    assert str(caught.value) == "the peer failed with exit code 1: no such card"


def test_a_peer_that_does_other_work_is_refused(monkeypatch):
    run_json = lambda command, who: json.loads(
        line(tokens_per_second=8 if who == "the peer" else 4)
    )
    monkeypatch.setattr(bench_peer, "run_json", run_json)
    with pytest.raises(
        UserError, match="the peer does 16 tokens at a time, but ours 8"
    ):
        bench_peer.against_peer(Settings(**TINY), sys.executable, lambda line: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "after 'bench' comes one of train, decode, memory, compile, not nothing"),
        (["trian"], "one of train, decode, memory, compile, not 'trian'"),
        (["train", "--size=huge"], "model.size is 'huge'"),
        (["train", "--seq=0"], "--seq=0"),
        (["train", "--batch=0"], "--batch is '0', but has to be one positive integer"),
        (["train", "--batch="], "--batch is ''"),
        (["decode", "--prompt=64,,256"], "--prompt is '64,,256', but has to be"),
        (["decode", "--prompt=64,1e3"], "commas between them, such as 64,256"),
        (["train", "--model=rnn"], "bench model is 'rnn', but has to be one of ebt"),
        (["train", "--system=3"], "bench system is 3, but has to be one of 1, 2"),
        (["memory", "--seq=8", "--seq_to=20"], "from seq (8); make it 16 or 32"),
        (["memory", "--seq=8", "--seq_to=4"], "from seq (8); make it 8 or 16"),
        (["train", "--dtype=int8"], "model.dtype is 'int8'"),
        (["train", "--meta_gradient=x"], "refine.meta_gradient is 'x', but has to be"),
        (["memory", "--peer=x"], "--peer is for bench train and bench decode, not for"),
        (["train", "--peer=x", "--model=both"], "--peer and --model=both do not go"),
        (
            ["train", "--peer=x", "--batch=1,2"],
            "--peer measures one --batch, but 2 are",
        ),
        (["decode", "--peer=x", "--prompt=1,2"], "one --prompt, but 2 are given (1,2)"),
        (["train", "--peer="], "--peer is empty; give it a command"),
        (["train", "--peer='x"], "No closing quotation"),
        (["train", "--peer=x", "--size=huge"], "model.size is 'huge'"),
        (["train", "--peer=/no/such", "--rounds=1"], "'/no/such' was not found"),
    ],
)
def test_errors(flags, message, capsys):
    assert cli.run(["bench", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"job": "sleep"}, "bench job is 'sleep', but has to be one of train, decode"),
        ({"batch": ()}, "bench batch is (), but has to be at least 1"),
        ({"prompt": (3, 0)}, "bench prompt is (3, 0), but has to be at least 1"),
        ({"steps": 0}, "bench steps is 0, but has to be at least 1"),
        ({"layers": -1}, "bench layers is -1, but has to be 0 or more"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(UserError) as caught:
        Settings(**values)
    assert message in str(caught.value)


def test_a_program_that_cannot_be_started_is_named(tmp_path):
    path = tmp_path / "peer"
    path.write_text("")
    with pytest.raises(
        UserError, match="Permission denied; give the path of a program"
    ):
        bench_peer.run_json([str(path)], "the peer")


@pytest.mark.parametrize(
    ("space", "baseline", "tokens"),
    [("image", "dit", 4), ("video", "transformer_pp", 3)],
)
def test_images_and_video_are_timed_beside_their_baselines(space, baseline, tokens):
    sizes = {"image": 4, "channels": 1, "patch": 2, "frame": 6, "seq": 3}
    result = run("train", model="both", space=space, layers=1, steps=1, **sizes)
    ours, other = result["rows"]
    assert (ours["model"], other["model"]) == ("ebt", baseline)
    assert ours["seq"] == tokens and ours["flops_per_token"] > 0
    assert result["comparisons"][0]["flop_ratio"] > 1
    assert f"ebt / {baseline}, batch" in render(result)
    assert f"space={space}" in render(result)


def test_images_and_video_are_not_generated():
    with pytest.raises(UserError, match="bench decode is of text, but space"):
        Settings(job="decode", space="video")
