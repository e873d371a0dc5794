"""Rank the columns for every user of the click files.

Reads   CLICKS_DIR/*, WORK_DIR/indexing/, WORK_DIR/model/; for the printed example also the titles in DATA_DIR
Writes  RANKING_DIR/<input name>.json.gz   a line per user, in the order of the input:
        {"uid": "u1", "columns": ["c3", ...], "scores": [-0.7, ...], "source": "model", "clicks": 57}
        RANKING_DIR/<input name>.made_of.json  what that ranking was made of
        RANKING_DIR/default.json           one such line, for users in no file
        RANKING_DIR/served.csv             one line a run: how good the former rankings were for what was clicked since

    python infer.py

Scores are log probabilities that the user's next column click is in the column; "clicks" is how many clicks were known. A
user without any known click among those that the model reads gets the columns by popularity, "source": "popular".
Finished files are not computed again unless something changed. A Ranker ranks the columns for one user, now, and says why.
"""

import csv
import functools
import gzip
import itertools
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from get_indexing import (
    DATA_DIR, MAX_ID_CHARS, MAX_LINE_BYTES, WORK_DIR,
    InputError, OrZero, Records, Tally, file_fingerprint, fingerprint, input_name, load_index, name_unread,
    only_one, packages_named, read_json, read_names, remove_leftovers, replacing, run_script, write_json,
)  # fmt: skip
from get_tfrecord import (
    NUM_WORKERS, ClickEncoder, History, cut_files, draw_of, held_out_share, map_files, parse_history, read_if_whole, slices,
    split_click, stamp_of, survey,
)  # fmt: skip

with packages_named():
    import numpy as np

CLICKS_DIR: str = f"{DATA_DIR}/click_seq"  # the users to rank for; name another folder to rank for others
RANKING_DIR: str = f"{WORK_DIR}/ranking"  # one for each folder of users
TOP_K: OrZero = 0  # columns for each user; 0: all
NOW_AFTER: int = 43_200  # seconds after the newest click of all that a user is taken to come, where "now" is not given
DECIMALS: OrZero = 4  # of the scores; equal ones go by the order of the columns
SERVED_USERS: int = 3000  # by whom the former rankings are judged, or up to twice as many
RANK_BYTES: int = 512 << 10  # of click files: the work of one task
BATCH_USERS: int = 128  # ranked at once; fewer where columns are many
GZIP_LEVEL: OrZero = 1  # level 9 takes 70 times as long for 12 % less
EXAMPLE: int = 5  # last clicks and first columns of the user who is printed


def infer(clicks_dir=CLICKS_DIR, work_dir=WORK_DIR, ranking_dir=RANKING_DIR, top_k=TOP_K, num_workers=NUM_WORKERS):
    """Write the ranking of each click file as soon as it is whole, unless it stands still; return the paths of all."""
    clicks_dir, folder, work_dir = (Path(path).absolute() for path in (clicks_dir, ranking_dir, work_dir))
    check_ranking_dir(clicks_dir, folder)
    index, model = load_index(work_dir), read_json(work_dir / "model/model.json", "train.py")
    contents = survey(clicks_dir, num_workers)
    made_with = describe_ranking(model, index, check_clicks(contents, num_workers), top_k)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    outputs = {path: folder / f"{input_name(path)}.json.gz" for path in contents}
    made_of = {path: made_with | {"input": content.sha256} for path, content in contents.items()}
    former = {path: read_former(output, made_of[path], clicks_dir) for path, output in outputs.items()}
    stands = (folder / "default.json").exists()
    todo = [path for path in contents if not (stands and made_of[path].items() <= former[path].items())]
    served = [(path, outputs[path], former[path]["model"]) for path in todo if former[path]]
    judge_served(folder, served, index, sum(content.lines for content in contents.values()), num_workers)

    tasks = cut_files(todo, RANK_BYTES)
    first = tasks[0][0] if tasks else None
    rank = functools.partial(rank_ranges, folder=folder, work_dir=work_dir, made_with=made_with, first=first)
    ranked, example = {}, None
    parts = itertools.chain.from_iterable(map_files(rank, tasks, "rank", num_workers))
    for path, of_file in itertools.groupby(parts, key=lambda part: part.path):
        of_file = list(of_file)
        if of_file[0].first:  # before any ranking stands, so that a run that fails here does all again
            default, *example = of_file[0].first
            with replacing(folder / "default.json") as temporary:
                temporary.write_text(default, encoding="utf-8")
        if stamp_of(path) == contents[path].stamp:
            ranked[path] = join_parts(outputs[path], of_file, made_of[path], clicks_dir)
    users = sum(ranked.values())
    print(f"{users:,} users ranked; {len(ranked):,} of {len(outputs):,} rankings in {ranking_dir} are new")
    if example and example[0].uid:
        print_example(*example, index)
    if changed := ", ".join(path for path in todo if path not in ranked):
        raise InputError(f"{changed}: changed while it was ranked, so the former ranking stays; run infer.py again")
    return list(outputs.values())


