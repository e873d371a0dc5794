"""Kill every stage at random moments and see that nothing is lost.

    python tests/bench/kill_battery.py [KILLS [SEED [standing]]]

Every kill (SIGKILL to the script, its workers left to themselves) falls on a run over changed data, in a folder where the
outputs of former data stand. After it no process may be left, and all that stands must be whole: former or new, never
half. A script is killed a few times in a row and then left to end; its outputs must be byte for byte those of a run that
nobody disturbed (the trained weights: number for number). The moment is drawn from the time that the stage is at work,
after its imports.

After every kill of train.py, which retrains over the data of a second day, infer.py must give the bytes that the model
of the first day gives, or those of the finished new one. "standing" kills nothing but these retrainings.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import HOUSE, _clicks_like_real, _raw, edit

CHAIN = ["get_indexing", "get_tfrecord", "get_dataset", "model_tf2", "train", "infer"]
STAGES = {"get_indexing": "indexing", "get_tfrecord": "tfrecord", "train": "model", "infer": "ranking"}
LEFTOVER = {
    "get_indexing": ".tmp.{}.vid2idx.json",
    "get_tfrecord": ".tmp.{}.manifest.json",
    "train": ".tmp.{}.checkpoint.npz",
    "infer": ".tmp.{}.a.json.gz",
}
SMALL = {
    "get_tfrecord": dict(RANGE_BYTES=16_000, NUM_WORKERS=2),
    "infer": dict(RANK_BYTES=16_000),
    "get_dataset": dict(MIN_STEPS=6),
    "train": dict(EPOCHS=2, WARM_EPOCHS=2),
}
IN_A_ROW = 4  # kills of a script before it is left to end
PATIENCE = 300  # seconds until a process that does not end is called hung


# ---------------------------------------------------------------- folders and processes


def fresh_folder(folder):
    """Fill a folder with the six scripts, their constants edited for small data."""
    folder.mkdir(parents=True)
    for script in CHAIN:
        shutil.copy(HOUSE / f"{script}.py", folder)
        edit(folder, script, **SMALL.get(script, {}))
    return folder


def former_data(folder):
    """Write raw data: 150 users in a plain file of two byte ranges and a gzip file."""
    real = _clicks_like_real(150, seed=51)
    titles = {vid: f"Title of {vid}" for vids in real["columns"].values() for vid in vids}
    _raw(folder / "data/sample", columns=real["columns"], titles=titles, users=real["users"][:90], click_file="a")
    _raw(folder / "data/sample", users=real["users"][90:], click_file="b", gzip=True)


def changed_data(folder):
    """Change the raw data: a new column, a shelf filled anew, more users, and clicks since the former rankings."""
    real = _clicks_like_real(170, seed=51)
    columns = real["columns"] | {"new": ["n1", "n2", "t0a-1"], "t0a": ["t0a-3", "t0a-4", "n3"]}
    users = [(uid, [*clicks, "n1_new", "t0a-3_t0a"]) for uid, clicks in real["users"]]
    _raw(folder / "data/sample", columns=columns, users=users[:100], click_file="a")
    _raw(folder / "data/sample", users=users[100:], click_file="b", gzip=True)


def start(folder, script, **how):
    """Start a script in a session of its own, as a user would in that folder."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, f"{script}.py"], cwd=folder, env={**os.environ, **quiet}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **how)  # fmt: skip


def end(process):
    """Wait until a process has ended, and all that it started; return (exit status, output, errors)."""
    out, err = process.communicate(timeout=PATIENCE)
    wait_for(lambda: not family(process), f"process {process.args} left {family(process)} behind")
    return process.returncode, out, err


def wait_for(condition, otherwise):
    """Poll until condition() holds and return what it gave; give up with AssertionError(otherwise)."""
    stop = time.monotonic() + PATIENCE
    while not (outcome := condition()):
        assert time.monotonic() < stop, otherwise
        time.sleep(0.002)
    return outcome


def family(process):
    """Return {pid: command line} of the living processes of a process's session, zombies left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == process.pid and state not in "ZX":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ")
    return found


def workers(process):
    """Return the pids of a process's workers."""
    return [pid for pid, command in family(process).items() if "spawn_main" in command]


def lock_of(folder, script):
    """Return the path of the lock that a script makes when it begins its work."""
    return folder / "data/work" / ("ranking" if script == "infer" else "") / f".{script}.py.lock"


def at_work(folder, script, process):
    """Wait until a script has done its imports and begun its work."""
    lock = lock_of(folder, script)
    wait_for(lambda: lock.exists() or process.poll() is not None, f"{script}.py does not begin")


