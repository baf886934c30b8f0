import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from d2v_fast import report
from d2v_fast.figures import FIGURES
from d2v_fast.report import COLORS, main, page, read_run

HOSTILE = "<script>alert(1)</script>\"'&"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """The text of a page; fails on a tag that is not closed, and collects what a browser would fetch."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.fetched, self.tags = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action") and not value.startswith("#"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def line(step, **more):
    return json.dumps({"step": step, "time": 1.7e9 + step} | {name: 0.1 + step / 1000 for name in FIGURES} | more)


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", lines=None, **files):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.jsonl").write_text("\n".join(lines or [line(step) for step in (1, 50, 100)]) + "\n")
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return folder

    return make


def html_of(*folders):
    return page([read_run(folder, COLORS[i]) for i, folder in enumerate(folders)])


def test_a_page_shows_what_a_run_wrote(make_run):
    alarm = "predictions are becoming constant"
    html = html_of(
        make_run(
            config_yaml="train: {steps: 400, output: null}\nmask: {kind: span}\ndata: {}\n",
            environment_json=json.dumps({"threads": "2", "warnings": ["/dev/shm has 0.06 GiB"]}),
            alarms_jsonl=json.dumps({"step": 50, "alarms": [alarm]}),
        )
    )
    found = Page(html)
    assert f"step 50: {alarm}" in found.text and "/dev/shm has 0.06 GiB" in found.text
    assert "100 of 400" in found.text and "mask.kind span" in found.text and "threads 2" in found.text
    assert all(figure.title in found.text for figure in FIGURES.values())
    assert found.tags.count("svg") == len(FIGURES)


def test_the_page_is_self_contained(make_run):
    html = html_of(make_run())
    assert Page(html).fetched == []
    assert not {"link", "script", "img", "iframe"} & set(Page(html).tags)
    assert "@import" not in html and "url(http" not in html and len(html) < 400_000


def test_report_of_an_unfinished_run(make_run):
    """Half a line, a line cut off by a kill, and numbers that are missing or that JSON does not support."""
    whole = [line(1), line(50)[:40], line(100, loss=None), line(150, grad_norm=math.nan), line(200)[:-9]]
    folder = make_run(lines=whole, alarms_jsonl='{"step": 100, "alarms": ["of 100"]}\n{"step": 150, "ala')
    run = read_run(folder, "red")
    assert [one["step"] for one in run.log] == [1, 100, 150] and run.alarms == [(100, "of 100")]
    Page(page([run]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value, curves", [(None, 0), (math.nan, len(FIGURES)), (0.0, len(FIGURES))])
def test_a_log_without_numbers_to_draw(make_run, value, curves):
    lines = [line(step, **dict.fromkeys(FIGURES, value)) for step in (1, 50)]
    html = html_of(make_run(lines=lines, alarms_jsonl='{"step": 50, "alarms": ["all is lost"]}'))
    assert Page(html).tags.count("svg") == curves


NESTED = "[" * 100_000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
PROBE = {"data": "photos", "name": None, "limit": 20, "step": 100, "results": {"trained": {"knn": 0.5, "linear": 0.25}}}


@pytest.fixture
def one_curve(monkeypatch):
    monkeypatch.setattr(report, "FIGURES", {"loss": FIGURES["loss"]})


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("one_curve")
class TestDamaged:
    """Files of a run may be half written, edited or hostile; the page shows the rest."""

    @pytest.mark.parametrize("step", ['"x"', "1e999", "NaN", "[1]", "-1", "null", "1" + "0" * 400])
    def test_steps_of_the_log(self, step, make_run):
        run = read_run(make_run(lines=[line(1), f'{{"step": {step}, "loss": 3}}', line(100)]), "red")
        assert [one["step"] for one in run.log] == [1, 100]

    @pytest.mark.parametrize("bad", ["null", "[1]", '"a"', "5", '{"loss": 1}', "\x00", '{"step": 60, "loss": ' + NESTED])
    def test_lines_of_the_log(self, bad, make_run):
        run = read_run(make_run(lines=[line(1), bad, line(100)]), "red")
        assert [one["step"] for one in run.log] == [1, 100]
        Page(page([run]))

    @pytest.mark.parametrize("value", ["1e999", "-1e999", "1e308", "1" + "0" * 400, "true", '"5"', "{}", "1e-320", "3e38"])
    def test_numbers_of_the_log(self, value, make_run):
        Page(html_of(make_run(lines=[line(1), f'{{"step": 50, "loss": {value}, "grad_norm": {value}, "time": {value}}}'])))

    def test_a_step_that_is_text_counts(self, make_run):
        assert [one["step"] for one in read_run(make_run(lines=['{"step": "1", "loss": 2}', line(5)]), "red").log] == [1, 5]

    @pytest.mark.parametrize("alarms", ["null", "5", '"abc"', "{}", "[null, 1, []]", "[" * 500 + "]" * 500])
    def test_alarms(self, alarms, make_run):
        Page(html_of(make_run(alarms_jsonl=f'{{"step": 50, "alarms": {alarms}}}\n{{"step": 50}}\n7')))

    @pytest.mark.parametrize(
        "text", ["- a", "a: [", "x", "5", BOMB, NESTED, "!!python/object/apply:os.getcwd []", "? [a]: b", "\x00"]
    )
    def test_settings(self, text, make_run):
        run = read_run(make_run(config_yaml=text), "red")
        assert run.config == {} and run.unread[0].startswith("config.yaml: ")
        assert "left out: config.yaml: " in Page(page([run])).text

    @pytest.mark.parametrize("text", ["", "null", "{}", "a:\n", "1: {2: 3}", "a: 1e999\nb: .nan\nc: 2001-01-01"])
    def test_settings_that_are_odd(self, text, make_run):
        run = read_run(make_run(config_yaml=text), "red")
        Page(page([run]))

    @pytest.mark.parametrize("text", ["", "[]", "5", "{", NESTED, '{"warnings": 5}'])
    def test_the_machine(self, text, make_run):
        run = read_run(make_run(environment_json=text), "red")
        assert run.unread and not run.environment
        Page(page([run]))

    @pytest.mark.parametrize(
        "probes",
        [{}, 5, [1], [[PROBE]], PROBE, [PROBE | {"results": {}}], [PROBE | {"results": {"trained": {"knn": "x"}}}]]
        + [[PROBE | {key: []}] for key in PROBE]
        + [[{key: value for key, value in PROBE.items() if key != left_out}] for left_out in PROBE]
        + [[PROBE | {"results": {"trained": {"knn": math.nan}}}], [PROBE | {"results": {"a": {"knn": 0}, "b": {"nats": 0}}}]],
    )
    def test_probes(self, probes, make_run):
        run = read_run(make_run(probe_json=json.dumps(probes)), "red")
        assert run.probes == [] and "probe.json: holds no results of d2v-probe" in run.unread[0]
        Page(page([run]))

    def test_named_pipes_in_place_of_files(self, make_run):
        folder = make_run()
        for name in ("alarms.jsonl", "config.yaml", "environment.json", "probe.json"):
            os.mkfifo(folder / name)
        run = read_run(folder, "red")
        assert (run.alarms, run.config, run.environment, run.probes) == ([], {}, {}, [])


@pytest.mark.usefixtures("one_curve")
def test_probes_of_the_same_data_side_by_side(make_run):
    other = PROBE | {"step": 50, "results": {"trained": {"knn": 0.125, "linear": 0.75}}}
    more = PROBE | {"data": "words", "results": {"trained": {"accuracy": 0.0625, "nats": 4.25}}}
    html = html_of(make_run("a", probe_json=json.dumps([PROBE])), make_run("b", probe_json=json.dumps([other, more])))
    assert html.count("photos, at most 20") == 1 and html.count("<th>knn</th>") == 1
    text = Page(html).text
    assert "100 trained 50.0% 25.0%" in text and "50 trained 12.5% 75.0%" in text and "100 trained 6.2% 4.250" in text


@pytest.mark.usefixtures("one_curve")
def test_names_that_are_not_utf8(make_run):
    name = os.fsdecode(b"caf\xe9.wav")
    folder = make_run(alarms_jsonl=json.dumps({"step": 50, "alarms": [name]}))
    main([str(folder)])
    assert (folder / "report.html").read_text(encoding="utf-8").count("caf?.wav") == 1


def test_a_page_that_cannot_be_written(make_run, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/page\.html: cannot be written, choose another with --out: No such file"):
        main([str(make_run()), "--out", str(tmp_path / "nowhere" / "page.html")])


def test_repeated_steps_replace_earlier_records(make_run):
    lines = [line(1), line(50, loss=1), line(100, loss=2), line(150, loss=3), line(50, loss=7), line(100, loss=8)]
    old = [{"step": 50, "alarms": ["once"]}, {"step": 150, "alarms": ["before it was resumed"]}]
    run = read_run(make_run(lines=lines, alarms_jsonl="\n".join(map(json.dumps, old))), "red")
    assert [(one["step"], one["loss"]) for one in run.log[1:]] == [(50, 7), (100, 8)]
    assert run.alarms == [(50, "once")]


def test_everything_from_files_is_escaped(make_run):
    folder = make_run(
        HOSTILE.replace("/", "∕"),
        lines=[line(1, loss=HOSTILE), line(2)],
        config_yaml=json.dumps({"data": {"path": HOSTILE, HOSTILE: 1}}),
        environment_json=json.dumps({HOSTILE: HOSTILE, "warnings": [HOSTILE]}),
        alarms_jsonl=json.dumps({"step": 2, "alarms": [HOSTILE]}),
    )
    for html in (html_of(folder), html_of(folder, make_run("other"))):
        found = Page(html)
        assert "script" not in found.tags and found.text.count("alert(1)") >= 5


def test_several_runs_side_by_side(make_run):
    a = make_run("a", config_yaml="train: {steps: 5, seed: 0}")
    b = make_run("b", lines=[line(1), line(900)], config_yaml="train: {steps: 5, seed: 1}")
    html = html_of(a, b)
    assert "2 runs" in Page(html).text and all(f"stroke: {color}" in html for color in COLORS[:2])
    different, same = html.index("train.seed"), html.index("train.steps")
    assert different < html.index("1 shared by all") < same


def test_pages_of_long_runs_stay_small(make_run):
    lines = [line(step, loss=math.sin(step)) for step in range(1, 20_001)]
    html = html_of(make_run(lines=lines))
    assert len(html) < 1_500_000
    # The range of each point is drawn too, not only its mean.
    runs = [read_run(make_run("spike", lines=[*lines[:500], line(501, loss=50.0), *lines[501:3000]]), COLORS[0])]
    figure = report.curve(runs, "loss")
    assert re.search(r">(40|50)<", figure), "the spike is averaged away"


def test_the_command(make_run, tmp_path, capsys):
    folder = make_run()
    main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    main([str(folder), str(make_run("b")), "--out", str(tmp_path / "both.html")])
    assert "2 runs" in (tmp_path / "both.html").read_text()
    with pytest.raises(ValueError, match=r"nowhere: has no log\.jsonl; expected the folder of a run"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="no complete line yet"):
        main([str(make_run("empty", lines=['{"step": 1, "lo']))])


def test_without_matplotlib(make_run):
    code = "import sys; sys.modules['matplotlib'] = None; from d2v_fast.cli import report; report()"
    done = subprocess.run([sys.executable, "-c", code, str(make_run())], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "d2v-report: the curves need matplotlib: pip install 'd2v-fast[report]'"
