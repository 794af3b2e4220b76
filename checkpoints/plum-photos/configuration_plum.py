"""Configuration of PLUM (Partonomy, arXiv 2505.20759): a vision-language model, a SAM, and modules between them."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

# Types of segmenters, and of video models with the segmenter that is part of them.
SEGMENTER_TYPES = ("sam", "sam_hq", "sam2", "sam3_tracker")
SEGMENTER_IN_VIDEO_MODEL = {"sam2_video": "sam2", "sam3_tracker_video": "sam3_tracker", "sam3_video": "sam3_tracker"}


def as_segmenter_config(config: PreTrainedConfig, *, where: str = "sam_config") -> PreTrainedConfig:
    """
    Return the config of a segmenter: `config` itself, or that of the segmenter in a video model, as which SAM 2.1 and
    SAM 3 are released.

    Raises:
        ValueError: The model is no segmenter.
    """
    segmenter_type = SEGMENTER_IN_VIDEO_MODEL.get(config.model_type, config.model_type)
    if segmenter_type not in SEGMENTER_TYPES:
        hint = (
            "SAM 3's detector takes words, not prompts; pass its tracker" if "sam3" in segmenter_type else "pass one"
        )
        raise ValueError(
            f"{where} is a {config.model_type!r} model, expected a segmenter ({', '.join(SEGMENTER_TYPES)}); {hint}."
        )
    if segmenter_type == config.model_type:
        return config
    config = getattr(config, "tracker_config", config)
    parts = {name: getattr(config, name).to_dict() for name in ("prompt_encoder_config", "mask_decoder_config")}
    for part in parts.values():
        del part["model_type"]
    return CONFIG_MAPPING[segmenter_type](vision_config=config.vision_config.to_dict(), **parts)


@strict
class PlumConfig(PreTrainedConfig):
    r"""
    Configuration of [`PlumForConditionalGeneration`]. The defaults are those of the published model (LLaVA + SAM).

    Args:
        vlm_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `LlavaConfig()`):
            The image-text-to-text model that generates the answers.
        sam_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `SamConfig()`):
            The segmenter that decodes spans of the answer to masks: SAM, SAM-HQ, SAM 2.1 or the tracker of SAM 3.
        vlm_image_input (`str`, *optional*, defaults to `"pixel_values"`):
            Input of the vision tower of the vision-language model: `"pixel_values"`, the image from its own image
            processor, or `"sam_image_embeddings"`, the output of SAM's encoder (then both sides share one vision
            encoder, and the tower is a small network over SAM's grid: `num_channels` is SAM's embedding width and
            `image_size` its grid).
        span_source (`str`, *optional*, defaults to `"tagger"`):
            Source of spans: `"tagger"`, the span tagger's O/B/I classes of a plain-text answer, or `"seg_token"`, a
            special token that the model writes after each grounded phrase, as in LISA (arXiv 2308.00692); then a span
            is this one token, and there is no span tagger and no span loss.
        seg_token_id (`int`, *optional*): Id of the special token for `span_source="seg_token"`.
        span_tagger_num_layers (`int`, *optional*, defaults to 1):
            Bidirectional encoder layers of the span tagger; 0 tags from the causal hidden states directly.
        span_tagger_num_heads (`int`, *optional*, defaults to 8):
            Attention heads of each tagger layer.
        span_tagger_intermediate_size (`int`, *optional*, defaults to 2048):
            Width of the feed-forward part of each tagger layer.
        mask_feedback (`bool`, *optional*, defaults to `True`):
            Whether the masks of earlier spans condition the mask of the next.
        mask_feedback_num_heads (`int`, *optional*, defaults to 8):
            Attention heads over the earlier masks.
        correction_window (`float`, *optional*):
            A mask that is corrected with clicks or a box is decoded in a square window of the image, this many times
            as large as mask and prompts, which SAM encodes at its full input size (zoom-in, arXiv 2001.10331). From 1
            to 100. Default: such masks are decoded in the whole image, as SAM does.
        language_modeling_loss_weight (`float`, *optional*, defaults to 1.0): Weight of next-token cross-entropy.
        span_loss_weight (`float`, *optional*, defaults to 8.0): Weight of the O/B/I cross-entropy.
        span_class_weights (`list[float]`, *optional*, defaults to `(0.1, 1.0, 1.0)`): Class weights of O, B and I.
        span_loss_scope (`str`, *optional*, defaults to `"answer"`):
            `"answer"`: answer tokens of every row with span supervision. `"sequence"`: every position of the rows that
            have a span, with prompt, image and padding as O (as in the training of the published model).
        mask_overlap_loss (`str`, *optional*, defaults to `"focal_tversky"`): `"focal_tversky"` or `"dice"`.
        mask_overlap_loss_weight (`float`, *optional*, defaults to 8.0): Weight of the overlap loss.
        tversky_false_negative_weight (`float`, *optional*, defaults to 0.7): Alpha of the Tversky index.
        tversky_false_positive_weight (`float`, *optional*, defaults to 0.3): Beta of the Tversky index.
        tversky_focal_exponent (`float`, *optional*, defaults to 0.75): Gamma of the focal Tversky loss.
        mask_bce_loss_weight (`float`, *optional*, defaults to 2.0): Weight of the per-pixel binary cross-entropy.
        mask_iou_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the squared error of SAM's predicted IoU (Segment Anything, section 3). 0 as in the published
            model, which starts from a trained SAM; a SAM from scratch needs it for meaningful mask scores.
        teacher_kl_loss_weight (`float`, *optional*, defaults to 0.1):
            Weight of the divergence from the frozen language model on span tokens, if a teacher is passed.
        teacher_kl_sigma (`float`, *optional*, defaults to 1.0): Standard deviation of the two Gaussians compared.
        image_statistics (`dict`, *optional*): Statistics of SAM's embeddings of the kinds of training images, written
            by `scripts/calibrate_confidence.py`: for each kind, `mean` and `std` of each channel of the mean
            embeddings of its images; `intercept` and `slope` of the confidence, and the `threshold` below which an
            image counts as unlike them.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new PLUM weights.
    """

    model_type = "plum"
    sub_configs = {"vlm_config": AutoConfig, "sam_config": AutoConfig}
    keys_to_ignore_at_inference = ["last_hidden_state", "losses"]  # a Trainer would collect them for metrics

    # The two backbones
    vlm_config: dict | PreTrainedConfig | None = None
    sam_config: dict | PreTrainedConfig | None = None
    vlm_image_input: Literal["pixel_values", "sam_image_embeddings"] = "pixel_values"

    # Spans
    span_source: Literal["tagger", "seg_token"] = "tagger"
    seg_token_id: int | None = None
    span_tagger_num_layers: int = 1
    span_tagger_num_heads: int = 8
    span_tagger_intermediate_size: int = 2048

    # Mask feedback
    mask_feedback: bool = True
    mask_feedback_num_heads: int = 8

    # Corrections with prompts
    correction_window: float | None = None

    # Losses
    language_modeling_loss_weight: float = 1.0
    span_loss_weight: float = 8.0
    span_class_weights: list[float] | tuple[float, ...] = (0.1, 1.0, 1.0)
    span_loss_scope: Literal["answer", "sequence"] = "answer"
    mask_overlap_loss: Literal["focal_tversky", "dice"] = "focal_tversky"
    mask_overlap_loss_weight: float = 8.0
    tversky_false_negative_weight: float = 0.7
    tversky_false_positive_weight: float = 0.3
    tversky_focal_exponent: float = 0.75
    mask_bce_loss_weight: float = 2.0
    mask_iou_loss_weight: float = 0.0
    teacher_kl_loss_weight: float = 0.1
    teacher_kl_sigma: float = 1.0

    # Confidence
    image_statistics: dict | None = None

    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not isinstance(self.vlm_config, PreTrainedConfig):
            self.vlm_config = AutoConfig.for_model(**{"model_type": "llava", **(self.vlm_config or {})})
        if not isinstance(self.sam_config, PreTrainedConfig):
            self.sam_config = AutoConfig.for_model(**{"model_type": "sam", **(self.sam_config or {})})
        self.sam_config = as_segmenter_config(self.sam_config)
        # In evaluation, SAM 2 replaces an unstable mask by one of three others, which PLUM does not train.
        if hasattr(self.sam_config.mask_decoder_config, "dynamic_multimask_via_stability"):
            self.sam_config.mask_decoder_config.dynamic_multimask_via_stability = False
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """Return the language model's configuration."""
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def sam_image_size(self) -> int:
        """Side, in pixels, of SAM's square input."""
        return self.sam_config.prompt_encoder_config.image_size

    @property
    def sam_grid_size(self) -> int:
        """Side, in cells, of SAM's square image embedding."""
        return self.sam_image_size // self.sam_config.prompt_encoder_config.patch_size

    @property
    def sam_width(self) -> int:
        """Channels of SAM's image embedding, prompts and mask decoder."""
        return self.sam_config.prompt_encoder_config.hidden_size

    @property
    def low_res_mask_size(self) -> int:
        """Side, in pixels, of the square masks of SAM's decoder."""
        return 4 * self.sam_grid_size

    def validate_architecture(self):
        """Check fields against each other; raises `ValueError` that names both values."""
        self._check_vlm_family()
        self._check_segmenter()
        embedding_width = self.sam_width
        text_width = self.vlm_config.get_text_config().hidden_size
        self._check_span_source()
        self._check_image_statistics(embedding_width)
        if self.correction_window is not None and not 1 <= self.correction_window <= 100:
            raise ValueError(f"correction_window must be a number from 1 to 100, found {self.correction_window}.")
        if self.span_tagger_num_layers and text_width % self.span_tagger_num_heads:
            raise ValueError(
                f"span_tagger_num_heads is {self.span_tagger_num_heads}, which does not divide the language model's "
                f"hidden size {text_width}."
            )
        if self.mask_feedback and embedding_width % self.mask_feedback_num_heads:
            raise ValueError(
                f"mask_feedback_num_heads is {self.mask_feedback_num_heads}, which does not divide SAM's embedding "
                f"width {embedding_width}."
            )
        if len(self.span_class_weights) != 3:
            raise ValueError(
                f"span_class_weights needs three weights, for O, B and I, found {self.span_class_weights}."
            )
        if self.vlm_image_input == "sam_image_embeddings":
            tower = self.vlm_config.vision_config
            channels, side = (getattr(tower, name, None) for name in ("num_channels", "image_size"))
            side = max(side) if isinstance(side, (list, tuple)) else side
            found, expected = (channels, side), (embedding_width, self.sam_grid_size)
            if found != expected:
                raise ValueError(
                    "vlm_image_input is 'sam_image_embeddings', so vlm_config.vision_config must have (num_channels, "
                    f"image_size) = SAM's (embedding width, grid size) = {expected}, found {found}; "
                    "build a vision tower of these sizes, of a family that has a fixed image size (CLIP, InternVL)."
                )

    def _check_segmenter(self):
        sam = self.sam_config
        vision, width, grid = sam.vision_config, self.sam_width, self.sam_grid_size
        widths = [("sam_config.mask_decoder_config.hidden_size", sam.mask_decoder_config.hidden_size)]
        sides = []
        if hasattr(vision, "backbone_feature_sizes"):
            widths.append(("sam_config.vision_config.fpn_hidden_size", vision.fpn_hidden_size))
            found, expected = (
                [list(size) for size in vision.backbone_feature_sizes],
                [[side, side] for side in (4 * grid, 2 * grid, grid)],
            )
            if found != expected:
                patch = sam.prompt_encoder_config.patch_size
                raise ValueError(
                    f"sam_config.vision_config.backbone_feature_sizes is {found}, but images of {self.sam_image_size} "
                    f"pixels and patches of {patch} in sam_config.prompt_encoder_config give {expected}."
                )
        else:
            widths.append(("sam_config.vision_config.output_channels", vision.output_channels))
            widths.append(("2 * sam_config.vision_config.num_pos_feats", 2 * vision.num_pos_feats))
            sides = ["image_size", "patch_size"]
        for name, value in widths:
            if value != width:
                raise ValueError(
                    f"{name} is {value} but sam_config.prompt_encoder_config.hidden_size is {width}; SAM's encoder, "
                    "prompts and mask decoder share one width."
                )
        for side in sides:
            found, prompt = getattr(vision, side), getattr(sam.prompt_encoder_config, side)
            if found != prompt:
                raise ValueError(
                    f"sam_config.vision_config.{side} is {found} but sam_config.prompt_encoder_config.{side} is "
                    f"{prompt}; set both to the same value."
                )

    def _check_image_statistics(self, embedding_width: int):
        if self.image_statistics is None:
            return
        missing = {"mean", "std", "intercept", "slope", "threshold"} - set(self.image_statistics)
        if missing:
            raise ValueError(f"image_statistics lacks {sorted(missing)}; run scripts/calibrate_confidence.py again.")
        for name in ("intercept", "slope", "threshold"):
            value = self.image_statistics[name]
            if not isinstance(value, (int, float)):
                raise ValueError(f"image_statistics has {name} = {value!r}, expected a number.")
        mean, std = (self.image_statistics[name] for name in ("mean", "std"))
        rows = [*mean, *std]
        lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
        if len(mean) != len(std) or lengths != {embedding_width}:
            raise ValueError(
                f"image_statistics must hold a mean and a deviation of {embedding_width} channels, SAM's, for each "
                f"kind of images, found {len(mean)} and {len(std)} of {sorted(lengths)} channels; run "
                "scripts/calibrate_confidence.py again."
            )

    def _check_span_source(self):
        if (self.span_source == "seg_token") != (self.seg_token_id is not None):
            raise ValueError(
                f"span_source is {self.span_source!r} but seg_token_id is {self.seg_token_id}; give the id of the "
                "tokenizer's special token with 'seg_token', and none with 'tagger'."
            )
        vocab_size = self.vlm_config.get_text_config().vocab_size
        if self.seg_token_id is not None and not 0 <= self.seg_token_id < vocab_size:
            raise ValueError(
                f"seg_token_id is {self.seg_token_id} but the language model has {vocab_size} tokens; add the token "
                "to the tokenizer and resize the model's embeddings."
            )

    def _check_vlm_family(self):
        """Raise `ValueError` for families whose hidden states are not aligned with `input_ids`."""
        vlm = self.vlm_config
        if vlm.is_encoder_decoder or vlm.get_text_config().is_encoder_decoder:
            raise ValueError(
                f"vlm_config is a {vlm.model_type!r} model, an encoder-decoder: its decoder sees the answer only, so "
                "hidden states are not aligned with input_ids; choose a decoder-only vision-language model."
            )
        if getattr(vlm, "image_token_id", None) is None:
            raise ValueError(
                f"vlm_config is a {vlm.model_type!r} model without image_token_id: images are not placeholder tokens "
                "in input_ids, so hidden states are not aligned with them; choose a family where they are."
            )


PlumConfig.register_for_auto_class()

__all__ = ["PlumConfig"]
