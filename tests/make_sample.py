"""Write the shipped sample, data/sample: synthetic clicks with a known structure, the same bytes every time.

    python tests/make_sample.py [FOLDER]

Shelves belong to themes. A user likes two themes; within one, a click on a shelf is mostly followed by the next shelf of
that theme (after "Street food" comes "Home cooking"). So the order of clicks tells what comes next, popularity does not.
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
    users = [{"uid": f"u{n}", "click_seq": make_clicks(rng, shelves)} for n in range(NUM_USERS)]
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


def make_clicks(rng, shelves):
    """Return one user's clicks, oldest first."""
    themes = list(THEMES)
    weights = [1 / (rank + 2) for rank in range(len(themes))]
    liked = rng.choices(themes, weights, k=2)
    last, clicks = {}, []
    for _ in range(3 + int(rng.expovariate(1 / 16))):
        theme = liked[rng.random() < 0.3] if rng.random() < 0.9 else rng.choice(themes)
        cids = [cid for cid, shelf in shelves.items() if shelf["theme"] == theme]
        if theme in last and rng.random() < FOLLOWS:
            cid = cids[(cids.index(last[theme]) + 1) % len(cids)]
        else:
            cid = rng.choice(cids)
        last[theme] = cid
        vids = shelves[cid]["vids"]
        vid = vids[int(len(vids) * rng.random() ** 2)]
        clicks.append(f"{vid}_{cid}" if rng.random() < IN_SHELF else vid)
    return clicks


def write_lines(path, records):
    """Write records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    make_sample(sys.argv[1] if len(sys.argv) > 1 else "data/sample")
