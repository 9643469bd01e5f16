# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what is in it, what is not trusted in it, and how a real browser shows it."""

import base64
import io
import json
import logging
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, page
from markupsafe import escape
from PIL import Image

from igae.cli.report import main
from igae.evaluation.pictures import save_png, write_video
from igae.training import Tracker, TrackingConfig
from igae.viewer.report import LoggedStep, media, read_run, scene_table, try_to_write, write_report

HOSTILE = "<script>document.title='taken'</script>\"'><img src=http://127.0.0.1:9/x onerror=console.error(1)>"
PSNR = {"chair": 21.5, "duck": 9.75, "mug": 30.25, HOSTILE: 25.0}
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")


def make_run(folder: Path) -> Path:
    """A run as training leaves it, of two stages, with a hostile name wherever a name comes from outside."""
    random = np.random.default_rng(0)
    tracker = Tracker(folder, TrackingConfig())
    for step in range(10, 1001, 10):
        stage = "warmup" if step <= 600 else "joint"
        values = {"loss/total": math.exp(-step / 200), "lr/planes": 0.01 * 0.99**step, "lr/encoder": 0.0}
        tracker.scalars(step, stage, {**values, "views_per_second": 100.0 if stage == "warmup" else 7.5})
        if step in (600, 1000):
            tracker.scalars(step, stage, {"eval/heldout/rgb_psnr": 20 + step / 1000, "eval/train/rgb_psnr": 24.0})
    tracker.scalars(1000, "joint", {HOSTILE: 1.0})
    tracker.close()
    (folder / "metrics.json").write_text(json.dumps({"joint": {"step": 1000, "heldout/rgb_psnr": 21.0}}))
    (folder / "config.yaml").write_text(f"experiment: demo\nroot: s3://key:hidden-word@bucket/x\nother: {HOSTILE}\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "device": HOSTILE}))
    for name in ("warmup-00000600", "joint-00001000"):
        colors = random.integers(0, 256, (3, 10, 3), dtype=np.uint8)
        save_png(folder / "pictures" / f"{name}.png", colors.repeat(30, axis=0).repeat(30, axis=1))
    frames = random.integers(0, 256, (12, 64, 192, 3), dtype=np.uint8)
    write_video(folder / "orbits" / "warmup" / "old.mp4", frames)
    write_video(folder / "orbits" / "joint" / "chair.mp4", frames)
    return folder


def add_examples(folder: Path, columns: int = 3) -> None:
    """Views of three scenes as an evaluation leaves them."""
    random = np.random.default_rng(1)
    for which, scene in (("worst", "duck"), ("best", "mug"), ("median", HOSTILE)):
        shown = ["truth", "decoded render", "depth", "latents: encoded", "latents: rendered", "autoencoder"][:columns]
        labels = {"columns": ", ".join(shown), "scene": scene, "which": which, "split": "held-out"}
        labels |= {"metric": "heldout/rgb_psnr", "value": f"{PSNR[scene]}", "scenes": "4", "near": "1.5", "far": "2.5"}
        labels["scale"] = "#ffee00, #001122" + ", red; } body { display: none" * (scene == HOSTILE)
        strip = random.integers(0, 256, (8, 8 * columns, 3), dtype=np.uint8)
        save_png(folder / "examples" / f"{which}.png", strip, labels)
    (folder / "examples" / "only.png").write_bytes(b"not a picture")
    save_png(folder / "examples" / "other.png", strip, labels | {"which": "other"})


def add_evaluation(folder: Path) -> None:
    scenes = {name: {"heldout/rgb_psnr": value, "heldout/rgb_ssim": value / 100} for name, value in PSNR.items()}
    del scenes["chair"]["heldout/rgb_ssim"]
    means = {"heldout/rgb_psnr": 21.625, "heldout/rgb_ssim": 0.2167}
    (folder / "evaluation.json").write_text(json.dumps({"means": means, "scenes": scenes}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("report") / "demo")
    add_evaluation(folder)
    add_examples(folder)
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> str:
    return write_report(run).read_text()


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_and_settings_of_others_are_text(report: str) -> None:
    reader = Reader(report)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    # as a scene (in the table and among the best), a metric's name, a device and in the settings
    assert sum(HOSTILE in text for text in reader.texts) >= 5
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "display: none" not in report
    for tag, attributes in reader.tags:
        for name in ("src", "href", "poster", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)


def test_credentials_are_masked(report: str) -> None:
    assert "hidden-word" not in report and "s3://***@bucket" in report


def test_pictures_and_the_last_stage_s_orbits_are_inside(report: str, run: Path) -> None:
    urls = [attributes["src"] or "" for tag, attributes in Reader(report).tags if tag in ("img", "video")]
    kinds = [re.split("[:;,]", url)[1] for url in urls]
    assert kinds == ["image/webp"] * 11 + ["video/mp4"]
    urls = urls[9:]  # after three examples of three pictures
    names = [medium.name for medium in media.pictures(run)[0]]
    assert names == ["warmup-00000600", "joint-00001000"]
    for name, url in zip(names, urls, strict=False):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), dtype=float)
        truth = np.asarray(Image.open(run / f"pictures/{name}.png"), dtype=float)
        assert shown.shape == truth.shape
        assert abs(shown - truth).mean() < 6  # 2.6; of other colors: more than 70


