"""The prompts of a process are encoded first, then the text encoder is freed, and only then the denoiser is loaded.

UMT5-XXL weighs more than a 4-bit expert, so memory must hold the larger of the two and not their sum. Embeddings are kept as
files (`ptq.store.embeddings`): a process that continues a run does not load the encoder where they are all there. The image
encoder of I2V-14B stays with the denoiser: diffusers' pipelines take a picture or its embedding, and need the picture.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq import ui
from ptq.errors import DamagedFileError, PtqError
from ptq.store.embeddings import embedding_file, read_embedding, write_embedding
from ptq.store.files import digest
from ptq.wan.identity import parts_digest
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import load_pipeline
from ptq.wan.pipeline import place_pipeline

if TYPE_CHECKING:
    from torch import Tensor

ENCODING_PARTS = ("text_encoder", "tokenizer")
"""Components that only encode prompts."""
_OTHER_PARTS = ("vae", "transformer", "transformer_2", "image_encoder", "image_processor")


@dataclass(frozen=True)
class TextEncoding:
    """The embeddings of a run's prompts.

    Attributes:
        layout: the model whose text encoder and tokenizer make them.
        folder: where they are kept.
        dtype: of the encoder's weights and output, "float32" or "bfloat16".
        length: tokens of an embedding (max_sequence_length).
        negative: the negative prompt; None where the guidance needs none.
        device, offload: where the encoder computes, as `place_pipeline` takes it.
    """

    layout: ModelLayout
    folder: Path
    dtype: str
    length: int
    negative: str | None
    device: str = "cpu"
    offload: str = "none"

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode what is not there, or not whole (a message says so); the encoder is gone afterwards.

        Raises:
            PtqError: it cannot be loaded, or gives values that are not finite; the disk is full.
        """
        texts = dict.fromkeys([*prompts, *([] if self.negative is None else [self.negative])])
        missing = [text for text in texts if self._read(text) is None]
        damaged = [path for text in missing if (path := embedding_file(self.folder, self._key(text))).exists()]
        if damaged:
            ui.warn(f"{damaged[0]} is damaged ({len(damaged)} such files); what it held is encoded again.")
        if missing:
            self._encode(missing)

    def arguments(self, prompt: str) -> dict[str, Tensor]:
        """What the pipeline's call takes in place of the texts: embeddings [1, length, width] on the CPU.

        Raises:
            DamagedFileError: a file was damaged after `prepare`.
        """
        found = {"prompt_embeds": self._load(prompt)}
        return found if self.negative is None else {**found, "negative_prompt_embeds": self._load(self.negative)}

    def _encode(self, texts: list[str]) -> None:
        import torch

        pipeline = place_pipeline(load_encoder(self.layout, self.dtype), self.device, self.offload)
        with ui.progress("Encoding prompts", len(texts)) as bar, torch.no_grad():
            for text in texts:
                embeds = pipeline.encode_prompt(
                    text, do_classifier_free_guidance=False, max_sequence_length=self.length
                )[0][0].cpu()
                if not embeds.isfinite().all():
                    raise PtqError(
                        f"The text encoder of {self.layout.path} gave values that are not finite for the prompt {ui.shorten(repr(text))}. Its weights are damaged, or the device does not compute; `ptq doctor` shows the versions."
                    )
                write_embedding(self.folder, self._key(text), embeds)
                bar.advance()
        del pipeline
        gc.collect()  # hooks of offloading refer to their modules in circles
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, text: str) -> Tensor:
        embeds = self._read(text)
        if embeds is None:
            raise DamagedFileError(
                f"{embedding_file(self.folder, self._key(text))} was damaged or removed while the run went on. Run the same command again; it encodes the prompt anew."
            )
        return embeds.unsqueeze(0)

    def _read(self, text: str) -> Tensor | None:
        return read_embedding(self.folder, self._key(text), self.length)

    def _key(self, text: str) -> str:
        kind = self.device.partition(":")[0]
        made = {"text": text, "encoder": self._encoder, "length": self.length, "dtype": self.dtype, "device": kind}
        return digest(made)

    @cached_property
    def _encoder(self) -> str:
        return parts_digest(self.layout.path, ENCODING_PARTS)


def load_encoder(layout: ModelLayout, dtype: str) -> Any:
    """A pipeline that can only encode prompts, on the CPU; errors as `load_pipeline`."""
    return _load_without(layout, dtype, _OTHER_PARTS)


def load_denoiser(layout: ModelLayout, dtype: str) -> Any:
    """A pipeline that takes embeddings instead of prompts, on the CPU; errors as `load_pipeline`."""
    return _load_without(layout, dtype, ENCODING_PARTS)


def _load_without(layout: ModelLayout, dtype: str, parts: Iterable[str]) -> Any:
    import torch

    named = {part: None for part in parts if part in layout.components}
    return load_pipeline(layout.path, dtype=getattr(torch, dtype), **named)
