"""Pieces of SVG for tests/figures.py: a figure that follows light and dark, and its texts and lines."""

import base64
import io
from html import escape

from PIL import Image

WIDTH = 880  # of a figure: a README shows it without scaling

COLOURS = {  # name: (light, dark). Colour-blind readers can tell a, b and c apart (after Okabe and Ito)
    "paper": ("#ffffff", "#0d1117"),
    "panel": ("#f3f5f8", "#1b222c"),
    "rule": ("#c4ccd6", "#414b58"),
    "ink": ("#1f2328", "#e6edf3"),
    "dim": ("#545d68", "#a3adb8"),
    "a": ("#0068a8", "#5bb8f0"),
    "b": ("#a84300", "#f0a030"),
    "c": ("#00704f", "#35c79b"),
}


def style():
    light = "".join(f"--{name}:{pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in COLOURS.items())
    rules = [
        f"svg{{{light}}}",
        f"@media (prefers-color-scheme: dark){{svg{{{dark}}}}}",
        "text{font:14px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:var(--ink)}",
        ".small{font-size:12.5px}.strong{font-weight:600}",
        ".code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:12.5px}",
        "image{image-rendering:pixelated}",
    ]
    for name in COLOURS:
        rules.append(f".{name}{{fill:var(--{name})}}.line-{name}{{stroke:var(--{name});fill:none;stroke-width:2}}")
    rules.append(".line-rule{stroke-width:1}")
    return "\n".join(rules)


def document(title, description, height, parts):
    """Return a complete figure. Screen readers read title and description."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{clean(title)}</title>',
        f'<desc id="desc">{clean(description)}</desc>',
        f"<style>\n{style()}\n</style>",
        rect(0.5, 0.5, WIDTH - 1, height - 1, "paper"),
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def clean(text):
    """Escape text for XML, which forbids most control characters even if they are escaped."""
    return escape("".join(c for c in text if c.isprintable()))


def text(x, y, content, kind="", anchor="start"):
    """Return a line of text. kind: style classes. <disc_emb> and <gen_emb> get the colours of their embeddings."""
    content = clean(content)
    content = content.replace("&lt;disc_emb&gt;", '<tspan class="a">&lt;disc_emb&gt;</tspan>')
    content = content.replace("&lt;gen_emb&gt;", '<tspan class="b">&lt;gen_emb&gt;</tspan>')
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{content}</text>'


def rect(x, y, w, h, kind="panel", radius=6):
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" class="{kind}"/>'


def line(points, kind="line-rule", dash=""):
    """Return a line through [(x, y), ..]. dash: lengths of strokes and gaps."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" class="{kind}"{dashed}/>'


def area(points, kind, opacity=1):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polygon points="{path}" class="{kind}" fill-opacity="{opacity}"/>'


def picture(x, y, w, h, file):
    """Return the pixels of an image file, embedded in the SVG, and a frame."""
    png = io.BytesIO()
    Image.open(file).convert("RGB").save(png, "PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    frame = line([(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)])
    return f'<image x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" href="data:image/png;base64,{data}"/>{frame}'
