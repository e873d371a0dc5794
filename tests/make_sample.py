"""Write the shipped sample, data/sample: synthetic clicks with a known structure, the same bytes every time.

    python tests/make_sample.py [FOLDER]

Shelves belong to themes. A user likes two themes; within one, a click on a shelf is mostly followed by the next shelf of
that theme (after "Street food" comes "Home cooking"). So the order of clicks tells what comes next, popularity does not.
A visit begins otherwise than it goes on: often with the user's own favourite shelf, or with the one that is the talk of the
day; and later visits follow the clock.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20
NUM_USERS = 2400
VIDEOS_OF_SHELF = 14
SHARED_OF_THEME = 4  # videos that stand on every shelf of the theme
FOLLOWS = 0.75  # chance that the next shelf of the theme follows
IN_SHELF = 0.7  # chance that a click is made in the shelf, not elsewhere in the app
OWN_FIRST = 0.45  # chance that a visit begins with the user's favourite shelf
DAY_FIRST = 0.25  # chance that it begins with the shelf of the day
VISIT_ENDS = 0.2  # chance that a click is the last one of its visit
START, DAYS = 1_763_942_400, 14  # 2025-11-24, 00:00 UTC; days that the clicks are spread over
FILES = 2

THEMES = {
    "food": {"街头美食 Street food": "Noodles", "家常菜 Home cooking": "Dumplings", "烘焙 Baking": "Sourdough"},
    "sport": {"足球 Football": "Derby", "篮球 Basketball": "Final", "跑步 Running": "Marathon"},
    "travel": {"城市漫步 City walks": "Old town", "海岛 Islands": "Lagoon", "登山 Mountains": "Summit"},
    "music": {"流行 Pop": "Chorus", "古典 Classical": "Sonata", "现场 Live": "Encore"},
    "film": {"喜剧 Comedy": "Mix-up", "悬疑 Mystery": "Alibi", "科幻 Science fiction": "Orbit"},
    "home": {"收纳 Tidying": "Shelf", "园艺 Gardening": "Seedling", "手工 Crafts": "Origami"},
    "tech": {"手机 Phones": "Unboxing", "编程 Programming": "Recursion", "机器人 Robots": "Gripper"},
    "nature": {"萌宠 Pets": "Kitten", "海洋 Oceans": "Reef", "鸟类 Birds": "Heron"},
    "learn": {"历史 History": "Dynasty", "数学 Mathematics": "Proof", "英语 English": "Idiom"},
    "drama": {"古装剧 Costume drama": "Palace", "都市剧 City drama": "Elevator", "动画 Animation": "Dragon"},
}


def make_sample(folder):
    """Write cid2vids.json, vid2title.json and click_seq/ under folder."""
    rng = random.Random(SEED)
    shelves, titles = make_shelves()
    folder = Path(folder)
    write_lines(
        folder / "cid2vids.json", ({"cid": c, "vids": s["vids"], "name": s["name"]} for c, s in shelves.items())
    )
    write_lines(folder / "vid2title.json", ({"vid": vid, "title": title} for vid, title in titles.items()))
    of_day = [rng.choice(list(shelves)) for _ in range(DAYS)]
    users = [{"uid": f"u{n}", **make_clicks(rng, shelves, of_day)} for n in range(NUM_USERS)]
    for n in range(FILES):
        write_lines(folder / "click_seq" / f"part-{n}.json", users[n::FILES])


def make_shelves():
    """Return ({cid: {"name", "theme", "vids"}}, {vid: title}); a theme's shelves stand in the order they are followed."""
    shelves, titles = {}, {}

    def make_video(title):
        vid = f"v_{len(titles):03}" if len(titles) % 10 == 0 else f"v{len(titles):03}"  # ids may hold underscores
        titles[vid] = title
        return vid

    for theme, names in THEMES.items():
        shared = [make_video(f"Best of {theme}, part {part}") for part in range(1, SHARED_OF_THEME + 1)]
        for name, subject in names.items():
            own = [make_video(f"{subject}, part {part}") for part in range(1, VIDEOS_OF_SHELF + 1)]
            shelves[f"c{len(shelves) + 1}"] = {"name": name, "theme": theme, "vids": own + shared}
    return shelves, titles


def make_clicks(rng, shelves, of_day):
    """Return one user's {"click_seq", "times"}, oldest first; of_day are the shelves of the days."""
    themes = list(THEMES)
    weights = [1 / (rank + 2) for rank in range(len(themes))]
    liked = rng.choices(themes, weights, k=2)
    favourite = rng.choice([cid for cid, shelf in shelves.items() if shelf["theme"] == liked[0]])
    last, clicks, times = {}, [], make_times(rng, 3 + int(rng.expovariate(1 / 16)))
    for before, now in zip([0, *times], times, strict=False):
        theme = liked[rng.random() < 0.3] if rng.random() < 0.9 else rng.choice(themes)
        cids = [cid for cid, shelf in shelves.items() if shelf["theme"] == theme]
        draw = rng.random() if now - before > 3600 else 1.0
        if draw < OWN_FIRST + DAY_FIRST:
            cid = favourite if draw < OWN_FIRST else of_day[(now - START) // 86_400]
        elif theme in last and rng.random() < FOLLOWS:
            cid = cids[(cids.index(last[theme]) + 1) % len(cids)]
        else:
            cid = rng.choice(cids)
        last[shelves[cid]["theme"]] = cid
        vids = shelves[cid]["vids"]
        vid = vids[int(len(vids) * rng.random() ** 2)]
        clicks.append(f"{vid}_{cid}" if rng.random() < IN_SHELF else vid)
    return {"click_seq": clicks, "times": times}


def make_times(rng, number):
    """Return unix seconds of so many clicks, in visits, the last of which is within the days."""
    gaps = [rng.randrange(20, 300) if rng.random() > VISIT_ENDS else rng.randrange(6, 40) * 3600 for _ in range(number)]
    end = START + DAYS * 86_400 - int(rng.expovariate(1 / 40_000)) - 1
    times = [end - sum(gaps[at:]) for at in range(1, number + 1)]
    return [max(time, START) for time in times]


def write_lines(path, records):
    """Write records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    make_sample(sys.argv[1] if len(sys.argv) > 1 else "data/sample")