def describe_ranking(model, index, newest, top_k):
    """Return what shapes the rankings beside the clicks, whose newest time is given; say for which moment they are."""
    now = newest and newest + NOW_AFTER
    if now:
        print(f'ranked for {moment(now)}, NOW_AFTER the newest click, where a line has no "now"')
    constants = dict(TOP_K=top_k, DECIMALS=DECIMALS, MAX_LINE_BYTES=MAX_LINE_BYTES, MAX_ID_CHARS=MAX_ID_CHARS)
    return dict(model=model.get("id"), index=fingerprint(index.videos, index.columns), constants=constants, now=now)


def check_ranking_dir(clicks_dir, ranking_dir):
    """Refuse to write rankings into the folder of the clicks, whose names they would take."""
    if Path(clicks_dir).resolve() == Path(ranking_dir).resolve():
        raise InputError(f"{ranking_dir}: RANKING_DIR is the folder of the clicks; name another one in infer.py")


def check_clicks(contents, num_workers):
    """Return the newest time of the clicks in files, of survey(), 0 where none is known; too many bad lines are refused."""
    newest, tallies = 0, {path: Tally(path) for path in contents}
    for newest_of_task, of_task in map_files(check_ranges, cut_files(contents, RANK_BYTES), "read clicks", num_workers):
        newest = max(newest, newest_of_task)
        for tally in of_task:
            tallies[tally.path] += tally
    for tally in tallies.values():
        tally.check()
    return newest


def check_ranges(ranges):
    """Return (the newest time of the clicks in byte ranges of click files, 0 where none is known; the Tally of each range)."""
    newest, tallies = 0, []
    for path, start, end in ranges:
        records = Records(path, parse_history, start, end)
        newest = max(newest, max((history.times[-1] for history in records if history.times), default=0))
        tallies.append(records.tally)
    return newest, tallies


