"""Time get_indexing.py from start to end on 50,000 videos, in turn with json.loads of the same files.

python tests/bench/bench_get_indexing.py [ROUNDS]
"""

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measure import cost_of, house, seconds, write_clicks


def load(data_dir):
    """Parse every line that get_indexing.py reads."""
    for path in data_dir.glob("*.json"):
        with open(path, "rb") as file:
            for line in file:
                json.loads(line)


def main(rounds=9):
    with tempfile.TemporaryDirectory() as temporary:
        data_dir, walls, loads = Path(temporary, "raw"), [], []
        write_clicks(data_dir, users=1)
        folder = house(Path(temporary, "house"), data_dir)
        for _ in range(rounds):
            shutil.rmtree(folder / "data/work", ignore_errors=True)
            walls.append(cost_of(folder, "get_indexing").wall)
            loads.append(seconds(lambda: load(data_dir)))
    wall, loaded = statistics.median(walls), statistics.median(loads)
    print(f"get_indexing.py {wall:.2f} s; json.loads {loaded:.3f} s; 3 x json.loads + 0.2 s = {3 * loaded + 0.2:.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