def kill(folder, script, moment):
    """Run a script, kill it `moment` seconds after it began to work, and see that its workers end as well."""
    lock_of(folder, script).unlink(missing_ok=True)
    process = start(folder, script)
    at_work(folder, script, process)
    time.sleep(moment)
    process.kill()
    end(process)
    return process.returncode < 0  # or it was faster


# ---------------------------------------------------------------- what stands


def standing(folder, script=None):
    """Return {path: bytes} of the outputs of a script, or of all, in a folder: nothing hidden, no logs."""
    work = folder / "data/work"
    paths = (work / STAGES[script] if script else work).rglob("*")
    names = {str(path.relative_to(work)): path for path in paths if path.is_file()}
    shown = {name: path for name, path in sorted(names.items()) if "/." not in f"/{name}" and "/logs/" not in name}
    return {name: path.read_bytes() for name, path in shown.items()}


def comparable(outputs):
    """Return outputs in the form that a second run must give again.

    Weights are arrays, and of what is random or of the moment nothing is left: ids, dates, seconds, where the folder is. Of
    served.csv it is the first line of figures: each run that was killed adds one.
    """
    same = {}
    for name, data in outputs.items():
        if name.endswith(".h5"):
            with h5py.File(io.BytesIO(data)) as file:
                arrays = {}
                file.visititems(lambda key, node, arrays=arrays: arrays.update({key: node[()].tobytes()})
                                if isinstance(node, h5py.Dataset) else None)  # fmt: skip
            same["weights"] = arrays
        elif name.endswith(".memory.npz"):
            same["memory"] = data
        elif name == "model/history.csv":
            same[name] = [line.rpartition(",")[0] for line in data.decode().splitlines()]
        elif name == "model/model.json":
            same[name] = {k: v for k, v in json.loads(data).items() if k not in ("weights", "memory", "date", "id")}
        elif name.endswith(".made_of.json"):
            same[name] = json.loads(data) | {"clicks": None}
        elif name == "ranking/served.csv":
            same[name] = [line.partition(",")[2] for line in data.decode().splitlines()[:2]]
        else:
            same[name] = data
    return same


def check_whole(folder, script, former, new):
    """Assert that whatever stands after a kill is whole, and that the stages before are as they were."""
    outputs = standing(folder)
    stage = STAGES[script]
    for name, data in former.items():
        assert name.startswith(f"{stage}/") or outputs.get(name) == data, f"{script}.py changed {name}"
    for name, data in outputs.items():
        check_file(name, data)
        check_former_or_new(name, data, former, new)
    numbers = set(json.loads(outputs["indexing/vid2idx.json"]).values())
    assert all(numbers.issuperset(of) for of in json.loads(outputs["indexing/cid2vidx.json"]).values())
    for name, sha256 in vouched(outputs):
        assert hashlib.sha256(outputs[name]).hexdigest() == sha256, f"{name} is not what is vouched for"


def check_former_or_new(name, data, former, new):
    """Assert that an output is that of the run before or of the run to come.

    Of the model's files only model.json counts, which vouches for others.
    """
    if not name.startswith("model/") or name == "model/model.json":
        known = [comparable({name: of[name]}) for of in (former, new) if name in of]
        assert comparable({name: data}) in known, f"{name} is neither the former nor the new one"


def rankings_of(outputs):
    """Return the rankings among outputs."""
    return {name: data for name, data in outputs.items() if name.endswith(".json.gz")}


def vouched(outputs):
    """Yield (path, SHA-256) of all that the manifest and the model's file vouch for."""
    if "tfrecord/manifest.json" in outputs:
        for name, made in json.loads(outputs["tfrecord/manifest.json"])["shards"].items():
            yield f"tfrecord/{name}", made["sha256"]
    if "model/model.json" in outputs:
        saved = json.loads(outputs["model/model.json"])
        for part in (saved["weights"], saved["memory"]):
            yield f"model/{part['file']}", part["sha256"]


def check_file(name, data):
    """Assert that a file is not cut short: by its own format, without the scripts."""
    if name.endswith(".json"):
        json.loads(data)
    elif name.endswith(".json.gz"):
        lines = gzip.decompress(data).split(b"\n")
        assert lines.pop() == b"" and all(map(json.loads, lines)), f"{name} does not end with its last line"
    elif name.endswith(".tfrecord"):
        at = 0
        while at < len(data):  # length, its checksum, the record, its checksum
            at += 8 + 4 + struct.unpack_from("<Q", data, at)[0] + 4
        assert at == len(data), f"{name} is cut short"
    elif name.endswith(".npz"):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            assert file.testzip() is None, f"{name} is damaged"
    elif name.endswith(".csv"):
        assert data.endswith(b"\n") and len({line.count(b",") for line in data.splitlines()}) == 1, f"{name} is cut"


