"""experiments/: statistics, tables that are those of their json, sweeps that go on where they were killed."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.create_model import main as create_model
from experiments import draw_band, draw_selection, draw_torus, stats, sweep
from experiments.adaptive.protocol import SHARED, shared
from experiments.initial_model import main as initial_model
from experiments.report import verdict
from experiments.run import BEGIN, END, FOLDER, FRONT, NAMES, block, front
from experiments.run import main as run_experiments
from experiments.sweep import Sweep, write_result
from llmc.checkpoint import named_views, read_model, tensor_shapes
from llmc.dataloader import write_tokens
from llmc.errors import UserError
from llmc.plot import main as plot
from llmc.plot import read_log, smoothed
from systems.band import Band
from systems.selection import kept_pairs

ROOT = Path(__file__).parent.parent
TRAINERS = {name: importlib.import_module(name) for name in ("train_banded", "train_sparse_attn", "train_toroidal")}
SWEEPS = [
    (name, preset) for name in NAMES for preset in importlib.import_module(f"experiments.{name}.protocol").PRESETS
]


# ----------------------------------------------------------------------------------------------------------------------
# statistics: values from tables of the distributions, and upstream's table of experiment 5, recomputed

PUBLISHED = {  # length: (mean, population deviation of 3 runs) of drop ratios .25 .33 .5 .67 .75 .9
    64: [(18.090, 0.209), (18.375, 0.215), (18.767, 0.134), (18.926, 0.061), (18.972, 0.192), (18.950, 0.134)],
    128: [(16.776, 0.105), (17.112, 0.143), (17.496, 0.090), (17.762, 0.156), (17.829, 0.170), (17.748, 0.089)],
    256: [(15.742, 0.055), (15.974, 0.098), (16.386, 0.107), (16.645, 0.133), (16.681, 0.124), (16.654, 0.076)],
    512: [(14.826, 0.247), (15.054, 0.220), (15.498, 0.311), (15.802, 0.337), (15.906, 0.274), (15.883, 0.142)],
}
RECOMPUTED = {64: (9.65, 0.80, 4.41, 3.60, 2.88), 128: (21.5, 0.90, 7.45, 6.08, 4.87)}
RECOMPUTED |= {256: (30.6, 0.93, 9.78, 7.98, 6.39), 512: (6.11, 0.72, 4.15, 3.39, 2.71)}


def three_runs(mean: float, deviation: float) -> list[float]:
    """Three values with this mean and population deviation."""
    return [mean - deviation * np.sqrt(1.5), mean, mean + deviation * np.sqrt(1.5)]


@pytest.mark.parametrize("T", PUBLISHED)
def test_published_table_of_experiment_5(T):
    """F, eta squared, d with either deviation and g: from means of three decimals, so to 1 %."""
    x = np.array([three_runs(*each) for each in PUBLISHED[T]])
    F, eta2, d_population, d, g = RECOMPUTED[T]
    found = stats.one_way(x)
    assert found["F"] == pytest.approx(F, rel=0.01) and found["eta2"] == pytest.approx(eta2, abs=0.006)
    assert (found["df"], found["df_error"]) == (5, 12)
    assert stats.cohens_d(x[4], x[0], ddof=0) == pytest.approx(d_population, rel=0.01)
    assert stats.cohens_d(x[4], x[0]) == pytest.approx(d, rel=0.01)
    assert stats.hedges_g(x[4], x[0]) == pytest.approx(g, rel=0.01)


def test_power_of_the_published_design():
    """8.6 % for a medium effect at 3 runs; 36 runs for 80 %."""
    power = [stats.anova_power(0.25, 6, n) for n in (3, 10, 36)]
    np.testing.assert_allclose(power, [0.08564, 0.24935, 0.81127], atol=1e-5)
    assert stats.seeds_needed(0.25, 6) == 36


def test_p_values_of_the_distributions():
    """F's SF(9.65; 5, 12), the studentized range's SF(4; 6, 12) and quantile, t's two-sided p (2.5; 4)."""
    from scipy.stats import f, studentized_range, ttest_1samp

    assert f.sf(9.65, 5, 12) == pytest.approx(6.9146e-4, rel=1e-4)
    assert studentized_range.sf(4, 6, 12) == pytest.approx(0.119403, rel=1e-5)
    assert studentized_range.isf(0.05, 6, 12) == pytest.approx(4.75023, rel=1e-5)
    x = np.array([-2.0, -1, 0, 1, 2])
    x = x + 2.5 * x.std(ddof=1) / np.sqrt(5)
    assert ttest_1samp(x, 0).pvalue == pytest.approx(0.0667665, rel=1e-5)
    interval = stats.mean_interval(x)  # t(0.975; 4) = 2.776445
    assert interval.half == pytest.approx(2.776445 * x.std(ddof=1) / np.sqrt(5), rel=1e-6)
    assert not interval.excludes(0) and interval.excludes(-1)


