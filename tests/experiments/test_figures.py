"""What figures show, and that they can be read."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns

from experiments import figures

LONG = "oplora(num_iters=2, momentum_rank=16)"


@pytest.fixture
def drawn(monkeypatch):
    """The figures, in place of their files."""
    found = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, path: found.append(figure))
    yield found
    plt.close("all")


def sweep(methods, settings=("",), rates=5):
    """Valleys at 3.4 and more, each method's at another rate; three seeds, at the last epoch."""
    rows = [
        {"method": name, "setting": setting, "learning_rate": 10.0 ** ((k + i) / 2 - 4), "seed": seed}
        | {"epoch": 1.0, "x_loss": 3.4 + 0.01 * i + 0.1 * (k - rates // 2) ** 2 + 0.01 * seed}
        for i, name in enumerate(methods)
        for setting, k, seed in itertools.product(settings, range(rates), range(3))
    ]
    return pd.DataFrame(rows)


def curves(methods, settings=("",), metrics=("x_loss", "test_accuracy", "train_loss")):
    """Losses from 4 down, and scores up."""
    rows = [
        {"method": name, "setting": setting, "learning_rate": 0.1, "seed": seed, "epoch": epoch}
        | {z: 3 + (4 - epoch) ** 2 / 9 + 0.01 * (i + seed) for z in metrics}
        | {"test_accuracy": 0.7 + 0.05 * epoch + 0.01 * seed}
        for i, name in enumerate(methods)
        for setting, seed, epoch in itertools.product(settings, range(3), (1.0, 2.0, 3.0, 4.0))
    ]
    return pd.DataFrame(rows)


def names(count):
    return [f"method_{i}" for i in range(count - 1)] + [LONG]


def lines(axis):
    """(the lines in colour by their label, how many are grey)."""
    drawn = [z for z in axis.get_lines() if len(z.get_xdata()) > 1]
    colours = [z for z in drawn if z.get_color() in figures.LINES.values()]
    return {z.get_label(): z for z in colours}, sum(z.get_color() == "0.8" for z in drawn)


def markers(axis, kind):
    return [
        tuple(z.get_xydata()[0])
        for z in axis.get_lines()
        if z.get_marker() == kind and len(z.get_xydata()) == 1
    ]


@pytest.mark.parametrize("count", [1, 5, 6])
def test_few_methods_share_a_panel(count, drawn):
    figures.draw_sweep(sweep(names(count)), "x_loss", None)
    [axis] = drawn[0].axes
    coloured, grey = lines(axis)
    assert list(coloured) == names(count) and grey == 0
    assert [z.get_text() for z in drawn[0].legends[0].get_texts()] == names(count)
    assert len({z.get_color() for z in coloured.values()}) == count
    assert len({z.get_marker() for z in coloured.values()}) == count


@pytest.mark.parametrize("draw", ["sweep", "curves"])
@pytest.mark.parametrize("count", [7, 9])
def test_many_methods_have_panels(count, draw, drawn):
    """The best first, in front of all others."""
    methods = names(count)
    if draw == "sweep":
        figures.draw_sweep(sweep(methods[::-1]), "x_loss", None)
        expected = methods[::-1]
    else:
        figures.draw_curves(curves(methods), ["x_loss", "train_loss"], None)
        expected = methods
    [figure] = drawn
    assert [z.get_title().replace("\n", " ").replace(" (", "(") for z in figure.axes] == expected
    for axis in figure.axes:
        coloured, grey = lines(axis)
        assert (len(coloured), grey) == (1, count - 1)
    assert not figure.legends


@pytest.mark.parametrize("count", [2, 6, 7])
def test_settings(count, drawn):
    """A panel for each rank; of more methods a panel for each, with a line for each rank."""
    ranks, methods = ["rank 2", "rank 8", "rank 32"], names(count)
    figures.draw_sweep(sweep(methods, ranks), "x_loss", None)
    figures.draw_curves(curves(methods, ranks), ["x_loss", "train_loss"], None)
    panels, legend = (ranks, methods) if count <= 6 else (methods, ranks)
    for figure in drawn:
        assert [z.get_title().replace("\n", " ").replace(" (", "(") for z in figure.axes] == panels
        assert [z.get_text() for z in figure.legends[0].get_texts()] == legend
        assert all(list(lines(axis)[0]) == legend for axis in figure.axes)
        assert len({axis.get_ylim() for axis in figure.axes}) == 1  # to be compared
        assert figure.get_supylabel() == "x loss"
        for axis in figure.axes:
            first = axis.get_subplotspec().is_first_col()
            assert axis.yaxis.get_tick_params().get("labelleft", True) == first


def test_a_method_without_a_setting(drawn):
    runs = sweep(["a", "b"], ["rank 2", "rank 8"]).sort_values("setting", kind="stable")
    figures.draw_sweep(runs[(runs["setting"] == "rank 8") | (runs["method"] == "b")], "x_loss", None)
    assert [list(lines(axis)[0]) for axis in drawn[0].axes] == [["b"], ["b", "a"]]
    assert [z.get_text() for z in drawn[0].legends[0].get_texts()] == ["b", "a"]


@pytest.mark.parametrize("failing", [np.nan, np.inf, 30.0, 1e30])
def test_a_failing_run_sets_no_scale(failing, drawn):
    """It is at the edge, and said."""
    good, bad = sweep(["a", "b", "c"]), sweep(["a", "b", "c"])
    fails = (bad["method"] == "b") & (bad["learning_rate"] == bad["learning_rate"].max() / 10**0.5)
    bad.loc[fails & (bad["seed"] == 1), "x_loss"] = failing  # one seed of three
    bad.loc[bad["learning_rate"] == bad["learning_rate"].max(), "x_loss"] = failing
    for runs in (good, bad):
        figures.draw_sweep(runs, "x_loss", None)
    (plain,), (axis,) = (figure.axes for figure in drawn)
    assert axis.get_ylim()[0] == pytest.approx(plain.get_ylim()[0], rel=0.01)
    assert 3.8 < axis.get_ylim()[1] <= plain.get_ylim()[1] < 4.0
    at_edge = [x for x, y in markers(axis, "^") if y == axis.get_ylim()[1]]
    rates = sorted(bad["learning_rate"].unique())
    assert at_edge == pytest.approx(rates[-2:] if np.isnan(failing) or failing == np.inf else rates[-1:])
    assert "above the axis, or diverged" in drawn[1].get_supxlabel()
    assert "axis" not in drawn[0].get_supxlabel() and not markers(plain, "^")
    for line in lines(axis)[0].values():
        assert np.isfinite(line.get_ydata()).all()


def test_nothing_but_failures(drawn):
    figures.draw_sweep(sweep(["a", "b"]).assign(x_loss=np.nan), "x_loss", None)
    [axis] = drawn[0].axes
    assert len(markers(axis, "^")) == 10


@pytest.mark.parametrize("loss", [-1e5, 0.0, 1e-9])
def test_what_is_too_good_for_a_logarithm(loss, drawn):
    """Full training's excess loss is below that of the best of a rank."""
    runs = sweep(["a", "full"])
    runs.loc[runs["method"] == "full", "x_loss"] = loss
    figures.draw_sweep(runs, "x_loss", None)
    [axis] = drawn[0].axes
    assert 3.0 < axis.get_ylim()[0] < 3.4
    assert [y for _, y in markers(axis, "v")] == [axis.get_ylim()[0]] * 5
    assert "below the axis" in drawn[0].get_supxlabel()


def test_a_sweep_marks_its_points_and_the_best(drawn):
    figures.draw_sweep(sweep(["a", "b"]), "x_loss", None)
    [axis] = drawn[0].axes
    assert axis.get_xscale() == axis.get_yscale() == "log"
    for i, (name, line) in enumerate(lines(axis)[0].items()):
        assert len(line.get_markevery()) == 5
        [large] = markers(axis, line.get_marker())
        assert large == pytest.approx((10.0 ** ((2 + i) / 2 - 4), 3.41 + 0.01 * i)), name
    assert "large: the best" in drawn[0].get_supxlabel()


def test_bands_and_medians(drawn):
    """From the least to the largest of three seeds; a score is drawn as an error."""
    figures.draw_curves(curves(["a"]), ["x_loss", "test_accuracy"], None)
    loss, error = drawn[0].axes
    assert [loss.get_title(), error.get_title()] == ["x loss", "test error (1 - accuracy)"]
    for axis, middle, spread in ((loss, 4.01, 0.01), (error, 0.24, 0.01)):
        [line] = lines(axis)[0].values()
        assert line.get_ydata()[0] == pytest.approx(middle)
        corners = axis.collections[0].get_paths()[0].vertices
        ends = corners[corners[:, 0] == 1.0, 1]
        assert (ends.min(), ends.max()) == pytest.approx((middle - spread, middle + spread))


@pytest.mark.parametrize("rates", [1, 2, 5, 9])
def test_decades_on_the_axis(rates, drawn):
    figures.draw_sweep(sweep(["a"], rates=rates), "x_loss", None)
    [axis] = drawn[0].axes
    low, high = axis.get_xlim()
    ticks = [z for z in axis.get_xticks() if low <= z <= high]
    assert len(ticks) >= 2 and np.allclose(np.log10(ticks) % 1, 0)


def overlaps(figure):
    """Texts on one another, or beyond the figure."""
    figure.draw_without_rendering()
    texts = [*figure.texts, *(z for legend in figure.legends for z in legend.get_texts())]
    for axes in figure.axes:
        texts.append(axes.title)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = *axis.get_major_ticks(), *axis.get_minor_ticks()
            texts += [z.label1 for z in ticks if low <= z.get_loc() <= high]
    boxes = [(z.get_text(), z.get_window_extent()) for z in texts if z.get_visible() and z.get_text()]
    found = [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]
    width, height = figure.canvas.get_width_height()
    return found + [a for a, x in boxes if x.x0 < 0 or x.y0 < 0 or x.x1 > width or x.y1 > height]


@pytest.mark.parametrize(("count", "settings"), [(1, 1), (6, 1), (6, 3), (7, 6), (20, 1)])
def test_no_text_lies_on_another(count, settings, drawn):
    settings = [f"rank {2**i}" for i in range(settings)] if settings > 1 else [""]
    methods = names(count)
    for rates in (2, 5) if count < 20 else (5,):
        figures.draw_sweep(sweep(methods, settings, rates), "x_loss", None)
    for scale in (1.0, 0.03) if count < 20 else (0.03,):
        runs = curves(methods, settings)
        runs["x_loss"] = np.exp((runs["x_loss"] - 3) / scale)  # of some decades
        runs["epoch"] *= 7
        figures.draw_curves(runs, ["x_loss", "test_accuracy", "train_loss"], None)
    for figure in drawn:
        assert not overlaps(figure)
        assert figure.get_figwidth() <= figures.WIDTH


def test_heat_map(tmp_path, monkeypatch):
    """Dampings down, powers across, in panels of structure and K."""
    drawn = []
    heatmap = sns.heatmap
    monkeypatch.setattr(
        sns, "heatmap", lambda table, **options: drawn.append(table) or heatmap(table, **options)
    )
    grid = {
        "structure": ["diagonal", "dense"],
        "num_iters": [1, 2],
        "damping": [1e-6, 0.1],
        "power": [0.25, 0.5],
    }
    values = np.append(np.linspace(0.2, 0.9, 15), np.nan)  # the last run failed
    rows = [
        dict(zip(grid, setting, strict=True)) | {"x_accuracy": 1 - value}
        for value, setting in zip(values, itertools.product(*grid.values()), strict=True)
    ]
    figures.draw_heat_map(pd.DataFrame(rows), list(grid), "x_accuracy", tmp_path / "map.png")
    found = {tuple(table.stack(future_stack=True).dropna().round(6)) for table in drawn}
    assert found == {
        tuple(z for z in row if not np.isnan(z)) for row in values.reshape(4, 4).round(6).tolist()
    }
    assert (tmp_path / "map.png").exists()
