"""The page of a search says what its report says."""

import json
import re
from html import escape
from html.parser import HTMLParser

import pytest

from foveate.tune.page import TERMS, render
from foveate.tune.space import describe

VOID = {"meta"}


class Tags(HTMLParser):
    """Checks that tags nest; `ids` are the anchors, `links` what points to them."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], set(), set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given["id"]} if "id" in given else set()
        self.links |= {given["href"]} if "href" in given else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report_of(verdict, model="tiny", **others):
    about = {
        "model": model, "options": {"seed": 0, "plan": {"trials": 30}},
        "left_out": {"tome": "needs <r>"}, "cpu_seconds": 90.0, "machine": {"cpu": "a & b"},
    }  # fmt: skip
    return json.loads(json.dumps({**about, **verdict.to_dict(), **others}))


def worth(recipe):
    """What the planted recipes get right: those in the encoder less than others."""
    return 0.5 if recipe[0].slug == "cls-drop" else 0.8


@pytest.fixture(scope="module")
def verdict(tune):
    return tune(worth, methods=("cls-drop", "fastv"), minimize=("flops",), targets=("kl<=0.9",))[0]


def test_every_recipe_is_told_with_its_numbers(verdict):
    page = render(report_of(verdict))
    for candidate in verdict.found.candidates:
        assert escape(describe(candidate.recipe)) in page
        if candidate.score is not None:
            low, high = candidate.score.interval
            assert f"({100 * low:.1f} to {100 * high:.1f})" in page
    assert page.count("<circle") == sum(c.score is not None for c in verdict.found.candidates)
    assert page.count('class="series chosen"') == 1
    assert "<b>" + escape(describe(verdict.chosen.recipe)) in page
    assert "needs &lt;r&gt;" in page
    assert "a &amp; b" in page


def test_tags_nest_and_links_lead_somewhere(verdict):
    tags = Tags()
    tags.feed(render(report_of(verdict, model="<script>alert(1)</script>")))
    assert tags.open == []
    assert tags.links == {f"#{anchor}" for anchor in tags.ids}
    assert not re.search("<script", render(report_of(verdict, model="<script>")))


def test_headings_are_explained(verdict):
    page = render(report_of(verdict))
    headings = {h.partition(",")[0] for h in re.findall(r"<abbr[^>]*>([^<]*)</abbr>", page)}
    assert {"recipe", "search", "held out", "change", "FLOPs", "KV cache", "asked"} <= headings
    for name, said in TERMS.items():
        assert f"<dt>{name}</dt><dd>{escape(said)}</dd>" in page


def test_a_policy_is_told_with_what_it_wins(verdict):
    won = {"gain_over_fixed": [2.0, -0.5, 4.5], "fixed": "a<b", "flops": 0.42, "fixed_flops": 0.43}
    page = render(report_of(verdict, adaptive=won))
    assert "+2.0 points (-0.5 to +4.5) over a&lt;b" in page
    assert "42.0 % of the FLOPs against 43.0 %" in page
    assert "A policy" not in render(report_of(verdict))


def test_a_search_that_finds_nothing_has_a_page(tune):
    verdict, *_ = tune(worth, targets=("accuracy>=-1", "flops<=0.5x"), trials=8)
    assert verdict.chosen is None
    page = render(report_of(verdict))
    assert "No recipe meets the targets" in page
    assert 'class="series chosen"' not in page
    empty = {"candidates": [], "front": [], "chosen": None, "best_published": None}
    assert "No recipe was asked." in render(report_of(verdict, gain_over_published=None, **empty))
