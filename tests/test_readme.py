"""What our texts say: commands parse, files that they read exist by then, make targets exist, figures are repeatable.

Texts are README.md, the other READMEs, the Makefile's recipes, and each script's docstring and --help.
"""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.starter_pack import SIZES as STARTER_PACK
from experiments import readme_figures, recall
from kernels.cpu.band.band_mask import band_count
from llmc.cli import ArgumentParser
from llmc.errors import UserError
from llmc.tokenizer import BYTE_VOCAB

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
DOC = {page.stem: page.read_text() for page in (ROOT / "doc").glob("*.md")}
FOLDERS = ("benchmarks", "data", "dev", "doc", "experiments", "kernels", "llmc", "systems", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
MARKDOWN = sorted(str(page.relative_to(ROOT)) for page in PAGES)
TRAINERS = ["train_banded.py", "train_sparse_attn.py", "train_toroidal.py"]
SCRIPTS = [
    *TRAINERS,
    "generate.py",
    "evaluate.py",
    "-m llmc.diff",
    "-m llmc.plot",
    "-m kernels.cuda.runtime.compile",
    "-m kernels.cuda.runtime.roofline",
]
SCRIPTS += [
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "data", "dev", "doc", "experiments")
    for path in sorted(ROOT.glob(f"{folder}/*.py"))
]
SCRIPTS += ["tests/golden_run.py", "tests/check_gpt2.py", "tests/cuda_emulator/build.py"]
LIBRARIES = {"data/corpus.py", "data/download.py", "benchmarks/turns.py", "benchmarks/kernel_times.py"}  # no command
LIBRARIES |= {"data/hf.py", "data/tensor_file.py"}
LIBRARIES |= {f"experiments/{name}.py" for name in ("sweep", "report", "stats")}
# without a parser: how many words they take
WORDS = {"tests/golden_run.py": 1, "tests/check_gpt2.py": 2, "tests/cuda_emulator/build.py": 1}
WORDS |= {"-m kernels.cuda.runtime.roofline": 0}
TO_BE_MADE = {"train_activation.py"}  # by the reader, as CONTRIBUTING.md tells
OTHERS = {"-m pytest", "-m pip", "-m venv", "-m ruff"}  # programs of others
# what only the reader can have: output of another trainer, own data, own text, a download
OWN = {"theirs.txt", "TRAIN.bin", "VAL.bin", "book.txt", "more/*.txt", "posts.jsonl", "gpt2", "gpt2/model.safetensors"}
OWN |= {"openwebtext/train.bin", "openwebtext/val.bin"}
MAKE = re.compile(r"\bmake(?: -\w+)* ([a-z_]+)")
# a command: python, ours or the Makefile's, a script or module, and its words up to a comment, a pipe or a bracket
COMMAND = re.compile(
    r"(?:^|(?<=[\s\"`(]))(?:\S*/)?python3? (-m [\w.]+|[\w/]+\.py)((?:(?! {2}| #| \(|[`)\n|&;]).)*)", re.MULTILINE
)


# ----------------------------------------------------------------------------------------------------------------------
# texts and the commands in them


def code(markdown: str) -> str:
    """The code blocks and code spans of a text, in order."""
    found = re.findall(r"^ *```\w*\n(.*?)^ *```$|`([^`\n]+)`", markdown, re.MULTILINE | re.DOTALL)
    return "\n".join(block or span for block, span in found)


def recipes(target: str) -> str:
    """What `make target` would type and say, all it depends on included, on a fresh clone."""
    call = ["make", "--no-print-directory", "-n", "-B", target]
    lines = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return "\n".join(shlex.split(line)[1] if line.startswith('echo "') else line for line in lines)


def module_of(script: str):
    return importlib.import_module(script.removeprefix("-m ").removesuffix(".py").replace("/", "."))


def docstring(script: str) -> str:
    """The examples of a script's docstring."""
    path = script.removeprefix("-m ").replace(".", "/") + ".py" if script.startswith("-m ") else script
    return examples(ast.get_docstring(ast.parse((ROOT / path).read_text())) or "")


