"""Run the chain on a data set with a held-out truth and print times and ranking quality.

    python tests/bench/bench_ranking.py RAW_FOLDER TRUTH.json [CONSTANT=VALUE ...]

RAW_FOLDER is what DATA_DIR names; the truth is {uid: the cid clicked next}. The scripts are copied into a temporary
folder and their constants edited there, as a user would. Prints a table of NDCG@10, each column ranked: how well the
towers, the memory and habit alone and the mix do on validation, on the test users and on all users of the truth; and
"unseen", the truth with the columns that a user clicked before taken out of his ranking.
"""

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOUSE = Path(__file__).parents[2]
CHAIN = ("get_indexing", "get_tfrecord", "train", "infer")


def main(raw, truth_file, *edits):
    truth = json.loads(Path(truth_file).read_text(encoding="utf-8"))
    seen = {
        line["uid"]: {click.partition("_")[2] for click in line["click_seq"]} for line in lines_of(raw, "click_seq")
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for script in HOUSE.glob("*.py"):
            shutil.copy(script, folder)
        for edit in edits:
            set_constant(folder, *edit.split("=", 1))
        (folder / "data").mkdir()
        (folder / "data/sample").symlink_to(Path(raw).absolute())
        started = time.time()
        for script in CHAIN:
            clock = time.time()
            run(folder, script)
            print(f"{script:14} {time.time() - clock:7.1f} s", flush=True)
        print(f"{'chain':14} {time.time() - started:7.1f} s")
        model_file = folder / "data/work/model/model.json"
        model = json.loads(model_file.read_text(encoding="utf-8"))
        print(", ".join(f"{name} {model['mix'][name]}" for name in list(model["mix"])[:5]))
        print("           validation    test   truth  unseen   HR@10 of the truth")
        for row, weights in {"mix": None, "towers": (0.0, 0.0), "memory": (1.0, 0.0), "habit": (0.0, 1.0)}.items():
            if weights:
                alone = dict(zip(("memory_weight", "habit_weight"), weights, strict=True)) | {"clicked_factor": 1.0}
                changed = model | {"id": row, "mix": model["mix"] | alone}
                model_file.write_text(json.dumps(changed), encoding="utf-8")
                run(folder, "infer")
            known = [
                f"{model[split][row]['NDCG@10']:.4f}" if row in model[split] else "-"
                for split in ("validation", "test")
            ]
            hits, gain, unseen = score(folder, truth, seen)
            print(f"{row:10} {known[0]:>10} {known[1]:>7} {gain:7.4f} {unseen:7.4f} {hits:7.4f}", flush=True)


def set_constant(folder, name, value):
    """Edit the one line that gives a constant its value."""
    for script in folder.glob("*.py"):
        source = script.read_text(encoding="utf-8")
        edited, times = re.subn(rf"^({name}\b[^=\n]*) = [^#\n]*", rf"\1 = {value}  ", source, flags=re.MULTILINE)
        if times:
            script.write_text(edited, encoding="utf-8")
            return
    raise SystemExit(f"no script has a constant {name}")


def run(folder, script):
    """Run a script in folder; its own output goes to stderr."""
    subprocess.run([sys.executable, f"{script}.py"], cwd=folder, check=True, stdout=sys.stderr)


def lines_of(folder, name):
    """Yield the JSON lines of the files in a folder."""
    for path in sorted(Path(folder, name).glob("*.json*")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def score(folder, truth, seen):
    """Return HR@10, NDCG@10, and NDCG@10 without the columns seen, of the rankings; a user without one counts as 0."""
    sums = [0.0, 0.0, 0.0]
    for line in lines_of(folder, "data/work/ranking"):
        target = truth.get(line.get("uid"))
        if target in line.get("columns", ()):
            ahead = line["columns"][: line["columns"].index(target)]
            unseen = [cid for cid in ahead if cid not in seen.get(line["uid"], ())]
            sums[0] += len(ahead) < 10
            sums[1] += gain(len(ahead))
            sums[2] += gain(len(unseen))
    return [total / len(truth) for total in sums]


def gain(ahead):
    """Return the NDCG@10 of a target with so many columns ahead of it."""
    return 1 / math.log2(ahead + 2) if ahead < 10 else 0.0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
