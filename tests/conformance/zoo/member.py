"""A member of the zoo: how to build a tiny model of a family and prompts for it."""

import copy
from typing import Any, ClassVar

import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

MEMBERS: dict[str, type["Member"]] = {}


class Member:
    """Base of all members; a subclass gives at least `name` and `config`.

    Prompts carry image features that were made by hand (`mm_encoder_outputs`), which tests the
    language side without pixels; `pixels` gives the same prompt with what the encoder eats.
    """

    name: ClassVar[str]
    visual: ClassVar[int] = 16  # tokens of an image
    stacked: ClassVar[bool] = False  # features in one tensor instead of a list
    vocabulary: ClassVar[int] = 96
    image_id: ClassVar[int] = 90
    modality: ClassVar[str] = "image"  # what `image_id` stands for
    what: ClassVar[str] = ""  # the same in words, where images differ
    others: tuple[int, ...] = ()  # placeholders of other modalities in a prompt
    kind: ClassVar[Any] = AutoModelForImageTextToText
    closed: ClassVar[bool] = False  # whether methods cannot act inside the tower
    mixes: ClassVar[bool] = False  # nor is a token made of patches of its own; such are closed too
    some_logits: ClassVar[bool] = True  # whether it says that it makes logits of some tokens alone
    placed: ClassVar[bool] = True  # whether visual tokens have a place in the image
    beams_of_many: ClassVar[bool] = True  # whether beam search may have several images in a row

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            MEMBERS[cls.name] = cls

    def config(self) -> Any:
        """A tiny config of the family."""
        raise NotImplementedError

    def build(self, attention: str = "sdpa") -> Any:
        """The model, always with the same weights, with attention that is peaked."""
        torch.manual_seed(0)
        model = self.kind.from_config(self.config(), attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if of_language(name):
                    if parameter.dim() > 1:
                        parameter.copy_(torch.randn_like(parameter) * 0.15)
                    elif parameter.dim() == 1 and "norm" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        # No special token is generated: the oracle would take it for an image.
        model.generation_config.suppress_tokens = list(range(80, self.vocabulary))
        return model

    @property
    def cuts_logits(self) -> bool:
        """Whether it makes those of the tokens alone that it is told."""
        return self.some_logits

    # -- prompts

    def inputs(self, rows: list[list[int]], seed: int = 0) -> dict[str, Any]:
        """A left-padded batch: for each row lengths of text pieces, with an image between two."""
        generator = torch.Generator().manual_seed(seed)
        sequences, images = [], 0
        for pieces in rows:
            ids: list[int] = []
            for number, length in enumerate(pieces):
                if number:
                    ids += self.image_ids()
                    images += 1
                ids += torch.randint(3, 80, (length,), generator=generator).tolist()
            sequences.append(ids)
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
        inputs = {"input_ids": ids, "attention_mask": mask, **self.extras(ids, images)}
        return inputs | (self.given(images, generator) if images else {})

    def given(self, images: int, generator: torch.Generator) -> dict[str, Any]:
        """What a prompt brings for its images: features, or pixels where it cannot bring these."""
        width = self.config().get_text_config().hidden_size
        features = torch.randn(images, self.visual, width, generator=generator)
        return {"mm_encoder_outputs": {self.modality: self.output(features)}}

    def given_of(self, inputs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        """The same for some images of a batch."""
        features = self.stack(inputs)[start:stop]
        return {"mm_encoder_outputs": {self.modality: self.output(features)}}

    def encode_again(self, model: Any, inputs: dict[str, Any]) -> None:
        """Encode the images of a prompt alone, where it brings pixels."""

    def image_ids(self) -> list[int]:
        """Token ids of one image in a prompt."""
        return [self.image_id] * self.visual

    def extras(self, ids: torch.Tensor, images: int) -> dict[str, Any]:
        """Other arguments that a forward needs, such as grids."""
        return {}

    def output(self, features: torch.Tensor) -> Any:
        """(images, V, D) features in the container that the family's encoder returns."""
        pooled = features if self.stacked else list(features)
        return BaseModelOutputWithPooling(pooler_output=pooled)

    def pooled(self, output: Any) -> Any:
        """The features in such a container, as methods see them."""
        return output.pooler_output

    def cached(self, model: Any) -> dict[str, Any]:
        """Arguments with which a forward over a prompt fills a cache."""
        return {"use_cache": True}

    def row(self, inputs: dict[str, Any], row: int) -> dict[str, Any]:
        """One row of a batch, alone and without padding."""
        keep = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][keep][None]
        counts = (inputs["input_ids"] == self.image_id).sum(1) // self.visual
        images = int(counts[row])
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        alone |= self.extras(ids, images)
        if images:
            first = int(counts[:row].sum())
            alone |= self.given_of(inputs, first, first + images)
        return alone

    def continued(self, inputs: dict[str, Any], more: torch.Tensor) -> dict[str, Any]:
        """The inputs of a forward over a prompt and (B, N) tokens after it."""
        ids = torch.cat((inputs["input_ids"], more), 1)
        images = int((ids == self.image_id).sum()) // self.visual
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole |= self.extras(ids, images)
        if images:
            whole |= self.given_of(inputs, 0, images)
        return whole

    def stack(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(images, V, D) features of a batch."""
        pooled = self.pooled(inputs["mm_encoder_outputs"][self.modality])
        return pooled if isinstance(pooled, torch.Tensor) else torch.stack(list(pooled))

    def pixels(self, images: int, seed: int = 0) -> dict[str, Any] | None:
        """What the encoder eats for some images, or `None` where pixels are tested elsewhere."""
        return None

    def take(self, pixels: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        """The pixels of some of the images."""
        return {name: value[start:stop] for name, value in pixels.items()}

    def batch(self, pixels: dict[str, Any], images: list[int]) -> dict[str, Any]:
        """Pixels of a batch whose rows have so many images, from those of all images."""
        return pixels

    def counts(self, model: Any, pixels: dict[str, Any]) -> list[int]:
        """Visual tokens of each image that `pixels` makes, as an unpatched model encodes them."""
        with torch.no_grad():
            pooled = self.encode(model, pixels)
        return [feature.shape[:-1].numel() for feature in pooled]

    class_attention: ClassVar[str | None] = None  # attention whose row 0 is the class token's
    class_layer: ClassVar[int] = 1  # the layer of it that the language model sees

    def class_scores(
        self, model: Any, pixels: dict[str, Any], rows: torch.Tensor
    ) -> list[torch.Tensor]:
        """(V) class-token attention of each image's tokens, from (N, P) rows of what was encoded.

        Families in which tokens are not patches say which patches make which token, without the
        code that is tested.
        """
        return list(rows)

    # -- the parts of a model

    def base(self, model: Any) -> Any:
        """The model that makes features and puts them in the prompt."""
        return model.model

    def head(self, model: Any) -> Any:
        """The language-model head."""
        return model.lm_head

    def run(self, model: Any, **inputs: Any) -> Any:
        """The base model's output, with `last_hidden_state`."""
        return self.base(model)(**inputs)

    def below_head(self, model: Any) -> Any:
        """The model whose last hidden states the head reads."""
        return self.base(model)

    def encode(self, model: Any, pixels: dict[str, Any], modality: str | None = None) -> Any:
        """Features of some images as they are put in the prompt, as an unpatched model makes them:
        a list of (V, D), or (images, V, D).
        """
        encode = getattr(self.base(model), f"get_{modality or self.modality}_features")
        return self.pooled(encode(**fresh(pixels), return_dict=True))

    # -- what the oracle asks

    def text(self, model: Any) -> Any:
        """The text model."""
        return model.model.language_model

    def attention(self, layer: Any) -> Any:
        """The attention of a decoder layer; `None` of one in which no token attends to another."""
        return getattr(layer, "self_attn", None)

    def norm(self, text: Any) -> Any:
        """The norm after the text model's last layer."""
        return text.norm

    def rotary(self, text: Any, hidden: torch.Tensor, positions: torch.Tensor, layer: int) -> Any:
        """(cos, sin) of a layer for (1, T) positions."""
        return text.rotary_emb(hidden, position_ids=positions)


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """A copy of inputs; encoder outputs are copied too, since models may change them."""
    return copy.deepcopy(inputs)


def of_language(path: str) -> bool:
    """Whether a parameter is the language model's."""
    parts = ("language_model", "text_model", "lm_head")
    within = ("model.layers.", "model.embed_tokens.")  # of models that are text models themselves
    return path.startswith(within) or any(part in path for part in parts)


@torch.no_grad()
def loud(model: Any) -> Any:
    """A model with a tower and a projector that matter: random ones of small models hardly do."""
    generator = torch.Generator().manual_seed(1)
    for path, weight in model.named_parameters():
        if not of_language(path) and weight.dim() > 1:
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 1.5 / weight[0].numel() ** 0.5)
    return model