def test_examples_are_the_best_the_median_and_the_worst_scene_pixel_by_pixel(run: Path, report: str) -> None:
    found = media.examples(run)
    assert [example.labels["scene"] for example in found] == ["mug", HOSTILE, "duck"]
    assert [[cell.name for cell in example.cells] for example in found] == [["truth", "decoded render", "depth"]] * 3
    for example, name in zip(found, ("best", "median", "worst"), strict=True):
        strip = np.asarray(Image.open(run / f"examples/{name}.png"))
        for i, cell in enumerate(example.cells):
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(cell.url.partition(",")[2]))))
            assert np.array_equal(shown, strip[:, 8 * i : 8 * (i + 1)])
    titles = re.findall(r"<h4>(.*?) <small>", report)
    assert titles[0] == "Best of 4: mug, held-out view" and titles[2] == "Worst of 4: duck, held-out view"
    bars = re.findall(r"linear-gradient\((.*?)\)", report)
    assert bars == ["to right, #ffee00, #001122"] * 3 and report.count("depth 1.5") == 3


def test_a_report_opens_with_its_verdict(run: Path, report: str) -> None:
    box = re.search(r'<p class="verdict">(.*?)</p>', report)
    assert box is not None and report.index(box[0]) < report.index("<nav>")
    assert box[1] == "held-out views 21.6 dB"  # of evaluation.json, which is newer than what training has logged


def test_settings_that_differ_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("experiment: x\n")
    changes = {"train.joint.epochs": ["75", "4"], "seed": ["1", "1"], "data.root": ["(default)", HOSTILE]}
    (tmp_path / "changes.json").write_text(json.dumps({"recipe": "igae.yaml", "changes": changes}))
    text = write_report(tmp_path).read_text()
    rows = re.findall(r"<tr><td>([\w.]+)</td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert rows[:2] == [("train.joint.epochs", "75", "4"), ("data.root", "(default)", str(escape(HOSTILE)))]
    assert "What differs from igae.yaml" in text and ("seed", "1", "1") not in rows
    (tmp_path / "changes.json").write_text('{"changes": {"seed": ["1"]}}')
    with pytest.raises(ValueError, match=r"changes.json is damaged"):
        write_report(tmp_path)


def test_several_runs_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, psnr, rate in (("first", 21.0, 0.5), ("second", 23.0, 0.25)):
        (tmp_path / name).mkdir()
        means = {"heldout/rgb_psnr": psnr, "heldout/baseline_psnr": 20.0}
        scenes = {"duck": means, name: {"heldout/rgb_psnr": psnr + 1}}
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"means": means, "scenes": scenes}))
        (tmp_path / name / "config.yaml").write_text(f"seed: 1\ntrain: {{joint: {{decay: {rate}, epochs: 2}}}}\n")
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert main([*folders, str(run)]) == 0
    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out.startswith(f"{path}: ")
    text = path.read_text()
    # They have no data.root, but were evaluated on other scenes.
    assert "can't be compared" in text and "first: 2 evaluated scenes; second: 2 evaluated scenes; demo: 4 eval" in text
    verdicts = re.findall(r'<p class="verdict".*?><b>(.*?)</b>: (.*?)</p>', text)
    assert verdicts[:2] == [
        ("first", "held-out views 21.0 dB: 1.0 dB above the mean training image"),
        ("second", "held-out views 23.0 dB: 3.0 dB above the mean training image"),
    ]
    rows = {row[0]: row[1:] for row in (re.findall(r"<td[^>]*>(.*?)</td>", line) for line in text.splitlines()) if row}
    assert rows["train.joint.decay"] == ["0.5", "0.25", "–"] and "train.joint.epochs" in rows and "seed" in rows
    assert rows["duck"] == ["21", "23", "9.75"] and rows["first"] == ["22", "–", "–"]
    assert [values for name, values in rows.items() if ">heldout/rgb_psnr<" in name] == [["21", "23", "21.625"]]
    write_report([tmp_path / "first", tmp_path / "first"], tmp_path / "twice.html")
    twice = (tmp_path / "twice.html").read_text()
    assert "first (1), first (2) - igae" in twice and "All settings are the same" in twice
    assert "can't be compared" not in twice
    for name in ("first", "second"):
        (tmp_path / name / "evaluation.json").unlink()
        (tmp_path / name / "config.yaml").write_text(f"data: {{root: data/{name}}}\n")
    write_report([tmp_path / "first", tmp_path / "second"], tmp_path / "other.html")
    assert "their data differ: first: data/first; second: data/second</p>" in (tmp_path / "other.html").read_text()


