"""Samples of the procedural fashion world: one group is one figure in one take, in several looks."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.sample_data import backgrounds, media
from loomvideo.pipelines.sample_data.config import SampleDataConfig
from loomvideo.pipelines.sample_data.figures import MOTIONS, Look, Person, Renderer, random_figure
from loomvideo.pipelines.sample_data.garments import COLOURS, OUTFITS, PATTERNS, Garment, flat_lay
from loomvideo.pipelines.sources.samples import Sample

DATASET = "fashion-world"
LICENCE = "CC0-1.0"
HAIR_PHRASES = {
    "long": "long {} hair",
    "bob": "a {} bob",
    "bun": "{} hair in a bun",
    "curly": "curly {} hair",
    "short": "short {} hair",
}
FLAT_LAY_GROUNDS = ((236, 233, 228), (226, 232, 236), (240, 230, 226))


@dataclass(frozen=True)
class Edit:
    """A change of look and the words for it."""

    kind: str
    instruction: str
    look: Look
    garment: str = ""
    value: str = ""
    reference: np.ndarray | None = None


def random_look(outfit: str, random: np.random.Generator) -> Look:
    """Garments of an outfit in different colours, before a background."""
    types = OUTFITS[outfit]
    colours = random.choice(list(COLOURS), len(types), replace=False)
    garments = tuple(random_garment(t, str(c), random) for t, c in zip(types, colours, strict=True))
    return Look(garments, str(random.choice(list(backgrounds.BACKGROUNDS))))


def random_garment(garment_type: str, colour: str, random: np.random.Generator) -> Garment:
    """A garment of a colour: most of them plain, patterns in black or white."""
    pattern = "plain" if random.random() < 0.6 else str(random.choice([p for p in PATTERNS if p != "plain"]))
    accent = {"black": "white", "white": "black", "yellow": "black"}.get(colour, "white")
    return Garment(garment_type, colour, pattern, accent)


class FashionGroup:
    """Renders one figure in many looks and writes the media of its samples."""

    def __init__(self, name: str, split: str, seed: list[int], folder: Path, config: SampleDataConfig):
        """Draw the figure and its look; nothing is rendered yet."""
        self.name, self.split, self.folder, self.config = name, split, folder, config
        self.random = np.random.default_rng(seed)
        self.figure: Person = random_figure(self.random)
        self.look = random_look(self.figure.outfit, self.random)
        self.num_frames = int(self.random.choice(config.num_frames))
        self.used: set[Look] = {self.look}
        self.written: set[str] = set()

    def samples(self, tasks: tuple[str, ...]) -> list[Sample]:
        """Make one sample for each task."""
        return [self._sample(task, f"{self.name}-{number}-{task}") for number, task in enumerate(tasks)]

    def _sample(self, task: str, key: str) -> Sample:
        if TASKS[task].needs_source:
            return self._edit_sample(task, key)
        look = random_look(self.figure.outfit, self.random)
        references: list[str] = []
        caption = self._caption(look)
        if task == "mi2v":
            with_background = bool(self.random.random() < 0.5)
            pictures = [self._flat_lay(garment) for garment in look.garments]
            if with_background:
                pictures.append(self._background(look.background))
            references = [self._picture(f"{key}-ref{i}.png", picture) for i, picture in enumerate(pictures)]
            caption = self._reference_prompt(look, with_background)
        return Sample(
            key=key,
            task=task,
            dataset=DATASET,
            target=self._media(look, "png" if task == "t2i" else "mp4", key),
            references=references,
            caption=caption,
            licence=LICENCE,
            group=self.name,
            split=self.split,
            extra=self._attributes(look),
        )

    def _edit_sample(self, task: str, key: str) -> Sample:
        edit = self._new_edit(task)
        kind = "png" if task == "image_edit" else "mp4"
        record = {"kind": edit.kind, "to": edit.value}
        if edit.garment:
            before = dataclasses.asdict(self.look.garment(edit.garment))
            field = {"recolour": "colour", "pattern": "pattern", "ref_pattern": "pattern"}.get(edit.kind)
            record |= {"garment": edit.garment} | ({"from": before[field]} if field else {})
            record |= self._mask(edit.garment, kind)
        else:
            record |= {"from": self.look.background}
        references = []
        if edit.reference is not None:
            references = [self._picture(f"{key}-ref0.png", edit.reference)]
        return Sample(
            key=key,
            task=task,
            dataset=DATASET,
            source=self._media(self.look, kind, f"{self.name}-source"),
            target=self._media(edit.look, kind, key),
            references=references,
            instruction=edit.instruction,
            caption=self._caption(edit.look),
            licence=LICENCE,
            group=self.name,
            split=self.split,
            extra=self._attributes(edit.look) | {"edit": record},
        )

    def _new_edit(self, task: str) -> Edit:
        """An edit to a look that this group has not shown yet, while there are any."""
        edit = self._random_edit(task)
        for _ in range(20):
            if edit.look not in self.used:
                break
            edit = self._random_edit(task)
        self.used.add(edit.look)
        return edit

    def _random_edit(self, task: str) -> Edit:
        random, look = self.random, self.look
        area = np.array([0.3 if g.type == "trousers" else 1.0 for g in look.garments])
        garment = look.garments[int(random.choice(len(look.garments), p=area / area.sum()))]
        other_places = [name for name in backgrounds.BACKGROUNDS if name != look.background]
        if task == "ref_edit":
            kind = str(random.choice(["ref_garment", "ref_pattern", "ref_background"], p=[0.5, 0.25, 0.25]))
            if kind == "ref_background":
                place = str(random.choice(other_places))
                return Edit(kind, "replace the background with the one in the image", Look(look.garments, place),
                            value=place, reference=self._background(place))  # fmt: skip
            colours = [c for c in COLOURS if c not in (garment.colour, garment.accent)]
            shown = random_garment(garment.type, str(random.choice(colours)), random)
            if kind == "ref_garment":
                text = f"replace the {garment.type} with the one in the image"
                return Edit(kind, text, look.wearing(shown), garment.type, shown.phrase, self._flat_lay(shown))
            patterns = [p for p in PATTERNS if p not in ("plain", garment.pattern)]
            shown = dataclasses.replace(shown, pattern=str(random.choice(patterns)), accent=garment.accent)
            text = f"replace the {garment.type}'s pattern with the one in the image"
            worn = dataclasses.replace(garment, pattern=shown.pattern)
            return Edit(kind, text, look.wearing(worn), garment.type, shown.pattern, self._flat_lay(shown))
        weights = self.config.edit_weights
        kinds = list(weights)
        kind = str(random.choice(kinds, p=np.array(list(weights.values())) / sum(weights.values())))
        if kind == "background":
            place = str(random.choice(other_places))
            text = f"change the background to {backgrounds.phrase(place)}"
            return Edit(kind, text, Look(look.garments, place), value=place)
        if kind == "pattern":
            pattern = str(random.choice([p for p in PATTERNS if p != garment.pattern]))
            changed = dataclasses.replace(garment, pattern=pattern)
            return Edit(
                kind, f"make the {garment.type} {PATTERNS[pattern]}", look.wearing(changed), garment.type, pattern
            )
        # A plain garment's accent is not seen; a patterned one keeps its accent, so that colour is out.
        taken = {garment.colour} | ({garment.accent} if garment.pattern != "plain" else set())
        colour = str(random.choice([c for c in COLOURS if c not in taken]))
        changed = dataclasses.replace(garment, colour=colour)
        return Edit(kind, f"make the {garment.type} {colour}", look.wearing(changed), garment.type, colour)

    def _caption(self, look: Look) -> str:
        figure = self.figure
        hair = HAIR_PHRASES[figure.hair_style].format(figure.hair)
        clothes = " and ".join(("" if g.type == "trousers" else "a ") + g.phrase for g in look.garments)
        place = backgrounds.phrase(look.background)
        return f"a {figure.person} with {hair} wearing {clothes}, {MOTIONS[figure.motion]} in front of {place}"

    def _reference_prompt(self, look: Look, with_background: bool) -> str:
        clothes = " and ".join(f"the {g.type}" for g in look.garments)
        place = "the background in the last image" if with_background else backgrounds.phrase(look.background)
        motion = MOTIONS[self.figure.motion]
        return f"a {self.figure.person} wearing {clothes} in the images, {motion} in front of {place}"

    def _attributes(self, look: Look) -> dict:
        return {
            "garments": [garment.attributes() for garment in look.garments],
            "background": look.background,
            "person": self.figure.attributes(),
        }

    def _media(self, look: Look, kind: str, stem: str) -> str:
        """Write the clip (mp4) or its middle frame (png) once; return the path for the sample file."""
        path = f"media/{self.name}/{stem}.{kind}"
        if path not in self.written:
            self.written.add(path)
            renderer = Renderer(self.figure, look, self.config.width, self.config.height)
            if kind == "mp4":
                media.write_clip(self.folder / path, [renderer.frame(i) for i in range(self.num_frames)])
            else:
                media.write_picture(self.folder / path, renderer.frame(self.num_frames // 2))
        return path

    def _picture(self, name: str, picture: np.ndarray) -> str:
        path = f"media/{self.name}/{name}"
        media.write_picture(self.folder / path, picture)
        return path

    def _flat_lay(self, garment: Garment) -> np.ndarray:
        ground = FLAT_LAY_GROUNDS[int(self.random.integers(len(FLAT_LAY_GROUNDS)))]
        return flat_lay(garment, self.figure.flare, min(self.config.width, self.config.height), ground)

    def _background(self, name: str) -> np.ndarray:
        # The middle of the very panorama that the target is shot before.
        look = Look(self.look.garments, name)
        renderer = Renderer(self.figure, look, self.config.width, self.config.height)
        return renderer.empty_scene()

    def _mask(self, garment_type: str, kind: str) -> dict:
        """Mask of the edited garment in the first frame (mp4) or the still, and its box as shares of the frame."""
        index = 0 if kind == "mp4" else self.num_frames // 2
        path = f"media/{self.name}/{self.name}-mask-{garment_type}-{index}.png"
        renderer = Renderer(self.figure, self.look, self.config.width, self.config.height)
        mask = renderer.garment_mask(index, garment_type)
        if path not in self.written:
            self.written.add(path)
            media.write_picture(self.folder / path, mask)
        ys, xs = np.nonzero(mask > 127)
        box = [xs.min() / mask.shape[1], ys.min() / mask.shape[0],
               (xs.max() + 1) / mask.shape[1], (ys.max() + 1) / mask.shape[0]]  # fmt: skip
        return {"mask": path, "bbox": [round(float(v), 4) for v in box]}
