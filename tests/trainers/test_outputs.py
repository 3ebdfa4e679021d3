"""What a run may write: nothing that is another's, nothing that is not finite, nothing without a word."""

import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import check_refused, done, losses, snapshot

import train_banded
import train_sparse_attn
import train_toroidal
from llmc import lock
from llmc.checkpoint import GPT2Config, Model, num_parameters
from llmc.errors import UserError
from llmc.resume import load_checkpoint, not_finite, other_spelling, save_checkpoint
from llmc.state import TrainState

TRAINERS = {"banded": train_banded, "sparse": train_sparse_attn, "toroidal": train_toroidal}


@pytest.fixture
def call(folder, capfdbinary):
    """call("-n 3 -c c.bin", "sparse") -> Result: a trainer on the tiny files, in this process, --overwrite left out."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(flags="", trainer="banded", **changed):
        argv = [*tiny.options(**{"overwrite": None} | changed), *shlex.split(flags)]
        return tiny.call(capfdbinary, TRAINERS[trainer].main, *argv)

    yield run
    signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------------------
# what is not finite


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("how", ["-k 1", "-k 1 -v 1", "-k 5", "stopped"])
def test_a_run_that_diverges_leaves_the_last_good_pair(call, monkeypatch, trainer, how):
    """-l 1e20 gives weights whose loss is NaN: they are never saved, periodically, at the end or on Ctrl-C."""
    flags = "-s 0 -v 0 -m 1 " + ("--train all" if trainer == "toroidal" else "")
    done(call(f"-n 3 -c c.bin {flags}", trainer))
    if how == "stopped":
        learning_rate, stops = TRAINERS[trainer].learning_rate, [3]

        def then_stop(schedule, step, **settings):
            if step in stops:
                stops.clear()
                os.kill(os.getpid(), signal.SIGINT)
            return learning_rate(schedule, step, **settings)

        monkeypatch.setattr(TRAINERS[trainer], "learning_rate", then_stop)
    result = call(f"--resume c.bin -n 60 -l 1e20 {'' if how == 'stopped' else how}", trainer)
    assert result.code == 1 and result.err.count("error: ") == 1, result
    assert "c.bin of before stays as it is" in result.err or "c.bin stays as it is" in result.err
    model, state = load_checkpoint("c.bin")
    for values in (model.params, model.extra, state.m, state.v):
        assert np.isfinite(values).all()
    assert model.step == 3
    assert sorted(path.name for path in Path().glob("c*")) == ["c.bin", load_state_name()]
    done(call(f"--resume c.bin -n {model.step + 2} -l 1e-4 --grad-clip 1 -v 0 -s 0", trainer))


def load_state_name() -> str:
    (state,) = Path().glob("c_state_*")
    return state.name


def test_an_indexer_that_diverges_is_told_by_its_kl(call):
    """The language loss stays finite: select_topk takes NaN for the lowest score."""
    done(call("-n 3 -c c.bin -s 0 -v 0 --indexer-heads 2 --indexer-dim 8 --top-k 4", "sparse"))
    before = snapshot(Path())
    result = call("--resume c.bin -n 9 -k 1 --indexer-lr-sparse 3e38 -v 0 -s 0", "sparse")
    check_refused(result, "indexer", "c.bin")
    model, _ = load_checkpoint("c.bin")
    assert np.isfinite(model.extra).all() and model.step == 3
    assert snapshot(Path()) == before
    result = call("--resume c.bin -n 9 --indexer-lr-sparse 3e38 -v 0 -s 0", "sparse")
    check_refused(result, "indexer's loss", "at step 5")  # step 4 spoils the weights, the next one sees it
    assert snapshot(Path()) == before


def pair(step: int) -> tuple[Model, TrainState]:
    """A model with five extra values, and its state: every number in them is the step."""
    config = GPT2Config(maxT=2, V=3, L=1, NH=1, C=4, Vp=4)
    n = num_parameters(config)
    model = Model(config, np.full(n, step, np.float32), step, extra=np.full(5, step, np.float32))
    return model, TrainState(step, 1, 0, 0, np.full(n + 5, step, np.float32), np.full(n + 5, step, np.float32))


@pytest.mark.parametrize("part", ["params", "extra", "m", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_part_of_a_checkpoint_is_checked(tmp_path, part, value):
    path = tmp_path / "c.bin"
    save_checkpoint(path, *pair(1))
    before = snapshot(tmp_path)
    model, state = pair(2)
    array = getattr(model if part in ("params", "extra") else state, part)
    array[-1] = value
    tensor = "lnfb" if part == "params" else "the extra tensors"
    what = part if part in "mv" else "weight"
    with pytest.raises(UserError, match=f"after 2 steps a {what} of {tensor} is {value}"):
        save_checkpoint(path, model, state)
    assert snapshot(tmp_path) == before


def test_not_finite_looks_at_all_blocks():
    values = np.zeros((1 << 22) + 5, np.float32)
    assert not_finite(values) is None
    values[-2] = np.inf
    assert not_finite(values) == values.size - 2


# ----------------------------------------------------------------------------------------------------------------------
# what is another's


@pytest.mark.parametrize(
    "flags, words",
    [
        ("-c c.bin", ["-c c.bin: exists already", "--resume c.bin", "--overwrite 1"]),
        ("-c other.bin -o log.txt", ["-o log.txt: exists already", "--overwrite 1"]),
        ("-c model.bin", ["-c model.bin: is the file of -e"]),
        ("-c linked.bin", ["-c linked.bin: exists already"]),
        ("-o model.bin", ["-o model.bin: is the file of -e"]),
        ("-c new.bin -o new.bin", ["-o new.bin: is the file of -c"]),
        ("-c new.bin -o ./new.bin", ["-o ./new.bin: is the file of -c"]),
        ("-c c", ["-c c: c.bin beside it keeps its state under the same name"]),
        ("-c plain.bin", ["-c plain.bin: plain beside it keeps its state under the same name"]),
        ("--resume c.bin -c second.bin -n 5", ["-c second.bin: exists already"]),
        ("--resume c.bin -n 5 -o other.txt", ["-o other.txt: exists already", "goes on with it"]),
    ],
)
def test_what_is_there_already_is_refused(call, flags, words):
    done(call("-n 2 -c c.bin -o log.txt"))
    done(call("-n 1 -c second.bin -o other.txt"))
    done(call("-n 1 -c plain"))
    os.symlink("second.bin", "linked.bin")
    before = snapshot(Path())
    check_refused(call(flags if "-n" in flags else f"-n 2 {flags}"), *words, code=2)
    assert snapshot(Path()) == before


def test_overwrite_replaces_and_says_what_it_drops(call):
    done(call("-n 2 -v 1 -c c.bin -o log.txt"))
    old = load_state_name()
    out = done(call("-n 1 -c c.bin -o log.txt --overwrite 1")).out
    assert "c.bin exists: the first save of this run replaces it\n" in out
    assert f"dropped {old}, which an earlier run left\n" in out
    assert "log.txt: dropped 5 of its lines, from step 0 on\n" in out  # 3 validations, 2 training losses
    assert load_checkpoint("c.bin")[1].step == 1 and load_state_name() != old
    out = done(call("--resume c.bin -n 4")).out
    assert "an earlier run" not in out and "exists" not in out  # its own earlier save


def test_a_resumed_run_drops_what_came_after_its_save_and_says_so(call):
    done(call("-n 4 -v 2 -c c.bin -o log.txt"))
    with open("log.txt", "a") as log:
        log.write("s:4 trl:1.0000\ns:5 trl:1.0000\n")
    out = done(call("--resume c.bin -n 6")).out
    assert "log.txt: dropped 3 of its lines, from step 4 on\n" in out  # the last validation is repeated
    Path("log.txt").unlink()
    assert "log.txt is gone: a new log begins with this run" in done(call("--resume c.bin -n 7")).out


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="not on Windows")
def test_a_log_may_be_a_device_that_keeps_nothing(call):
    before = snapshot(Path())
    for _ in range(2):
        assert len(losses(done(call("-n 2 -o /dev/null")).out)) == 2
    assert snapshot(Path()) == before and not os.path.isfile("/dev/null")


@pytest.mark.parametrize("name, flag", [("c.bin", "-c"), ("log.txt", "-o")])
def test_a_read_only_file_is_refused_at_the_start(call, name, flag):
    done(call("-n 2 -c c.bin -o log.txt"))
    os.chmod(name, 0o444)
    before = snapshot(Path())
    for flags in ("--resume c.bin -n 4", f"-n 3 {flag} {name} --overwrite 1"):
        check_refused(call(flags), f"{flag} ", f"{name}: is read-only", "chmod u+w")
    assert snapshot(Path()) == before and os.stat(name).st_mode & 0o777 == 0o444


def test_a_state_that_is_read_only_stays(call):
    done(call("-n 2 -c c.bin"))
    kept = load_state_name()
    os.chmod(kept, 0o444)
    done(call("--resume c.bin -n 4"))
    assert Path(kept).exists() and len(list(Path().glob("c_state_*"))) == 2


def test_the_mode_of_a_checkpoint_stays(call):
    done(call("-n 2 -c c.bin"))
    os.chmod("c.bin", 0o640)
    done(call("--resume c.bin -n 3"))
    assert os.stat("c.bin").st_mode & 0o777 == 0o640


def test_leftovers_of_a_killed_save_go(call):
    done(call("-n 2 -c c.bin"))
    state = load_state_name()
    for name in (".c.bin.4000000.tmp", f".{state}.4000000.tmp", ".other.bin.4000000.tmp"):
        Path(name).write_bytes(b"half")
    done(call("--resume c.bin -n 3"))
    assert [path.name for path in Path().glob(".*")] == [".other.bin.4000000.tmp"]


def test_a_checkpoint_behind_a_link_keeps_its_state_beside_itself(call):
    os.mkdir("store")
    done(call("-n 2 -c store/c.bin"))
    os.symlink("store/c.bin", "link.bin")
    done(call("--resume link.bin -n 3"))
    assert load_checkpoint("store/c.bin")[1].step == load_checkpoint("link.bin")[1].step == 3
    assert not list(Path().glob("link_state*")) and os.path.islink("link.bin")


@pytest.mark.parametrize("name, twin", [("run", "run.bin"), ("run.bin", "run"), ("lr_0.1", "lr_0.1.bin")])
def test_names_with_one_base(name, twin):
    assert other_spelling(name) == Path(twin) and other_spelling(twin) == Path(name)


# ----------------------------------------------------------------------------------------------------------------------
# two runs at once


@pytest.mark.parametrize("flags", ["-c c.bin", "-c c", "-c c.bin --overwrite 1", "-c other.bin -o log.txt"])
def test_the_second_of_two_runs_is_refused_and_the_first_is_whole(call, folder, flags):
    process = tiny.start(
        "train_banded.py", [*tiny.options(steps=100000), "-k", "2", "-c", "c.bin", "-o", "log.txt", "-s", "0"], folder
    )
    tiny.wait_for(process, b"val loss")
    result = call(f"-n 2 {flags}")
    check_refused(result, "another run is writing it", f"process {process.pid} on ", code=1)
    tiny.wait_for(process, b"checkpoint saved")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 130 and b"go on with" in out
    assert load_checkpoint("c.bin")[1].step > 0
    assert not list(folder.glob(".*")) and not list(folder.glob("other*"))
    done(call("--resume c.bin -n 100003 -v 0 -s 0".replace("100003", str(load_checkpoint("c.bin")[1].step + 3))))


def test_the_lock_dies_with_its_process(call, folder):
    process = tiny.start("train_banded.py", [*tiny.options(steps=100000), "-k", "1", "-c", "c.bin"], folder)
    tiny.wait_for(process, b"checkpoint saved")
    process.kill()
    process.communicate()
    assert (folder / ".c.lock").exists()
    steps = load_checkpoint("c.bin")[1].step
    done(call(f"--resume c.bin -n {steps + 2}"))
    assert not (folder / ".c.lock").exists()


def test_a_lock_is_for_one_process_but_not_against_itself(tmp_path):
    path = tmp_path / "c.bin"
    lock.acquire(path, "-c")
    lock.acquire(path, "-c")
    assert (tmp_path / ".c.bin.lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    lock.release_all()
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# resumed somewhere else


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_a_run_is_resumed_from_another_folder(call, folder, elsewhere, monkeypatch):
    """Patterns, log and tokenizer were typed relative to the first run's folder, whose name is a pattern itself."""
    odd = folder.with_name("a [run] *")
    folder.rename(odd)
    monkeypatch.chdir(odd)
    flags = "-v 2 -s 3 -m 2 --tokenizer byte_tokenizer.bin"
    done(call(f"-n 5 {flags} -c whole.bin -o whole.txt"))
    done(call(f"-n 3 {flags} -c part.bin -o part.txt"))
    monkeypatch.chdir(elsewhere)
    resumed = call("--resume '../a [run] */part.bin' -n 5", train_data=None, val_data=None, batch_size=None)
    assert len(losses(done(resumed).out)) == 2
    assert not list(elsewhere.iterdir())
    tiny.assert_same_run(odd / "whole.bin", odd / "part.bin")
    assert (odd / "whole.txt").read_bytes() == (odd / "part.txt").read_bytes()