def moment(now):
    """Return a time in words, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))


# ---------------------------------------------------------------- rankings, and what they were made of


def made_of_file(output):
    """Return the path of the file beside a ranking that says what it was made of."""
    return output.with_name(f"{output.name.removesuffix('.json.gz')}.made_of.json")


def places_of(clicks_dir, output):
    """Return where the clicks of a ranking lie; one of both stays where all is moved, or a part."""
    return {"absolute": str(clicks_dir), "relative": os.path.relpath(clicks_dir, output.parent)}


def read_former(output, made_of, clicks_dir):
    """Return what the ranking that stands was made of, {} where it is not what the file beside it says.

    That of another folder's file of the same name is not written over: it raises InputError.
    """
    former = read_if_whole(made_of_file(output))
    if not output.exists() or former.get("sha256") != file_fingerprint(output):
        return {}
    same_place = former["clicks"].items() & places_of(clicks_dir, output).items()
    if former["input"] != made_of["input"] and not same_place:
        raise InputError(
            f"{output} is the ranking of a file in {former['clicks']['absolute']}, not in {clicks_dir}; give this folder a "
            "RANKING_DIR of its own in infer.py"
        )
    return former


class Part(NamedTuple):
    """The ranking of one byte range of a click file."""

    path: str  # of the click file
    file: Path  # with the ranking
    users: int  # ranked there
    first: tuple | None  # of the first range: (line for users in no file, History and [Reason, ...] of its first user)


def join_parts(output, parts, made_of, clicks_dir):
    """Write a ranking from its Parts, and before it what it was made of; return how many users there are."""
    with replacing(output, durable=False) as temporary:
        with open(temporary, "wb") as whole:
            for part in parts:  # gzip files in a row are one gzip file
                with open(part.file, "rb") as file:
                    shutil.copyfileobj(file, whole)
                part.file.unlink()
        places, digest = places_of(clicks_dir, output), file_fingerprint(temporary)
        write_json(made_of_file(output), made_of | {"clicks": places, "sha256": digest})
    return sum(part.users for part in parts)


def rank_ranges(ranges, folder, work_dir, made_with, first=None):
    """Rank the users of byte ranges of click files; return the Part of each. With the `first` comes what there is one of."""
    ranker, parts = load_ranker(work_dir, made_with["model"], made_with["index"], made_with["now"]), []
    top_k, nobody = made_with["constants"]["TOP_K"], History("", [], [], 0)
    for path, start, end in ranges:
        users, example, of_first = 0, nobody, None
        file = folder / f".tmp.{fingerprint(input_name(path), start)[:32]}.part"  # a leftover until it is joined
        with (
            replacing(file, durable=False) as temporary,
            open(temporary, "wb") as raw,
            gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as packed,
        ):
            histories = iter(Records(path, parse_history, start, end))
            while block := list(itertools.islice(histories, 8 * ranker.at_once)):  # enough to find some of like length
                packed.write("".join(ranker.lines(block, top_k)).encode())
                users += len(block)
                example = block[0] if example is nobody else example
        if (path, start, end) == first:
            (default,), (_, clicks, times, now) = ranker.lines([nobody], top_k), example
            shown = example._replace(now=now or made_with["now"])
            of_first = default, shown, ranker.why(clicks, EXAMPLE, times, now)
        parts.append(Part(path, file, users, of_first))
    return parts


@functools.lru_cache(maxsize=1)
def load_ranker(work_dir, model, index, supposed):
    """Return the Ranker of work_dir, once for a process; another model or index than the run began with ends it."""
    ranker = Ranker(work_dir, supposed)
    if (ranker.id, fingerprint(ranker.index.videos, ranker.index.columns)) != (model, index):
        raise InputError(f"{work_dir}: model or index changed while infer.py was at work; run it again")
    return ranker


# ---------------------------------------------------------------- one user


class Ranker:
    """The model that stands and the current columns: raw clicks in, ranked columns out.

    supposed is the moment to rank for where none is given, in unix seconds; its hour of the day means nothing.
    TensorFlow is imported here, by the workers: the process that starts them does without.
    """

    def __init__(self, work_dir=WORK_DIR, supposed=0):
        from model_tf2 import SCORES_AT_ONCE, Memory, Scorer, Users
        from train import load_model

        self.index, self.supposed, self.users = load_index(work_dir), supposed, Users
        model, counts, self.mix, saved = load_model(work_dir, self.index)
        self.id, self.encoder = saved["id"], ClickEncoder(self.index)
        self.user_max_len = saved["records"]["constants"]["USER_MAX_LEN"]
        if not self.encoder.current:
            raise InputError("no column holds a video: nothing to rank; run get_indexing.py on today's columns")
        self.scorer = Scorer(model, Memory(counts, self.index, saved["constants"]), self.index)
        self.cids = self.scorer.cids
        self.at_once = max(1, min(BATCH_USERS, SCORES_AT_ONCE // len(self.cids)))  # users

    def rank(self, clicks, top_k=TOP_K, times=None, now=None):
        """Return [(cid, probability), ...] for a user's clicks, oldest first: the best column first, top_k of them or all.

        times are unix seconds, one a click, and now is the moment to rank for, where they are known. What is no list of
        texts or integers raises TypeError. The logarithm of a probability is the score that the ranking files hold.
        """
        (scores,) = self.scores(self.padded([self.encode(clicks, times, now)]))
        return [(self.cids[place], math.exp(scores[place])) for place in best_first(scores, top_k)]

    def why(self, clicks, top_k=EXAMPLE, times=None, now=None):
        """Return the Reason of each of the first columns for a user's clicks, as rank() takes them.

        Each of the clicks that the model reads is left out once, which lets an earlier one in, and the columns are ranked
        again: what a click does is how much the log probability of a column falls without it. So it holds for all parts of
        the model together.
        """
        history = self.encode(clicks, times, now, self.user_max_len + 1)
        *lists, now = history
        first = max(0, len(lists[0]) - self.user_max_len)
        without = [(*(of[:i] + of[i + 1 :] for of in lists), now) for i in range(first, len(lists[0]))]
        users = self.padded([history, *without])
        scores, shares = self.scores(users), self.shares(self.users(*(of[:1] for of in users)))
        effects, unread = scores[0] - scores[1:], [0.0] * (len(clicks) - len(without))
        return [
            Reason(self.cids[place], math.exp(scores[0, place]), *shares[place], unread + effects[:, place].tolist())
            for place in best_first(scores[0], top_k)
        ]

    def shares(self, user):
        """Return which shares of each current column's probability towers and memory give one user; None: popularity."""
        if not user.is_known()[0]:
            return [(None, None)] * len(self.cids)
        weighted = np.array(self.mix.weights())[:, None] * self.scorer.parts(user, self.mix)[:, 0]
        return (weighted / weighted.sum(axis=0))[:2].T.tolist()

    def encode(self, clicks, times=None, now=None, longest=None):
        """Return (video numbers, column numbers, times of the last clicks, as many as are read, now); 0 is not known."""
        if type(clicks) is not list or not all(type(click) in (str, int) for click in clicks):
            raise TypeError(f"clicks must be a list of texts or integers, not {clicks!r:.80}")
        times = times or [0] * len(clicks)
        if len(times) != len(clicks):
            raise TypeError(f"{len(times):,} times for {len(clicks):,} clicks")
        last = longest or self.user_max_len
        return *self.encoder.encode(list(map(str, clicks[-last:]))), list(map(int, times[-last:])), int(now or 0)

    def scores(self, users):
        """Return log probabilities float64 [n, current columns] of Users."""
        scores = np.log(self.scorer.probabilities(users, self.mix))
        if not np.isfinite(scores).all():
            raise InputError("the model gives scores that are not finite; run train.py again")
        return scores

    def padded(self, histories):
        """Return encoded histories as Users: of each the last clicks that are read, 0 padded at the end."""
        longest = max(1, *(min(len(videos), self.user_max_len) for videos, *_ in histories))
        padded = np.zeros([3, len(histories), longest], np.int64)
        for user, (*lists, _) in enumerate(histories):
            for row, numbers in zip(padded[:, user], lists, strict=True):
                last = numbers[-self.user_max_len :]
                row[: len(last)] = last
        clock = np.array([now for *_, now in histories])
        return self.users(*padded, np.where(clock > 0, clock, self.supposed), clock)

    def lines(self, histories, top_k=TOP_K):
        """Return the output line of each of the Historys, a list; those of like length are ranked at once: little is padding."""
        lines, as_json = [""] * len(histories), functools.partial(json.dumps, ensure_ascii=False)
        cids = np.array(list(map(as_json, self.cids)), object)
        by_length = sorted(range(len(histories)), key=lambda place: len(histories[place].clicks))
        for places in slices(by_length, self.at_once):
            users = self.padded([self.encode(*histories[place][1:]) for place in places])
            for place, scores, is_known in zip(places, self.scores(users), users.is_known(), strict=True):
                history, best = histories[place], best_first(scores, top_k)
                rounded = ", ".join([f"%.{DECIMALS}f"] * len(best)) % tuple(scores[best])  # twice as fast as by json
                source = "model" if is_known else "popular"
                lines[place] = (
                    f'{{"uid": {as_json(history.uid)}, "columns": [{", ".join(cids[best])}], "scores": [{rounded}], '
                    f'"source": "{source}", "clicks": {len(history.clicks)}}}\n'
                )
        return lines