# ---------------------------------------------------------------- the battery


class Battery:
    """Folders in which the former outputs of every stage stand and its input has changed, and what it must give."""

    def __init__(self, folder):
        self.folder, self.ready, self.former, self.new, self.seconds, self.runs = folder, {}, {}, {}, {}, 0
        self.rankings = None
        self.killed = dict.fromkeys(STAGES, 0)
        chain = fresh_folder(folder / "chain")
        former_data(chain)
        for script in STAGES:
            self.run(chain, script)
        changed_data(chain)
        for script in STAGES:
            self.ready[script] = shutil.copytree(chain, folder / f"ready-{script}")
            self.former[script] = standing(chain)
            self.seconds[script] = self.run(chain, script)
            self.new[script] = standing(chain)
        self.done = chain

    def run(self, folder, script):
        """Run a script to its good end and return how many seconds it was at work."""
        lock_of(folder, script).unlink(missing_ok=True)
        process = start(folder, script)
        at_work(folder, script, process)
        began = time.monotonic()
        status, out, err = end(process)
        assert status == 0, f"{script}.py: exit status {status}\n{out}\n{err}"
        return time.monotonic() - began

    def ready_folder(self, script):
        """Return a new folder in which a script is about to run over changed data."""
        self.runs += 1
        return shutil.copytree(self.ready[script], self.folder / f"run-{self.runs}")

    def survive(self, script, moments):
        """Kill a script at moments (parts of its working time) in a row, checking each time, and let it end.

        self.killed counts the runs that were really killed before they had ended.
        """
        folder = self.ready_folder(script)
        for moment in moments:
            self.killed[script] += kill(folder, script, moment * self.seconds[script])
            check_whole(folder, script, self.former[script], self.new[script])
            if script == "train":
                self.check_ranking(folder)
        leftover = folder / "data/work" / STAGES[script] / LEFTOVER[script].format("0" * 32)
        leftover.write_bytes(b"half")
        self.run(folder, script)
        self.check_same(folder, script)
        shutil.rmtree(folder)

    def rank(self, folder):
        """Return the rankings that infer.py gives in a copy of a folder."""
        copy = shutil.copytree(folder, self.folder / "ranked")
        self.run(copy, "infer")
        ranked = rankings_of(standing(copy, "infer"))
        shutil.rmtree(copy)
        return ranked

    def check_ranking(self, folder):
        """Assert that infer.py ranks by the former model, to the byte, or by the finished new one."""
        if not self.rankings:
            self.rankings = {"former": self.rank(self.ready["train"]), "new": self.rank(self.done)}
            assert self.rankings["former"] != self.rankings["new"]
        stands, former = ((of / "data/work/model/model.json").read_bytes() for of in (folder, self.ready["train"]))
        model = "former" if stands == former else "new"
        assert self.rank(folder) == self.rankings[model], f"infer.py does not rank by the {model} model, which stands"

    def check_same(self, folder, script):
        """Assert that a folder's outputs are those of the undisturbed run, with nothing left beside them."""
        outputs, expected = comparable(standing(folder)), comparable(self.new[script])
        assert outputs.keys() == expected.keys(), f"{sorted(outputs)} stand, not {sorted(expected)}"
        for name in outputs:
            assert outputs[name] == expected[name], f"{name} is not that of an undisturbed run"
        hidden = (folder / "data/work" / STAGES[script]).rglob(".*")
        left = [path.name for path in hidden if path != lock_of(folder, script)]
        assert not left, f"{script}.py leaves {left} behind"


def main(kills=200, seed=1, stages=""):
    rng, lost = random.Random(seed), 0
    scripts = ["train"] if stages == "standing" else list(STAGES)
    with tempfile.TemporaryDirectory() as folder:
        battery = Battery(Path(folder))
        for number in range(0, kills, IN_A_ROW):
            script = scripts[number // IN_A_ROW % len(scripts)]
            moments = sorted(rng.random() for _ in range(IN_A_ROW))
            try:
                battery.survive(script, moments)
            except (AssertionError, ValueError, OSError) as error:
                lost += 1
                print(
                    f"{script}.py killed at {', '.join(f'{m:.0%}' for m in moments)} of its work: {error}", flush=True
                )
    counts = ", ".join(f"{script}.py {count}" for script, count in battery.killed.items())
    print(f"{sum(battery.killed.values())} kills at work ({counts}), {lost} lost something")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