def examples(text: str) -> str:
    """The lines of a docstring that start with python or make, without their comments."""
    return "\n".join(re.findall(r"^ *((?:python|make) (?:(?! +#).)*)", text, re.MULTILINE))


class Parsed(Exception):
    """Carries what a script's own main made of its command line."""

    def __init__(self, parser: ArgumentParser, settings: Namespace):
        self.parser, self.settings = parser, settings


def run_parser(script: str, words: list[str], monkeypatch) -> Parsed:
    """Run the script's main until its command line is parsed. Raises UserError for a wrong one."""
    parse = ArgumentParser.parse

    def stop(parser, argv=None, saved=None):
        raise Parsed(parser, parse(parser, argv))

    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(ArgumentParser, "parse", stop)
        patch.setattr(sys, "argv", [script, *words])
        try:
            module_of(script).main()
        except Parsed as parsed:
            return parsed
    raise AssertionError(f"{script} did not parse its command line")


def commands(text: str) -> Iterator[tuple[str, list[str], str | None]]:
    """(script, words, file that its output goes to) of each command in `text` that calls a script of ours."""
    for match in COMMAND.finditer(text):
        words, output = shlex.split(match[2]), None
        if ">" in words:
            words, output = words[: words.index(">")], words[words.index(">") + 1]
        if match[1] not in OTHERS:
            yield match[1], words, output


def settings(script: str, words: list[str], monkeypatch) -> Namespace:
    """The settings of a command. Raises UserError, or fails, where it would be refused."""
    assert script in SCRIPTS, f"no script {script}"
    if script in WORDS:
        assert len(words) == WORDS[script] and not any(word.startswith("-") for word in words), (script, words)
        return Namespace(words=words)
    return run_parser(script, words, monkeypatch).settings


