"""Pictures and films of results: H.264 files that browsers play, filmstrips, contact sheets, thumbnails.

Videos are uint8 RGB arrays ``[frames, height, width, 3]``; an image is a video of one frame.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loomvideo.pipelines.evaluation.metrics import check_video
from loomvideo.pipelines.vlm.requests import spread_frames
from loomvideo.platform.errors import full_disk_named

BACKGROUND = (255, 255, 255)
INK = (28, 30, 33)
MUTED = (108, 113, 120)
RULE = (222, 224, 228)
ACCENT = (24, 92, 168)


def filmstrip(video: np.ndarray, count: int = 5, height: int = 128, gap: int = 2) -> Image.Image:
    """A row of ``count`` frames spread over the video, each ``height`` pixels high."""
    tiles = [_resized(frame, height) for frame in spread_frames(video, count)]
    width = sum(tile.width for tile in tiles) + gap * (len(tiles) - 1)
    strip = Image.new("RGB", (width, height), BACKGROUND)
    x = 0
    for tile in tiles:
        strip.paste(tile, (x, 0))
        x += tile.width + gap
    return strip


def stacked_filmstrips(
    videos: Mapping[str, np.ndarray], count: int = 5, height: int = 128, max_width: int | None = None
) -> Image.Image:
    """Filmstrips one above the other with their labels at the left: equal columns are equal moments.

    Args:
        videos: Label to video, top to bottom.
        count: Frames a strip.
        height: Pixels a frame; less when ``max_width`` demands it.
        max_width: Widest picture allowed, in pixels.
    """
    font = _font(13)
    label_width = max(round(font.getlength(label)) for label in videos) + 16
    if max_width is not None:
        widest = max(v.shape[2] / v.shape[1] * min(count, len(v)) for v in videos.values())
        height = min(height, max(16, int((max_width - label_width - 2 * count) / widest)))
    strips = {label: filmstrip(video, count, height) for label, video in videos.items()}
    width = label_width + max(strip.width for strip in strips.values())
    sheet = Image.new("RGB", (width, (height + 4) * len(strips) - 4), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for row, (label, strip) in enumerate(strips.items()):
        y = row * (height + 4)
        draw.text((label_width - 10, y + height // 2), label, fill=MUTED, font=font, anchor="rm")
        sheet.paste(strip, (label_width, y))
    return sheet


def thumbnail(video: np.ndarray, height: int = 96) -> Image.Image:
    """The middle frame, ``height`` pixels high."""
    check_video(video)
    return _resized(video[len(video) // 2], height)


@dataclass(frozen=True)
class SheetRow:
    """One sample of a contact sheet.

    Attributes:
        text: The instruction or caption, written above the pictures.
        panels: Column label (``source``, ``edited``, ``target``, …) to video; a missing column stays empty.
        note: A short line of figures at the right of the text, such as ``edit 24.1 dB · copy 20.3 dB``.
    """

    text: str
    panels: Mapping[str, np.ndarray]
    note: str = ""


def contact_sheet(
    rows: Sequence[SheetRow],
    columns: Sequence[str] = ("source", "edited", "target"),
    title: str = "",
    frames: int = 3,
    height: int = 128,
) -> Image.Image:
    """Samples below each other, each a row of panels ``source | edited | target`` under its instruction.

    Args:
        rows: The samples, top to bottom.
        columns: Panel labels, left to right; columns that no row has are left out.
        title: A heading for the sheet.
        frames: Frames a panel shows of a video.
        height: Pixels of a frame.

    Raises:
        ValueError: if there is no row, or no row has one of the columns.
    """
    columns = [name for name in columns if any(name in row.panels for row in rows)]
    if not columns:
        raise ValueError("contact sheet: no row has any of the columns")
    margin, gap, between = 20, 14, 22
    title_font, head_font, text_font, note_font = _font(18, bold=True), _font(13, bold=True), _font(14), _font(12)
    strips = [{c: filmstrip(row.panels[c], frames, height) for c in columns if c in row.panels} for row in rows]
    heads = {c: round(head_font.getlength(c)) for c in columns}
    widths = {c: max([heads[c], *(s[c].width for s in strips if c in s)]) for c in columns}
    inner = max(sum(widths.values()) + gap * (len(columns) - 1), 360)
    layouts = []
    for row in rows:
        note_width = round(note_font.getlength(row.note)) + (16 if row.note else 0)
        beside = note_width < 0.45 * inner
        lines = _wrap(row.text, text_font, inner - (note_width if beside else 0))
        layouts.append((lines, beside))
    line_height = 19
    top = margin + (34 if title else 0) + 24
    row_heights = [
        line_height * (len(lines) + (0 if beside or not row.note else 1)) + 6 + height + between
        for row, (lines, beside) in zip(rows, layouts, strict=True)
    ]
    sheet = Image.new("RGB", (inner + 2 * margin, top + sum(row_heights) - between + margin), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, fill=INK, font=title_font, anchor="lt")
    x_of, x = {}, margin
    for column in columns:
        x_of[column] = x
        draw.text((x, top - 8), column, fill=ACCENT, font=head_font, anchor="ls")
        x += widths[column] + gap
    y = top
    for index, (row, strip, (lines, beside)) in enumerate(zip(rows, strips, layouts, strict=True)):
        if index:
            draw.line([(margin, y - between // 2), (margin + inner, y - between // 2)], fill=RULE)
        for line in lines:
            draw.text((margin, y), line, fill=INK, font=text_font, anchor="la")
            y += line_height
        if row.note and beside:
            first_line = y - line_height * len(lines)
            draw.text((margin + inner, first_line + 1), row.note, fill=MUTED, font=note_font, anchor="ra")
        elif row.note:
            draw.text((margin, y), row.note, fill=MUTED, font=note_font, anchor="la")
            y += line_height
        y += 6
        for column, picture in strip.items():
            sheet.paste(picture, (x_of[column], y))
        y += height + between
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG through a temporary name, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.tmp.png")
    with full_disk_named(path, partial):
        picture.save(partial, compress_level=4)
        partial.replace(path)


def _resized(frame: np.ndarray, height: int) -> Image.Image:
    picture = Image.fromarray(frame)
    width = max(1, round(picture.width * height / picture.height))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # DejaVu comes with matplotlib and covers far more scripts than Pillow's built-in font.
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int = 3) -> list[str]:
    """Break text into at most ``max_lines`` lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    lines, line = [], ""
    for word in text.split():
        candidate = f"{line} {word}".strip()
        if line and font.getlength(candidate) > width:
            lines.append(line)
            line = word
        else:
            line = candidate
    lines.append(line)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] += " …"
    for i, text_line in enumerate(lines):
        while len(lines[i]) > 2 and font.getlength(lines[i]) > width:
            text_line = text_line.rstrip(" …")[:-1]
            lines[i] = text_line + "…"
    return lines
