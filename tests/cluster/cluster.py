"""What the cluster tests share: folders with small data, and bounded processes on loopback."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.kill_battery import fresh_folder
from conftest import _clicks_like_real, _raw, edit

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
SCRIPTS = "get_indexing.py,get_tfrecord.py,get_dataset.py,model_tf2.py,train.py,infer.py"
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}


def small_folder(folder, users=150, **constants):
    """Return a folder with the scripts, edited for small data, and raw data: a plain file of two ranges and a gzip."""
    fresh_folder(folder)
    edit(folder, "model_tf2", DROPOUT=0.0)
    edit(folder, "train", **constants)
    real = _clicks_like_real(users, seed=51)
    titles = {vid: f"Title of {vid}" for vids in real["columns"].values() for vid in vids}
    few = users * 3 // 5
    _raw(folder / "data/sample", columns=real["columns"], titles=titles, users=real["users"][:few], click_file="a")
    _raw(folder / "data/sample", users=real["users"][few:], click_file="b", gzip=True)
    return folder


def copy_of(folder, name):
    """Return a copy of a folder beside it."""
    return shutil.copytree(folder, folder.with_name(name))


def run(command, folder, seconds=300, **environment):
    """Start a bounded process in a folder; its output is piped."""
    return subprocess.Popen(["timeout", "-k", "5", str(seconds), *command], cwd=folder, text=True,
                            env={**os.environ, **QUIET, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def well(process):
    """Wait for a process that must end well; return what it printed."""
    out, err = process.communicate()
    assert process.returncode == 0, f"{process.args}: {process.returncode}\n{out}\n{err[-5000:]}"
    return out


def python(folder, script, **how):
    """Run a script with Python, in one process of the shell, to its good end."""
    return well(run([sys.executable, f"{script}.py"], folder, **how))


def submit(folder, script, master):
    """Start a script with spark-submit."""
    command = [str(BIN / "spark-submit"), "--master", master, "--py-files", SCRIPTS, f"{script}.py"]
    return run(command, folder, PYSPARK_PYTHON=sys.executable)


def as_the_readme_says(number, folder):
    """Run the README's n-th command of this section in a folder, in the environment of the tests, to its good end."""
    commands = re.findall(r"^```shell\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return well(run(["bash", "-c", commands[number]], folder, PATH=f"{BIN}:{os.environ['PATH']}"))


def addresses(number):
    """Return so many free addresses on loopback."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    free = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return free
