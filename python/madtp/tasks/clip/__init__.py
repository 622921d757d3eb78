"""CLIP: how well do images and texts go together?"""

from __future__ import annotations

from ... import flops
from ...config import CLIPConfig
from ...processing import CLIPProcessor, clean_sentence
from ..base import Recipe
from ..losses import contrastive_loss
from ..pairs import PairsTask, single_tokens
from .model import CLIP


class CLIPTask(PairsTask):
    """Trained on the contrast of images and texts; simpler than the official recipe: no momentum towers, no queue."""

    name = "clip"
    Config, Processor, Model = CLIPConfig, CLIPProcessor, CLIP
    recipe = Recipe(5, 16, 1e-5, 0.2)

    def text(self, caption):
        return self.processor.text(clean_sentence(caption, 30))

    def cost(self, image=None, text=None, pruning=True, pooled=False):
        return flops.clip(self.config, image=image, text=text, pruning=pruning, pooled=pooled)

    def loss(self, model, batch, output, pruning, seed):
        scale = model.logit_scale.clamp(0, 4.6052).exp()
        identities = batch["identities"].to(model.device)
        return {"contrast": contrastive_loss(output.image_embeds, output.text_embeds, scale, identities)}

    def states(self, output):
        return [single_tokens(output.image_embeds), single_tokens(output.text_embeds)]
