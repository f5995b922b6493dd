import json
import re
import sys

import pytest

from secateur.errors import DataError, MissingExtra
from secateur.report import Frozen, Law, Layer, Point, Report, Row
from secateur.tasks import Interval

EVIL = "</script><script>alert('x')</script>&\"$title ${x} ü"


def full(name="conv1.weight"):
    dense = Row("dense", 2_000_000, 1_999_000, 40_800_000, 8_000_400, Interval(0.972, 0.951, 0.985), None)
    pruned = Row("pruned", 1_000_000, 999_500, 20_400_000, 4_000_400, Interval(0.61, 0.56, 0.66))
    recovered = Row(
        "recovered",
        1_000_000,
        999_500,
        20_400_000,
        4_000_400,
        Interval(0.969, 0.948, 0.983),
        Interval(0.003, -0.008, 0.0136),
        Interval(5.0, 4.5, 6.0),
        60_000_000,
    )
    onnx = Row("onnx", 1_000_000, 999_500, 20_400_000, 4_100_000, latency=Interval(1.0, 0.9, 1.1))
    return Report(
        name,
        (
            Row(**{**vars(dense), "latency": Interval(10.0, 9.0, 11.0), "memory": 90_000_000}),
            pruned,
            recovered,
            onnx,
        ),
        (Layer(name, (64, 3, 3, 3), (32, 3, 3, 3), 0.5, 1_000_000),),
        (Frozen(name, 10, f"model output 0: {name}"),),
        Law(3.1e-7, 1e-4, f"the zeroed original {name}"),
        {"pattern": "channel", "seed": 0, name: name},
        (f"a note {name}",),
        tried=tuple(Point(f"series {name}", left, Interval(left, left / 2, 1.0)) for left in (0.2, 0.5)),
    )


def unscripted(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def bare(page):
    """What a browser shows: the page without styles, scripts and tags."""
    text = re.sub(r"<style.*?</style>", "", unscripted(page), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


@pytest.fixture
def save(tmp_path):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")

    def save(report):
        report.save_html(tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return save


@pytest.mark.parametrize("report", [full(), full(EVIL), Report("empty", ())])
def test_json_round_trip(report):
    assert Report.from_json(report.to_json()) == report


def changed(path, value):
    data = json.loads(full().to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged, or no JSON"),
        ("[" * 100_000, "damaged, or no JSON"),
        ("[]", "not of version 1"),
        (changed(["version"], 2), "not of version 1"),
        (changed(["rows", 0, "params"], "many"), r"report\.rows\[0\]\.params is 'many', expected int"),
        (changed(["rows", 0, "params"], True), r"params is 'True', expected int"),
        (changed(["rows", 0, "accuracy"], [0.5, 0.4]), r"accuracy is '\[0\.5, 0\.4\]', expected Interval"),
        (changed(["rows"], {}), r"report\.rows is '{}', expected"),
        (changed(["law", "error"], None), r"report\.law\.error is 'None', expected float"),
        (changed(["layers", 0, "before"], ["a"]), r"before\[0\] is 'a', expected int"),
        (changed(["meta", "seed"], []), r"report\.meta is"),
        (changed(["extra"], 1), r"report lacks, or does not know: extra"),
        (changed(["rows", 1], {"stage": "x"}), r"report\.rows\[1\] lacks, or does not know: accuracy, bytes"),
    ],
)
def test_a_damaged_report_is_named(text, message):
    with pytest.raises(DataError, match=message):
        Report.from_json(text)


def test_the_page_says_what_was_measured(save):
    text = bare(save(full()))
    for said in (
        "multiply-adds 50.0% less",
        "parameters 50.0% less",
        "latency 2.00x faster",
        "score \N{MINUS SIGN}0.3 points (\N{MINUS SIGN}1.4 to +0.8)",
        "40.8 M",
        "8 MB",
        "60 MB",
        "97.2%",
        "94.8% to 98.3%",
        "4.5 ms to 6 ms",
        "(32, 3, 3, 3)",
        "Relative error 3.1e-07 of at most 1.0e-04",
        "model output 0",
        "a note",
        "seed 0",
    ):
        assert said in text
    assert "Nonzero parameters" not in text


def test_another_runtime_is_shown_but_is_no_merit_of_pruning(save):
    text = bare(save(full()))
    assert "1 ms" in text
    assert "10.00x" not in text


def test_the_page_needs_no_network_and_fits_a_phone(save):
    page = save(full())
    assert not re.search(r"src=|href=|url\(|//", unscripted(page))
    assert not re.search(r"<script[^>]*src=", page)
    assert "@import" not in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<script") == page.count("</script>") == 1


def test_strings_of_the_user_stay_text(save):
    page = save(full(EVIL))
    assert page.count("<script") == page.count("</script>") == 1
    assert "alert('x')</" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(&#x27;x&#x27;)" in page
    charts = json.loads(re.search(r"^const charts = (.*);$", page, flags=re.M)[1])
    assert set(charts) == {"change", "accuracy", "layers", "tried"}
    for chart in ("layers", "tried"):
        assert EVIL in json.dumps(charts[chart], ensure_ascii=False).replace('\\"', '"')


def test_zeros_are_said_to_save_nothing(save):
    text = bare(save(Report("masked", (Row("dense", 1000, 1000, 5, 4000), Row("pruned", 1000, 100, 5, 4000)))))
    assert "nonzero parameters 90.0% less" in text
    assert "file unchanged" in text
    assert "multiply-adds unchanged" in text


def test_a_slower_or_larger_result_is_said_to_be_so(save):
    rows = (
        Row("dense", 100, 100, 5, 4000, latency=Interval(1.0, 1.0, 1.0)),
        Row("pruned", 100, 100, 5, 5000, latency=Interval(1.5, 1.0, 2.0)),
    )
    text = bare(save(Report("worse", rows)))
    assert "latency 1.50x slower" in text
    assert "file 25.0% more" in text


def test_a_time_within_the_spread_is_no_gain(save):
    rows = (
        Row("dense", 100, 100, 5, 4000, latency=Interval(10.0, 9.0, 11.0)),
        Row("pruned", 50, 50, 3, 2000, latency=Interval(9.5, 9.0, 10.5)),
    )
    text = bare(save(Report("noise", rows)))
    assert "latency no difference beyond the spread" in text
    assert "faster" not in text


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (Row("dense", 0, 0, None, 0),),
        (Row("dense", 10, 10, 0, 8), Row("pruned", 5, 5, 0, 8, accuracy=Interval(-3.5, -4.0, -3.0))),
    ],
)
def test_what_was_not_measured_leaves_no_hole(save, rows):
    text = bare(save(Report("little", rows)))
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize("package", ["altair", "vl_convert"])
def test_a_missing_package_is_named_and_nothing_is_written(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package}.*secateur\[report\]"):
        full().save_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