class Reason(NamedTuple):
    """Why a column stands where it does for a user."""

    cid: str
    probability: float
    of_towers: float | None  # share of the probability that the towers give; None: popularity
    of_memory: float | None  # and that the memory gives; the rest is habit
    effects: list  # of each of the user's clicks: above 0 it speaks for the column, 0 without it nothing changes


def best_first(scores, top_k=0):
    """Return the places of scores [columns], the best first, of equals the first: top_k of them, or all."""
    return np.argsort(-scores, kind="stable")[: top_k or None]


def print_example(history, reasons, index, data_dir=DATA_DIR):
    """Print in words what a user clicked last, the columns that come first for them, and the clicks that speak for each."""
    split = [split_click(click, index.videos, index.columns) for click in history.clicks[-EXAMPLE:]]
    titles, names = read_names(data_dir, {vid for vid, _ in split})
    named = [titles.get(vid, vid) + (f"  in {names.get(cid, cid)}" if cid else "") for vid, cid in split]
    print(f"user {history.uid} clicked last:", *named, sep="\n  ")
    when = ""
    if any(history.times) and history.now:
        when = f", opened after {(history.now - history.times[-1]) / 3600:.0f} hours, on {moment(history.now)},"
    print(f"and is shown first{when} by these of the clicks:")
    for reason in reasons:
        shares = "popular"
        if reason.of_towers is not None:
            habit = max(0.0, 1 - reason.of_towers - reason.of_memory)
            shares = f"towers {reason.of_towers:.0%}, memory {reason.of_memory:.0%}, habit {habit:.0%}"
        print(f"  {reason.probability:6.1%}  {names.get(reason.cid, reason.cid)}  ({shares})")
        for effect, click in sorted(zip(reason.effects[-len(named) :], named, strict=True), reverse=True):
            if effect > 0.05:
                print(f"          {effect:+.2f}  {click}")