def test_default_data_is_found_from_any_folder(call, folder, elsewhere, monkeypatch, tmp_path):
    """The clone's data folder is meant, wherever the clone is now."""
    clone = tmp_path / "clone"
    (clone / "data" / "shakespeare").mkdir(parents=True)
    for split, name in (("train", "train_00.bin"), ("val", "val.bin")):
        shutil.copy(folder / name, clone / "data" / "shakespeare" / f"shakespeare_byte_{split}.bin")
    monkeypatch.setattr("llmc.options.ROOT", clone)
    none = dict(train_data=None, val_data=None)
    done(call("-n 2 -c c.bin", **none))
    assert load_checkpoint("c.bin")[1].options["train_data"] == "{clone}/data/shakespeare/shakespeare_byte_train.bin"
    clone.rename(tmp_path / "moved")
    monkeypatch.setattr("llmc.options.ROOT", tmp_path / "moved")
    monkeypatch.chdir(elsewhere)
    done(call(f"--resume {folder}/c.bin -n 3", **none))
    assert load_checkpoint(folder / "c.bin")[1].step == 3


def test_a_copy_of_a_run_has_a_log_of_its_own(call, folder, tmp_path, monkeypatch):
    done(call("-n 4 -v 2 -c c.bin -o log.txt"))
    shutil.copytree(folder, tmp_path / "copy")
    before = snapshot(folder)
    monkeypatch.chdir(tmp_path)
    done(call("--resume copy/c.bin -n 6", train_data=None, val_data=None))
    assert snapshot(folder) == before
    assert b"s:5 trl:" in (tmp_path / "copy" / "log.txt").read_bytes()


