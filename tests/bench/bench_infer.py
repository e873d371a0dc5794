"""Time infer.py with 1,000 columns and full lists, against the limit of its parts and a naive ranking of one user at a time.

    python tests/bench/bench_infer.py [USERS [ROUNDS]]

The limit: the model, sorting, JSON and gzip of the same users, each measured alone on one core, added up and divided by
the cores. The naive ranking: one user at a time, the vectors of all columns computed anew, json.dumps, gzip level 9.
Memory is compared with a tenth of the users. The model is trained for one epoch on a few users: what it ranks does not
matter here.
"""

import gzip
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import edit
from measure import CORES, cost_of, house, in_turn, seconds, write_clicks

TRAINED_ON = 1000
NAIVE_USERS = 60


def trained_house(folder):
    """Return a folder in which the model has been trained for one epoch on a few users."""
    write_clicks(folder / "few", TRAINED_ON)
    chain = house(folder / "trained", folder / "few")
    edit(chain, "train", EPOCHS=1)
    for name in ("get_indexing", "get_tfrecord", "train"):
        cost_of(chain, name)
    return chain


def house_for(folder, users, trained):
    """Return a folder with the trained model and so many users to rank."""
    write_clicks(folder / f"raw-{users}", users)
    chain = house(folder / f"house-{users}", folder / f"raw-{users}")
    shutil.copy(trained / "train.py", chain)
    shutil.copytree(trained / "data/work", chain / "data/work")
    return chain


def parts_alone(work_dir, clicks_path):
    """Return {part: core-seconds a user} of the work that cannot be avoided, and the naive ranking's seconds a user."""
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    from get_indexing import Records
    from get_tfrecord import parse_history
    from infer import Ranker

    ranker = Ranker(work_dir)
    users = list(itertools.islice(Records(str(clicks_path), parse_history), 512))

    def score():
        return ranker.scores(ranker.padded([ranker.encode(*user[1:]) for user in users]))

    scores = score()
    order = np.argsort(-scores)
    lists = np.array(ranker.cids)[order].tolist(), np.take_along_axis(scores, order, 1).round(4).tolist()

    def as_json():
        return "".join(
            json.dumps({"uid": user.uid, "columns": columns, "scores": of_user, "source": "model"}) + "\n"
            for user, columns, of_user in zip(users, *lists, strict=True)
        ).encode()

    text = as_json()
    parts = in_turn(
        5,
        model=score,
        sort=lambda: np.argsort(-scores),
        json=as_json,
        gzip=lambda: zlib.compress(text, 1),
    )

    def naive():
        with gzip.open(work_dir / "naive.gz", "wt", compresslevel=9) as file:
            for user in users[:NAIVE_USERS]:
                ranker.scorer.refresh()
                file.writelines(ranker.lines([user]))

    naive()
    return {name: taken / len(users) for name, taken in parts.items()}, seconds(naive) / NAIVE_USERS


def main(users=20_000, rounds=3):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trained = trained_house(folder)
        few, many = (house_for(folder, number, trained) for number in (users // 10, users))
        few_peak, costs, firsts = cost_of(few, "infer").peak, [], []
        for _ in range(rounds):
            shutil.rmtree(many / "data/work/ranking", ignore_errors=True)
            seen, began = [], time.perf_counter()

            def look(seen=seen, began=began):
                if not seen and any((many / "data/work/ranking").glob("part-*.json.gz")):
                    seen.append(time.perf_counter() - began)

            costs.append(cost_of(many, "infer", meanwhile=look))
            firsts += seen
        parts, naive = parts_alone(many / "data/work", many / "data/sample/click_seq/part-00000.json")
    wall, cpu, peak = (statistics.median(of) for of in zip(*costs, strict=True))
    limit = sum(parts.values()) / CORES
    print(f"{users:,} users: {wall:.1f} s, {cpu:.1f} core-seconds ({cpu / wall / CORES:.0%} of {CORES} cores), first output "
          f"after {statistics.median(firsts):.1f} s, largest process {peak:.0f} MB "
          f"({peak / few_peak - 1:+.1%} against {users // 10:,} users)")  # fmt: skip
    print("alone, core-us a user: " + ", ".join(f"{name} {1e6 * taken:.0f}" for name, taken in parts.items()))
    print(
        f"{1e6 * wall / users:.0f} us a user with the start; limit {1e6 * limit:.0f} us: {limit * users / wall:.0%} of it"
    )
    print(f"naive {1e3 * naive:.1f} ms a user: {naive * users / wall:.0f} times slower")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