# ---------------------------------------------------------------- were the former rankings right?


def judge_served(folder, served, index, lines, num_workers=NUM_WORKERS):
    """Say how good the standing rankings were for what users clicked since, and append it to served.csv.

    served are [(click file, its ranking, its model), ...]; lines are those of all click files. Of a sample of the users the
    place of the first click is taken in a column that was ranked, beside the user's own recent columns, and popularity as
    default.json has it.
    """
    share, default = 2 * held_out_share(lines, SERVED_USERS / 2), read_if_whole(folder / "default.json")
    popular = {cid: place for place, cid in enumerate(default.get("columns", ()))}
    judge = functools.partial(judge_file, index=index, share=share, popular=popular)
    ranks = np.array([rank for ranks in map_files(judge, served, "served", num_workers) for rank in ranks])
    if not len(ranks):
        return
    hits, gains = (ranks <= 10).mean(axis=0), np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean(axis=0)
    print(
        f"served: of the former rankings, for what {len(ranks):,} users clicked first since: NDCG@10 {gains[0]:.4f}, HR@10 "
        f"{hits[0]:.4f}; own columns {gains[1]:.4f}, {hits[1]:.4f}; popularity {gains[2]:.4f}, {hits[2]:.4f}"
    )
    path = folder / "served.csv"
    former = list(csv.reader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
    figures = [f"{value:.4f}" for pair in zip(hits, gains, strict=True) for value in pair]
    head = [f"{name}{metric}" for name in ("", "own ", "popular ") for metric in ("HR@10", "NDCG@10")]
    row = [time.strftime("%Y-%m-%d %H:%M:%S"), served[0][2], len(ranks), *figures]
    if former and former[-1][1:] == list(map(str, row[1:])):  # of a run that ended before it had ranked
        return
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*(former or [["date", "model", "users", *head]]), row])


def judge_file(served, index, share, popular):
    """Return [(rank, rank by own columns, rank by popularity), ...] of what users of one click file clicked since."""
    clicks_path, output, _ = served
    encoder, cids, ranks, former = ClickEncoder(index), ["", *index.columns], [], {}
    with gzip.open(output, "rt", encoding="utf-8") as lines:
        for line in lines:
            uid = json.loads(line.partition(', "columns"')[0] + "}")["uid"]
            if draw_of(uid) < share:
                ranking = json.loads(line)
                former[uid] = ranking["columns"], ranking["clicks"]
    for history in Records(clicks_path, parse_history):
        if history.uid not in former:
            continue
        columns, number = former[history.uid]
        clicked = [cids[column] for column in encoder.encode(history.clicks)[1]]
        target = next((cid for cid in clicked[number:] if cid in columns), None)
        if target is None:
            continue
        own = {}
        for age, cid in enumerate(cid for cid in reversed(clicked[:number]) if cid):
            own[cid] = own.get(cid, 0) + 0.8**age
        by_popularity = sorted(sorted(columns), key=lambda cid: popular.get(cid, len(popular)))  # ties not by the model
        by_own = sorted(by_popularity, key=lambda cid: -own.get(cid, 0))
        ranks.append([1 + order.index(target) for order in (columns, by_own, by_popularity)])
    return ranks


def main():
    check_ranking_dir(CLICKS_DIR, RANKING_DIR)  # before the lock is written there
    with only_one(RANKING_DIR):
        name_unread(CLICKS_DIR)
        infer()


if __name__ == "__main__":
    run_script(__file__)
