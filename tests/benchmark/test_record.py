"""The file of results, the Markdown table and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvim.benchmark import Record, Row, columns, draw, markdown
from fastvim.benchmark.plot import draw_rates
from fastvim.errors import UserError

MEASUREMENTS = Path(__file__).parents[2] / "measurements"


def row(model="fastvim_a", side=224, rate=1000.0, **options) -> Row:
    values = {"batch": 2, "mode": "graph", "dtype": "bfloat16", **options}
    latency = None if rate is None else 2e3 / rate
    ours = model.startswith("fastvim")
    return Row(model, (side, side), images_per_second=rate, latency_ms=latency, ours=ours, **values)


ROWS = [
    row(side=224),
    row(side=512, rate=123.4, batch=1),
    row("vit", side=224, rate=12.34),
    row("vit", side=512, rate=None, failure="out of memory", batch=1),
    row("other", side=224, rate=1.234, failure="wrong: relative error 1"),
]


def test_the_file_gives_back_the_record(tmp_path):
    record = Record("abacus", [{"command": "fastvim benchmark ü"}])
    for entry in ROWS:
        record.add(entry)
    path = tmp_path / "new" / "results.json"
    record.save(path)
    assert Record.load(path) == record
    assert json.loads(path.read_text())["rows"][0]["size"] == [224, 224]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_case_has_one_row(tmp_path):
    record = Record("abacus", [{}])
    record.add(row(rate=1.0))
    record.add(row(rate=2.0, mode="eager"))
    record.runs.append({})
    record.add(row(rate=3.0))
    assert [(r.mode, r.images_per_second, r.run) for r in record.rows] == [
        ("eager", 2.0, 0),
        ("graph", 3.0, 1),
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"device": "a", "rows": [{"a": 1}]}'])
def test_files_of_something_else(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"results\.json: not a file of fastvim benchmark"):
        Record.load(path)
    with pytest.raises(FileNotFoundError, match="no results at"):
        Record.load(tmp_path / "none.json")


def test_markdown():
    assert markdown(ROWS).splitlines() == [
        "| images/s | 224 (2) | 512 (1) |",
        "|---|---:|---:|",
        "| fastvim_a | 1,000 | 123 |",
        "| vit | 12.3 | out of memory |",
        "| other | failed | - |",
    ]


def test_names_tell_what_differs():
    lines = markdown([row(), row(mode="eager"), row(dtype="amp", channels_last=True)])
    names = [line.split(" | ")[0] for line in lines.splitlines()[2:]]
    assert names == [
        "| fastvim_a, graph, bfloat16",
        "| fastvim_a, eager, bfloat16",
        "| fastvim_a, graph, amp, channels last",
    ]


def test_share_of_roofline():
    assert row().share_of_roofline is None
    assert row(roofline_ms=1.0).share_of_roofline == pytest.approx(0.5)


def test_the_training_loop_has_a_line_of_its_own():
    rows = [
        row(side=224, loop_images_per_second=765.4),
        row(side=512, batch=1, rate=123.4),
        row("vit"),
    ]
    assert markdown(rows).splitlines()[2:] == [
        "| fastvim_a | 1,000 | 123 |",
        "| fastvim_a, training loop | 765 | - |",
        "| vit | 1,000 | - |",
    ]
    assert columns(rows)["loop images/s"] == ["765", "", ""]
    assert "loop images/s" not in columns(rows[1:])


@pytest.mark.parametrize("name", ["h100", "h100_modes", "h100_training", "h100_channels"])
def test_published_files_are_read(name):
    record = Record.load(MEASUREMENTS / f"{name}.json")
    assert all(row.failure is None for row in record.rows)
    assert len(markdown(record.rows).splitlines()) > 5
    shares = [row.share_of_roofline for row in record.rows]
    ours = [row.ours and not row.train for row in record.rows]
    assert [share is not None and 0 < share < 1 for share in shares] == ours


@pytest.mark.parametrize("sides", [(224,), (224, 512, 1024)])
def test_the_picture_is_drawn(tmp_path, sides):
    rows = [row(name, side, 1e6 / side) for name in ("fastvim_a", "vit") for side in sides]
    path = tmp_path / "new" / "picture.png"
    draw(Record("abacus", [], rows), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_lines_of_the_picture():
    rows = [row(name, side, 1e6 / side) for name in ("vit", "fastvim_a") for side in (224, 512)]
    (axes,) = draw_rates("abacus", rows).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert sorted(line.get_linestyle() for line in axes.lines) == ["-", "--"]
    assert len({line.get_color() for line in axes.lines}) == 2
    words = [text.get_text() for text in axes.texts]
    assert words[1:] == ["abacus · bfloat16 · CUDA graph", "batch 2"]


def test_the_legend_names_the_fastest_first():
    rows = [row(f"vit_{i}", side, rate) for i, rate in enumerate((2, 9, 5)) for side in (224, 512)]
    (axes,) = draw_rates("abacus", [*rows, row(side=224), row(side=512, rate=1.0)]).axes
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["vit_1", "vit_2", "vit_0", "fastvim_a"]
    assert [text.get_color() for text in texts] == [line.get_color() for line in axes.lines]
    assert [text.get_fontweight() for text in texts] == [*["normal"] * 3, "bold"]


def test_bars_where_all_images_have_one_size():
    (axes,) = draw_rates("abacus", [row("vit", rate=12.34), row(rate=1000.0)]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["fastvim_a", "vit"]
    assert {"1,000", "12.3"} <= {text.get_text() for text in axes.texts}


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match="no row has a time"):
        draw(Record("abacus", [], ROWS[3:]), tmp_path / "picture.png")
