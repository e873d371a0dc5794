"""Rank the columns for every user of the click files.

Reads   CLICKS_DIR/*, WORK_DIR/indexing/, WORK_DIR/model/; for the printed example also the titles in DATA_DIR
Writes  RANKING_DIR/<input name>.json.gz   a line per user, in the order of the input:
        {"uid": "u1", "columns": ["c3", ...], "scores": [-0.7, ...], "source": "model"}
        RANKING_DIR/manifest.jsonl         a line per finished file: what it was made from; of two the later holds

    python infer.py

Scores are log probabilities that the user's next column click is in the column. A user without any known click among
those that the model reads gets the columns by popularity, "source": "popular". Finished files are not computed again
unless something changed. A Ranker ranks the columns for one user, now, and says why.
"""

import contextlib
import functools
import gzip
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from get_indexing import (
    DATA_DIR, LIMITS, NUM_WORKERS, WORK_DIR,
    InputError, Tallies, Tally, cut_files, file_fingerprint, find_files, fingerprint, input_name, load_index, map_files,
    only_one, read_clicks, read_json, read_lines, read_names, remove_leftovers, replacing, run_script, split_click,
)  # fmt: skip
from get_tfrecord import ClickEncoder

import numpy as np

CLICKS_DIR = f"{DATA_DIR}/click_seq"  # the users to rank for; name another folder to rank for others
RANKING_DIR = f"{WORK_DIR}/ranking"  # one for each folder of users
TOP_K = 0  # columns for each user; 0: all
RANK_BYTES = 512 << 10  # of click files: the work of one task
BATCH_USERS = 128  # ranked at once; fewer where columns are many
GZIP_LEVEL = 1  # level 9 takes 70 times as long for 12 % less
MEMO_SIZE = 1 << 18  # scores whose text is remembered
DECIMALS = 4  # of the scores; equal ones go by the order of the columns
EXAMPLE = 5  # last clicks and first columns of the user who is printed

rules = {
    "a path, without ~": ("CLICKS_DIR", "RANKING_DIR"),
    "a whole number in [0, inf)": ("TOP_K",),
    "a whole number in [1, inf)": ("RANK_BYTES", "BATCH_USERS", "MEMO_SIZE", "EXAMPLE"),
    "a whole number in [0, 9]": ("GZIP_LEVEL", "DECIMALS"),
}

as_json = functools.partial(json.dumps, ensure_ascii=False)


