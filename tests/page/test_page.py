"""The page of an evaluation, parsed."""

from __future__ import annotations

import re

import pytest
from evaluations import evaluated
from pages import Page, check_alone_and_accessible

from elf_fast.page import markup, plots
from elf_fast.page.run import html


@pytest.fixture(scope="module")
def example():
    return evaluated(batch=32)


@pytest.fixture(scope="module")
def page(example) -> Page:
    return Page(html([example], "elf-fast eval runs/photos"))


def test_the_page_needs_nothing_from_outside_and_says_what_it_shows(page):
    check_alone_and_accessible(page)
    assert len(page.named("img")) == 24 and page.text.rstrip().endswith("elf-fast eval runs/photos")


def test_it_opens_with_three_figures_and_the_plots_stand_above_the_text(example, page):
    m = example.observed.metrics
    kinds = [tag for tag, _ in page.elements]
    assert kinds.count("dt") == 3
    assert kinds.index("dl") < kinds.index("svg") < kinds.index("table")
    for label, value in (("accuracy", m["overall"]), ("compute", m["flops_share"])):
        assert f"{label}{100 * value:.1f}%95% interval" in page.text
    ratio, low, high = example.speed.ratio
    assert f"speed{ratio:.2f} \N{MULTIPLICATION SIGN}quartiles {low:.2f} to {high:.2f}" in page.text
    assert "batches of 32 on cpu" in page.text
    first_svg = kinds.index("svg")
    words = next(i for i, tag in enumerate(kinds) if tag == "p" and i > first_svg)
    assert kinds[first_svg:words].count("svg") >= 2


def test_groups_are_shown_before_and_after_exits(example, page):
    m = example.observed.metrics
    rows = {row[0].split()[0]: row[1:] for row in page.table("training images of a class")}
    assert set(rows) == {"all", "many", "medium", "few"}
    assert rows["many"][:2] == ["2", str(int((example.target < 2).sum()))]
    for name in ("many", "medium", "few"):
        assert rows[name][3].startswith(f"{100 * m[name]:.1f} [")
    final = 100 * m["anytime_accuracy"][-1]
    assert rows["all"][2].startswith(f"{final:.1f} [")
    gain = 100 * (m["overall"] - m["anytime_accuracy"][-1])
    assert rows["all"][4].startswith(f"{gain:+.1f} [")


def test_bars_go_from_head_to_tail_and_say_their_shares(example, page):
    rows = page.table("class", "training images")
    assert [row[1] for row in rows] == ["500", "200", "50", "5"]
    bars = [d for d in page.named("div") if d.get("class") == "bar"]
    shares = example.observed.metrics["exit_shares_by_class"][0]
    assert bars[0]["aria-label"] == ", ".join(
        f"exit {e + 1}: {100 * share:.0f}%" for e, share in enumerate(shares)
    )


def test_every_exit_has_its_numbers(example, page):
    m = example.observed.metrics
    rows = page.table("exit", "FLOPs, % of the whole network")
    assert len(rows) == 3
    for e, row in enumerate(rows):
        assert row[2:] == [
            f"{100 * m[key][e]:.1f}"
            for key in ("exit_shares", "exit_accuracy", "anytime_accuracy", "anytime_ece")
        ]
    bins = page.table("exit", "confidence, %")
    for e in "123":
        assert sum(float(row[3]) for row in bins if row[0] == e) == pytest.approx(100, abs=1)


def test_an_empty_group_has_no_number():
    page = Page(html([evaluated((500, 400, 300))], "x"))
    rows = {row[0].split()[0]: row[1:] for row in page.table("training images of a class")}
    assert rows["few"] == ["0", "0", "none", "none", "none", "none"]


def test_names_are_shown_as_they_are():
    names = ["<script>alert(1)</script>", "a & b", '"><img src=x onerror=alert(1)>', "'quoted'"]
    page = Page(html([evaluated(names=names, name="<b>run</b>")], "<i>"))
    check_alone_and_accessible(page)
    assert page.named("b") == page.named("i") == []
    for name in names:
        assert name in page.text
    assert [row[0] for row in page.table("class", "training images")] == names


