"""Run the chain on a data set with a held-out truth and print times and ranking quality.

    python tests/bench/bench_ranking.py RAW_FOLDER TRUTH.json [CONSTANT=VALUE ...]

RAW_FOLDER is what DATA_DIR names; the truth is {uid: the cid clicked next}. The scripts are copied into a temporary
folder and their constants edited there, as a user would. Prints HR@10, NDCG@10 and MRR of the mix and of the towers
alone over all users of the truth, each column ranked.
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
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for script in HOUSE.glob("*.py"):
            shutil.copy(script, folder)
        for edit in edits:
            set_constant(folder, *edit.split("=", 1))
        (folder / "data").mkdir()
        (folder / "data/sample").symlink_to(Path(raw).absolute())
        for script in CHAIN:
            started = time.time()
            run(folder, script)
            print(f"{script:14} {time.time() - started:7.1f} s", flush=True)
        print((folder / "data/work/model/metrics.json").read_text())
        print(f"mix    {score(folder, truth)}")
        model = json.loads((folder / "data/work/model/model.json").read_text())
        model["mix"]["memory_weight"] = 0.0
        (folder / "data/work/model/model.json").write_text(json.dumps(model))
        run(folder, "infer")
        print(f"towers {score(folder, truth)}")


def set_constant(folder, name, value):
    """Edit the one line that gives a constant its value."""
    for script in folder.glob("*.py"):
        source = script.read_text(encoding="utf-8")
        edited, times = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, flags=re.MULTILINE)
        if times:
            script.write_text(edited, encoding="utf-8")
            return
    raise SystemExit(f"no script has a constant {name}")


def run(folder, script):
    """Run a script in folder; its own output goes to stderr."""
    subprocess.run([sys.executable, f"{script}.py"], cwd=folder, check=True, stdout=sys.stderr)


def score(folder, truth):
    """Return the metrics of the rankings under folder; a user without a ranking counts as 0."""
    hits = gain = reciprocal = 0.0
    for path in (folder / "data/work/ranking").glob("*.json.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                if line["uid"] in truth and truth[line["uid"]] in line["columns"]:
                    rank = 1 + line["columns"].index(truth[line["uid"]])
                    reciprocal += 1 / rank
                    hits += rank <= 10
                    gain += 1 / math.log2(rank + 1) if rank <= 10 else 0
    hr, ndcg, mrr = (total / len(truth) for total in (hits, gain, reciprocal))
    return f"HR@10 {hr:.4f}  NDCG@10 {ndcg:.4f}  MRR {mrr:.4f}"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