def test_blocked_design_takes_the_seeds_out():
    """F by sums of squares; a seed's own level, however large, changes nothing; Tukey and Holm by their definitions."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5)) * 0.1 + np.array([[0.0], [0.1], [0.2], [0.6]])
    found = stats.blocked(x)
    between = 5 * ((x.mean(1) - x.mean()) ** 2).sum()
    seeds = 4 * ((x.mean(0) - x.mean()) ** 2).sum()
    error = ((x - x.mean()) ** 2).sum() - between - seeds
    assert found["F"] == pytest.approx((between / 3) / (error / 12), rel=1e-9) and found["df_error"] == 12
    level = x + 100 * rng.normal(size=5)
    assert stats.blocked(level)["F"] == pytest.approx(found["F"], rel=1e-6)
    from scipy.stats import studentized_range, ttest_rel

    q = abs(x[0].mean() - x[3].mean()) / np.sqrt(error / 12 / 5)
    assert stats.tukey(x)[0, 3] == pytest.approx(studentized_range.sf(q, 4, 12), rel=1e-6)
    plain = sorted(ttest_rel(x[i], x[j]).pvalue for i in range(4) for j in range(i))
    assert min(stats.paired_tests(x, "holm").values()) == pytest.approx(min(1, 6 * plain[0]))
    assert sorted(stats.paired_tests(x, "bonferroni").values())[1] == pytest.approx(min(1, 6 * plain[1]))


def test_verdicts_claim_no_more_than_the_data():
    assert verdict([1.0, 1.1, 0.9], "costs", "helps").startswith("costs: +1.00 [+0.75, +1.25]")
    assert verdict([-1.0, -1.1, -0.9], "costs", "helps").startswith("helps: ")
    assert re.fullmatch(
        r"no difference found: \+0.03 \[-0.\d+, \+0.\d+\], 0.\d+ would have been", verdict([0.1, -0.1, 0.1], "", "")
    )
    assert "shows nothing" in verdict([1.0], "costs", "helps")
    from scipy.stats import nct, t

    differences = np.array([0.1, -0.1, 0.2, -0.2])
    size = stats.detectable(differences) / (differences.std(ddof=1) / 2)  # noncentrality of n = 4
    assert nct.sf(t.isf(0.025, 3), 3, size) + nct.cdf(-t.isf(0.025, 3), 3, size) == pytest.approx(0.8, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# protocols and their pages


@pytest.mark.parametrize("name, preset", SWEEPS)
def test_protocols_name_what_trainers_take(name, preset):
    """Flags parse; names are unique, the same for all seeds; what a run needs stands in front of it."""
    this = Sweep(name, preset, FOLDER / name)
    first, second = (this.runs(seed) for seed in (1, 2))
    names = [each.name for each in first]
    assert names == [each.name for each in second] and len(set(names)) == len(names) > 1
    for place, each in enumerate(first):
        flags = each.flags.format(k=3).split()
        args = TRAINERS[each.trainer.removesuffix(".py")].arguments().parse(flags)
        assert args.steps >= 0 and args.seq_len
        assert (ROOT / each.data.split()[0]).exists() and bool(each.model) != bool(each.after)
        for needed in filter(None, (each.after, each.match)):
            assert needed in names[:place]
        assert ("{k}" in each.flags) == bool(each.match)


@pytest.mark.parametrize("name", NAMES)
def test_pages_show_the_results_on_file(name):
    """What stands between a README's markers is what the protocol makes of the json today."""
    page = (FOLDER / name / "README.md").read_text()
    for preset in ("cpu", "gpu"):
        assert page.count(BEGIN.format(preset)) == 1
        text = page.partition(BEGIN.format(preset))[2].partition(END)[0]
        assert text == block(Sweep(name, preset, FOLDER / name))


@pytest.mark.parametrize("name", FRONT)
def test_readme_shows_the_results_on_file(name):
    page, begin = (ROOT / "README.md").read_text(), BEGIN.format(f"{name} cpu")
    assert page.count(begin) == 1
    assert page.partition(begin)[2].partition(END)[0] == front(Sweep(name, "cpu", FOLDER / name))


