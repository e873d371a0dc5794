"""The rules of the house: one straight chain, one home for each constant, quiet imports, few dependencies."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_python
from get_indexing import RUNNING

ROOT = Path(__file__).parents[1]
CHAIN = ["get_indexing", "get_tfrecord", "get_dataset", "model_tf2", "train", "infer"]
DEPENDENCIES = {"tensorflow", "keras", "numpy", "tqdm"}  # keras comes with tensorflow; pyspark with spark-submit


def tree_of(script):
    return ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))


def imports_of(tree):
    """The top-level modules that a script imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def constants_of(tree):
    """The UPPER_CASE names that a script gives a value at its top level."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            for name in getattr(target, "elts", [target]):
                if isinstance(name, ast.Name) and name.id.isupper():
                    yield name.id


@pytest.mark.parametrize("script", CHAIN)
def test_imports_point_only_backwards_along_the_chain(script):
    of_the_house = set(imports_of(tree_of(script))) & set(CHAIN)
    assert of_the_house <= set(CHAIN[: CHAIN.index(script)])


@pytest.mark.parametrize("script", CHAIN)
def test_only_the_named_packages_and_the_standard_library_are_imported(script):
    assert set(imports_of(tree_of(script))) <= {*DEPENDENCIES, *CHAIN, *sys.stdlib_module_names}


def test_every_constant_has_exactly_one_home():
    homes = Counter(name for script in CHAIN for name in set(constants_of(tree_of(script))))
    assert {"DATA_DIR", "USER_MAX_LEN", "BATCH_POSITIONS", "EMB_DIM", "EPOCHS", "TOP_K"} <= set(homes)
    assert [name for name, count in homes.items() if count > 1] == []
    assert set(homes) >= RUNNING  # those whose change redoes nothing, by their names


def test_what_a_script_imports_from_another_is_made_there():
    for script in CHAIN:
        for node in ast.walk(tree_of(script)):
            if isinstance(node, ast.ImportFrom) and node.module in CHAIN:
                home = tree_of(node.module)
                made = {n.name for n in home.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
                types = {ast.unparse(n.targets[0]) for n in home.body if isinstance(n, ast.Assign)}
                assert {alias.name for alias in node.names} <= made | types | set(constants_of(home)), (script, home)


@pytest.mark.parametrize("script", CHAIN)
def test_a_script_runs_only_when_it_is_the_one_started(script):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign, ast.AnnAssign)
    first, *others, last = tree_of(script).body
    if script == "get_indexing":  # TensorFlow reads its environment when it is imported
        others = [node for node in others if not ast.unparse(node).startswith("os.environ.setdefault('TF_")]
    assert isinstance(first, ast.Expr) and isinstance(first.value.value, str)
    guarded = [node for node in others if isinstance(node, ast.With)]  # imports that may fail with one line
    assert all(ast.unparse(node.items[0]) == "packages_named()" for node in guarded)
    others = [node for node in others if node not in guarded] + [node for block in guarded for node in block.body]
    assert [type(node) for node in others if not isinstance(node, allowed)] == []
    run_script = "run_script" if script != "get_indexing" else "importlib.import_module('get_indexing').run_script"
    assert ast.unparse(last) == f"if __name__ == '__main__':\n    {run_script}(__file__)"


@pytest.mark.parametrize("script", CHAIN)
def test_a_script_that_writes_lets_no_second_one_of_it_work_each_worker_of_a_training_apart(script):
    (main,) = (node for node in tree_of(script).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    lock = {"get_dataset": None, "model_tf2": None, "train": "only_one(WORK_DIR, cluster_worker()[0])",
            "infer": "only_one(RANKING_DIR)"}.get(script, "only_one(WORK_DIR)")  # fmt: skip
    with_lock = [ast.unparse(node.items[0]) for node in main.body if isinstance(node, ast.With)]
    assert with_lock == ([lock] if lock else []) and (isinstance(main.body[-1], ast.With) or not lock)


def test_importing_the_scripts_prints_creates_and_seeds_nothing_whatever_the_kerasjson_of_the_user_says(tmp_path):
    """And a model is made of 32 bits, by TensorFlow."""
    (tmp_path / "keras.json").write_text('{"floatx": "float64", "backend": "torch"}')
    code = (
        "import random, sys, numpy, tensorflow\n"
        "random.seed(5); numpy.random.seed(5)\n"
        "before = random.getstate(), str(numpy.random.get_state())\n"
        f"import {', '.join(CHAIN)}\n"
        "assert (random.getstate(), str(numpy.random.get_state())) == before\n"
        "weights = model_tf2.build_model(num_videos=3, num_columns=2).weights\n"
        "assert {(type(w.value).__module__.split('.')[0], w.dtype) for w in weights} == {('tensorflow', 'float32')}\n"
    )
    quiet = dict(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1", KERAS_HOME=str(tmp_path))
    done = run_python(tmp_path, "-c", code, **quiet)
    assert (done.returncode, done.stdout) == (0, "")
    # what tensorflow itself says at its own import is not ours to silence
    ours = [line for line in done.stderr.splitlines() if any(f"{script}.py" in line for script in CHAIN)]
    assert ours == []
    assert [path.name for path in tmp_path.iterdir()] == ["keras.json"]


def test_numbering_starts_without_tensorflow_and_prints_and_creates_nothing(tmp_path):
    code = "import sys, get_indexing; sys.exit(bool({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    done = run_python(tmp_path, "-c", code, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_requirements_are_tensorflow_numpy_and_tqdm():
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = [re.match(r"[A-Za-z0-9_.-]+", line).group() for line in lines if line and not line.startswith("#")]
    assert sorted(names) == ["numpy", "tensorflow", "tqdm"]


def test_the_top_level_holds_the_six_scripts_and_little_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible == {*(f"{script}.py" for script in CHAIN), "requirements.txt", "README.md", "tests", "data"}


def test_ci_runs_the_quick_start_of_the_readme_on_two_versions_of_python():
    line = re.search("^python3 -m venv .*", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE).group()
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    ran = [command.strip() for command in workflow.partition("- run: |\n")[2].splitlines()]
    assert ran == line.replace("python3", "python").split(" && ")
    assert 'python-version: ["3.10", "3.13"]' in workflow
