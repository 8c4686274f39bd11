"""One HTML page with everything in it, and a slider over the stages."""
from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from .draw import View

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 15px sans-serif; margin: 0 1.5em 2em; color: #222; }}
  header {{ position: sticky; top: 0; background: #fff; padding: 1em 0; border-bottom: 1px solid #ccc; }}
  h1 {{ font-size: 1em; margin: 0 0 .6em; }}
  input {{ width: min(40em, 90%); }}
  main {{ display: flex; flex-wrap: wrap; gap: 1.5em; padding-top: 1em; }}
  figure {{ margin: 0; width: {width}px; }}
  figcaption {{ margin-bottom: .4em; overflow-wrap: anywhere; }}
  figcaption small {{ display: block; color: #666; }}
  img {{ width: {side}px; }}
  [hidden] {{ display: none; }}
</style>
<header>
  <h1>{title}</h1>
  <input id="stage" type="range" min="0" max="{last}" value="0" aria-label="stage" autofocus>
  <output id="name"></output>
</header>
<main>
{figures}
</main>
<script>
  const names = {names}, slider = document.getElementById("stage");
  function show() {{
    document.getElementById("name").textContent = names[slider.value];
    for (const part of document.querySelectorAll("[data-stage]")) part.hidden = part.dataset.stage !== slider.value;
  }}
  slider.addEventListener("input", show);
  show();
</script>
</html>
"""
_SIDE = 256  # pixels across a panel


def page(shown: Sequence[View], title: str) -> str:
    """The views, all with the same stages, beside each other; under each stage's kept patches their attention."""
    layers = [panel.title.partition(":")[0] for panel in shown[0].panels]
    both = any(panel.attention for panel in shown[0].panels)
    return _PAGE.format(
        title=escape(title), last=len(layers) - 1, names=layers, side=_SIDE, width=(2 if both else 1) * (_SIDE + 4),
        figures="\n".join(map(_figure, shown)),
    )  # fmt: skip


def _figure(view: View) -> str:
    stages = []
    for number, (title, *drawn) in enumerate(view.panels):
        pictures = "\n".join(f'<img alt="" src="{_embedded(one)}">' for one in drawn if one is not None)
        stages.append(f'<div data-stage="{number}">\n<small>{escape(title)}</small><br>\n{pictures}\n</div>')
    caption = f"{escape(view.caption or 'without a caption')}<small>{escape(view.name)}</small>"
    return f"<figure><figcaption>{caption}</figcaption>\n" + "\n".join(stages) + "\n</figure>"


def _embedded(picture: Image.Image) -> str:
    picture.save(encoded := io.BytesIO(), "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