TEXTS = {name: code((ROOT / name).read_text()) for name in MARKDOWN}
TARGETS = re.findall(r"^([a-z_]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
TEXTS |= {f"make {target}": recipes(target) for target in TARGETS}
TEXTS |= {f"docstring of {script}": docstring(script) for script in SCRIPTS}


@pytest.mark.parametrize("text", TEXTS)
def test_commands_parse(text, monkeypatch):
    """Every command names a script of ours, and flags and values that it takes."""
    for script, words, _ in commands(TEXTS[text]):
        if "--help" not in words and script not in TO_BE_MADE:
            settings(script, words, monkeypatch)


WITH_HELP = [script for script in SCRIPTS if script not in WORDS and script not in LIBRARIES]


@pytest.mark.parametrize("script", WITH_HELP)
def test_help_commands_parse(script, monkeypatch):
    """So does every command of --help, and the files that it reads are there by then."""
    parser = run_parser(script, positional(script), monkeypatch).parser
    check_files(examples(f"{parser.description}\n{parser.epilog or ''}"), products(), monkeypatch)


def positional(script: str) -> list[str]:
    """Words that the script cannot do without."""
    words = {"-m llmc.diff": ["A", "B"], "-m llmc.plot": ["log_sparse.txt"], "experiments/run.py": ["00009"]}
    words |= {"data/text.py": ["book.txt"], "data/to_hf.py": ["model.bin"], "data/from_hf.py": ["gpt2"]}
    words["experiments/initial_model.py"] = ["-e", "model.bin", "-o", "other.bin"]
    words["experiments/draw_band.py"] = ["-e", "checkpoint.bin", "--before", "model.bin"]
    words["experiments/draw_selection.py"] = ["-e", "sparse.bin", "-j", "val.bin"]
    words["experiments/draw_torus.py"] = ["-e", "torus.bin"]
    return words.get(script, [])


def test_the_texts_hold_commands():
    """The patterns above find what is to be checked."""
    found = {text: [script for script, _, _ in commands(TEXTS[text])] for text in TEXTS}
    assert {*TRAINERS, "generate.py", "-m llmc.diff", "data/create_model.py"} <= {*found["README.md"]}
    assert len(found["README.md"]) > 15 and "tests/check_gpt2.py" in found["README.md"]
    assert found["CONTRIBUTING.md"].count("-m pytest") == 0 and "train_sparse_attn.py" in found["CONTRIBUTING.md"]
    assert found["doc/gpu.md"].count("train_banded.py") == 3 and "data/recall.py" in found["doc/models_and_data.md"]
    assert found["make train_sparse_attn"].count("train_sparse_attn.py") == 2
    assert "generate.py" in found["make train_sparse_attn"]  # what it says at the end
    assert found["tests/cuda_emulator/README.md"] == ["tests/cuda_emulator/build.py"]
    assert set(found["docstring of -m llmc.diff"]) == {"train_banded.py", "-m llmc.diff"}


def test_wrong_commands_are_found(monkeypatch):
    for wrong in ("train_banded.py -w", "generate.py --topk 3", "data/create_model.py --preset d13", "train.py -n 1"):
        ((script, words, _),) = commands(f"`python {wrong}`")
        with pytest.raises((UserError, AssertionError)):
            settings(script, words, monkeypatch)


# ----------------------------------------------------------------------------------------------------------------------
# files


def data_files(name: str) -> dict[str, int]:
    """The pair that data/shakespeare.py writes."""
    return {f"data/shakespeare/{name}_{split}.bin": 0 for split in ("train", "val")}


DEFAULT_DATA = {50257: data_files("shakespeare"), BYTE_VOCAB: data_files("shakespeare_byte")}


def files(script: str, words: list[str], there: dict[str, int], monkeypatch) -> tuple[set[str], dict[str, int]]:
    """The files that a command reads, and those that it writes: {path: tokens of a model's vocabulary, else 0}.

    there: the files before it, likewise.
    """
    args = settings(script, words, monkeypatch)
    reads, writes = set(), {}
    if script in TRAINERS:
        V = there.get(args.resume or args.model, 0)
        reads = {args.resume or args.model, args.tokenizer}
        data = {args.train_data, args.val_data} if args.train_data else DEFAULT_DATA.get(V, {f"data of {V} tokens"})
        reads |= {*data}
        writes = {args.checkpoint or args.resume: V, args.log: 0}
    elif script == "generate.py":
        reads = {args.checkpoint, args.tokenizer}
    elif script == "evaluate.py":
        V = there.get(args.checkpoint, 0)
        reads = {args.checkpoint, *([args.val_data] if args.val_data else DEFAULT_DATA.get(V, {f"data of {V} tokens"}))}
    elif script == "data/hellaswag.py":
        writes = HELLASWAG
    elif script == "-m llmc.diff":
        reads = {args.A, args.B}
    elif script == "-m llmc.plot":
        reads, writes = {*args.logs}, {str(args.output): 0}
    elif script == "experiments/initial_model.py":
        reads, writes = {args.model}, {str(args.output): there.get(args.model, 0)}
    elif script == "data/shakespeare.py":
        writes = data_files("shakespeare_byte" if args.tokenizer == "byte" else "shakespeare")
    elif script == "data/text.py":
        reads = {*args.files}
        writes = {os.path.relpath(args.out_dir / f"{split}_000.bin", ROOT): 0 for split in ("train", "val")}
    elif script == "data/to_hf.py":
        reads, writes = {str(args.model)}, {str(args.out_dir): 0}
    elif script == "data/from_hf.py":
        reads, writes = {str(args.source)}, {str(args.output): 50257}
    elif script == "data/create_model.py":
        writes = {str(args.output): args.vocab}
    elif script == "data/starter_pack.py":
        writes = STARTER_FILES
    elif script == "tests/check_gpt2.py":
        reads = {*words}
    return {*reads} - {None}, {path: V for path, V in writes.items() if path}


REFUSING = {*TRAINERS, "data/create_model.py"}  # to overwrite what is there
HELLASWAG = {"data/hellaswag/hellaswag_val.bin": 0}
STARTER_FILES = {name: 50257 if name == "gpt2_124M.bin" else 0 for name in STARTER_PACK}


def check_files(text: str, there: dict[str, int], monkeypatch, fresh: bool = False) -> dict[str, int]:
    """Go through the commands of `text`, of make as well; each may read what is `there` or was written before it.

    -> what is there in the end. With `fresh`, fails too where a program would refuse to overwrite a file.
    """
    there = dict(there)
    for line in text.splitlines():
        for target in MAKE.findall(line):
            there = check_files(recipes(target), there, monkeypatch)
        for script, words, output in commands(line):
            if "--help" in words:
                continue
            reads, writes = files(script, words, there, monkeypatch)
            missing = reads - there.keys() - OWN
            assert not missing, f"{script} {shlex.join(words)} reads {missing}, which nothing has written by then"
            if fresh and not {"--force", "--overwrite", "--resume"} & {*words} and script in REFUSING:
                known = writes.keys() & there.keys()
                assert not known, f"{script} {shlex.join(words)}: there is a {known} already"
            there |= writes | ({output: 0} if output else {})
    return there


@functools.cache
def products() -> dict[str, int]:
    """What make targets write, the starter pack, and the models of data/create_model.py's own examples."""
    there = STARTER_FILES | HELLASWAG | DEFAULT_DATA[50257] | DEFAULT_DATA[BYTE_VOCAB]
    with pytest.MonkeyPatch.context() as patch:
        for text in (docstring("data/create_model.py"), "\n".join(f"make {target}" for target in MAKERS)):
            there = check_files(text, there, patch)
    return there


MAKERS = ("train_banded", "train_sparse_attn", "train_toroidal", "plot")


def test_readme_reads_what_it_has_written(monkeypatch):
    """From the top, on a fresh clone: no command of README reads a file that no command before it makes."""
    there = check_files(code(README), {}, monkeypatch, fresh=True)
    assert {"model.bin", "checkpoint.bin", "dense.bin", "byte.bin", "gpt2_124M.bin", "log_sparse.txt"} <= there.keys()
    assert (there["checkpoint.bin"], there["byte_checkpoint.bin"]) == (50257, BYTE_VOCAB)


@pytest.mark.parametrize("target", TARGETS)
def test_recipes_read_what_they_have_written(target, monkeypatch):
    """A make target makes all that it reads, but for those that say what they go on from."""
    before = {"plot": {"log_sparse.txt": 0}, "generate": {"checkpoint.bin": 50257}}.get(target, {})
    check_files(recipes(target), before, monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_read_what_is_there(script, monkeypatch):
    """A docstring's examples read what they have written, or what make or the starter pack makes."""
    check_files(docstring(script), products(), monkeypatch)


def test_missing_files_are_found(monkeypatch):
    with pytest.raises(AssertionError, match=r"reads \{'never.bin'\}"):
        check_files("python generate.py -e never.bin", {"model.bin": 50257}, monkeypatch)
    with pytest.raises(AssertionError, match="data of 1000 tokens"):
        check_files("python train_banded.py -e own.bin", {"own.bin": 1000}, monkeypatch)
    with pytest.raises(AssertionError, match="already"):
        check_files("make model\npython data/create_model.py", {}, monkeypatch, fresh=True)
    with pytest.raises(AssertionError, match="already"):
        check_files("make train_banded\npython train_banded.py -c checkpoint.bin", {}, monkeypatch, fresh=True)


# ----------------------------------------------------------------------------------------------------------------------
# make


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("make ")])
def test_make_targets_exist(text):
    named = set(MAKE.findall(TEXTS[text]))
    if text == "README.md":
        assert {"train_banded", "train_toroidal", "test", "kernels", "bench", "diff", "figures", "recall"} <= named
    if text == "CONTRIBUTING.md":
        assert {"setup", "test", "lint", "roofline", "kernels"} <= named
    assert named <= {*TARGETS}


