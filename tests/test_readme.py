"""The README keeps its word: its snippets and commands run, and the files, constants and lines that it names exist."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import get_dataset
from get_indexing import get_indexing
from get_tfrecord import get_tfrecord
from train import train

import pytest
from conftest import run_python
from test_architecture import CHAIN, constants_of, tree_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = [f"{script}.py" for script in CHAIN]
EVERY_DAY = [script for script in SCRIPTS if script not in ("get_dataset.py", "model_tf2.py")]

# One process for all, since tensorflow takes seconds to import; each snippet has names and a folder of its own.
RUN_SNIPPETS = """
import json, os, pathlib, sys, traceback

failed = {}
for path in map(pathlib.Path, sys.argv[1:]):
    os.chdir(path.parent)
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": path.stem})
    except (Exception, SystemExit):
        failed[path.stem] = traceback.format_exc(limit=-3)
print("FAILED " + json.dumps(failed))
"""

# Stands for python3, python, pip and pytest: it writes down how it was called, and makes the environment of `-m venv`.
STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && : > "$3/bin/activate"; fi
"""


def blocks(language):
    """Return (line in the README, text) of each fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def section(name):
    """Return the text of a section."""
    return README.split(f"\n## {name}\n")[1].split("\n## ")[0]


def table(first_column, name):
    """Return the rows, lists of cells, of the table in a section whose first heading is first_column."""
    lines = section(name).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def names(cell):
    """Return what stands in backquotes in a text."""
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="module")
def sample_work(tmp_path_factory):
    """WORK_DIR of the chain on the sample, with a small model of few steps."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_dataset, "MIN_STEPS", 1)
        get_indexing(ROOT / "data/sample", folder)
        get_tfrecord(ROOT / "data/sample", folder, num_workers=1)
        train(folder, arguments={"emb_dim": 8, "user_blocks": 1}, EPOCHS=1, HABIT_HOURS=(0.0,), CLICKED_FACTORS=(1.0,))
    return folder


@pytest.fixture(scope="module")
def snippets(tmp_path_factory, sample_work):
    """({line: its folder}, {line: traceback}): every Python snippet run, in a folder with what the text says is there."""
    folders = {}
    for line, text in blocks("python"):
        folder = folders[line] = tmp_path_factory.mktemp(f"line_{line}")
        (folder / f"{line}.py").write_text(text, encoding="utf-8")
        (folder / "clicks.csv").write_text(blocks("csv")[0][1], encoding="utf-8-sig")  # as Excel writes it
        (folder / "data/sample").parent.mkdir()
        (folder / "data/sample").symlink_to(ROOT / "data/sample")
        shutil.copytree(sample_work, folder / "data/work")
        write_ranks(folder / "data/work/model.kept/test.csv", {"u1": 2, "u2": 1, "u3": 30, "gone\u2028": 1})
        write_ranks(folder / "data/work/model/test.csv", {"u1": 1, "u2": 1, "u3": 3, "new\u2028": 1})
    files = [folder / f"{line}.py" for line, folder in folders.items()]
    result = run_python(tmp_path_factory.mktemp("nothing"), "-c", RUN_SNIPPETS, *files)
    assert result.returncode == 0, result.stderr[-3000:]
    printed, failed = result.stdout.rsplit("FAILED ", 1)
    return folders, json.loads(failed), printed


