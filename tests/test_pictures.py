"""What pictures show: all names or how many, whole numbers, and room at their edges."""

import re
from itertools import pairwise

import pytest
from matplotlib import rcParams
from matplotlib.image import imread

from flexmask import Sample, build_tree
from flexmask.plots import draw_losses
from flexmask.tools.plan.figure import draw_plan
from flexmask.tools.plan.survey import Plan
from flexmask.tools.show.row_figures import draw_rows, row_heading
from flexmask.tools.show.run import row_pictures

MARGIN = 6  # pixels


def conversation(turns):
    """A tree whose turns think, and leave their thoughts out of the history."""
    samples, history = [], [1, 2, 3]
    for turn in range(turns):
        answer = [10 + turn, 5, 6]
        weights = [0] * len(history) + [1] * 4
        samples.append(Sample([*history, 4, *answer], weights, key=2 * turn + 1))
        history = [*history, *answer]
    return build_tree(samples)


def plan(*tokens):
    known = Plan()
    for count in tokens:
        known.turns.append(1)
        known.conversation_tokens.append(count)
        known.sample_tokens.append(count)
    return known


def losses(number):
    return {"N-pass": (range(1, number + 1), [1.0] * number), "single-pass": ([1], [1.0])}


def rows(turns, path):
    tree = conversation(turns)
    draw_rows(row_pictures([tree]), path, heading=row_heading("row", tree, tree.num_tokens))


@pytest.mark.parametrize(("turns", "step"), [(1, 1), (40, 1), (100, 3)])
def test_each_sample_is_named_or_it_says_how_many_are(turns, step, tmp_path, monkeypatch):
    monkeypatch.setitem(rcParams, "svg.fonttype", "none")
    rows(turns, tmp_path / "row.svg")
    svg = (tmp_path / "row.svg").read_text()
    assert svg.count(">message ") == -(-turns // step)
    assert (">one in 3 is named<" in svg) == (step == 3)


def test_a_heading_compares_only_what_differs():
    one, two = conversation(1), conversation(2)
    assert row_heading("a:1", one, one.num_tokens) == "a:1: 1 sample, 7 tokens"
    assert row_heading("a:1", two, two.num_tokens) == "a:1: 2 samples, 14 tokens instead of 17"


@pytest.mark.parametrize("tokens", [(69,), (400, 900), (40, 90, 200), (10, 3000), (10, 300_000)])
def test_ticks_of_a_plan_are_whole_numbers_with_room(tokens, monkeypatch):
    drawn = []
    monkeypatch.setattr("flexmask.tools.plan.figure.save_figure", lambda own, _: drawn.append(own))
    draw_plan(plan(*tokens), "plan.png")
    drawn[0].draw_without_rendering()
    for axis in (axes.xaxis for axes in drawn[0].axes):
        labels = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
        assert all(re.fullmatch(r"[\d,]+", label.get_text()) for label in labels)
        boxes = sorted(label.get_window_extent().intervalx.tolist() for label in labels)
        assert boxes
        assert all(left[1] < right[0] for left, right in pairwise(boxes))


PICTURES = {
    "row": lambda path: rows(40, path),
    "plan": lambda path: draw_plan(plan(40, 90, 200), path),
    "losses": lambda path: draw_losses(losses(5), path),
}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_pictures_have_room_at_their_edges(draw, tmp_path):
    draw(tmp_path / "picture.png")
    pixels = imread(tmp_path / "picture.png")
    edges = (pixels[:MARGIN], pixels[-MARGIN:], pixels[:, :MARGIN], pixels[:, -MARGIN:])
    assert all((edge == 1).all() for edge in edges)
