"""The README keeps its word: its snippets run, and the files, constants and sample lines that it names exist."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["get_indexing.py", "get_tfrecord.py", "get_dataset.py", "model_tf2.py", "train.py", "infer.py"]

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


def blocks(language):
    """Return (line in the README, text) of each fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def table(first_column, section):
    """Return the rows, lists of cells, of the table in a section whose first heading is first_column."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][0] == first_column
    return rows[2:]


def names(cell):
    """Return what stands in backquotes in a table cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_every_python_snippet_runs_by_itself(tmp_path):
    paths = []
    for line, text in blocks("python"):
        paths.append(tmp_path / f"line_{line}" / f"line_{line}.py")
        paths[-1].parent.mkdir()
        paths[-1].write_text(text, encoding="utf-8")
    assert len(paths) > 20
    result = subprocess.run(
        [sys.executable, "-c", RUN_SNIPPETS, *map(str, paths)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    failed = json.loads(result.stdout.rsplit("FAILED ", 1)[1])
    assert not failed, "\n".join(f"README.md, {line}: {error}" for line, error in failed.items())


def test_every_python_snippet_asserts_its_claim():
    silent = [
        line for line, text in blocks("python") if not re.search(r"^ *(assert|raise SystemExit)", text, re.MULTILINE)
    ]
    assert not silent


def test_commands_name_existing_files():
    commands = [text for _, text in blocks("bash")]
    scripts = [name for text in commands for name in re.findall(r"\bpython (\S+\.py)", text)]
    options = [name for text in commands for name in re.findall(r" -[rc] (\S+)", text)]
    assert set(scripts) == set(SCRIPTS) - {"model_tf2.py"}
    assert set(options) == {
        "requirements.txt",
        "tests/requirements.txt",
        "tests/cluster/requirements.txt",
        ".pytest.ini",
    }
    missing = [name for name in scripts + options if not (ROOT / name).is_file()]
    assert not missing


@pytest.mark.parametrize("text", [text for _, text in blocks("bash") if ".py" in text])
def test_commands_run_the_scripts_in_the_order_of_the_chain(text):
    scripts = re.findall(r"\bpython (\S+\.py)", text)
    assert scripts == [name for name in SCRIPTS if name in scripts]
    assert len(scripts) in (0, 5)


def test_chain_table_lists_the_scripts_in_order():
    assert [names(script) for script, *_ in table("script", "The chain")] == [[name] for name in SCRIPTS]


def test_every_file_of_the_chain_table_exists_or_is_written():
    written, wrong = set(), []
    for script, reads, writes in table("script", "The chain"):
        source = (ROOT / names(script)[0]).read_text(encoding="utf-8")
        for path in names(reads):
            if not path.startswith("data/work/"):
                if not list(ROOT.glob(path.removesuffix("[.gz]"))):
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
    assert len({name for name, *_ in rows}) == len(rows) > 30
    constants = {script: assigned_names(script) for script in SCRIPTS}
    wrong = [name for name, home, *_ in rows if names(name)[0] not in constants[names(home)[0]]]
    assert not wrong


def test_what_to_run_again_names_scripts():
    for name, home, meaning, again in table("name", "Constants"):
        assert all(part in SCRIPTS or part.startswith("data/work/") for part in names(again)), name
        assert names(again) or again in ("nothing", "train anew"), name
        assert home and meaning


def assigned_names(script):
    """Return the upper-case names that a script assigns at its top level."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()}


def test_constants_named_in_the_text_are_in_the_table():
    listed = {names(name)[0] for name, *_ in table("name", "Constants")}
    mentioned = set(re.findall(r"`([A-Z][A-Z_]{3,})(?: = [^`]*)?`", README))
    assert mentioned <= listed | {"BST_DSSM", "TF_CONFIG", "PYSPARK_PYTHON"}


def test_sample_lines_shown_are_in_the_sample():
    sample = {
        line
        for path in (ROOT / "data/sample").rglob("*.json")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    shown = [line for _, text in blocks("json") for line in text.splitlines()]
    assert len(shown) == 3
    assert set(shown) <= sample