def made_up(each, rng) -> dict:
    """What a run could have printed, without running it."""
    steps, T = int(each.flag("-n")), int(each.flag("-t"))
    start = 4 + 0.01 * rng.random()
    found = {"parameters": 10**5, "trained": 1000, "activation_MiB": 1, "parameters_in_all": 11 * 10**4}
    found |= {"fc1_kept": 500, "fc_full": 1000} if "banded" in each.name or "fc1" in each.name else {}
    if each.trainer == "train_sparse_attn.py" and "--attention dense" not in each.flags:
        found |= {"kept_pairs": [T * 3.0, T * 3.1], "causal_pairs": T * (T + 1) // 2}
    found |= {"answers": [[0, 0.1], [steps, 0.9]]} if "--answers-after" in each.flags else {}
    return {
        "preset": "smoke",
        "name": each.name,
        "seed": each.seed,
        "settings": dict(each.settings),
        "commands": ["python data", "python data/create_model.py --vocab byte", f"python {each.trainer} {each.flags}"],
        "val_loss": [[0, start], *([[steps // 2, 3.5], [steps, 3 + 0.01 * rng.random()]] if steps else [])],
        "found": found,
        "measured": {"ms_per_step": 1 + rng.random(), "memory_MiB": 50, "seconds": 1.0},
        "diverged": None,
        "device": "CPU",
        "versions": {"processor": "p", "blas": "b"},
        "code": "c",
        "data": {"d": "s"},
    }


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_reports_of_a_sweep_that_has_only_begun(name, seeds, tmp_path):
    """One seed gives the same tables as three, without intervals; no cell is left empty for want of a number."""
    this, rng = Sweep(name, "smoke", tmp_path), np.random.default_rng(0)
    found = [made_up(each, rng) for seed in range(1, seeds + 1) for each in this.runs(seed)]
    text = this.protocol.report(found) + (this.protocol.headline(found) if name in FRONT else "")
    if seeds == 1:
        this.protocol.draw(found, tmp_path)
        assert (tmp_path / "smoke.png").read_bytes().startswith(b"\x89PNG")
    assert "nan" not in text and "inf" not in text.replace("find", "") and " - |" not in text
    assert bool(re.search(r"\[[+-]\d", text)) == (seeds > 1) and text.count("| published claim |") == 1
    assert ("of one seed, which shows nothing" in text) == (seeds == 1 and name != "optimal_sparsity")


def test_runs_that_were_added_later_are_not_needed(tmp_path):
    """Experiment 3 is complete without keys that queries share; its tables have an arm once every seed does."""
    this, rng, texts = Sweep("adaptive", "smoke", tmp_path), np.random.default_rng(0), []
    results = [made_up(each, rng) for seed in (1, 2) for each in this.runs(seed)]
    later = {each.name for each in this.runs(1) if each.later}
    assert len(later) == 4 and all("share" in name for name in later)
    for names in (set(), {"text_32_share_0_5"}, later):  # of seed 2, which lacks the others
        for path in tmp_path.rglob("*.json"):
            path.unlink()
        for each, result in zip([*this.runs(1), *this.runs(2)], results):
            if not each.later or each.seed == 1 or each.name in names:
                write_result(this.path(each), result)
        found = this.complete()
        assert len(found) == len(results) - 4 + len(names)
        texts.append(this.protocol.report(found))
    shared = [re.findall(r"^\| (.* against a list for each query) \|", text, re.M) for text in texts]
    assert [len(rows) for rows in shared] == [0, 1, 4] and shared[1] == [
        "text 32: share 0.5 against a list for each query"
    ]
    assert [text.count("\n| share 0.5 |") for text in texts] == [0, 1, 2]
    for each in this.runs(1):  # without a seed's other runs it is not complete
        if each.name == "text_32_prefix":
            this.path(each).unlink()
    assert {result["seed"] for result in this.complete()} == {2}


def test_shared_keys_have_as_many_pairs():
    for T in (32, 64, 128, 256):
        for arm in SHARED:
            share, k = map(int, re.fullmatch(r"--share (\d+) --top-k (\d+)", shared(arm, T)).groups())
            own = kept_pairs(int(float(arm.split()[1]) * T), T)
            assert share == T // 16 and k >= 2 * share
            assert abs(kept_pairs(k, T, share) / own - 1) < (0.03 if T > 32 else 0.06)


def test_no_band_of_00009_is_all_ones():
    """And a narrower MLP has the parameters of both bands, to one hidden unit."""
    from kernels.cpu.band.band_mask import band_count

    protocol = importlib.import_module("experiments.00009.protocol")
    for preset in protocol.PRESETS.values():
        C = preset["C"]
        for width, share in zip(protocol.bandwidths(C), (0.75, 0.44, 0.24)):
            kept = band_count(4 * C, C, width)
            assert kept / (4 * C * C) == pytest.approx(share, abs=0.01)
            assert abs((2 * C + 1) * protocol.same_parameters(C, width) - (2 * kept + 4 * C)) <= 2 * C + 1


# ----------------------------------------------------------------------------------------------------------------------
# sweeps


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [
        sys.executable,
        ROOT / "experiments" / "run.py",
        "00009",
        "--preset",
        "smoke",
        "--folder",
        folder,
        *words,
    ]
    return subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(folder: Path) -> dict[str, dict]:
    """{file: result}, but for times and memory."""
    paths = sorted((folder / "00009" / "results" / "smoke").glob("*.json"))
    return {path.name: json.loads(path.read_text()) | {"measured": None} for path in paths}


def killed_and_resumed(folder: Path, *words: str, at: int) -> None:
    """Killed when `at` runs are on file, then run to its end, which makes only those that are not."""
    process = start(folder, *words)
    deadline = time.monotonic() + 120
    while len(results(folder)) < at:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert len(before) >= at
    printed, _ = start(folder, *words).communicate()
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert all(after[path] == written for path, written in before.items())
    assert printed.startswith(f"{len(after) - len(before)} runs to make")


def test_killed_sweep_goes_on(tmp_path):
    """kill -9 in the middle, then the same command: the json of a sweep that nobody killed, apart from times."""
    only = ("--seeds", "1", "--only", "permuted", "--jobs", "1")
    killed_and_resumed(tmp_path / "killed", *only, at=1)
    start(tmp_path / "whole", *only).communicate()
    killed, whole = results(tmp_path / "killed"), results(tmp_path / "whole")
    assert killed == whole and [*whole] == ["fc1_32_permuted_lr0.003.1.json", "fc1_64_permuted_lr0.003.1.json"]
    narrow, wide = whole.values()
    assert len(wide["train_loss"]) == 20 and [step for step, _ in wide["val_loss"]] == list(range(0, 21, 2))
    assert narrow["found"]["fc1_kept"] < wide["found"]["fc1_kept"] < wide["found"]["fc_full"] == 2 * 4 * 32 * 32
    assert 0 < abs(wide["val_loss"][0][1] - narrow["val_loss"][0][1]) < 0.01  # one model, two bands


def test_failed_run_stops_no_others(tmp_path, monkeypatch, capsys):
    """But those that need it; the sweep ends with an error, and a run that diverged is a result."""
    this = Sweep("adaptive", "smoke", tmp_path)
    names = ("text_32_before", "text_32_dense", "random_32_causal", "random_32_leak_1")
    todo = [(this, each) for each in this.runs(1) if each.name in names]

    def perform(sweep, each):
        if each.name == "text_32_before":
            raise UserError("no memory")
        diverged = 7 if each.name == "random_32_causal" else None
        return {"diverged": diverged, "val_loss": [[0, 1.5]], "measured": {"seconds": 2.0}}

    monkeypatch.setattr(sweep, "perform", perform)
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        sweep.perform_all(todo, 2)
    printed = capsys.readouterr().out
    assert printed.count("failed: no memory") == 2 and "random_32_causal, seed 1: diverged at step 7" in printed
    assert "random_32_leak_1, seed 1: val 1.5000, 2 s" in printed and "[4/4, 100%, 0 s left]" in printed


@pytest.mark.slow
def test_whole_smoke_sweep(tmp_path):
    """make experiment NAME=00009 PRESET=smoke: killed in the middle, under two minutes in all, its page filled."""
    began = time.monotonic()
    (tmp_path / "00009").mkdir()
    (tmp_path / "00009" / "README.md").write_text(f"{BEGIN.format('smoke')}{END}")
    killed_and_resumed(tmp_path, at=20)
    assert time.monotonic() - began < 120
    page = (tmp_path / "00009" / "README.md").read_text()
    assert len(results(tmp_path)) == 38 and "| both 32 | 24.1 % | 24.1 % |" in page and "38 runs, preset smoke" in page
    assert (tmp_path / "00009" / "smoke.png").read_bytes().startswith(b"\x89PNG")


def test_another_flag_code_or_data_is_another_run(monkeypatch):
    this = Sweep("00009", "smoke", FOLDER / "00009")
    dense, banded, *_ = this.runs(1)
    assert this.key(dense) == this.key(dense) != this.key(banded)
    before = this.key(dense)
    monkeypatch.setattr(sweep, "code", lambda trainer, device: "other")
    assert this.key(dense) != before
    files = {str(path) for path in sweep.imported("train_banded.py", "cpu")}
    assert {"train_banded.py", "systems/band.py", "kernels/cpu/gpt2/adamw.py", "llmc/loop.py"} <= files
    assert not any(path.startswith(("experiments", "tests", ".venv")) for path in files)


def recorded() -> list[Path]:
    return sorted(FOLDER.glob("00009/results/cpu/*.json"))


def test_recorded_run_repeats(tmp_path):
    """The commands of a result on file, cut to five steps, give its first losses: same weights, data and arithmetic."""
    result = json.loads(recorded()[0].read_text())
    for command in result["commands"]:
        command = re.sub(r"-n \d+", "-n 5", command.replace("build/experiments", str(tmp_path)))
        for folder in ("models", "data"):
            (tmp_path / folder).mkdir(exist_ok=True)
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
    losses = sweep.read_output(done.stdout)
    np.testing.assert_allclose(losses["train_loss"], result["train_loss"][:5], atol=2e-4)
    assert losses["val_loss"][0][1] == pytest.approx(result["val_loss"][0][1], abs=2e-5)
    assert losses["found"].get("fc2_kept") == result["found"].get("fc2_kept")


def test_results_on_file_are_small():
    for path in FOLDER.glob("*/results/*/*.json"):
        assert path.stat().st_size < 40_000
        result = json.loads(path.read_text())
        assert {"commands", "key", "code", "data", "versions", "device", "seed", "measured"} <= result.keys()
        assert str(ROOT) not in path.read_text()


# ----------------------------------------------------------------------------------------------------------------------
# initial weights, pictures


def test_narrower_mlp_stays_narrow(tmp_path, monkeypatch):
    """Three steps with weight decay leave the hidden units that were cut off at exactly 0, and move all others."""
    monkeypatch.chdir(tmp_path)
    create_model(["--vocab", "64", "-C", "16", "-L", "2", "-H", "2", "-T", "16", "-o", "whole.bin"])
    initial_model(shlex.split("-e whole.bin -o narrow.bin --hidden 40 --residual unscaled --biases uniform"))
    rng = np.random.default_rng(0)
    write_tokens(tmp_path / "data.bin", rng.integers(0, 64, 500).astype(np.uint16))
    flags = "-e narrow.bin -i data.bin -j data.bin -b 2 -t 16 -n 3 -v 0 -m 1 -s 0 -d 1 -c out.bin --device cpu"
    TRAINERS["train_banded"].main([*flags.split(), "--weight-decay", "0.1", "-l", "1e-2"])
    whole, narrow, out = (read_model(tmp_path / f"{name}.bin") for name in ("whole", "narrow", "out"))
    before, start_, after = (named_views(each.params, tensor_shapes(each.config)) for each in (whole, narrow, out))
    for name, cut, kept in (
        ("fcw", np.s_[:, 40:], np.s_[:, :40]),
        ("fcb", np.s_[:, 40:], np.s_[:, :40]),
        ("fcprojw", np.s_[:, :, 40:], np.s_[:, :, :40]),
    ):
        assert np.all(after[name][cut] == 0) and np.all(after[name][kept] != start_[name][kept])
    np.testing.assert_allclose(start_["attprojw"], 2 * before["attprojw"])  # sqrt(2 L) = 2
    assert np.abs(start_["qkvb"]).max() <= 0.25 and start_["qkvb"].std() == pytest.approx(0.25 / np.sqrt(3), rel=0.2)


def test_smoothed_loss():
    np.testing.assert_allclose(smoothed([1.0, 2, 3, 4, 5], 3), [1.5, 2, 3, 4, 4.5])
    np.testing.assert_allclose(smoothed([1.0, 2], 5), [1.5, 1.5])


def test_plot_draws_several_logs(tmp_path):
    """Ours and llm.c's main.log, in which a line has more than one figure."""
    for name, offset in (("log_dense.txt", 0), ("log_sparse.txt", 1)):
        lines = [f"s:{step} trl:{5 - step / 50 + offset:.4f}\n" for step in range(60)]
        (tmp_path / name).write_text(
            "s:0 tel:5.0000\n" + "".join(lines) + "s:60 tel:4.0000\n" + f"s:60 kl:0.{offset}\n"
        )
    (tmp_path / "main.log").write_text("s:0 tel:5.1\ns:0 trl:5.2 lr:0.0001 norm:1.25\n")
    assert read_log(tmp_path / "main.log") == {"tel": [(0, 5.1)], "trl": [(0, 5.2)]}
    logs = [str(tmp_path / name) for name in ("log_dense.txt", "log_sparse.txt", "main.log")]
    assert plot([*logs, "-o", str(tmp_path / "out.png"), "--mark", "20"]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_checkpoints(tmp_path, monkeypatch):
    """The three scripts on what the trainers wrote; what is drawn of a band and of a ring is what they are."""
    monkeypatch.chdir(tmp_path)
    create_model(["--vocab", "64", "-C", "16", "-L", "2", "-H", "2", "-T", "16", "-o", "model.bin"])
    write_tokens(tmp_path / "data.bin", np.random.default_rng(0).integers(0, 64, 500).astype(np.uint16))
    every = shlex.split("-e model.bin -i data.bin -j data.bin -b 2 -t 16 -n 2 -v 0 -m 1 -s 0 --device cpu -c")
    TRAINERS["train_banded"].main([*every, "band.bin", "-1", "16", "-2", "16"])
    TRAINERS["train_sparse_attn"].main([*every, "sparse.bin", "--top-k", "3", "--indexer-warmup", "1"])
    TRAINERS["train_toroidal"].main([*every, "torus.bin", "--layers", "1", "--period", "12"])
    assert draw_band.main(shlex.split("-e band.bin --before model.bin -o band.png")) == 0
    assert draw_selection.main(shlex.split("-e sparse.bin -j data.bin -t 16 -o sparse.png")) == 0
    assert draw_torus.main(shlex.split("-e torus.bin -t 16 -o torus.png")) == 0
    for name in ("band", "sparse", "torus"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    file = read_model("sparse.bin")
    inputs = np.arange(16, dtype=np.int32)[None]
    for selector in draw_selection.SELECTORS:
        for p, mask in draw_selection.layers_of("sparse.bin", file, inputs, selector):
            np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
            assert not np.triu(p, 1).any() and [*mask.sum(1)] == [1, 2, *[3] * 14] and mask.diagonal().all()
    recent = draw_selection.layers_of("sparse.bin", file, inputs, "recency")[0][1]
    assert all(recent[t, t - 2 : t + 1].all() for t in range(2, 16))
    weights = draw_band.weights_of("band.bin", 0, Band(16, 16))
    offsets, sizes = draw_band.along_the_band(weights["fcw"])
    assert [*offsets] == [*range(-8, 9)] and 0.01 < sizes.min() < sizes.max() < 0.04
    ring = draw_torus.distances(16, 12, -1)
    assert ring[14, 14] == 0 and ring[14, 8] == 0.5 and ring[14, 3] == ring[14, 13] == 1 / 12 and ring[14, 2] == 0
    assert np.isnan(ring[3, 4])


def test_matched_run_keeps_as_many_pairs(tmp_path):
    """A run that goes on from another, and takes its k from a third: both are made before it; k is the nearest."""
    words = ["adaptive", "--preset", "smoke", "--folder", str(tmp_path), "--seeds", "1", "--only"]
    assert run_experiments([*words, "text_32_before"]) == 0
    assert run_experiments([*words, "text_32_recency"]) == 0
    made = {path.name.partition(".")[0]: json.loads(path.read_text()) for path in tmp_path.rglob("*.json")}
    assert [*sorted(made)] == ["text_32_before", "text_32_prefix", "text_32_recency"]
    prefix, recency = made["text_32_prefix"], made["text_32_recency"]
    k, wanted = recency["settings"]["k"], np.mean(prefix["found"]["kept_pairs"])
    kept = np.array([kept_pairs(each, 32) for each in range(1, 33)])
    assert recency["found"]["kept_pairs"] == [kept[k - 1]] * 2 and abs(kept - wanted).argmin() == k - 1
    assert f"--top-k {k} " in recency["commands"][-1] and len(recency["commands"]) == 2
    learnt = made["text_32_before"]["val_loss"][-1][1]
    assert prefix["val_loss"][0] == [0, learnt] and recency["val_loss"][0][1] != learnt
