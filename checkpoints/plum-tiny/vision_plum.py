"""
What a vision-language model inside PLUM sees of images: through SAM's encoder, or by its own tower.

Shapes. B rows, L tokens, N images, D language width, C SAM width, G grid side.
"""

import inspect

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


class PlumVision:
    """The part of [`PlumForConditionalGeneration`] that turns images into inputs of its language model."""

    def get_image_embeddings(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """SAM's encoder: `(N, 3, image_size, image_size)` pixels to `(N, C, G, G)` embeddings."""
        return self.sam.vision_encoder(sam_pixel_values.to(self.sam.vision_encoder.dtype)).last_hidden_state

    def get_vlm_image_features(self, image_token_counts: list[int], **image_inputs) -> list[torch.Tensor] | None:
        """
        What the vision-language model sees of images, to be kept and given as `vlm_image_features` wherever they are
        asked about.

        Args:
            image_token_counts: Placeholder tokens of each image.
            image_inputs: `sam_image_embeddings` where the model looks through SAM, else the inputs that the
                vision-language model takes for these images.

        Returns:
            `(image tokens, D)` features of each image; `None` for a family that takes more from an image than these.
        """
        if self.config.vlm_image_input == "sam_image_embeddings":
            embeddings = image_inputs["sam_image_embeddings"].to(self.vlm.dtype)
            outputs = self.vlm.model.get_image_features(embeddings, return_dict=True)
        else:
            if "mm_encoder_outputs" not in inspect.signature(self.vlm.model.forward).parameters:
                return None
            taken = inspect.signature(self.vlm.model.get_image_features).parameters
            inputs = {name: value for name, value in image_inputs.items() if name in taken}
            inputs["pixel_values"] = inputs["pixel_values"].to(self.vlm.dtype)
            outputs = self.vlm.model.get_image_features(**inputs, return_dict=True)
            if set(outputs) - {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}:
                return None
        features = torch.cat([feature.flatten(0, -2) for feature in outputs.pooler_output])
        if len(features) != sum(image_token_counts):
            raise ValueError(
                f"Image features and image tokens do not match: {len(image_token_counts)} images have {len(features)} "
                f"features and {sum(image_token_counts)} image tokens; set the processor's num_image_tokens right."
            )
        return list(features.split(image_token_counts))

    def rate_images(self, sam_image_embeddings: torch.Tensor) -> torch.Tensor | None:
        """
        Probability `(N,)` that an image is of a kind that the model has learnt, from `(N, C, G, G)` embeddings; None
        for a model without `config.image_statistics`.

        The distance of an image is the mean over channels of its squared deviation from the mean embedding of known
        images, in standard deviations; its probability is a logistic function of the distance's logarithm.
        """
        known = self.config.image_statistics
        if known is None:
            return None
        pooled = sam_image_embeddings.float().mean(dim=(2, 3))  # (N, C)
        mean, std = (torch.tensor(known[name], device=pooled.device) for name in ("mean", "std"))
        distance = ((pooled - mean) / std).square().mean(dim=1)
        return torch.sigmoid(known["intercept"] - known["slope"] * distance.log())

    def _resolve_images(
        self,
        input_ids,
        pixel_values,
        sam_pixel_values,
        sam_image_embeddings,
        sam_image_index,
        vlm_image_features=None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
        """The vision-language model's image inputs, SAM's embeddings and the image of each row."""
        if sam_image_embeddings is None and sam_pixel_values is not None and len(sam_pixel_values):
            sam_image_embeddings = self.get_image_embeddings(sam_pixel_values)
        if sam_image_index is None:
            count = 0 if sam_image_embeddings is None else len(sam_image_embeddings)
            if count not in (0, len(input_ids)):
                raise ValueError(
                    f"Found {count} images for {len(input_ids)} rows; pass sam_image_index (B,) with the image of "
                    "each row, -1 for none."
                )
            rows = torch.arange(len(input_ids), device=input_ids.device)
            sam_image_index = rows if count else torch.full_like(rows, -1)
        vlm_inputs = {}
        if self.config.vlm_image_input == "sam_image_embeddings":
            if sam_image_embeddings is not None:
                vlm_inputs["inputs_embeds"] = self._embed_with_images(
                    input_ids, sam_image_embeddings, sam_image_index, vlm_image_features
                )
        elif vlm_image_features is not None:
            vlm_inputs["mm_encoder_outputs"] = {"image": self._repeat_for_rows(vlm_image_features, sam_image_index)}
        elif pixel_values is not None and len(pixel_values):
            vlm_inputs["pixel_values"] = pixel_values.to(self.vlm.dtype)
        return vlm_inputs, sam_image_embeddings, sam_image_index

    def _check_image_tokens(self, input_ids, vlm_inputs: dict):
        """`ValueError` where the vision-language model would take image tokens for words."""
        given = vlm_inputs.keys() & {"inputs_embeds", "pixel_values", "mm_encoder_outputs"}
        if not given and (input_ids == self.config.vlm_config.image_token_id).any():
            raise ValueError(
                "input_ids hold image tokens, but no image comes with them; pass pixel_values, or what "
                "get_vlm_image_features returned as vlm_image_features."
            )

    @staticmethod
    def _repeat_for_rows(vlm_image_features, sam_image_index) -> BaseModelOutputWithPooling:
        """Features of each row's image, in the form in which the vision-language model takes them ready-made."""
        of_rows = [vlm_image_features[image] for image in sam_image_index.tolist() if image >= 0]
        return BaseModelOutputWithPooling(pooler_output=of_rows)

    def _embed_with_images(self, input_ids, sam_image_embeddings, sam_image_index, features=None) -> torch.Tensor:
        """
        Input embeddings `(B, L, D)` with the features of each row's image in its placeholders. The vision tower sees
        an image once, however many rows ask about it.
        """
        placeholders = input_ids == self.config.vlm_config.image_token_id
        if features is None:
            outputs = self.vlm.model.get_image_features(sam_image_embeddings.to(self.vlm.dtype), return_dict=True)
            features = list(outputs.pooler_output)
        features = torch.stack(features)[sam_image_index[sam_image_index >= 0]]
        if placeholders.sum() != features.shape[:2].numel():
            raise ValueError(
                f"Image features and image tokens do not match: {len(features)} rows with an image have "
                f"{features.shape[1]} features each, found {int(placeholders.sum())} image tokens; set the "
                f"processor's num_image_tokens to {features.shape[1]}."
            )
        embeddings = self.get_input_embeddings()(input_ids)
        return embeddings.masked_scatter(placeholders[..., None], features.to(embeddings))
