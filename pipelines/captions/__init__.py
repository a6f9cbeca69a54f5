"""Texts of samples: existing ones, or made by a vision-language model as sentences, attributes or edit instructions."""

from loomvideo.pipelines.captions.captioner import Captioner, CaptionResult, with_text
from loomvideo.pipelines.captions.options import CaptionOptions

__all__ = ["CaptionOptions", "CaptionResult", "Captioner", "with_text"]
