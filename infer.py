"""Rank the columns for every user of the click files.

Reads   DATA_DIR/click_seq/*.json[.gz], WORK_DIR/indexing/, WORK_DIR/model/
Writes  WORK_DIR/ranking/<input name>.json.gz   a line per user, in the order of the input:
        {"uid": "u1", "columns": ["c3", ...], "scores": [-0.7, ...], "source": "model"}

    python infer.py

Scores are log probabilities that the user's next column click is in the column. A user without any known click gets
the columns by popularity, "source": "popular". Finished files are not computed again unless something changed.
"""

import functools
import gzip
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from get_indexing import (
    DATA_DIR,
    UNKNOWN,
    WORK_DIR,
    InputError,
    Tally,
    constants,
    file_fingerprint,
    file_ranges,
    find_files,
    fingerprint,
    input_name,
    load_index,
    map_files,
    parse_clicks,
    read_json,
    read_names,
    read_records,
    remove_leftovers,
    replacing,
    run_script,
    split_click,
    write_json,
)
from get_tfrecord import ClickEncoder

CLICKS_DIR = f"{DATA_DIR}/click_seq"  # the users to rank for; name another folder to rank for others
TOP_K = 0  # columns for each user; 0: all
BATCH_USERS = 128
GZIP_LEVEL = 1  # level 9 takes 70 times as long for 12 % less
MEMO_SIZE = 1 << 18  # scores whose text is remembered
DECIMALS = 4  # of the scores; equal ones go by the order of the columns

as_json = functools.partial(json.dumps, ensure_ascii=False)