def test_a_thousand_classes_make_a_small_page():
    counts = [max(1, 1000 - c) for c in range(1000)]
    written = html([evaluated(counts, N=800)], "x")
    assert len(written) < 300_000
    rows = Page(written).table("class", "training images")
    assert len(rows) == 40
    assert rows[0][:2] == ["class 0 to class 24, 25 classes", "1,000 to 976"]


def test_a_network_without_exits_has_a_page():
    page = Page(html([evaluated(exits=1, batch=32)], "x"))
    check_alone_and_accessible(page)
    assert "every image costs the same" in page.text and "ms" in page.text
    assert "Where each class leaves" not in page.headings
    assert [row[0] for row in page.table("exit", "FLOPs, % of the whole network")] == [
        "1, the last"
    ]


def test_runs_stand_side_by_side():
    runs = [evaluated(name="one", batch=32), evaluated(name="two", width=16, batch=32),
            evaluated(name="three", exits=1, batch=32)]  # fmt: skip
    page = Page(html(runs, "x"))
    rows = {row[0]: row[1:] for row in page.table("", "one", "two", "three")}
    assert rows["balanced accuracy, %"] == [
        f"{100 * run.observed.metrics['balanced_accuracy']:.1f}" for run in runs
    ]
    assert rows["left at each exit, %"][2] == "100"
    for name in ("one", "two"):
        assert page.text.count(f"{name}: thresholds moved together") == 2  # FLOPs and milliseconds
    assert page.text.count("three: whole network") == 2
    assert "thousand FLOPs per image" in page.text  # the whole networks cost differently
    assert "% of the whole network" not in page.named("svg")[0]["aria-label"]


def test_a_prior_weighs_what_the_page_shows():
    run = evaluated(prior=[0.0, 0.0, 0.0, 1.0], batch=32)
    of_class = run.observed.metrics["per_class"][3]
    page = Page(html([run], "x"))
    assert f"accuracy{100 * of_class:.1f}%" in page.text
    assert "weighted by the prior" in page.text
    rows = {row[0].split()[0]: row[1:] for row in page.table("training images of a class")}
    assert rows["many"][3] == "none" and rows["few"][3].startswith(f"{100 * of_class:.1f}")


def test_an_evaluation_that_nothing_counts_in_is_refused():
    run = evaluated(class_counts=(5, 5), N=40, prior=[0.0, 1.0])
    run.target.zero_()
    with pytest.raises(ValueError, match="runs/photos: expected at least one image that counts"):
        html([run], "x")


# Style


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_and_lines_stand_out_in_light_and_dark():
    """Contrast as WCAG 2 computes it: 4.5 for text, 3 for graphics."""
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part))
                   for part in markup.STYLE.split("@media", 1))  # fmt: skip
    assert light.keys() == dark.keys() >= {"paper", "ink", "soft"}
    for theme in (light, dark):
        paper = _luminance(theme["paper"])
        least = {"ink": 4.5, "soft": 4.5, **{f"c{i}": 3 for i in range(plots.COLOURS)}}
        for name, wanted in least.items():
            pair = sorted((paper, _luminance(theme[name])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= wanted, name


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 0.35, [0, 0.1, 0.2, 0.3]),
        (87.2, 91.9, [88, 89, 90, 91]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert plots.ticks(low, high) == pytest.approx(expected)


def test_more_runs_than_colours_differ_by_their_dashes():
    series = [plots.Series(f"{i}", [0, 1], [i, i], colour=i) for i in range(8)]
    legend = plots.legend(series, [])
    styles = re.findall(r"<line[^>]*>", legend)
    assert len(set(re.sub(r' [xy][12]="[^"]*"', "", style) for style in styles)) == 8


def test_an_attribute_cannot_be_left():
    made = markup.element("p", "a < b", title='"><script>')
    assert made == '<p title="&quot;&gt;&lt;script&gt;">a &lt; b</p>'