def test_size_is_bounded(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for i in range(30):
        save_png(tmp_path / f"pictures/joint-{i:08d}.png", random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    (tmp_path / "pictures/joint-00000050.png").write_bytes(b"not a picture")
    shown, left_out = media.pictures(tmp_path)
    assert len(shown) == media.COUNT - 1 and left_out == 20  # the newest one can't be read
    (tmp_path / "pictures/joint-00000050.png").unlink()
    shown, left_out = media.pictures(tmp_path)
    assert (len(shown), left_out) == (media.COUNT, 18) and shown[-1].name == "joint-00000029"
    size = len(base64.b64decode(shown[-1].url.partition(",")[2]))
    shown, left_out = media.pictures(tmp_path, budget=3 * size)
    assert 2 <= len(shown) <= 4 and len(shown) + left_out == 30 and shown[-1].name == "joint-00000029"
    (tmp_path / "orbits/joint").mkdir(parents=True)
    (tmp_path / "orbits/joint/broken.mp4").write_bytes(b"not a video")
    assert media.orbits(tmp_path, ["joint"]) == ([], 1)
    assert media.orbits(tmp_path / "orbits/joint", ["..", "../..", "/"]) == ([], 0)


def test_all_pictures_of_a_step_are_shown(tmp_path: Path) -> None:
    for i in range(30):
        for name in ("views", "latents"):
            save_png(tmp_path / f"pictures/joint-{name}-{i:08d}.png", np.zeros((2, 3, 3), np.uint8))
    shown, left_out = media.pictures(tmp_path)
    steps = [medium.name.rpartition("-")[2] for medium in shown]
    assert len(shown) == media.COUNT and left_out == 48 and steps[::2] == steps[1::2] and steps[-1] == "00000029"
    assert [medium.name for medium in shown[-2:]] == ["joint-views-00000029", "joint-latents-00000029"]


def test_what_is_wrong_is_at_the_top(tmp_path: Path) -> None:
    def logged(step: int, heldout: float, train: float) -> str:
        values = {"eval/heldout/rgb_psnr": heldout, "eval/heldout/baseline_psnr": 20.0, "eval/train/rgb_psnr": train}
        return json.dumps({"step": step, "stage": "joint", "time": 5.0, **values})

    later = json.dumps({"step": 30, "stage": "joint", "time": 6.0, "loss/eval/x": 1.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join([logged(10, 10.0, 30.0), logged(20, 21.0, 24.0), later]))
    assert "Warning" not in write_report(tmp_path).read_text()  # 3 dB, and over an earlier evaluation
    (tmp_path / "metrics.jsonl").write_text("\n".join([logged(10, 21.0, 21.0), logged(20, 19.5, 24.0), later]))
    text = write_report(tmp_path).read_text()
    boxes = re.findall(r'<p class="problem">.*?</p>', text)
    assert len(boxes) == 2 and text.index(boxes[0]) < text.index("<nav>")
    assert "19.50 dB" in boxes[0] and "20.00 dB" in boxes[0] and "4.5 dB better" in boxes[1]
    assert all("(joint, step 20)" in box for box in boxes)
    means = {"heldout/rgb_psnr": 21.0, "heldout/constant_psnr": 22.0}  # the name of version 0.1
    (tmp_path / "evaluation.json").write_text(json.dumps({"means": means, "scenes": {}}))
    boxes = re.findall(r'<p class="problem">.*?</p>', write_report(tmp_path).read_text())
    assert ["(evaluation.json)" in box for box in boxes] == [False, False, True]


def test_without_an_evaluation_the_page_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("experiment: x\n")
    text = write_report(tmp_path).read_text()
    assert "igae evaluate --checkpoint" in text and '<table class="sortable">' not in text


def test_ranking() -> None:
    scenes = {f"s{i}": {"a_ssim": 1.0, "train/rgb_psnr": float(i)} for i in range(1500)} | {"none": {"a_ssim": 0.5}}
    table = scene_table(scenes, {"a_ssim": 1.0})
    assert table["by"] == "train/rgb_psnr" and table["columns"] == ["train/rgb_psnr", "a_ssim"]
    assert [name for name, _ in table["rows"]] == [f"s{i}" for i in range(1000)] and table["count"] == 1501
    lpips = scene_table({"good": {"x_lpips": 0.1}, "bad": {"x_lpips": 0.9}}, {})
    assert [name for name, _ in lpips["rows"]] == ["bad", "good"]
    assert scene_table({}, {})["rows"] == []


def test_a_run_that_is_under_way_or_was_killed(tmp_path: Path) -> None:
    good = {"step": 1, "stage": "joint", "time": 5.0, "loss/total": None, "views_per_second": 2}
    lines = [json.dumps(good), '{"step": 2, "sta', "[1]", '{"step": NaN, "stage": "joint", "time": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run(tmp_path).steps == [LoggedStep(1, "joint", 5.0, {"views_per_second": 2})]
    assert "No stage has ended yet" in write_report(tmp_path).read_text()


def test_metrics_of_version_0_1_have_their_names_of_today(tmp_path: Path) -> None:
    old = {"loss/photo_ae": 1, "eval/photos/ae_psnr": 2, "eval/heldout/constant_psnr": 3, "imbalance": 4, "photos": 5}
    old["loss/rgb"] = 6
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "stage": "joint", "time": 5.0, **old}))
    (tmp_path / "metrics.json").write_text(json.dumps({"joint": {"photos/ae_psnr": 7}}))
    (tmp_path / "evaluation.json").write_text(json.dumps({"means": {"photos/ae_psnr": 8}, "scenes": {}}))
    run = read_run(tmp_path)
    new = ["loss/natural_ae", "eval/natural/ae_psnr", "eval/heldout/baseline_psnr", "straggler_factor", "natural"]
    assert run.steps[0].values == dict(zip([*new, "loss/rgb"], range(1, 7), strict=True))
    assert run.stage_metrics == {"joint": {"natural/ae_psnr": 7}}
    assert run.evaluation is not None and run.evaluation.means == {"natural/ae_psnr": 8}
    assert not re.search("photo|constant|imbalance", write_report(tmp_path).read_text())


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 100_000, '{"means": {}}', '{"means": 1, "scenes": {}}', '{"means": {}, "scenes": []}']
)
def test_wrong_input_is_one_sentence(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    (tmp_path / "igae.json").touch()
    (tmp_path / "config.yaml").touch()
    assert main([str(tmp_path)]) == 2 and "is an export and has no metrics" in capsys.readouterr().err
    (tmp_path / "igae.json").unlink()
    (tmp_path / "config.yaml").write_text("")
    assert main([str(tmp_path), "--output", str(tmp_path / "none" / "x.html")]) == 2
    assert "make it first" in capsys.readouterr().err
    assert main([str(tmp_path), "--output", str(tmp_path / "x.html")]) == 0 and (tmp_path / "x.html").is_file()
    (tmp_path / "evaluation.json").write_text(text)
    assert main([str(tmp_path)]) == 2 and not (tmp_path / "report.html").exists()
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "evaluation.json is damaged" in captured.err


def test_a_report_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        try_to_write(tmp_path / "missing")
    assert "the report was not written" in caplog.text and f"igae report {tmp_path}" in caplog.text


@browser
def test_in_a_browser(run: Path, report: str, tmp_path: Path) -> None:
    path = run / "report.html"
    with page(tmp_path / "profile") as shown:
        # what is looked for would be found
        bad = tmp_path / "bad.html"
        bad.write_text("<img src='http://127.0.0.1:9/picture'><script>console.error('oh'); nothing()</script>")
        shown.open(bad.as_uri())
        assert "http://127.0.0.1:9/picture" in shown.requests
        assert any("oh" in text for text in shown.complaints) and any("nothing" in text for text in shown.complaints)
        shown.requests.clear()
        shown.complaints.clear()

        shown.open(path.as_uri())
        assert shown.run("document.title") == "demo - igae"
        assert shown.run("[...document.images].every(image => image.naturalWidth > 0)")
        plays = (
            "new Promise(done => {const v = document.querySelector('video'); v.scrollIntoView(); const look = () => "
        )
        plays += "v.error ? done(v.error.message) : v.currentTime > 0 ? done(true) : setTimeout(look, 50); look()})"
        assert shown.run(plays) is True
        names = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[0].textContent)"
        up = ["duck", "chair", HOSTILE, "mug"]
        assert shown.run(names) == up  # the worst first
        shown.click("table.sortable th:nth-child(2)")
        assert shown.run(names) == up
        shown.click("table.sortable th:nth-child(2)")
        assert shown.run(names) == up[::-1]
        shown.click("table.sortable th:nth-child(3)")  # the chair has none
        assert shown.run(names) == ["duck", HOSTILE, "mug", "chair"]
        shown.click("table.sortable th:nth-child(3) button")
        assert shown.run(names) == ["mug", HOSTILE, "duck", "chair"]
        shown.click("table.sortable th:nth-child(1)")
        assert shown.run(names) == [HOSTILE, "chair", "duck", "mug"]
        shown.run("scrollTo(0, 0)")
        assert shown.run("document.querySelectorAll('details').forEach(details => details.open = true)") is None
        video = "document.querySelector('video').paused"
        shown.run("document.querySelector('video').scrollIntoView()")
        shown.wait_for(f"!{video}")  # a browser stops what is not seen
        shown.click("video")
        assert shown.run(video) is True
        style = "getComputedStyle(i).imageRendering == 'pixelated' && i.width > 100 && i.naturalWidth == 8"
        assert shown.run(f"[...document.querySelectorAll('.cells img')].every(i => {style})")
        assert "PSNR of decoded renders" in shown.run("document.querySelector('abbr').title")
        shown.run("scrollTo(0, 0)")
        picture = np.asarray(Image.open(io.BytesIO(shown.screenshot())).convert("RGB")).astype(int)
        assert picture.shape == (900, 1280, 3)
        dark = (picture.sum(2) < 300).mean()
        assert 0.002 < dark < 0.5  # text and curves on white: 0.012
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
        asked = [url for url in shown.requests if not url.startswith("data:")]
        assert asked == [path.as_uri()]
        assert shown.complaints == []
        # nothing is wider than a phone, of one run nor of several
        several = write_report([run, run], tmp_path / "several.html")
        for file in (path, several):
            for width in (400, 1300):
                shown.resize(width, 900)
                shown.open(file.as_uri())
                shown.run("document.querySelectorAll('details').forEach(details => details.open = true)")
                assert shown.run("document.documentElement.scrollWidth") <= width
                assert shown.run("document.querySelector('h2').getBoundingClientRect().bottom") < 900
        # the six pictures of a view are in one row, or in two of three
        add_examples(tmp_path / "six", 6)
        (tmp_path / "six/config.yaml").write_text("seed: 1\n")
        six = write_report(tmp_path / "six")
        rows = "Object.values(Object.groupBy([...document.querySelector('.cells').children], e => e.offsetTop))"
        for width, expected in ((1300, [6]), (1200, [6]), (1000, [6]), (900, [3, 3]), (400, [3, 3])):
            shown.resize(width, 900)
            shown.open(six.as_uri())
            assert shown.run(f"{rows}.map(row => row.length)") == expected
            assert shown.run("document.documentElement.scrollWidth") <= width
        files = {file.as_uri() for file in (path, several, six)}
        assert {url for url in shown.requests if not url.startswith("data:")} == files
        assert shown.complaints == []
