"""Train day after day, warm and from nothing, and print what each takes and gives.

    python tests/bench/bench_days.py RAW_FOLDER [CONSTANT=VALUE ...]

RAW_FOLDER is what DATA_DIR names. On the first day of four each user has made 70 % of their clicks, then 80, 90 and all.
One folder trains each day from the model of the day before, one from nothing (WARM_START = False). Prints for each day the
seconds of train.py and of its epochs alone, and NDCG@10 of the towers and of the mix over the test users, who are the
same in both folders.
"""

import csv
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench_ranking import HOUSE, lines_of, run, set_constant

DAYS = (0.7, 0.8, 0.9, 1.0)
CHAIN = ("get_indexing", "get_tfrecord", "train")


def main(raw, *edits):
    with tempfile.TemporaryDirectory() as parent:
        folders = {name: make_house(Path(parent, name), raw, edits) for name in ("warm", "cold")}
        set_constant(folders["cold"], "WARM_START", False)
        print("day  share  start   train.py   epochs: number  seconds   towers     mix")
        for day, share in enumerate(DAYS, start=1):
            for name, folder in folders.items():
                write_day(raw, folder / "data/sample/click_seq", share)
                for script in CHAIN:
                    clock = time.time()
                    run(folder, script)
                print(f"{day:3} {share:6.0%}  {name:5} {time.time() - clock:10.1f} {summary(folder)}", flush=True)


def make_house(folder, raw, edits):
    """Return a new folder with the scripts, edited, and all raw data but the clicks."""
    (folder / "data/sample/click_seq").mkdir(parents=True)
    for place, paths in ((folder, HOUSE.glob("*.py")), (folder / "data/sample", Path(raw).glob("*.json*"))):
        for path in paths:
            shutil.copy(path, place)
    for edit in edits:
        set_constant(folder, *edit.split("=", 1))
    return folder


def write_day(raw, folder, share):
    """Write the first clicks of every user, that share of them."""
    with open(folder / "clicks.json", "w", encoding="utf-8") as file:
        for line in lines_of(raw, "click_seq"):
            number = max(1, round(share * len(line["click_seq"])))
            file.write(
                json.dumps(line | {name: line[name][:number] for name in ("click_seq", "times") if name in line})
            )
            file.write("\n")


def summary(folder):
    """Return what the last training took and gave, in words."""
    with open(folder / "data/work/model/history.csv", newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    test = json.loads((folder / "data/work/model/metrics.json").read_text(encoding="utf-8"))["test"]
    towers, mix = (test[row]["NDCG@10"] for row in ("towers", "mix"))
    return f"{len(epochs):15} {sum(float(row['seconds']) for row in epochs):8.1f} {towers:8.4f} {mix:7.4f}"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