def test_makefile_lists_its_targets():
    text = (ROOT / "Makefile").read_text()
    targets = {*TARGETS, "help", "clean"}
    assert set(re.findall(r"[a-z_]+", text.splitlines()[0].partition("make ")[2])) == targets
    assert set(re.search(r"^\.PHONY: (.*)", text, re.MULTILINE)[1].split()) == targets


# ----------------------------------------------------------------------------------------------------------------------
# figures


def figures(name: str) -> list[str]:
    """The lines of a run's block in its page."""
    begin, page = readme_figures.begin(name), readme_figures.PAGES[name].read_text()
    assert page.count(begin) == 1
    text, end, _ = page.partition(begin)[2].partition(readme_figures.END)
    assert end and text.startswith("```\n") and text.endswith("\n```\n") and text.count("```") == 2
    return text.splitlines()[1:-1]


@pytest.mark.parametrize("name", readme_figures.RUNS)
def test_figures_are_of_these_runs(name):
    """A block holds the lines that the script shows, in their order, of a run as long as the commands say."""
    lines = figures(name)
    asked = [pattern.removeprefix("last ") for turn in readme_figures.RUNS[name].values() for pattern in turn]
    shown = [line for line in lines if line != "..."]
    assert len(shown) == len(asked) and lines[0] != "..." and lines[-1] != "..."
    for line, pattern in zip(shown, asked):
        assert re.match(pattern, line), f"{line!r} stands where {pattern!r} is asked for"
    last = [command for command in readme_figures.commands(name) if command.startswith("train_")][-1]
    steps = re.search(r"-n (\d+)", last)[1]
    for step in re.findall(r"step +\d+/(\d+)", "\n".join(lines)):
        assert step == steps