def write_ranks(path, ranks):
    """Write a test.csv as train.py does, with the rows of the table that the snippets read."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(["uid", "history", "target", "clicked_before", "random", "mix"])
        csv.writer(file).writerows([uid, 5, "c1", 0, 9, rank] for uid, rank in ranks.items())


def test_every_python_snippet_runs_by_itself(snippets):
    folders, failed, _ = snippets
    assert len(folders) > 14
    assert not failed, "\n".join(f"README.md, line {line}: {error}" for line, error in failed.items())


def test_every_python_snippet_asserts_its_claim():
    assert not [line for line, text in blocks("python") if not re.search(r"^ *assert ", text, re.MULTILINE)]


def test_the_raw_files_made_of_a_table_of_clicks_can_be_read(snippets, capsys):
    line = next(line for line, text in blocks("python") if "csv.DictReader" in text and "click_seq" in text)
    folder = snippets[0][line]
    clicks = (folder / "data/mine/click_seq/clicks.json").read_text(encoding="utf-8")
    assert clicks == '{"uid": "u1", "click_seq": ["v1", "v2_c7"], "times": [1795641004, 1795641245]}\n'
    get_indexing(folder / "data/mine", folder / "data/index")
    assert capsys.readouterr().out.startswith("2 videos (2 new), 1 columns (1 new, 0 empty)")


def test_the_comparison_of_two_tests_takes_the_users_of_both(snippets):
    """NDCG@10 of u1 rises from 1 / log2(3) to 1, of u2 it stays, of u3 it rises from 0 to 1 / log2(4)."""
    ahead = (1 - 0.63093 + 0.5) / 3
    assert f"{ahead:+.4f}, 95 % " in snippets[2] and ", 3 users" in snippets[2]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """[(line, what was called)]: every command of the README, run by a shell in whose path python and pip are stubs.

    The folder has the scripts and a model that stands, and is fresh for each.
    """
    called = []
    for line, text in blocks("bash") + blocks("shell"):
        folder = tmp_path_factory.mktemp(f"line_{line}")
        for name in ("python3", "python", "pip", "spark-submit"):
            (folder / "stubs").mkdir(exist_ok=True)
            (folder / "stubs" / name).write_text(STUB)
            (folder / "stubs" / name).chmod(0o755)
        (folder / "data/work/model").mkdir(parents=True)
        (folder / "data/work/model/model.json").write_text("{}")
        (folder / "data/work/model.kept").mkdir()
        environment = {"PATH": f"{folder / 'stubs'}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
        done = subprocess.run(
            ["sh", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
        lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
        called.append((line, lines))
    return called


def test_commands_run_the_scripts_in_the_order_of_the_chain(calls):
    started = [[call.split()[1] for call in of if re.match(r"python \S+\.py$", call)] for _, of in calls]
    wrong = [scripts for scripts in started if scripts != sorted(scripts, key=SCRIPTS.index)]
    assert not wrong
    whole = [script for script in SCRIPTS if script != "model_tf2.py"]
    assert started.count(whole) == 2 and started.count(EVERY_DAY) == 1  # the quick start, in two languages; every day


def test_each_quick_start_is_one_line_that_installs_what_it_runs(calls):
    text = section("Quick start")
    quick = list(dict.fromkeys(block for _, block in blocks("bash") if block in text))
    assert [block.count("\n") for block in quick] == [1, 1]
    for block, needed in zip(
        quick, (["requirements.txt"], ["requirements.txt", "tests/requirements.txt"]), strict=True
    ):
        line = next(line for line, other in blocks("bash") if other == block)
        venv, pip, *rest = dict(calls)[line]
        assert venv == "python3 -m venv .venv" and pip == "pip install " + " ".join(f"-r {n}" for n in needed)
        assert all(call.startswith("python ") for call in rest) and rest


def test_commands_name_existing_files(calls):
    text = "\n".join(call for _, of in calls for call in of)
    found = set(re.findall(r"\b\S+\.py\b", text.replace(",", " "))) | set(re.findall(r" -[rc] (\S+)", text))
    assert set(SCRIPTS) - {"model_tf2.py"} <= found
    assert not [name for name in found if not (ROOT / name).is_file()]
    in_text = re.findall(r"`(?:python )?(tests/[^` ]+)[^`]*`|\]\((tests/[^)]+)\)", README)
    assert not [name for pair in in_text for name in pair if name and not (ROOT / name).exists()]


def test_the_line_of_the_crontab_runs_the_chain_of_every_day_in_both_languages():
    lines = re.findall(r"^30 3 .*$", README, re.MULTILINE)
    assert len(lines) == 2 and lines[0] == lines[1] and "%" not in lines[0]
    assert [f"{name}.py" for name in re.search(r"for s in (.*?);", lines[0])[1].split()] == EVERY_DAY


@pytest.mark.parametrize("broken", [None, "train"])
def test_the_line_of_the_crontab_runs_every_script_until_one_fails_and_says_so(tmp_path, broken):
    line = re.search(r"^30 3 \* \* \* (.*)$", README, re.MULTILINE)[1].replace("/srv/columns", str(tmp_path))
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho ran "$1"\n[ "$1" != {broken}.py ]\n')
    python.chmod(0o755)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    ran = re.findall(r"ran (\S+)", (tmp_path / "chain.log").read_text())
    assert ran == (EVERY_DAY[:3] if broken else EVERY_DAY)
    assert ("failed" in done.stdout) == bool(broken)


def test_a_model_that_was_kept_can_be_put_back(tmp_path):
    keep, restore = (text for _, text in blocks("bash") if "model.kept" in text)
    model = tmp_path / "data/work/model/model.json"
    model.parent.mkdir(parents=True)
    for version in ("yesterday", "today"):
        model.write_text(version)
        if version == "yesterday":
            subprocess.run(["sh", "-ec", keep], cwd=tmp_path, check=True)
    subprocess.run(["sh", "-ec", restore.replace("python infer.py", "true")], cwd=tmp_path, check=True)
    assert model.read_text() == "yesterday"


def test_the_chain_table_has_the_scripts_in_order_and_every_file_of_it_exists_or_is_written():
    assert [names(script) for script, *_ in table("script", "The chain")] == [[name] for name in SCRIPTS]
    written, wrong = set(), []
    for script, reads, writes in table("script", "The chain"):
        source = (ROOT / names(script)[0]).read_text(encoding="utf-8")
        for path in names(reads):
            if not path.startswith("data/work/"):
                if not list(ROOT.glob(path)):
                    wrong.append(f"{path}, which {script} reads, does not exist")
            elif path not in written:
                wrong.append(f"{path}, which {script} reads, is not written before")
        for path in names(writes):
            folder, name = path.removeprefix("data/work/").split("/")
            written.add(path)
            wrong += [
                f"{script} does not write {path}: no {part!r} in it"
                for part in (folder, *filter(None, re.split(r"\*|-", name)))
                if part not in source
            ]
    assert written
    assert not wrong


def test_every_constant_of_the_table_exists_in_its_home():
    rows = table("name", "Constants")
    constants, homes = [names(name) for name, *_ in rows], [names(home) for _, home, *_ in rows]
    listed = [name for of_row in constants for name in of_row]
    assert len(set(listed)) == len(listed) > 30
    made = {f"{script}.py": set(constants_of(tree_of(script))) for script in CHAIN}
    for of_row, of_home in zip(constants, homes, strict=True):
        assert len(of_home) in (1, len(of_row))
        for name, home in zip(of_row, of_home * len(of_row), strict=False):
            assert name in made[home], (name, home)


def test_what_to_run_again_is_the_home_or_the_first_script_that_follows_and_writes():
    for name, home, meaning, again in table("name", "Constants"):
        writes = {"get_dataset.py": "train.py", "model_tf2.py": "train.py"}
        assert names(again) in ([writes.get(names(home)[-1], names(home)[-1])], []), name
        assert names(again) or again == "nothing", name
        assert meaning


def test_constants_named_in_the_text_exist():
    mentioned = set(re.findall(r"`([A-Z][A-Z_]{3,})(?: = [^`]*)?`", README))
    made = {name for script in CHAIN for name in constants_of(tree_of(script))}
    assert mentioned - made <= {"BST_DSSM", "TF_CONFIG", "PYSPARK_PYTHON"}


def test_sample_lines_shown_are_in_the_sample():
    sample = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "data/sample").rglob("*.json"))
    shown = [line for _, text in blocks("json") for line in text.splitlines()]
    assert len(shown) == 3 and all(f"{line}\n" in sample for line in shown)


def test_every_row_of_the_printed_table_is_explained():
    rows = re.findall(
        r'(?:yield "([a-z ]+)"|"([a-z]+)": (?:plain|chosen))', (ROOT / "train.py").read_text(encoding="utf-8")
    )
    rows = {one or other for one, other in rows}
    assert rows == {"random", "popularity", "own columns", "chain", "standing", "towers", "memory", "habit", "mix"}
    assert rows <= set(names(section("Reading the results")))


def test_each_line_of_the_pitfalls_names_the_test_that_shows_it():
    tree = ast.parse((ROOT / "tests/test_pitfalls.py").read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    lines = [line for line in section("Questions and pitfalls").splitlines() if line.startswith("- ")]
    shown = [f"test_{names(line)[-1]}" for line in lines if "(no test: " not in line]
    assert len(lines) > 10 and len(set(shown)) == len(shown)
    assert set(shown) <= tests


def test_the_readme_is_short_links_to_its_chinese_part_first_and_says_everything_in_order():
    lines = README.splitlines()
    assert len(lines) <= 650 and "(#中文简介)" in lines[2]
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == [
        "What it does", "Quick start", "Your own data", "Every day", "Reading the results",
        "One user now, why, what is alike", "The chain", "Constants", "Figures", "More machines", "Questions and pitfalls", "中文简介",
    ]  # fmt: skip


def test_every_link_inside_the_readme_has_its_heading():
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(
            r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
        )
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