def test_a_copy_of_a_run_whose_log_is_elsewhere_is_refused(call, folder, tmp_path, elsewhere):
    done(call(f"-n 4 -v 2 -c c.bin -o {elsewhere}/log.txt"))
    log = (elsewhere / "log.txt").read_bytes()
    shutil.copytree(folder, tmp_path / "copy")
    result = call(f"--resume {tmp_path}/copy/c.bin -n 6")
    check_refused(result, f"a copy of {folder}/c.bin, whose log is {elsewhere}/log.txt", "-o NAME", code=2)
    done(call(f"--resume {tmp_path}/copy/c.bin -n 6 -o {tmp_path}/copy/log.txt"))
    assert (elsewhere / "log.txt").read_bytes() == log
    shutil.rmtree(folder / "gone", ignore_errors=True)
    os.rename("c.bin", "moved.bin")  # not a copy: the log goes on
    for state in Path().glob("c_state*"):
        state.rename(state.name.replace("c_state", "moved_state"))
    done(call("--resume moved.bin -n 6"))
    assert b"s:5 trl:" in (elsewhere / "log.txt").read_bytes()


def test_a_model_with_few_positions_trains_by_the_defaults(folder, capfdbinary):
    """-t and -g are fitted to the model, and what was typed is refused unless nothing is drawn."""
    tiny.make_folder(folder, tiny.resized(maxT=16))
    out = done(tiny.call(capfdbinary, train_banded.main, *tiny.options(seq_len=None, sample_tokens=None, steps=1))).out
    rows = tiny.table(out)
    assert (rows["sequence length T"], rows["genT"]) == ("16", "16")
    check_refused(tiny.call(capfdbinary, train_banded.main, *tiny.options(sample_tokens=17, steps=1)), "-g 17", code=2)
    done(tiny.call(capfdbinary, train_banded.main, *tiny.options(sample_tokens=17, steps=1, sample_every=0)))