def infer(clicks_dir=CLICKS_DIR, work_dir=WORK_DIR, top_k=TOP_K, **how):
    """Write the ranking of each click file as soon as it is whole, and return all paths; those still good are kept."""
    folder, work_dir = Path(work_dir, "ranking"), Path(work_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    manifest = read_json(folder / "manifest.json", "infer.py") if (folder / "manifest.json").exists() else {}
    model = read_json(work_dir / "model/model.json", "train.py")
    code = file_fingerprint(Path(__file__).with_name("model_tf2.py"))  # not its constants: they need TensorFlow
    made_with = fingerprint(constants("get_indexing", "infer"), code, model, load_index(work_dir), top_k)
    outputs, made_from, tasks = {}, {}, []
    for path in find_files(clicks_dir):
        output = outputs[path] = work_dir / "ranking" / f"{input_name(path)}.json.gz"
        made_from[path] = fingerprint(made_with, file_fingerprint(path))
        if not output.exists() or manifest.get(output.name) != [made_from[path], file_fingerprint(output)]:
            parts = [(where, output.with_name(f".{output.name}.{where.start}.tmp")) for where in file_ranges([path])]
            tasks += [(where, part, work_dir, made_with, top_k) for where, part in parts]

    users = 0
    results = zip(tasks, map_files(rank_range, tasks, desc="rank", **how), strict=True)
    for path, of_file in itertools.groupby(results, key=lambda result: result[0][0].path):
        tally = Tally(path)
        with replacing(outputs[path]) as temporary, open(temporary, "wb") as whole:
            for (_, part, *_), part_tally in of_file:  # gzip files in a row are one gzip file
                with open(part, "rb") as ranked:
                    shutil.copyfileobj(ranked, whole)
                part.unlink()
                tally.append(part_tally)
            tally.check()
        manifest[outputs[path].name] = [made_from[path], file_fingerprint(outputs[path])]
        write_json(folder / "manifest.json", manifest)
        users += tally.lines - sum(tally.skipped.values())
    remove_leftovers(folder)  # of a task that was tried twice
    for path in sorted(set((work_dir / "ranking").glob("*.json.gz")) - set(outputs.values())):
        print(f"{path}: no click file of this name any more; remove it if it should not be published", file=sys.stderr)
    ranked = len({where.path for where, *_ in tasks})
    print(f"{users:,} users ranked in {ranked:,} files, {len(outputs):,} files stand in {folder}")
    return list(outputs.values())


def rank_range(task):
    """Rank the users of one FileRange into its part file and return the tally of its lines."""
    where, part, work_dir, made_with, top_k = task
    ranker, tally = load_ranker(work_dir, made_with), Tally(where.path)
    users = read_records(tally, parse_clicks, *where[1:])
    with (
        replacing(part) as temporary,
        open(temporary, "wb") as file,
        gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed,
    ):
        while block := list(itertools.islice(users, BATCH_USERS)):
            packed.write("".join(ranker.lines(block, top_k)).encode())
    return tally


@functools.lru_cache(maxsize=1)
def load_ranker(work_dir, made_with):
    """Return the Ranker of work_dir, once for a process and what it is made with."""
    return Ranker(work_dir)


class Ranker:
    """The trained model and the current columns: raw clicks in, ranked columns out.

    TensorFlow is imported here, by the workers: the process that starts them does without.
    """

    def __init__(self, work_dir=WORK_DIR):
        import tensorflow as tf

        from get_dataset import column_table
        from train import load_model

        self.model, self.memory, self.chosen, saved = load_model(work_dir)
        index = load_index(work_dir)
        self.encoder, self.user_max_len = ClickEncoder(index), saved["user_max_len"]
        numbers = np.array([number for number, videos in enumerate(index.columns.values(), start=1) if videos])
        if not len(numbers):
            raise InputError(
                "no column holds a video, so there is nothing to rank; run get_indexing.py on today's columns"
            )
        self.columns = numbers - 1  # the current ones, in the order of the index
        cids = list(index.columns)
        self.texts = [as_json(cids[column]) for column in self.columns], ScoreTexts()
        videos = column_table(index, self.memory.video_clicks, saved["item_max_len"])[numbers]
        self.column_vectors = self.model.column_vectors(videos, numbers)
        clicks = self.of_current(self.memory.column_clicks[None, 1:])[0] + 0.5
        self.popularity = np.log(clicks / clicks.sum())

        @tf.function(reduce_retracing=True)
        def logits(videos, columns, last):
            users = self.model.user_vectors(videos, columns)
            return self.model.logits(tf.gather(users, last, batch_dims=1), self.column_vectors)

        self.logits = logits

    def of_current(self, scores):
        """Scores [n, columns the memory knows] -> [n, current columns]; a newer column scores 0."""
        newer = self.columns[-1] + 1 - scores.shape[1]
        return np.pad(scores, [(0, 0), (0, max(newer, 0))])[:, self.columns]

    def scores(self, histories):
        """Return log probabilities float64 [n, current columns] of encoded histories, n pairs (videos, columns)."""
        from model_tf2 import MEMORY_CLICKS, mix

        lengths = np.array([min(len(videos), self.user_max_len) for videos, _ in histories])
        padded = np.zeros([2, len(histories), max(1, lengths.max())], np.int32)
        for user, (history, length) in enumerate(zip(histories, lengths, strict=True)):
            for row, numbers in zip(padded[:, user], history, strict=True):
                row[:length] = numbers[len(numbers) - length :]
        logits = self.logits(*padded, np.maximum(lengths - 1, 0)).numpy()
        places = lengths[:, None] - 1 - np.arange(MEMORY_CLICKS)
        latest = np.where(places >= 0, np.take_along_axis(padded, np.maximum(places, 0)[None], axis=2), 0)
        remembered = self.of_current(self.memory.scores(*latest, self.chosen.own_weight))
        return mix(logits, remembered, self.chosen.memory_weight, self.chosen.temperature)

    def lines(self, users, top_k=0):
        """Yield the output line of each of users, a list of (uid, clicks)."""
        histories = [self.encoder.encode(clicks) for _, clicks in users]
        known = [max(videos, default=0) > UNKNOWN or any(columns) for videos, columns in histories]
        scores = self.scores(histories)
        scores[~np.array(known)] = self.popularity
        if not np.isfinite(scores).all():
            raise InputError("the model gives scores that are not finite; run train.py again")
        for (uid, _), is_known, *best in zip(users, known, *best_first(scores, top_k), strict=True):
            columns, scores = (
                ", ".join(map(texts.__getitem__, of)) for texts, of in zip(self.texts, best, strict=True)
            )
            yield (
                f'{{"uid": {as_json(uid)}, "columns": [{columns}], "scores": [{scores}], '
                f'"source": "{"model" if is_known else "popular"}"}}\n'
            )


def best_first(scores, top_k=0):
    """Return (places, costs), lists [n, top_k or columns], of scores [n, columns]: the best first, of equals the first.

    A cost is -score * 10**DECIMALS as an integer. Cost and place in one number need one sort, which has no ties.
    """
    num_columns = scores.shape[1]
    bits = num_columns.bit_length()
    keys = (np.rint(scores * -(10.0**DECIMALS)).astype(np.int64) << bits) + np.arange(num_columns)
    if 0 < top_k < num_columns:
        keys = np.partition(keys, top_k - 1)[:, :top_k]
    keys.sort()
    return (keys & (1 << bits) - 1).tolist(), (keys >> bits).tolist()


class ScoreTexts(dict):
    """The JSON text of each cost, remembered: users share most scores, and a float takes long to print."""

    def __missing__(self, cost):
        if len(self) >= MEMO_SIZE:
            self.clear()
        text = self[cost] = as_json(-cost / 10**DECIMALS)
        return text


def print_example(output, clicks_path, data_dir=DATA_DIR):
    """Print in words what the first ranked user of a file clicked last, and the columns that come first for them."""
    titles, names = read_names(data_dir)
    index = load_index()
    with gzip.open(output, "rt", encoding="utf-8") as ranked:
        first = ranked.readline()
    if not first:
        return
    line = json.loads(first)
    _, clicks = next(read_records(Tally(clicks_path), parse_clicks))
    print(f"user {line['uid']} clicked last:")
    for click in clicks[-5:]:
        vid, cid = split_click(click, index.videos, index.columns)
        print(f"  {titles.get(vid, vid)}" + (f"  in {names.get(cid, cid)}" if cid else ""))
    print(f"and is shown first ({line['source']}):")
    for cid, score in list(zip(line["columns"], line["scores"], strict=True))[:5]:
        print(f"  {np.exp(score):6.1%}  {names.get(cid, cid)}")


def main():
    outputs = infer()
    print_example(outputs[0], find_files(CLICKS_DIR)[0])


if __name__ == "__main__":
    run_script(main)