def infer(clicks_dir=CLICKS_DIR, work_dir=WORK_DIR, ranking_dir=RANKING_DIR, top_k=TOP_K, num_workers=NUM_WORKERS):
    """Write the ranking of each click file as soon as it is whole, unless it stands still; return the paths of all."""
    folder, work_dir = Path(ranking_dir).absolute(), Path(work_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # By its name, which stays where all is moved and where a link leads elsewhere.
    clicks_from = os.path.relpath(Path(clicks_dir).absolute(), folder)
    remove_leftovers(folder)
    index, model = load_index(work_dir), read_json(work_dir / "model/model.json", "train.py")
    made_with = {
        "model": model.get("id"),
        "index": fingerprint(index.videos, index.columns),
        "clicks": clicks_from,
        "constants": {"TOP_K": top_k, "DECIMALS": DECIMALS},
        "limits": LIMITS,
    }
    manifest = read_manifest(folder)
    outputs = {path: folder / f"{input_name(path)}.json.gz" for path in find_files(clicks_dir)}
    for output in outputs.values():
        check_folder(manifest.get(output.name), output, clicks_from)
    stands = standing_rankings(outputs, manifest, made_with, num_workers)
    tasks = cut_files([path for path in outputs if path not in stands], RANK_BYTES)
    first = tasks[0][0] if tasks else None
    rank = functools.partial(rank_ranges, folder=folder, work_dir=work_dir, made_with=made_with, explain=first)

    users, examples = 0, []
    with map_files(rank, tasks, "rank", num_workers) as results:
        parts = parts_in_order(tasks, results, examples)
        for path, of_file in itertools.groupby(parts, key=lambda part: part[0].path):
            tally, manifest[outputs[path].name] = join_parts(outputs[path], of_file, made_with)
            users += tally.lines - tally.skipped.total()
    remove_leftovers(folder)  # of a task that was tried twice
    name_the_gone(folder, manifest, outputs, clicks_from)
    print(
        f"{users:,} users ranked in {len(outputs) - len(stands):,} files, {len(outputs):,} files stand in {ranking_dir}"
    )
    for example in examples:
        print_example(*example, index)
    return list(outputs.values())


def parts_in_order(tasks, results, examples):
    """Yield (FileRange, Tally) of the tasks' results; what they explain goes to the list of examples."""
    for ranges, (tallies, explained) in zip(tasks, results, strict=True):
        examples += explained
        yield from zip(ranges, tallies, strict=True)


def name_the_gone(folder, manifest, outputs, clicks_from):
    """Print a line for each ranking that stands though its click file, of this folder, is gone."""
    for name in sorted(manifest.keys() - {output.name for output in outputs.values()}):
        if manifest[name]["clicks"] == clicks_from and (folder / name).exists():
            print(
                f"{folder / name}: no click file of this name any more; remove it if it should not be published",
                file=sys.stderr,
            )


def join_parts(output, parts, made_with):
    """Write a ranking from its parts, (FileRange, Tally) in order; return (Tally of all, its entry of the manifest).

    The entry, which knows the ranking by its hash, is written just before: no ranking stands that the manifest lacks.
    """
    tallies = Tallies()
    with replacing(output, durable=False) as temporary:
        with open(temporary, "wb") as whole:
            for file_range, tally in parts:  # gzip files in a row are one gzip file
                with open(part_of(output.parent, file_range), "rb") as part:
                    shutil.copyfileobj(part, whole)
                part_of(output.parent, file_range).unlink()
                tallies.extend([tally])
        tallies.check()
        (tally,) = tallies.values()
        entry = made_with | {"input": tally.hexdigest(), "sha256": file_fingerprint(temporary)}
        with open(output.parent / "manifest.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({output.name: entry}) + "\n")
    return tally, entry


def read_manifest(folder):
    """Return {output name: what it was made from}, and write it anew without damaged lines: a killed run cuts one short."""
    path, manifest = folder / "manifest.jsonl", {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                manifest |= {
                    name: of for name, of in json.loads(line).items() if {"clicks", "input", "sha256"} <= of.keys()
                }
        with replacing(path) as temporary:
            temporary.write_text(
                "".join(json.dumps({name: of}) + "\n" for name, of in manifest.items()), encoding="utf-8"
            )
    return manifest


def check_folder(made_from, output, clicks_from):
    """Refuse to write over the ranking of another folder's file of the same name; folders are as seen from the rankings."""
    if made_from and made_from["clicks"] != clicks_from and output.exists():
        former, now = (os.path.normpath(output.parent / clicks) for clicks in (made_from["clicks"], clicks_from))
        raise InputError(
            f"{output} is the ranking of a file in {former}, not in {now}; give this folder a RANKING_DIR of its own "
            "in infer.py"
        )


def standing_rankings(outputs, manifest, made_with, num_workers):
    """Return the paths of the click files whose rankings stand: those made with the same, of the same clicks."""
    maybe = [
        path
        for path, output in outputs.items()
        if output.exists() and made_with.items() <= manifest.get(output.name, {}).items()
    ]
    tallies = Tallies()
    with map_files(read_digests, cut_files(maybe), "check rankings", num_workers) as results:
        for of_task in results:
            tallies.extend(of_task)
    return {
        path
        for path in maybe
        if manifest[outputs[path].name]
        == made_with | {"input": tallies[path].hexdigest(), "sha256": file_fingerprint(outputs[path])}
    }


def read_digests(ranges):
    """Return the [Tally, ...] of FileRanges, which hold their digests."""
    tallies = []
    for file_range in ranges:
        tallies.append(Tally(file_range.path))
        for line, offset in read_lines(file_range):
            tallies[-1].count(line, offset)
    return tallies


def part_of(folder, file_range):
    """Return the path of the ranking of one FileRange, a leftover unless it is joined with the others of its file."""
    return folder / f".part.{fingerprint(input_name(file_range.path), file_range.start)[:32]}.tmp"


def rank_ranges(ranges, folder, work_dir, made_with, explain=None):
    """Rank the users of FileRanges, each into its part file; return ([Tally, ...], [(uid, last clicks, Reasons)]).

    The example is the first user of the FileRange that is to be explained, if it is one of them.
    """
    ranker, tallies, examples = load_ranker(work_dir, made_with["model"], made_with["index"]), [], []
    at_once = max(1, min(BATCH_USERS, ranker.scores_at_once // len(ranker.cids)))  # users
    for file_range in ranges:
        users = read_clicks([file_range], tallies)
        with (
            replacing(part_of(folder, file_range), durable=False) as temporary,
            open(temporary, "wb") as file,
            gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed,
        ):
            while block := list(itertools.islice(users, at_once)):
                packed.write("".join(ranker.lines(block, made_with["constants"]["TOP_K"])).encode())
                if file_range == explain and not examples:
                    uid, clicks = block[0]
                    examples = [(uid, clicks[-EXAMPLE:], ranker.why(clicks, EXAMPLE))]
    return tallies, examples


@functools.lru_cache(maxsize=1)
def load_ranker(work_dir, model, index):
    """Return the Ranker of work_dir, once for a process; another model or index than the run began with ends it."""
    ranker = Ranker(work_dir)
    if (ranker.id, fingerprint(ranker.index.videos, ranker.index.columns)) != (model, index):
        raise InputError(f"{work_dir}: model or index changed while infer.py was at work; run it again")
    return ranker


class Ranker:
    """The model that stands and the current columns: raw clicks in, ranked columns out.

    TensorFlow is imported here, by the workers: the process that starts them does without.
    """

    def __init__(self, work_dir=WORK_DIR):
        from model_tf2 import SCORES_AT_ONCE, Scorer
        from train import load_model

        self.index = load_index(work_dir)
        model, memory, self.mix, saved = load_model(work_dir, self.index)
        self.id, self.encoder = saved["id"], ClickEncoder(self.index)
        self.user_max_len = saved["records"]["constants"]["USER_MAX_LEN"]
        if not self.encoder.current:
            raise InputError(
                "no column holds a video, so there is nothing to rank; run get_indexing.py on today's columns"
            )
        self.scorer = Scorer(model, memory, self.index, saved["constants"]["ITEM_MAX_LEN"])
        self.scores_at_once = SCORES_AT_ONCE
        self.cids = self.scorer.cids
        self.texts = list(map(as_json, self.cids)), ScoreTexts()

    def rank(self, clicks, top_k=TOP_K):
        """Return [(cid, probability), ...] for a user's clicks, oldest first: the best column first, top_k of them or all.

        The logarithm of a probability is the score that the ranking files hold.
        """
        (places,), (costs,) = best_first(self.scores(*self.padded([self.encode(clicks)])), top_k)
        probabilities = np.exp(np.array(costs) / -(10.0**DECIMALS)).tolist()
        return list(zip(map(self.cids.__getitem__, places), probabilities, strict=True))

    def why(self, clicks, top_k=EXAMPLE):
        """Return the Reason of each of the first columns for a user's clicks, oldest first.

        Each of the clicks that the model reads is left out once, which lets an earlier one in, and the columns are ranked
        again: what a click does is how much the log probability of a column falls without it. So it holds for all parts of
        the model together.
        """
        history = self.encoder.encode(clicks[-self.user_max_len - 1 :])
        first = max(0, len(history[0]) - self.user_max_len)
        without = [[numbers[:i] + numbers[i + 1 :] for numbers in history] for i in range(first, len(history[0]))]
        padded = self.padded([history, *without])
        scores, of_towers = self.scores(*padded), self.share_of_towers(*padded[:, :1])
        effects, unread = scores[0] - scores[1:], [0.0] * (len(clicks) - len(without))
        (places,), _ = best_first(scores[:1], top_k)
        return [
            Reason(self.cids[place], math.exp(scores[0, place]), of_towers[place], unread + effects[:, place].tolist())
            for place in places
        ]

    def share_of_towers(self, videos, columns):
        """Return which share of each current column's probability the towers give one user, a list; None: popularity."""
        if not self.scorer.is_known(videos, columns)[0]:
            return [None] * len(self.cids)
        weight, (towers, memory) = self.mix.memory_weight, self.scorer.parts(videos, columns, self.mix)
        return ((1 - weight) * towers / ((1 - weight) * towers + weight * memory))[0].tolist()

    def encode(self, clicks):
        """Return (videos, columns) of the last clicks, as many as are read."""
        return self.encoder.encode(clicks[-self.user_max_len :])

    def scores(self, videos, columns):
        """Return log probabilities float64 [n, current columns] of padded histories."""
        scores = np.log(self.scorer.probabilities(videos, columns, self.mix))
        if not np.isfinite(scores).all():
            raise InputError("the model gives scores that are not finite; run train.py again")
        return scores

    def padded(self, histories):
        """Return int32 [2, n, len]: videos and columns of the last clicks of encoded histories, 0 padded at the end."""
        last = [[numbers[-self.user_max_len :] for numbers in history] for history in histories]
        padded = np.zeros([2, len(last), max(1, *(len(videos) for videos, _ in last))], np.int32)
        for user, history in enumerate(last):
            for row, numbers in zip(padded[:, user], history, strict=True):
                row[: len(numbers)] = numbers
        return padded

    def lines(self, users, top_k=TOP_K):
        """Yield the output line of each of users, a list of (uid, clicks)."""
        padded = self.padded([self.encode(clicks) for _, clicks in users])
        best, known = best_first(self.scores(*padded), top_k), self.scorer.is_known(*padded)
        for (uid, _), is_known, *of_user in zip(users, known, *best, strict=True):
            columns, scores = (
                ", ".join(map(texts.__getitem__, of)) for texts, of in zip(self.texts, of_user, strict=True)
            )
            source = "model" if is_known else "popular"
            yield (f'{{"uid": {as_json(uid)}, "columns": [{columns}], "scores": [{scores}], "source": "{source}"}}\n')


class Reason(NamedTuple):
    """Why a column stands where it does for a user."""

    cid: str
    probability: float
    of_towers: float | None  # share of the probability that the towers give, the rest is the memory's; None: popularity
    effects: list  # of each of the user's clicks: above 0 it speaks for the column, 0 without it nothing changes


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
    """The JSON text of each cost, remembered: users share most scores, and lru_cache() would take a fifth of the time."""

    def __missing__(self, cost):
        if len(self) >= MEMO_SIZE:
            self.clear()
        text = self[cost] = as_json(-cost / 10**DECIMALS)
        return text


def print_example(uid, clicks, reasons, index, data_dir=DATA_DIR):
    """Print in words what a user clicked last, the columns that come first for them, and the clicks that speak for each."""
    split = [split_click(click, index.videos, index.columns) for click in clicks]
    titles, names = read_names(data_dir, {vid for vid, _ in split})
    named = [titles.get(vid, vid) + (f"  in {names.get(cid, cid)}" if cid else "") for vid, cid in split]
    print(f"user {uid} clicked last:", *named, sep="\n  ")
    print("and is shown first, by these of the clicks:")
    for reason in reasons:
        share = "(popular)"
        if reason.of_towers is not None:
            share = f"(towers {reason.of_towers:.0%}, memory {1 - reason.of_towers:.0%})"
        print(f"  {reason.probability:6.1%}  {names.get(reason.cid, reason.cid)}  {share}")
        for effect, click in sorted(zip(reason.effects[-len(named) :], named, strict=True), reverse=True):
            if effect > 0.05:
                print(f"          {effect:+.2f}  {click}")


@only_one()
def main():
    infer()


if __name__ == "__main__":
    run_script(main)
