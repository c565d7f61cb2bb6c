"""Tables for notebooks; those for screens are tested with the screens."""

from __future__ import annotations

from adaptive_trainer.prediction.estimator import Prediction
from adaptive_trainer.utils.tables import html


def test_what_cells_hold_is_text() -> None:
    made = html([("a<b", "n"), (None, 0)])
    assert made == "<table><tr><th>a&lt;b</th><th>n</th></tr><tr><td></td><td>0</td></tr></table>"


def test_a_prediction_shows_its_sizes_or_why_there_are_none() -> None:
    known = Prediction(64 * 2**20, 66 * 2**20, 70 * 2**20, 68 * 2**20)._repr_html_()
    assert "<td>64 MiB</td><td>66 MiB</td><td>70 MiB</td><td>68 MiB</td>" in known
    assert Prediction(reason="no <tensor>")._repr_html_() == "<p>not known: no &lt;tensor&gt;</p>"
