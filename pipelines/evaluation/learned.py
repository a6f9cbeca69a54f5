"""Metrics with network weights, behind the ``eval`` extra: LPIPS, CLIP and DINO similarities, kernel distance.

Weights are looked for where their libraries cache them; on a machine without network put them there first. Every
builder returns a function of result and inputs to named values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from loomvideo.pipelines.evaluation.inputs import LoadedItem
from loomvideo.pipelines.evaluation.measures import HIGHER_IS_BETTER, ExtraMeasure
from loomvideo.platform.errors import UserError

HIGHER_IS_BETTER |= {
    "lpips_target": False,
    "lpips_source": None,
    "clip_text": True,
    "clip_frames": None,
    "clip_reference": True,
    "dino_subject": None,
    "dino_reference": True,
}
FRAMES = 8


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


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID: unbiased squared MMD of features ``[n, d]`` with the cubic polynomial kernel (Binkowski et al. 2018).

    Unlike FID it is unbiased at the hundred or so samples that a suite has.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("KID needs at least two samples on each side")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    m, n = len(a), len(b)
    aa, bb = kernel(a, a), kernel(b, b)
    within = (aa.sum() - np.trace(aa)) / (m * (m - 1)) + (bb.sum() - np.trace(bb)) / (n * (n - 1))
    return float(within - 2 * kernel(a, b).mean())


def build_lpips() -> ExtraMeasure:
    """LPIPS (AlexNet; Zhang et al. 2018) to target and source, mean of sampled frames."""
    torch, lpips = _need("torch"), _need("lpips")
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(video: np.ndarray, other: np.ndarray) -> float:
        a, b = (torch.from_numpy(_spread(x)).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (video, other))
        with torch.inference_mode():
            return float(network(a, b).mean())

    def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        values = {}
        if inputs.target is not None:
            values["lpips_target"] = distance(video, inputs.target)
        if inputs.source is not None:
            values["lpips_source"] = distance(video, inputs.source)
        return values

    return measure


def build_clip() -> ExtraMeasure:
    """CLIP ViT-L/14: text to frames, frames to each other, references to frames."""
    torch, open_clip = _need("torch"), _need("open_clip")
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms("ViT-L-14", pretrained="openai")
    tokenizer = open_clip.get_tokenizer("ViT-L-14")
    model.eval()

    def pictures(frames: np.ndarray) -> np.ndarray:
        batch = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
        with torch.inference_mode():
            return model.encode_image(batch).float().numpy()

    def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        features = pictures(_spread(video))
        with torch.inference_mode():
            text = model.encode_text(tokenizer([inputs.item.text])).float().numpy()
        values = {"clip_text": float(cosine_rows(features, np.broadcast_to(text, features.shape)).mean())}
        if len(features) > 1:
            values["clip_frames"] = float(cosine_rows(features[1:], features[:-1]).mean())
        if inputs.references:
            references = pictures(np.stack([_square(picture) for picture in inputs.references]))
            similarity = [cosine_rows(features, np.broadcast_to(r, features.shape)).mean() for r in references]
            values["clip_reference"] = float(np.mean(similarity))
        return values

    return measure


def build_dino() -> ExtraMeasure:
    """DINOv2 ViT-B/14: subject consistency over time, and references to frames."""
    torch, transformers = _need("torch"), _need("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained("facebook/dinov2-base")
    model = transformers.AutoModel.from_pretrained("facebook/dinov2-base").eval()

    def features(frames: np.ndarray) -> np.ndarray:
        inputs = processor(images=list(frames), return_tensors="pt")
        with torch.inference_mode():
            return model(**inputs).last_hidden_state[:, 0].float().numpy()

    def measure(video: np.ndarray, inputs: LoadedItem) -> dict[str, float]:
        found = features(_spread(video))
        values = {"dino_subject": temporal_similarity(found)} if len(found) > 1 else {}
        if inputs.references:
            references = features(np.stack([_square(picture) for picture in inputs.references]))
            similarity = [cosine_rows(found, np.broadcast_to(r, found.shape)).mean() for r in references]
            values["dino_reference"] = float(np.mean(similarity))
        return values

    return measure


BUILDERS: dict[str, Callable[[], ExtraMeasure]] = {"lpips": build_lpips, "clip": build_clip, "dino": build_dino}


def learned_metrics(names: list[str]) -> list[tuple[str, Callable[[], ExtraMeasure]]]:
    """The builders of the named metrics.

    Raises:
        UserError: naming those there are.
    """
    unknown = [name for name in names if name not in BUILDERS]
    if unknown:
        raise UserError(f"learned: {unknown[0]!r} is unknown; choose from {', '.join(BUILDERS)}")
    return [(name, BUILDERS[name]) for name in names]


def _need(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"learned metrics need {module}: pip install 'loomvideo[eval]'") from error


def _spread(video: np.ndarray) -> np.ndarray:
    return video[np.linspace(0, len(video) - 1, min(FRAMES, len(video))).round().astype(int)]


def _square(picture: np.ndarray, side: int = 224) -> np.ndarray:
    import cv2

    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
