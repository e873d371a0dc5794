"""Ranking: what each user's line holds, that serving is what was evaluated, and what a second run does again."""

import csv
import gzip
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections import Counter

import get_dataset
import infer as infer_module
from get_dataset import column_table, count_windows, dataset_from_clicks, load_manifest
from get_indexing import InputError, get_indexing, load_index
from get_tfrecord import History, cut_files, get_tfrecord
from infer import NOW_AFTER, Ranker, Reason, infer, print_example
from model_tf2 import Memory, Scorer
from train import train

import numpy as np
import pytest
from conftest import _clicks_like_real, _raw, _write_lines, draw, edit_json, files_of

REAL = _clicks_like_real(150, seed=31)
HEARD = ["t0a-1_t0a", "t0b-2"]  # clicks of a user whom the model knows
START = 1_763_942_400  # 2025-11-24, 00:00 UTC


def times_of(clicks):
    """Times of a user's clicks, each a visit by itself; every topic has a week of its own, so there are trends."""
    week = max("0123", key=[click[1] for click in clicks].count)
    return [START + 604_800 * int(week) + 1800 * at + 600 * at**2 for at in range(len(clicks))]


TIMES = {uid: times_of(clicks) for uid, clicks in REAL["users"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with raw/ and a trained work/ of 150 users with structured clicks; nothing is ranked there."""
    folder = tmp_path_factory.mktemp("trained")
    users = [(uid, clicks, TIMES[uid]) for uid, clicks in REAL["users"]]
    raw = _raw(folder / "raw", columns=REAL["columns"], users=users)
    get_indexing(raw, folder / "work")
    get_tfrecord(raw, folder / "work", num_workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_dataset, "MIN_STEPS", 6)
        # All of towers, memory and habit count.
        shape = {"emb_dim": 8, "user_blocks": 1}
        train(folder / "work", arguments=shape, EPOCHS=1, MIX_WEIGHTS=(0.3,), CLICKED_FACTORS=(0.5,))
    return folder


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """A model is loaded once for all copies of its folder: the hashes by which it is asked for are the same there."""
    load, rankers = infer_module.load_ranker, {}

    def load_once(work_dir, *made_of):
        if made_of not in rankers:
            rankers[made_of] = load(work_dir, *made_of)
        return rankers[made_of]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer_module, "load_ranker", load_once)
        yield load


@pytest.fixture(scope="module")
def ranker(trained):
    return Ranker(trained / "work")


@pytest.fixture
def own(trained, tmp_path):
    """A copy of that folder, for a test that changes it."""
    return shutil.copytree(trained, tmp_path / "own")


@pytest.fixture
def ranked(trained, tmp_path):
    """A function ([(uid, clicks), ...]) -> the lines of their ranking, made in a folder of its own."""

    def rank(users, **how):
        clicks = _raw(tmp_path / "asked", users=users) / "click_seq"
        shutil.rmtree(tmp_path / "ranking", ignore_errors=True)
        return lines_of(infer(clicks, trained / "work", tmp_path / "ranking", num_workers=1, **how)[0])

    return rank


def lines_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table_of(lines):
    """Scores by column of each line."""
    return [dict(zip(line["columns"], line["scores"], strict=True)) for line in lines]


def popular_order(columns=REAL["columns"]):
    """The columns by clicks of all users, of equal ones the first first."""
    clicked = Counter(click.split("_")[1] for _, clicks in REAL["users"] for click in clicks if "_" in click)
    return sorted(columns, key=lambda cid: (-clicked[cid], list(columns).index(cid)))


def rank_own(own, asked=None, **how):
    """infer() of a folder made by own(), in this process."""
    return infer(asked or own / "asked/click_seq", own / "work", own / "ranking", num_workers=1, **how)


def filled(own, columns):
    """Make the index of a folder anew with these columns."""
    get_indexing(_raw(own / "raw", columns=columns), own / "work")


# ---------------------------------------------------------------- the lines


def test_each_user_has_a_line_in_input_order_with_every_column_once_and_how_many_clicks_it_was_made_of(ranked):
    users = [*REAL["users"], ("same", HEARD * 400), ("none", []), ("same", HEARD), ('Zoë \u2028 "q" \\', ["x", "y_z"])]
    lines = ranked(users)
    assert [(line["uid"], line["clicks"]) for line in lines] == [(uid, len(clicks)) for uid, clicks in users]
    for line in lines:
        assert list(line) == ["uid", "columns", "scores", "source", "clicks"]
        assert sorted(line["columns"]) == sorted(REAL["columns"])
        assert line["scores"] == sorted(line["scores"], reverse=True)
        assert np.exp(line["scores"]).sum() == pytest.approx(1, abs=1e-3)  # log probabilities
    assert len({tuple(line["columns"]) for line in lines}) > 50
    first = [{**line, "columns": line["columns"][:3], "scores": line["scores"][:3]} for line in lines]
    assert ranked(users, top_k=3) == first and ranked(users, top_k=1000) == lines


@pytest.mark.parametrize("decimals", [0, 1])
def test_scores_are_sorted_before_they_are_rounded(ranked, monkeypatch, decimals):
    exact = ranked(REAL["users"])
    monkeypatch.setattr(infer_module, "DECIMALS", decimals)
    rounded = ranked(REAL["users"])
    assert [line["columns"] for line in rounded] == [line["columns"] for line in exact]
    assert all(score == round(score, decimals) for line in rounded for score in line["scores"])
    pairs = [pair for table in table_of(rounded) for pair in itertools.pairwise(table.items())]
    assert any(score == lower and cid > after for (cid, score), (after, lower) in pairs)


def test_equal_scores_go_by_the_order_of_the_columns(own):
    """Columns of videos that nobody clicked are equal in popularity."""
    filled(own, REAL["columns"] | {"z9": ["unseen"], "late": ["unseen"], "a0": ["unseen"]})
    _raw(own / "asked", users=[("none", [])])
    (line,) = lines_of(rank_own(own)[0])
    assert line["columns"][-3:] == ["z9", "late", "a0"] and len(set(line["scores"][-3:])) == 1


def test_a_user_without_a_known_click_or_in_no_file_gets_the_popularity_order(ranked, tmp_path):
    unknown = [("none", []), ("unheard", ["x", "what_ever", "t0a"]), ("odd", ["", "_", "_t9"])]
    *lines, known, in_column = ranked([*unknown, ("u", HEARD), ("v", ["unheard_t0a"])])
    assert [line["source"] for line in lines] == ["popular"] * 3 and known["source"] == in_column["source"] == "model"
    for line in lines:
        assert line["columns"] == popular_order() and line["scores"] == lines[0]["scores"]
    assert json.loads((tmp_path / "ranking/default.json").read_text()) == lines[0] | {"uid": ""}


def timed(own, click_file, **lines):
    """Write a click file of users, by name, who have HEARD and the other entries of a line given."""
    lines = [{"uid": uid, "click_seq": HEARD, **line} for uid, line in lines.items()]
    return _write_lines(own / f"asked/click_seq/{click_file}.json", lines)


def test_a_line_is_ranked_for_its_now_and_without_it_for_now_after_the_newest_click_of_all(own, ranker, capsys):
    times, newest = [START + 86_400, START + 86_460], START + 30 * 86_400
    soon, late = dict(times=times, now=times[-1] + 7200), dict(times=times, now=newest + NOW_AFTER)
    timeless = dict(now=soon["now"])
    timed(own, "newest", e=dict(times=[START, newest]))
    timed(own, "timed", default=dict(times=times), late=late, soon=soon, timeless=timeless)
    lines = lines_of(rank_own(own)[1])
    assert f"ranked for {time.strftime('%Y-%m-%d %H:%M', time.gmtime(late['now']))} UTC" in capsys.readouterr().out
    for line, how in zip(lines, (late, late, soon, timeless), strict=True):
        scores = {cid: math.log(probability) for cid, probability in ranker.rank(HEARD, **how)}
        assert table_of([line])[0] == pytest.approx(scores, abs=1.01e-4)
        assert [reason.cid for reason in ranker.why(HEARD, 3, **how)] == line["columns"][:3]
    scores = np.array([[table[cid] for cid in REAL["columns"]] for table in table_of(lines)])
    assert np.abs(scores[2] - scores[1]).max() > 0.05  # the trend is another, and the gap
    assert np.abs(scores[2] - scores[3]).max() > 0.001  # the gap alone


# ---------------------------------------------------------------- columns that changed since training


def test_new_columns_and_shelves_filled_anew_are_ranked_and_retired_ones_are_not_without_training_again(own):
    _raw(own / "asked", users=[("u", HEARD), ("none", [])])
    before = lines_of(rank_own(own)[0])
    left = {cid: vids for cid, vids in REAL["columns"].items() if cid not in ("t1b", "t3c")}
    columns = left | {"fresh": ["just made"], "t3a": ["t0b-0", "t0b-1"]}
    filled(own, columns)
    after = lines_of(rank_own(own)[0])
    assert all(sorted(line["columns"]) == sorted(columns) for line in after)
    assert all(np.isfinite(line["scores"]).all() for line in after)
    assert after[1]["columns"] == popular_order(columns) and after[1]["columns"][-1] == "fresh"
    assert table_of(before)[0]["t3a"] != table_of(after)[0]["t3a"]


@pytest.mark.parametrize(("memory", "habit"), [(0.3, 0.1), (0.1, 0.85)])
def test_no_weight_pushes_a_column_down_that_is_newer_than_the_model(own, memory, habit):
    """One with the videos of another counts as that one; of one with unseen videos the towers alone say something."""
    filled(own, REAL["columns"] | {"twin": REAL["columns"]["t0a"], "unseen": ["just made"]})
    edit_model(own, memory_weight=memory, habit_weight=habit, clicked_factor=1.0)
    ranker = Ranker(own / "work")
    users = ranker.padded([ranker.encode(clicks) for clicks in (["t0a-1", "t0b-2"], ["t1c-1_t1c", "t2b-2_t2b"])])
    logits = ranker.scorer.towers(users).astype(float) / ranker.scorer.memory.constants["TEMPERATURE"]
    towers, ranked = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), np.exp(ranker.scores(users))
    assert ranked[:, 13] == pytest.approx(towers[:, 13], rel=1e-5)
    of_towers = (1 - memory - habit) * (towers[:, 12] - towers[:, 0])
    assert ranked[:, 12] - ranked[:, 0] == pytest.approx(of_towers, rel=1e-4)
    assert not np.allclose(ranked[:, 12], towers[:, 12], rtol=0.05)


def test_where_every_column_is_empty_it_says_so(own):
    edit_json(own / "work/indexing/cid2vidx.json", lambda columns: {cid: [] for cid in columns})
    _raw(own / "asked", users=[("a", HEARD)])
    with pytest.raises(InputError, match="no column"):
        rank_own(own)


# ---------------------------------------------------------------- serving is what was evaluated


def test_serving_gives_the_towers_logits_of_the_training_side(trained, ranker):
    """The last click of a user is asked for, of those before, at its time: one window holds all their clicks."""
    index, constants, scorer = ranker.index, load_manifest(trained / "work")[0]["constants"], ranker.scorer
    model, trend, videos = scorer.model, scorer.memory.trend, column_table(index, scorer.memory.video_clicks)
    columns, expected, asked = model.column_vectors(videos[1:], np.arange(1, len(videos))), {}, REAL["users"][:60]
    histories = [History(uid, clicks, TIMES[uid], 0) for uid, clicks in asked]
    for batch in dataset_from_clicks(histories, index, constants):
        batch["trend_row"] = trend.rows(batch["asked"])
        vectors = model.user_vectors(batch["user_feature"], batch["user_column"], batch["user_gap"])
        of_batch = (batch[name].numpy() for name in ("uid", "user_feature", "trend_row"))
        for uid, clicked, row, of_user in zip(*of_batch, vectors, strict=True):
            at = np.count_nonzero(clicked) - 2
            of_trend = trend.table[row[at], 1:] @ model.trend_weights.numpy()
            expected[uid.decode()] = (model.scaled_cosines(of_user[at : at + 1], columns)[0] + of_trend).numpy()
    assert expected.keys() == dict(asked).keys()
    for uid, clicks in asked:
        users = ranker.padded([ranker.encode(clicks[:-1], TIMES[uid][:-1], TIMES[uid][-1])])
        assert users.now[0] > 0 and np.allclose(scorer.towers(users)[0], expected[uid], atol=1e-4)


def test_the_ranks_in_test_csv_are_those_that_serving_gives_with_what_the_training_records_count(trained):
    """Each test user's raw clicks before the last one in a column are ranked for at its time, as infer.py does."""
    work, users, order = trained / "work", dict(REAL["users"]), list(REAL["columns"])
    (manifest, index), ranker = load_manifest(work), Ranker(work)
    counts, of_all = (count_windows(manifest, splits, work, 1) for splits in (["train"], ["train", "val", "test"]))
    memory = Memory(counts._replace(daily=of_all.daily), index)
    ranker.scorer = Scorer(ranker.scorer.model, memory, index)
    with open(work / "model/test.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["uid"] for row in rows} == {uid for uid in users if draw(uid) >= 0.5} and len(rows) > 50
    for row in rows:
        clicks, times = users[row["uid"]], TIMES[row["uid"]]
        place = max(place for place, click in enumerate(clicks) if "_" in click)
        target, before = clicks[place].split("_")[1], clicks[:place]
        assert (row["target"], row["history"]) == (target, str(place))
        scores = ranker.scores(ranker.padded([ranker.encode(before, times[:place], times[place])]))[0]
        best = sorted(order, key=lambda cid: (-scores[order.index(cid)], order.index(cid)))
        assert row["mix"] == str(1 + best.index(target))


def test_a_supposed_moment_has_a_day_but_no_hour_and_one_that_is_given_has_both(trained):
    uid, clicks = REAL["users"][0]
    ranker, given = Ranker(trained / "work", supposed=TIMES[uid][-1] + 99), TIMES[uid][-1] + 7
    users = ranker.padded([ranker.encode(clicks, TIMES[uid]), ranker.encode(clicks, TIMES[uid], given)])
    assert users.now.tolist() == [ranker.supposed, given] and users.clock.tolist() == [0, given]


def assert_equal_rankings(some, others):
    """Equal but for the last decimal of a score, where sums that were padded otherwise may round the other way."""
    assert [line["uid"] for line in some] == [line["uid"] for line in others]
    for a, b in zip(table_of(some), table_of(others), strict=True):
        assert a == pytest.approx(b, abs=1.01e-4)


def test_two_workers_and_files_cut_into_ranges_give_the_same_bytes(own, monkeypatch):
    asked = _raw(own / "asked", users=REAL["users"][:80], click_file="one") / "click_seq"
    _raw(own / "asked", users=REAL["users"][80:], click_file="two", gzip=True)
    whole = [lines_of(path) for path in rank_own(own)]
    monkeypatch.setattr(infer_module, "RANK_BYTES", 5000)
    contents = []
    for workers in (1, 2):
        ranking = own / f"ranking{workers}"
        contents.append([path.read_bytes() for path in infer(asked, own / "work", ranking, num_workers=workers)])
    assert contents[0] == contents[1]
    cut = [[json.loads(line) for line in gzip.decompress(content).splitlines()] for content in contents[0]]
    assert len(cut) == 2
    for a, b in zip(cut, whole, strict=True):
        assert_equal_rankings(a, b)


# ---------------------------------------------------------------- files


def edit_model(own, **mix):
    """Change entries of the mix in model.json as a training that ended would: its id is another then."""
    changed = lambda saved: saved | {"mix": saved["mix"] | mix, "id": f"another {mix}"}
    edit_json(own / "work/model/model.json", changed)


@pytest.fixture
def two(own):
    """own(), asked for a user each in the files one and two, both ranked."""
    _raw(own / "asked", users=[("a", HEARD)], click_file="one")
    _raw(own / "asked", users=[("b", HEARD)], click_file="two", gzip=True)
    assert [path.name for path in rank_own(own)] == ["one.json.gz", "two.json.gz"]
    return own


def stamps(own):
    paths = (own / "ranking").glob("*.json.gz")
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def computed_again(own, **how):
    """Rank again and return the names of the rankings that were written anew."""
    before = stamps(own)
    rank_own(own, **how)
    return {name for name, of_file in stamps(own).items() if before.get(name) != of_file}


BOTH = {"one.json.gz", "two.json.gz"}


def test_each_input_file_has_its_ranking_beside_it_what_it_was_made_of_and_nothing_else_is_left(two):
    ranking, made = two / "ranking", {"one.made_of.json", "two.made_of.json"}
    assert {path.name for path in ranking.iterdir()} == BOTH | made | {"default.json"}
    for name, uid in (("one", "a"), ("two", "b")):
        made_of, output = json.loads((ranking / f"{name}.made_of.json").read_text()), ranking / f"{name}.json.gz"
        assert [line["uid"] for line in lines_of(output)] == [uid]
        assert made_of["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
        line = json.dumps({"uid": uid, "click_seq": HEARD}).encode() + b"\n"
        assert made_of["input"] == hashlib.sha256(line).hexdigest()
        assert made_of["clicks"] == {"absolute": str(two / "asked/click_seq"), "relative": "../asked/click_seq"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("two.json.gz", b"", r"two\.json\.gz: an empty file; copy it again, or remove it"),
     ("two.json.gz", gzip.compress(b"{}" * 500, mtime=0)[:-9], "not a whole gzip file"),
     ("one.json", b" \n\n", "one.json: nothing but blanks; copy it again, or remove it"),
     ("two.json.gz", gzip.compress(b"", mtime=0), "two.json.gz: nothing but blanks; copy it again, or remove it"),
     ("two.json.gz", gzip.compress(b'{"uid": "b", "click_seq": ["t0b-2"]}\n{not JSON\n', mtime=0),
      r"1 of 2 lines are bad \(line 2: not JSON\), more")],
)  # fmt: skip
def test_a_click_file_that_is_not_whole_stops_the_run_before_anything_is_replaced(two, name, content, said):
    before = stamps(two)
    (two / "asked/click_seq" / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        rank_own(two, top_k=2)
    assert stamps(two) == before


def test_a_finished_file_is_not_computed_again(two, monkeypatch, capsys):
    monkeypatch.chdir(two / "asked")
    for name, value in dict(BATCH_USERS=1, GZIP_LEVEL=9, RANK_BYTES=7, EXAMPLE=1, SERVED_USERS=1).items():
        monkeypatch.setattr(infer_module, name, value)
    capsys.readouterr()
    assert computed_again(two) == computed_again(two, asked="../asked/click_seq") == set()
    said = f"0 users ranked; 0 of 2 rankings in {two / 'ranking'} are new\n"
    assert capsys.readouterr().out == 2 * said
    _raw(two / "asked", users=[("b", HEARD), ("c", [])], click_file="two", gzip=True)
    assert computed_again(two) == {"two.json.gz"} and "\nuser b clicked last:\n" in capsys.readouterr().out
    assert [line["uid"] for line in lines_of(two / "ranking/two.json.gz")] == ["b", "c"]
    (two / "asked/click_seq/two.json.gz").unlink()
    assert computed_again(two) == set() and (two / "ranking/two.json.gz").exists()


def test_a_ranking_that_is_gone_or_changed_or_lacks_what_it_was_made_of_is_made_again(two):
    one, made_of = two / "ranking/one.json.gz", two / "ranking/one.made_of.json"
    good, note = one.read_bytes(), made_of.read_bytes()
    for path, content in [(one, good + good), (made_of, note[:40]), (made_of, b"7"), (made_of, b""), (one, b"")]:
        path.write_bytes(content) if content else path.unlink()
        assert computed_again(two) == {"one.json.gz"}
        assert (one.read_bytes(), made_of.read_bytes()) == (good, note)


CHANGES = {
    "a shelf": lambda own, patch: filled(own, REAL["columns"] | {"t0a": ["t1a-0"]}),
    "the model": lambda own, patch: edit_model(own, memory_weight=0.35),
} | {
    name: lambda own, patch, name=name: patch.setattr(infer_module, name, 99)
    for name in ("DECIMALS", "NOW_AFTER", "MAX_ID_CHARS", "MAX_LINE_BYTES")
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_file_is_computed_again_when_the_index_the_model_or_a_constant_changed(two, monkeypatch, change):
    timed(two, "one", a=dict(times=[START + 86_400] * 2))
    rank_own(two)
    change(two, monkeypatch)
    assert computed_again(two) == BOTH and computed_again(two) == set()


def test_a_ranking_of_another_click_folder_is_never_overwritten(two):
    others = _raw(two / "others", users=[("o", HEARD)], click_file="one") / "click_seq"
    before = files_of(two)
    with pytest.raises(InputError, match=r"one\.json\.gz is the ranking of a file in .*/asked/click_seq.*RANKING_DIR"):
        rank_own(two, others)
    assert files_of(two) == before
    (others / "one.json").rename(others / "three.json")
    former = stamps(two)
    rank_own(two, others)
    assert former.items() <= stamps(two).items()


def test_a_copy_whose_rankings_lie_elsewhere_in_it_has_nothing_to_do(two, tmp_path):
    copy = shutil.copytree(two, tmp_path / "copy")
    (copy / "ranking").rename(copy / "work/ranking")
    before = files_of(copy)
    infer(copy / "asked/click_seq", copy / "work", copy / "work/ranking", num_workers=1)
    assert files_of(copy) == before


@pytest.mark.parametrize("moved", [["asked", "work", "ranking"], ["work", "ranking"], ["ranking"], ["work"]])
def test_folders_that_were_moved_leave_nothing_to_do_and_are_ranked_as_before(two, moved):
    for name in moved:
        (two / "moved").mkdir(exist_ok=True)
        (two / name).rename(two / "moved" / name)
    asked, work, ranking = (two / ("moved" if name in moved else ".") / name for name in ("asked", "work", "ranking"))
    before = files_of(two)
    infer(asked / "click_seq", work, ranking, num_workers=1)
    assert files_of(two) == before
    _raw(asked, users=[("c", HEARD)], click_file="one")
    assert lines_of(infer(asked / "click_seq", work, ranking, num_workers=1)[0])[0]["uid"] == "c"


def run_main(own, monkeypatch, clicks, ranking):
    """Run main() of a folder made by own() with these CLICKS_DIR and RANKING_DIR."""
    monkeypatch.setattr(infer_module, "CLICKS_DIR", str(clicks))
    monkeypatch.setattr(infer_module, "RANKING_DIR", str(ranking))
    monkeypatch.setattr(infer_module, "infer", lambda: infer(clicks, own / "work", ranking, num_workers=1))
    infer_module.main()


@pytest.mark.parametrize("names", [("click_seq", "click_seq"), ("click_seq", "link"), ("link", "click_seq")])
def test_a_ranking_folder_that_is_that_of_the_clicks_is_refused_before_a_byte_is_written(own, monkeypatch, names):
    (own / "asked/link").symlink_to(_raw(own / "asked", users=[("u", HEARD)]) / "click_seq")
    before = files_of(own)
    with pytest.raises(InputError, match="RANKING_DIR is the folder of the clicks; name another one"):
        run_main(own, monkeypatch, *(own / "asked" / name for name in names))
    assert files_of(own) == before


def test_rankings_elsewhere_leave_the_folder_of_the_work_untouched(own, monkeypatch):
    """It may be read-only. Of what is written there, and removed again, the time of its folder would tell."""

    def state():
        return files_of(own / "work"), [path.stat().st_mtime_ns for path in [own / "work", *(own / "work").rglob("*")]]

    before, clicks = state(), _raw(own / "asked", users=[("u", HEARD)]) / "click_seq"
    run_main(own, monkeypatch, clicks, own / "elsewhere")
    assert lines_of(own / "elsewhere/clicks.json.gz")[0]["uid"] == "u" and state() == before


@pytest.mark.parametrize("uids", [["a", "a"], ["z"]])
def test_a_click_file_that_changes_while_ranked_keeps_its_ranking_and_others_are_ranked(two, monkeypatch, uids):
    """It grows, or another of the same size and time takes its place."""
    rank_ranges, path, new = infer_module.rank_ranges, two / "asked/click_seq/one.json", two / "new"
    kept = {name: data for name, data in files_of(two / "ranking").items() if name.startswith("one.")}
    new.write_bytes(b"".join(json.dumps({"uid": uid, "click_seq": HEARD}).encode() + b"\n" for uid in uids))
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))

    def rank_and_change(*args, **how):
        parts = rank_ranges(*args, **how)
        new.replace(path) if uids == ["z"] else shutil.copyfile(new, path)
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "rank_ranges", rank_and_change)
        with pytest.raises(InputError, match=r"/one\.json: changed while it was ranked, so the former ranking stays"):
            rank_own(two, top_k=2)
    assert kept.items() <= files_of(two / "ranking").items()
    assert len(lines_of(two / "ranking/two.json.gz")[0]["columns"]) == 2
    assert computed_again(two, top_k=2) == {"one.json.gz"}
    assert [line["uid"] for line in lines_of(two / "ranking/one.json.gz")] == uids
    assert not list((two / "ranking").glob(".*"))


def test_files_and_folders_of_others_stay_and_disturb_nothing(two):
    notes = {"notes.txt": b"mine", "old/one.json.gz": b"kept", ".mine.tmp": b"x", "other.json.gz": b"not ours"}
    for name, data in notes.items():
        (two / "ranking" / name).parent.mkdir(exist_ok=True)
        (two / "ranking" / name).write_bytes(data)
    for leftover in (f".tmp.{'0' * 32}.one.json.gz", f".tmp.{'1' * 32}..tmp.{'f' * 32}.part"):  # of a killed run
        (two / "ranking" / leftover).write_bytes(b"half")
    assert computed_again(two) == set() and computed_again(two, top_k=1) == BOTH
    assert {name: (two / "ranking" / name).read_bytes() for name in notes} == notes
    assert [path.name for path in (two / "ranking").glob(".*")] == [".mine.tmp"]


@pytest.mark.parametrize("change", [CHANGES["a shelf"], CHANGES["the model"]])
def test_a_model_or_index_that_changes_under_a_run_stops_it_and_leaves_the_former_rankings(
    two, loaded_once, monkeypatch, change
):
    """It changes when the run has read both, and has not yet given out its work."""
    before = stamps(two)
    _raw(two / "asked", users=[("a", ["t1a-1"])], click_file="one")

    def cut_later(paths, *range_bytes):
        change(two, monkeypatch)
        return cut_files(paths, *range_bytes)

    monkeypatch.setattr(infer_module, "cut_files", cut_later)
    monkeypatch.setattr(
        infer_module, "load_ranker", loaded_once.__wrapped__
    )  # as in a worker that has just been started
    with pytest.raises(InputError, match="model or index changed while infer.py was at work; run it again"):
        rank_own(two)
    assert stamps(two) == before


# ---------------------------------------------------------------- were the former rankings right?


def places(clicks, since, ranked, popular):
    """The places of the first click since in a ranked column, by the ranking, the own columns and popularity; or None."""
    own, since = ([click.rpartition("_")[2] for click in of if "_" in click] for of in (clicks, since))
    by_popularity = sorted(ranked, key=popular.index)
    weight = {cid: sum(0.8**age for age, clicked in enumerate(reversed(own)) if clicked == cid) for cid in ranked}
    by_own = sorted(by_popularity, key=lambda cid: -weight[cid])
    target = next((cid for cid in since if cid in ranked), None)
    return target and [1 + order.index(target) for order in (ranked, by_own, by_popularity)]


@pytest.mark.parametrize("served_users", [3000, 30])
def test_the_former_rankings_are_measured_by_what_users_clicked_since(own, monkeypatch, capsys, served_users):
    """Of 102 lines and SERVED_USERS = 30 those of a half of the users are taken."""
    monkeypatch.setattr(infer_module, "SERVED_USERS", served_users)
    table, users, share = own / "ranking/served.csv", REAL["users"][:100], 1.0 if served_users == 3000 else 0.5
    _raw(own / "asked", users=users)
    former = {line["uid"]: line["columns"] for line in lines_of(rank_own(own)[0])}
    filled(own, REAL["columns"] | {"late": ["t0a-0"]})
    since = {uid: [f"x_{cid}" for cid in REAL["columns"]][n % 7 : n % 7 + n % 3] for n, uid in enumerate(former)}
    since["user4"] = ["t0a-1", "t0a-1_gone", "t0a-0_late", *since["user4"]]  # in no column, or one that was not ranked
    asked = [("new", HEARD), *((uid, clicks + since[uid]) for uid, clicks in reversed(users)), ("newer", HEARD)]
    _raw(own / "asked", users=asked)
    rank_own(own)
    ranks = [places(clicks, since[uid], former[uid], popular_order()) for uid, clicks in users if draw(uid) < share]
    ranks = np.array([of_user for of_user in ranks if of_user])
    hits = [np.mean([rank <= 10 for rank in of_order]) for of_order in ranks.T]
    gains = [np.mean([(rank <= 10) / math.log2(1 + rank) for rank in of_order]) for of_order in ranks.T]
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert row["users"] == str(len(ranks)) and (len(ranks) == 66 if share == 1 else 20 < len(ranks) < 46)
    assert row["model"] == json.loads((own / "work/model/model.json").read_text())["id"]
    for name, hit, gain in zip(("", "own ", "popular "), hits, gains, strict=True):
        assert (row[f"{name}HR@10"], row[f"{name}NDCG@10"]) == (f"{hit:.4f}", f"{gain:.4f}")
    said = f"served: of the former rankings, for what {len(ranks)} users clicked first since: NDCG@10 {gains[0]:.4f}, HR@10"
    assert said in capsys.readouterr().out and len({f"{gain:.4f}" for gain in gains}) == 3
    rank_own(own, top_k=3)
    assert "served" not in capsys.readouterr().out and table.read_text().count("\n") == 2
    _raw(own / "asked", users=[(uid, clicks + [f"t0a-0_{cid}" for cid in REAL["columns"]]) for uid, clicks in asked])
    rank_own(own)
    assert "served: " in capsys.readouterr().out and table.read_text().count("\n") == 3


def test_columns_of_a_former_ranking_that_an_index_numbered_anew_does_not_know_are_judged_too(own, tmp_path):
    _raw(own / "asked", users=[("a", ["t0a-1_t0a", "t0b-1_gone", "t0b-2_t0b"])], click_file="one")
    with gzip.open(tmp_path / "one.json.gz", "wt") as file:
        file.write(
            '{"uid": "a", "columns": ["gone", "t1a", "t0b", "t0a"], "scores": [], "source": "model", "clicks": 1}\n'
        )
    served = str(own / "asked/click_seq/one.json"), tmp_path / "one.json.gz", "id"
    popular, index = {"t1a": 0, "t0b": 1, "t0a": 2}, load_index(own / "work")
    assert infer_module.judge_file(served, index, 1.0, popular) == [[3, 3, 2]]


def test_a_run_that_fails_after_it_judged_the_former_rankings_adds_no_second_line(own, monkeypatch):
    _raw(own / "asked", users=REAL["users"])
    rank_own(own)
    users = [(uid, [*clicks, "t0a-0_t0a"]) for uid, clicks in REAL["users"]]
    _raw(own / "asked", users=users)
    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "join_parts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rank_own(own)
    once = (own / "ranking/served.csv").read_text()
    rank_own(own)
    assert (own / "ranking/served.csv").read_text() == once and once.count("\n") == 2


def test_default_json_is_made_again_where_it_is_gone(own):
    path = own / "ranking/default.json"
    _raw(own / "asked", users=REAL["users"])
    rank_own(own)
    default = path.read_text()
    path.unlink()
    rank_own(own)
    assert path.read_text() == default


# ---------------------------------------------------------------- one user, now, and why


def test_ids_that_are_integers_are_their_decimal_text(own):
    filled(own, REAL["columns"] | {"7": ["64", "65"]})
    ranker = Ranker(own / "work")
    assert ranker.rank([64]) == ranker.rank(["64"]) != ranker.rank(["nobody knows"])
    assert ranker.why([64, "t0a-1_t0a"]) == ranker.why(["64", "t0a-1_t0a"])


@pytest.mark.parametrize("clicks", ["t0a-1", None, 64, ("t0a-1",), {"t0a-1": 1}, [None], ["t0a-1", 1.5], [[7]]])
def test_what_is_no_list_of_ids_is_refused_and_times_of_another_number(ranker, clicks):
    for call in (ranker.rank, ranker.why):
        with pytest.raises(TypeError, match="clicks must be a list of texts or integers"):
            call(clicks)
        with pytest.raises(TypeError, match="1 times for 2 clicks"):
            call(HEARD, times=[START])


@pytest.mark.parametrize("clicks", [["t0a-1_t0a", "nobody knows", "t0b-2", "t1a-1_t1a"], ["nobody knows"], []])
def test_what_a_click_does_is_what_ranking_without_it_changes(ranker, clicks, monkeypatch):
    monkeypatch.setattr(ranker, "mix", ranker.mix._replace(memory_weight=0.3, habit_weight=0.3))
    reasons, ranked, weights = ranker.why(clicks, top_k=3), dict(ranker.rank(clicks)), (0.4, 0.3, 0.3)
    parts = ranker.scorer.parts(ranker.padded([ranker.encode(clicks)]), ranker.mix)
    assert [reason.cid for reason in reasons] == list(ranked)[:3]
    for reason in reasons:
        assert math.isclose(reason.probability, ranked[reason.cid], rel_tol=1e-4)
        shares = [part[0, ranker.cids.index(reason.cid)] * weight for part, weight in zip(parts, weights, strict=True)]
        expected = [share / sum(shares) for share in shares[:2]] if "t0b-2" in clicks else [None, None]
        assert [reason.of_towers, reason.of_memory] == pytest.approx(expected)
        for place, effect in enumerate(reason.effects):
            without = dict(ranker.rank(clicks[:place] + clicks[place + 1 :]))
            assert abs(effect - math.log(ranked[reason.cid] / without[reason.cid])) < 3e-4
        assert len(reason.effects) == len(clicks)


def test_a_click_that_changes_nothing_has_no_effect(ranker):
    """Of a history of any length the last clicks alone are read."""
    clicks = ["t3a-1_t3a", *["t0a-1_t0a", "t0b-2"] * 50_000]
    unread = len(clicks) - ranker.user_max_len
    for reason in ranker.why(clicks):
        assert reason.effects[:unread] == [0.0] * unread and any(reason.effects[unread:])
        assert len(reason.effects) == len(clicks)
    assert all(reason.effects == [0.0, 0.0] for reason in ranker.why(["nobody knows", "nor that"]))
    of_last = dict(ranker.rank(clicks[-50:]))
    assert dict(ranker.rank(clicks)) == pytest.approx(of_last)
    assert dict(ranker.rank(clicks[:50])) != pytest.approx(of_last)


def test_the_example_names_what_was_clicked_what_is_shown_and_why_as_far_as_titles_are_known(own, capsys):
    index = load_index(own / "work")
    reasons = [Reason("t0a", 0.5, 0.25, 0.45, [0.31, 0.9, 0.01]), Reason("t0b", 0.1, None, None, [-0.5, 0.0, 0.2])]
    clicks, times = ["t0b-2", "t0a-1_t0a", "x"], [START, START, START + 3600]
    named = _raw(own / "named", columns={"t0a": ["t0a-1"]}, names={"t0a": "The best"}, titles={"t0b-2": "A title"})
    when = ", opened after 5 hours, on 2025-11-24 06:00 UTC,"
    for data_dir, title, name, history in (
        (named, "A title", "The best", History("u", clicks, times, START + 6 * 3600)),
        (own / "none", "t0b-2", "t0a", History("u", clicks, [0, 0, 0], 0)),
    ):
        print_example(history, reasons, index, data_dir)
        assert capsys.readouterr().out.splitlines() == [
            "user u clicked last:",
            f"  {title}",
            f"  t0a-1  in {name}",
            "  x",
            f"and is shown first{when if history.times[0] else ''} by these of the clicks:",
            f"   50.0%  {name}  (towers 25%, memory 45%, habit 30%)",
            f"          +0.90  t0a-1  in {name}",
            f"          +0.31  {title}",
            "   10.0%  t0b  (popular)",
            "          +0.20  x",
        ]