def test_figures_say_which_commands():
    """A page names each run's command in the code block before its figures."""
    assert readme_figures.PAGES.keys() == readme_figures.RUNS.keys()
    for name, page in readme_figures.PAGES.items():
        before = (
            page.read_text().partition(readme_figures.begin(name))[0].rpartition("```bash\n")[2].partition("```")[0]
        )
        assert ("-e byte.bin" if name == "bytes" else f"make {name}") in before
    assert len(readme_figures.commands("bytes")) == 3


def test_excerpt():
    lines = ["a 1", "b 1", "x", "a 2", "b 2", "a 3"]
    assert readme_figures.excerpt(lines, ["a", "b", "a"]) == ["a 1", "b 1", "...", "a 2"]
    assert readme_figures.excerpt(lines, ["b", "last a"]) == ["b 1", "...", "a 3"]
    with pytest.raises(UserError, match="no line like 'x'"):
        readme_figures.excerpt(lines, ["a", "x", "x"])


def test_figures_replace_their_block_alone(monkeypatch, tmp_path):
    """And what has been run with the same command and code is not run again."""
    readme, folder, before = tmp_path / "README.md", tmp_path / "bytes", "\n".join(figures("bytes"))
    readme.write_text(README)
    folder.mkdir()
    for number, command in enumerate(readme_figures.commands("bytes")):
        text = "val loss 5\nother\nstep  600/600: train loss 3\nval loss 2\ndevice: of the test\n"
        (folder / f"{number}.txt").write_text(f"{command}\n{text}")
    (folder / "code.txt").write_text(readme_figures.code())
    monkeypatch.setitem(readme_figures.PAGES, "bytes", readme)
    monkeypatch.setattr(readme_figures, "FOLDER", tmp_path)
    monkeypatch.setattr(readme_figures.subprocess, "run", None)
    assert readme_figures.main(["--only", "bytes"]) == 0
    expected = ["val loss 5", "...", "step  600/600: train loss 3", "val loss 2", "device: of the test"]
    assert readme.read_text() == README.replace(before, "\n".join(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_banded", "train_sparse_attn", "train_toroidal"])
def test_runs_print_what_readme_shows(name, monkeypatch, tmp_path):
    """The lines that the pages show are found in what the trainers print today; the runs are cut short."""
    short = {r"-n \d{3}": "-n 6", r"-v \d+": "-v 2", r"-m \d+": "-m 1", r"-s \d\d+": "-s 3", r"warmup \d+": "warmup 3"}
    full = readme_figures.commands(name)
    for pattern, replacement in short.items():
        full = [re.sub(rf"{pattern}\b", replacement, command) for command in full]
    monkeypatch.setattr(readme_figures, "commands", lambda name: full)
    monkeypatch.setattr(readme_figures, "FOLDER", tmp_path)
    assert readme_figures.block(name).startswith("```\n")


def test_toroidal_figures_bear_the_sentence():
    """...below them: the arms end within 1% of each other."""
    lines = [line for line in figures("train_toroidal") if line.startswith("perplexity")]
    _, after, _, control_after = (float(line.split()[1]) for line in lines)
    assert abs(after / control_after - 1) < 0.01
    assert "end within 1% of each other" in DOC["toroidal"]


def step_times(table: str) -> dict[str, list[tuple[str, str, str]]]:
    """size: (program, milliseconds, ratio) of each row of make bench's table"""
    row = r"^  (\S.*?) {2,}([\d.]+) ms .*? ([\d.]+) x"
    blocks = re.findall(r"^([\w-]+): C=.*\n((?:  .*\n)+)", table, re.MULTILINE)
    return {size: re.findall(row, rows, re.MULTILINE) for size, rows in blocks}


def test_bench_figures_are_those_of_results():
    """The table of make bench is that of benchmarks/RESULTS.md, and so are the figures of sparse attention."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    table = results[results.index("\nchars64: C=128") :].partition("```")[0]
    assert f"```{table}```" in DOC["speed"]
    measured = step_times(table)["124M"]
    rows = table_rows(README[README.index("| | weights kept") - 1 :])
    assert [(row[1], row[3], row[4]) for row in rows] == [row[:3] for row in measured[:4]]
    assert f"Two cores take {measured[1][1].partition('.')[0]} ms" in README
    sparse = results[results.index("make bench_sparse") :].partition("\nThe most keys")[0]
    cells = {row[3]: row[1:-1] for row in table_rows(sparse) if row[1:3] == ["768", "1024"]}

    def rounded(pair):
        return " + ".join(f"{float(ms):.0f}" for ms in pair.split(" + "))

    told = " ".join(DOC["sparse_attention"].split())
    assert f"dense attention takes {rounded(cells['dense'][3])} ms forward + backward (PyTorch" in told
    assert f"(PyTorch {rounded(cells['dense'][-1])}), 16 keys a query {rounded(cells['16'][4])} ms" in told


def test_laptop_figures_are_those_of_the_run():
    """README's sentence on make train_banded: milliseconds of the last step shown, the last validation loss."""
    lines = figures("train_banded")
    (ms,) = re.findall(r"step  400/400: .* \(([\d.]+) ms", "\n".join(lines))
    *_, loss = (float(line.split()[2]) for line in lines if line.startswith("val loss"))
    told = f"400 steps of 7.3M parameters at {float(ms):.0f} ms end at a validation loss of {loss:.2f}"
    assert told in " ".join(README.split())


def test_recall_tables_are_those_of_the_results(monkeypatch, tmp_path):
    """And are written anew from them alone."""
    results = json.loads(recall.RESULTS.read_text())
    for name, table in (("PAGE", recall.table(results)), ("README", recall.short_table(results))):
        text = getattr(recall, name).read_text()
        assert text.count(f"{recall.BEGIN}{table}{recall.END}") == 1
        (tmp_path / name).write_text(text.replace(table, "| old |\n"))
        monkeypatch.setattr(recall, name, tmp_path / name)
    assert recall.main(["--no-runs"]) == 0
    assert (tmp_path / "PAGE").read_text() == DOC["sparse_attention"] and (tmp_path / "README").read_text() == README


def test_speed_is_told_by_vocabulary_as_it_was_measured():
    """README's ranges are the table's lowest and highest, the worst row among them; bands' hold the measured ones."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    times = step_times(results[results.index("\nchars64: C=128") :].partition("```")[0])
    claim = r"on a CPU {0} times as fast as PyTorch eager, with 65 characters {0} times".format(r"([\d.]+) to ([\d.]+)")
    told = [float(ratio) for ratio in re.search(claim, " ".join(README.split())).groups()]
    for found, sizes in (
        (told[:2], ("tiny", "124M", "124M-long")),
        (told[2:], ("chars64", "chars128", "chars256")),
    ):
        ratios = [float(ratio) for size in sizes for name, _, ratio in times[size] if name == "ours, dense"]
        assert len(ratios) == 3 and found == [min(ratios), max(ratios)]

    def within(ratio, low, high):
        assert float(low) - 0.05 <= float(ratio) <= float(high) + 0.05

    bands, told = results[results.index("make bench_band") :], " ".join(DOC["band"].split())
    cells = {row[3]: row[-2] for row in table_rows(bands) if row[1:3] == ["768", "1024"]}
    found = re.search(r"([\d.]+) to ([\d.]+) times as fast as dense at w = 64 [^.]*\b([\d.]+) to ([\d.]+) at 256", told)
    within(cells["w = 64"].split()[0], *found.groups()[:2])
    within(cells["w = 256"].split()[0], *found.groups()[2:])
    for width in (1024, 2048):
        within(cells[f"w = {width}"].split()[0], *re.search(rf"([\d.]+) to ([\d.]+) at {width} ", told).groups())


def test_gpu_figures_are_those_of_the_page():
    """The milliseconds in doc/gpu.md and README stand in benchmarks/GPU.md, with the card and the day."""
    page, told = (ROOT / "benchmarks" / "GPU.md").read_text(), " ".join(README.split())
    for card in ("H100 80GB", "driver 580", "CUDA 13.0", "2026-11-26"):
        assert card in page and card in " ".join(DOC["gpu"].split())
    ours = table_rows(DOC["gpu"][DOC["gpu"].index("Milliseconds a step of 124M") :])
    rows = table_rows(page[page.index("GPT-2 124M, random") :])
    assert len(ours) == 4 and [row[2:4] for row in ours] == [row[2:4] for row in rows[:4]]
    (single, tf32), _, llmc, pytorch = (row[2:4] for row in rows[:4])
    assert f"a step of this takes {tf32} ms, PyTorch eager {pytorch[1]}, llm.c in TF32 {llmc[1]}" in told
    assert f"in float32 {single}, {pytorch[0]} and {llmc[0]}" in told


def table_rows(text: str) -> list[list[str]]:
    """The cells of the first table of `text`, without its head; the first cell of each is empty."""
    table = text[text.index("\n|") + 1 :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in table[2:]]


def test_density_table():
    table = DOC["band"][DOC["band"].index("| C | w = ") :].partition("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    widths = [int(cell.removeprefix("w = ")) for cell in header[1:]]
    assert len(widths) == 5 and len(rows) == 4
    for C, *densities in rows:
        for width, density in zip(widths, densities):
            kept = band_count(4 * int(C), int(C), width) / (4 * int(C) ** 2)
            assert density == f"{100 * kept:.1f}%"


def test_readme_is_short():
    assert README.count("\n") < 240


def test_folders_and_links_exist():
    """The house on CONTRIBUTING's page names every folder, and every relative link of a text leads to something."""
    house = CONTRIBUTING[CONTRIBUTING.index("## the house") :]
    named = set(re.findall(r"`(\w+)/", "\n".join(row[1] for row in table_rows(house))))
    assert {folder for folder in FOLDERS if (ROOT / folder).exists()} <= named
    assert all((ROOT / folder).exists() for folder in named)
    for text in MARKDOWN:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / text).read_text()):
            assert (ROOT / text).parent.joinpath(link).exists(), f"{text}: {link}"


def test_anchors_exist():
    for text in MARKDOWN:
        markdown = (ROOT / text).read_text()
        for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", markdown):
            target = (ROOT / text).parent.joinpath(path).read_text() if path else markdown
            heads = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, (text, anchor)