def test_depth_is_fitted_to_an_odd_head_size(folder, capfdbinary):
    tiny.make_folder(folder, tiny.resized(C=18, NH=2))
    out = done(tiny.call(capfdbinary, train_toroidal.main, *tiny.options(steps=1))).out
    assert tiny.table(out)["depth"] == "1 platters of 9 channels a head"
    check_refused(tiny.call(capfdbinary, train_toroidal.main, *tiny.options(steps=1, depth=2)), "--depth 2", code=2)


# ----------------------------------------------------------------------------------------------------------------------
# counts


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_steps_validate_and_train_nothing(call, trainer):
    out = done(call("-n 0 -m 0", trainer)).out
    assert len(tiny.val_losses(out)) == 1 and not losses(out)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_epoch_takes_every_batch_once(call, folder, trainer):
    """Shards of 33 and 47 tokens hold 2 + 2 batches of 16; llm.c's count is 80 // 16 = 5."""
    from llmc.dataloader import DataLoader, write_tokens

    for i, count in enumerate((33, 47)):
        write_tokens(folder / f"train_{i:02d}.bin", np.arange(count, dtype=np.uint16))
        write_tokens(folder / f"val_{i}.bin", np.arange(count, dtype=np.uint16))
    loader = DataLoader("val_?.bin", tiny.B, tiny.T)
    assert (loader.num_batches, loader.epoch_batches) == (5, 4)
    for m, batches in ((0, 4), (-1, 4), (3, 3), (9, 5)):  # 9: as many as llm.c would take
        rows = tiny.table(done(call(f"-n -1 -m {m} -v 0 -s 0", trainer, val_data="val_?.bin")).out)
        assert (rows["train_num_batches"], rows["val_num_batches"]) == ("4", str(batches))
