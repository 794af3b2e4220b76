"""PLUM: a vision-language model that tags spans of its plain-text answer and segments each of them.

From "Partonomy: Large Multimodal Models with Part-Level Visual Understanding" (arXiv 2505.20759).

    input_ids, image ──> vlm ──> hidden states H ──> lm_head ──> next token
                                      │
                                      ├──> span tagger (bidirectional) ──> O/B/I per token ──> spans
                                      └──> span projector ──> mean over the span's tokens ──> query z
                                                                                               │
    image ──> SAM encoder ──> image embedding ──────────────────> SAM mask decoder <───────────┤
                                                                    ▲       │                  │
                                            dense prompt ───────────┘       └──> low-res mask ──> (next span)
                                    (first span: "no mask"; later: mask feedback over the earlier masks)

With `span_source="seg_token"` the model is the LISA-like baseline (arXiv 2308.00692): instead of the tagger, a special
token `[SEG]` follows each grounded phrase, and its hidden state represents the span. Everything else is the same.

Terms. A *tag* is the class O, B or I of one token. A *span* is a B token and the I tokens directly
after it, written `[row, start, end)` in token positions. A *row* is one conversation of the batch. *Grid* is SAM's
image embedding (G x G cells), a *low-res mask* has 4G x 4G logits in the frame of SAM's padded square input.

Shapes. B rows, L tokens, S spans of the whole batch, N images, D language width, C SAM width, E channels of an image
embedding (C for SAM itself), G grid side, H/W pixels.

Deliberate differences from the authors' research code: conversations of one batch are decoded in lock-step; rows may
share an image or have none; FiLM's unused third projection is removed; the focal Tversky loss has finite gradients on
perfect predictions; each loss can be normalised by counts of the global batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

# transformers copies the files that are named in `from .file import name`, not those in `from . import file`.
try:
    from . import backbones_plum as backbones
    from . import generation_plum as generation
    from . import modules_plum as modules
    from . import segmentation_plum as segmentation
    from .configuration_plum import PlumConfig, as_segmenter_config
    from .generation_plum import DEFAULT_MAX_NEW_TOKENS
    from .modules_plum import IGNORE_INDEX
    from .processing_plum import CUSTOM_PIPELINES
    from .segmenters_plum import SEGMENTERS
    from .supervision_plum import supervise_masks
except ImportError:
    if __package__:
        raise
    import backbones_plum as backbones
    import generation_plum as generation
    import modules_plum as modules
    import segmentation_plum as segmentation
    from configuration_plum import PlumConfig, as_segmenter_config
    from generation_plum import DEFAULT_MAX_NEW_TOKENS
    from modules_plum import IGNORE_INDEX
    from processing_plum import CUSTOM_PIPELINES
    from segmenters_plum import SEGMENTERS
    from supervision_plum import supervise_masks

# Inputs from the processor for given answers.
GIVEN_ANSWERS = ("labels", "spans", "span_labels", "mask_labels", "hidden_states")
# Inputs of single spans.
GIVEN_SPANS = ("given_masks", *segmentation.PROMPTS)
# Number of positions whose vocabulary logits are in memory at once if only their loss is needed.
LOGIT_ROWS = 64


@dataclass
class PlumOutput(ModelOutput):
    """
    Output of [`PlumForConditionalGeneration.forward`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): Weighted sum of `losses`.
        logits (`torch.FloatTensor` of shape `(B, L, vocab_size)`): Next-token logits; None in training with labels.
        span_logits (`torch.FloatTensor` of shape `(B, L, 3)`): Logits of O, B and I (see `tag_tokens`).
        pred_masks (`torch.FloatTensor` of shape `(S, 4G, 4G)`): Low-res mask logits, one per span of `spans`.
        iou_scores (`torch.FloatTensor` of shape `(S,)`): SAM's predicted IoU of each mask.
        mask_targets (`torch.LongTensor` of shape `(S,)`): Index of each span's mask in `mask_labels`.
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, D)`): The language model's output after its final norm.
        hidden_states, attentions (`tuple[torch.FloatTensor]`): Those of the language model's layers, if
            `output_hidden_states` and `output_attentions` ask for them.
        losses (`dict[str, torch.FloatTensor]`): The unweighted losses by name, each a scalar.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    span_logits: torch.FloatTensor | None = None
    pred_masks: torch.FloatTensor | None = None
    iou_scores: torch.FloatTensor | None = None
    mask_targets: torch.LongTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    losses: dict[str, torch.FloatTensor] | None = None


@dataclass
class PlumSegmentationOutput(ModelOutput):
    """
    Output of [`PlumForConditionalGeneration.segment`]; `PlumProcessor.post_process_segmentation` reads it.

    Args:
        sequences (`torch.LongTensor` of shape `(B, L)`): Prompt and answer.
        answer_mask (`torch.BoolTensor` of shape `(B, L)`): Tokens of the answer without special tokens.
        is_truncated (`torch.BoolTensor` of shape `(B,)`): Whether a generated answer reached the token limit.
        span_logits (`torch.FloatTensor` of shape `(B, L, 3)`): Logits of O, B and I.
        spans (`torch.LongTensor` of shape `(S, 3)`): The spans `[row, start, end)`, rows ascending.
        tag_scores (`torch.FloatTensor` of shape `(S,)`):
            Mean probability of "not O" over the span's tokens; 1 for given spans.
        pred_masks (`torch.FloatTensor` of shape `(S, 4G, 4G)`): Low-res mask logits.
        mask_windows (`torch.FloatTensor` of shape `(S, 3)`):
            Window of each low-res mask, x0, y0, side in pixels of SAM's input; None if all show the whole input.
        iou_scores (`torch.FloatTensor` of shape `(S,)`): SAM's predicted IoU; 1 for given masks.
        sam_image_index (`torch.LongTensor` of shape `(B,)`): Image of each row, -1 for none.
        original_sizes, reshaped_input_sizes (`torch.LongTensor` of shape `(N, 2)`):
            (height, width) in pixels of the images as given and as resized for SAM before padding.
        image_confidences (`torch.FloatTensor` of shape `(N,)`):
            Probability that an image is of a kind in the training data; None for a model without calibration.
    """

    sequences: torch.LongTensor | None = None
    answer_mask: torch.BoolTensor | None = None
    is_truncated: torch.BoolTensor | None = None
    span_logits: torch.FloatTensor | None = None
    spans: torch.LongTensor | None = None
    tag_scores: torch.FloatTensor | None = None
    pred_masks: torch.FloatTensor | None = None
    mask_windows: torch.FloatTensor | None = None
    iou_scores: torch.FloatTensor | None = None
    sam_image_index: torch.LongTensor | None = None
    original_sizes: torch.LongTensor | None = None
    reshaped_input_sizes: torch.LongTensor | None = None
    image_confidences: torch.FloatTensor | None = None


def sincos_position_embedding(grid_size: int, width: int) -> torch.Tensor:
    """Return the fixed 2D sine-cosine embedding `(1, G, G, width)` (ViT-MAE, arXiv 2111.06377), amplitude 0.5."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid_size)[:, None] * frequencies  # (G, width/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, width/2)
    rows = axis[:, None].expand(-1, grid_size, -1)
    columns = axis[None].expand(grid_size, -1, -1)
    return 0.5 * torch.cat([rows, columns], dim=-1)[None]


class PlumPreTrainedModel(PreTrainedModel):
    config: PlumConfig
    base_model_prefix = "plum"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, segmentation.PlumMaskFeedback):
            init.normal_(module.queries, std=self.config.initializer_range)


class PlumForConditionalGeneration(
    backbones.PlumVision, segmentation.PlumMaskDecoding, PlumPreTrainedModel, GenerationMixin
):
    """A vision-language model with a span tagger, a span projector, mask feedback and a SAM."""

    # Each loss is normalised by its own count, so the Trainer must not divide again.
    accepts_loss_kwargs = False
    # Modules to exclude from 4- and 8-bit weights: `BitsAndBytesConfig(llm_int8_skip_modules=...)`.
    full_precision_modules = ("sam", "span_tagger", "span_projector", "mask_feedback", "vlm.lm_head")

    def __init__(self, config: PlumConfig):
        super().__init__(config)
        config.validate_architecture()  # `from_pretrained` sets fields of a config that was checked before
        text_width = config.vlm_config.get_text_config().hidden_size
        sam_width = config.sam_width
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config, trust_remote_code=False)
        if not isinstance(getattr(self.vlm, "model", None), PreTrainedModel):
            raise ValueError(
                f"vlm_config is a {config.vlm_config.model_type!r} model, and {type(self.vlm).__name__} has no model "
                "without language-modeling head, whose hidden states PLUM tags; choose another family."
            )
        generation.let_observe(self.get_decoder())
        self.sam = AutoModel.from_config(config.sam_config)
        self.segmenter = SEGMENTERS[config.sam_config.model_type]
        self.span_tagger = modules.SPAN_TAGGERS[config.span_source](config)
        self.span_projector = nn.Sequential(
            nn.Linear(text_width, text_width), nn.ReLU(), nn.Linear(text_width, sam_width)
        )
        self.mask_feedback = segmentation.PlumMaskFeedback(config) if config.mask_feedback else None
        self.post_init()

    @classmethod
    def from_backbones(
        cls, vlm: str, sam: str, *, dtype: str | torch.dtype = "auto", **plum_options
    ) -> "PlumForConditionalGeneration":
        """
        Return a PLUM with a pretrained vision-language model and a pretrained SAM; only span tagger, span projector
        and mask feedback are freshly initialised. `PlumProcessor.from_backbones` returns the processor.

        Args:
            vlm: Folder or Hub name of an image-text-to-text model, such as `llava-hf/llava-1.5-7b-hf`.
            sam: Folder or Hub name of a SAM, such as `facebook/sam-vit-huge` or `facebook/sam2.1-hiera-large`.
            dtype: Precision of all weights; `"auto"` uses that of the vision-language model.
            plum_options: Further fields of [`PlumConfig`].

        Raises:
            ValueError: A backbone is of another kind or does not fit (before any weight is read), or lacks weights.
        """
        vlm_config, sam_config = (AutoConfig.from_pretrained(name, trust_remote_code=False) for name in (vlm, sam))
        sam_config = as_segmenter_config(sam_config, where=sam)
        with torch.device("meta"):
            model = cls(cls.config_class(vlm_config=vlm_config, sam_config=sam_config, **plum_options))
        config = model.config
        model.vlm = backbones.load_whole(AutoModelForImageTextToText, vlm, config.vlm_config, dtype)
        generation.let_observe(model.get_decoder())
        model.sam = backbones.load_whole(type(model.sam), sam, config.sam_config, model.vlm.dtype)
        model.generation_config = model.vlm.generation_config
        for module in (model.span_tagger, model.span_projector, model.mask_feedback):
            if module is not None:
                module.to_empty(device=model.vlm.device).to(model.vlm.dtype).apply(model._init_weights)
        config.dtype = model.vlm.dtype
        return model.eval()

    def initialize_weights(self):
        """Initialise as in transformers, with position embeddings that a SAM without weights can learn from."""
        super().initialize_weights()
        # transformers draws the Gaussian matrix with a standard deviation of hundreds, which makes neighbouring cells
        # orthogonal, and starts the encoder's absolute positions at zero. `init` does not change loaded tensors.
        with torch.no_grad():
            for embedding in (self.sam.shared_image_embedding, self.sam.prompt_encoder.shared_embedding):
                init.normal_(embedding.positional_embedding, std=1.0)
            positions = getattr(self.sam.vision_encoder, "pos_embed", None)
            if positions is not None:
                init.copy_(positions, sincos_position_embedding(*positions.shape[2:]))

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.vlm.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.vlm.get_decoder()

    @property
    def device(self) -> torch.device:
        """The device of inputs: that of the weights or, with offloaded weights, the one that computes."""
        device = super().device
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            computing = next((hook for hook in hooks if getattr(hook, "execution_device", None) is not None), None)
            device = device if computing is None else torch.device(computing.execution_device)
        return device

    def enable_input_require_grads(self):
        """Enable gradients of word embeddings only; frozen image encoders would store activations needlessly."""
        self.get_decoder().enable_input_require_grads()

    def disable_input_require_grads(self):
        self.get_decoder().disable_input_require_grads()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        Load as in transformers, except for the generation config: a damaged one raises an error, and a missing one is
        made from the language model's config, which has the stop tokens.
        """
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_options = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
        name = pretrained_model_name_or_path
        has_settings = name is not None and generation.check_generation_file(name, **hub_options)
        loaded = super().from_pretrained(name, *args, **kwargs)
        if not has_settings and kwargs.get("generation_config") is None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.generation_config = GenerationConfig.from_model_config(model.config)
        return loaded

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs):
        """
        Save as in transformers, but with unchanged parameter names, because a Trainer that resumes does not find names
        in the older format of the vision-language model. The maximum length of an answer is saved as well.
        """
        if self.generation_config.max_new_tokens is None:
            self.generation_config.max_length = None
            self.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
        # transformers records one auto class per model; this one has three.
        auto_map, own = getattr(self.config, "auto_map", None) or {}, f"modeling_plum.{type(self).__name__}"
        self.config.auto_map = {**auto_map, "AutoModelForImageTextToText": own, "AutoModelForMultimodalLM": own}
        self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    # ---------------------------------------------------------------- training

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        span_labels: torch.LongTensor | None = None,
        spans: torch.LongTensor | None = None,
        mask_labels: list[torch.Tensor] | None = None,
        span_groups: torch.LongTensor | None = None,
        mask_groups: torch.LongTensor | None = None,
        teacher_forced: torch.BoolTensor | None = None,
        prompt_rounds: torch.LongTensor | None = None,
        prompt_draws: torch.Tensor | None = None,
        teacher: Callable[..., ModelOutput] | None = None,
        loss_counts: dict[str, torch.Tensor] | None = None,
        **inputs,
    ) -> PlumOutput:
        r"""
        Run one pass over prompts and answers, and compute every loss whose labels are given.

        Args:
            input_ids, attention_mask (`(B, L)`): Tokens; image placeholders are already expanded by the processor.
            labels (`(B, L)`): Tokens of the answers, -100 elsewhere; not shifted.
            span_labels (`(B, L)`): 0 = O, 1 = B, 2 = I, -100 where unsupervised.
            spans (`(S, 3)`): Spans `[row, start, end)` to segment, rows ascending, in the order of the conversation.
            mask_labels (S tensors `(H, W)`, 0/1): The mask of each span, at the size of its image or of `label_frame`;
                one tensor `(S, H, W)` for masks of one size.
            span_groups, mask_groups (`(S,)`, `(M,)`): Group of each span and of each of the M `mask_labels`; spans of
                a group may take its masks in any order (see [`MaskTargets`]). Default: mask i belongs to span i.
            teacher_forced (`(S,)` bool): Spans whose true mask, not the predicted one, is fed back to later spans.
            prompt_rounds (`(S,)`), prompt_draws (`(S, PROMPT_DRAWS)`): Number of further decodes of each span with
                prompts by chance, and the random numbers for them (see [`SampledPrompts`]). Their losses are averaged
                with those of the spans' own masks.
            teacher: The frozen language model of the KL loss on span tokens. Called without gradients with the inputs
                of this model's language model, including input embeddings.
            loss_counts: Divisors of the losses (see [`count_loss_items`]) for batches that are part of a larger one
                (gradient accumulation, several processes). Default: the counts of this batch.
            inputs: The image inputs, and further inputs of the vision-language model:
                `pixel_values`, images for the vision-language model, in order of their placeholders;
                `sam_pixel_values (N, 3, image_size, image_size)`, images for SAM, or instead
                `sam_image_embeddings (N, E, G, G)`; `sam_image_index (B,)`, the image of each row, -1 for none
                (default: image i belongs to row i); `original_sizes` and `reshaped_input_sizes (N, 2)`, (height,
                width) in pixels, from the processor.
        """
        if spans is not None:
            modules.check_spans(spans, input_ids.shape)
        mask_labels = None if mask_labels is None else list(mask_labels)
        images, vlm_inputs = self._take_images(input_ids, inputs)
        with generation.RecordedInputs(self.get_decoder()) as recorded:
            outputs = self._run_language_model(input_ids, attention_mask, **images.vlm_inputs, **vlm_inputs)
        hidden_states = outputs.last_hidden_state
        logits_of = partial(backbones.next_token_logits, self.vlm)
        span_logits = self.tag_tokens(input_ids, hidden_states, attention_mask)
        pred_masks = iou_scores = targets = sampled = sizes = None
        if spans is not None and len(spans):
            sizes = images.sizes_of(spans)
            given = hidden_states, spans, images.sam_embeddings, images.index
            groups = {"span_groups": span_groups, "mask_groups": mask_groups}
            drawn = {"teacher_forced": teacher_forced, "prompt_rounds": prompt_rounds, "prompt_draws": prompt_draws}
            targets, sampled = supervise_masks(self.config, mask_labels, sizes, images.sam_pixels, **groups, **drawn)
            pred_masks, iou_scores = self.decode_masks(*given, targets=targets, sampled=sampled)

        if mask_labels and sizes is None:
            raise ValueError("mask_labels need spans, original_sizes and reshaped_input_sizes; pass them as well.")
        config, losses = self.config, {}
        counts = loss_counts or modules.count_loss_items(
            config, labels, span_labels, spans, mask_labels, prompt_rounds
        )
        if labels is not None:
            losses["language_modeling"] = modules.language_modeling_loss(
                logits_of, hidden_states, labels, counts["tokens"]
            )
        if span_labels is not None and self.span_tagger.has_loss:
            losses["span_tagging"] = modules.span_tagging_loss(config, span_logits, span_labels, counts["tag_weight"])
        if mask_labels:
            labelled = pred_masks, iou_scores, mask_labels, sizes
            if sampled is not None:
                _, *labelled = sampled.with_own(*labelled)
            elif targets is not None:
                labelled = pred_masks, iou_scores, [mask_labels[i] for i in targets.of_span.tolist()], sizes
            losses |= modules.mask_losses(config, *labelled, counts["masks"])
        elif mask_labels is not None:
            losses |= dict.fromkeys(modules.MASK_LOSSES, torch.zeros((), device=hidden_states.device))
        if teacher is not None:
            losses["teacher_kl"] = self._teacher_loss(hidden_states, teacher, recorded.inputs, spans, counts["spans"])
        return PlumOutput(
            loss=sum(self.loss_weights[name] * value for name, value in losses.items()) if losses else None,
            losses=losses or None,
            logits=None if self.training and labels is not None else logits_of(hidden_states),
            span_logits=span_logits,
            pred_masks=pred_masks,
            iou_scores=iou_scores,
            mask_targets=None if targets is None else targets.of_span,
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each named loss in the total."""
        return {
            "language_modeling": self.config.language_modeling_loss_weight,
            "span_tagging": self.config.span_loss_weight,
            "mask_overlap": self.config.mask_overlap_loss_weight,
            "mask_bce": self.config.mask_bce_loss_weight,
            "mask_iou": self.config.mask_iou_loss_weight,
            "teacher_kl": self.config.teacher_kl_loss_weight,
        }

    def _run_language_model(self, input_ids, attention_mask, **vlm_inputs) -> ModelOutput:
        """
        Return the output of the language model, whose `last_hidden_state` `(B, L, D)` after its final norm is aligned
        with `input_ids`.
        """
        self._check_image_tokens(input_ids, vlm_inputs)
        if "inputs_embeds" not in vlm_inputs:
            vlm_inputs["input_ids"] = input_ids
        vlm_inputs["use_cache"] = False
        outputs = self.vlm.model(attention_mask=attention_mask, **vlm_inputs)
        outputs.last_hidden_state = hidden_states = outputs.last_hidden_state.to(input_ids.device)
        if hidden_states.shape[:2] != input_ids.shape:
            raise ValueError(
                f"{type(self.vlm).__name__} returns {tuple(hidden_states.shape[:2])} hidden states for input_ids of "
                f"shape {tuple(input_ids.shape)}; PLUM needs a family with one for each token."
            )
        return outputs

    def tag_tokens(
        self, input_ids: torch.LongTensor, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the O/B/I logits `(B, L, 3)` of tokens from their hidden states `(B, L, D)`."""
        return self.span_tagger(hidden_states, attention_mask, input_ids).to(hidden_states.device)

    def _teacher_loss(self, hidden_states, teacher, language_inputs, spans, count) -> torch.Tensor:
        if spans is None or not len(spans):
            return hidden_states.new_zeros(())
        with torch.no_grad():
            expected = teacher(**language_inputs).last_hidden_state
        return modules.teacher_kl_loss(hidden_states, expected, spans, self.config.teacher_kl_sigma, count)

    # --------------------------------------------------------------- inference

    @torch.no_grad()
    def generate(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **inputs_and_options
    ) -> torch.LongTensor:
        """
        Generate answers with the vision-language model's `generate`; accepts all outputs of the processor. SAM runs
        only if the vision-language model looks through it (`vlm_image_input="sam_image_embeddings"`).

        Args:
            input_ids, attention_mask (`(B, L)`): Prompts, padded on the left.
            inputs_and_options: The image inputs of [`forward`], or `vlm_image_features` of [`get_vlm_image_features`]
                instead of `pixel_values`; further inputs of the vision-language model; and options of
                transformers' `generate`.
        """
        if self.config.vlm_image_input == "pixel_values":
            inputs_and_options.pop("sam_pixel_values", None)
        images, inputs = self._take_images(input_ids, inputs_and_options)
        return self._generate(input_ids, attention_mask, **images.vlm_inputs, **inputs)[0]

    def _generate(self, input_ids, attention_mask, **kwargs) -> tuple[torch.LongTensor, GenerationConfig, dict]:
        """Return the result of `generate`, the settings that it used, and the arguments that are not settings."""
        self._check_image_tokens(input_ids, kwargs)
        if attention_mask is not None and (attention_mask[:, -1] == 0).any():
            raise ValueError("Prompts must be padded on the left to be continued; pass padding_side='left'.")
        # The settings loaded with this model, or changed on it by the caller, apply to the whole model.
        self.vlm.generation_config = self.generation_config
        settings, kwargs = generation.settle_options(self.generation_config, kwargs, input_ids.shape[1])
        generated = self.vlm.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, **kwargs
        )
        return generated, settings, kwargs

    @torch.no_grad()
    def segment(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **inputs_and_options
    ) -> PlumSegmentationOutput:
        r"""
        Generate the answers of prompts, tag them and segment the tagged spans. Conversations encoded with their
        answers are passed to [`segment_answers`], or to [`segment_spans`] if they have spans.

        Args:
            input_ids, attention_mask (`(B, L)`): Prompts, padded on the left.
            inputs_and_options: The image inputs and options of [`generate`], such as `max_new_tokens`.

        Raises:
            ValueError: Spans, masks or hidden states of answers without `labels`, or several sequences per prompt.
        """
        given = [name for name in GIVEN_ANSWERS + GIVEN_SPANS if inputs_and_options.get(name) is not None]
        if "labels" in given:
            given_method = self.segment_spans if "spans" in given else self.segment_answers
            return given_method(input_ids, attention_mask=attention_mask, **inputs_and_options)
        if given:
            raise ValueError(f"{', '.join(given)} belong to answers that are given; pass their labels as well.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        images, inputs = self._take_images(input_ids, inputs_and_options)
        sequences, attention_mask, answer_mask, is_truncated, hidden_states = self._answer(
            input_ids, attention_mask, images.vlm_inputs, inputs
        )
        return self._segment_tagged(sequences, attention_mask, answer_mask, is_truncated, hidden_states, images)

    @torch.no_grad()
    def segment_answers(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        hidden_states: torch.FloatTensor | None = None,
        **inputs,
    ) -> PlumSegmentationOutput:
        r"""
        Tag the last given answer of each row as if the model had written it, and segment the tagged spans.

        Args:
            input_ids, attention_mask (`(B, L)`): Conversations with answers.
            labels (`(B, L)`): Tokens of the answers, -100 elsewhere.
            hidden_states (`(B, L, D)`): Result of [`encode_conversations`] for these rows, if available.
            inputs: The image inputs of [`generate`] and further inputs of the vision-language model. Other labels of
                a training batch are unused.

        Raises:
            ValueError: A row has no answer, or a mask or prompt is given, which belongs to a span.
        """
        for name in GIVEN_SPANS:
            if inputs.get(name) is not None:
                raise ValueError(f"{name} belong to spans; pass spans as well, which segment_spans segments.")
        images, hidden_states = self._read_given(input_ids, attention_mask, hidden_states, inputs)
        answer_mask = self._mask_given_answers(labels)
        is_truncated = torch.zeros_like(answer_mask[:, 0])
        return self._segment_tagged(input_ids, attention_mask, answer_mask, is_truncated, hidden_states, images)

    @torch.no_grad()
    def segment_spans(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        spans: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        given_masks: dict[int, torch.Tensor] | None = None,
        input_points: dict[int, torch.Tensor] | None = None,
        input_labels: dict[int, torch.Tensor] | None = None,
        input_boxes: dict[int, torch.Tensor] | None = None,
        input_masks: dict[int, torch.Tensor] | None = None,
        hidden_states: torch.FloatTensor | None = None,
        **inputs,
    ) -> PlumSegmentationOutput:
        r"""
        Segment the given spans of given answers. Masks of spans in earlier answers of a row guide those of its last
        answer.

        Args:
            input_ids, attention_mask, labels, hidden_states, inputs: As in [`segment_answers`].
            spans (`(S, 3)`): Spans of the answers, `[row, start, end)`, in order and not empty.
            given_masks: Binary masks (original height, original width), arrays or tensors, by index of the span in
                `spans`. A given mask replaces the predicted one and guides the later spans of its row.
            input_points, input_labels: Points `(K, 2)`, x and y in pixels of the image as given, and their labels
                `(K,)`, 1 inside the mask and 0 outside, by index of the span. Prompts follow the span's query.
            input_boxes: Box `(4,)` around a mask, x0, y0, x1, y1 in pixels of the image, by index of the span.
            input_masks: Present mask by index of the span: booleans or integers (original height, original width), or
                low-res logits in floats `(4G, 4G)`. As the dense prompt it replaces the earlier masks of the row. A
                model with `correction_window` decodes such a span in a window, from `sam_pixel_values`.

        Raises:
            ValueError: Spans are out of range, out of order, empty or without an image; a given mask or prompt
                matches no span or does not fit its image; a row has no answer; windows without pixels.
        """
        images, hidden_states = self._read_given(input_ids, attention_mask, hidden_states, inputs)
        answer_mask = self._mask_given_answers(labels)
        modules.check_spans(spans, labels.shape)
        given = labels != IGNORE_INDEX
        outside = ~(given[spans[:, 0], spans[:, 1]] & given[spans[:, 0], spans[:, 2] - 1])
        for i in outside.nonzero()[:1, 0].tolist():
            raise ValueError(f"Span {i} is {spans[i].tolist()}, which is not part of an answer in labels.")
        span_logits = self.tag_tokens(input_ids, hidden_states, attention_mask)
        prompts = (input_points, input_labels, input_boxes, input_masks)
        given = self._read_given_spans(spans, images, given_masks, prompts)
        answers = {"sequences": input_ids, "answer_mask": answer_mask, "span_logits": span_logits, "spans": spans}
        answers["tag_scores"] = torch.ones(len(spans), dtype=span_logits.dtype, device=span_logits.device)
        answers["is_truncated"] = torch.zeros_like(answer_mask[:, 0])
        return self._segment(hidden_states, images, answers, given)

    def _read_given(self, input_ids, attention_mask, hidden_states, inputs):
        """Return the images of conversations with answers, and their hidden states, computed unless given."""
        images, inputs = self._take_images(input_ids, inputs)
        if hidden_states is None:
            vlm_inputs = {name: value for name, value in inputs.items() if name not in GIVEN_ANSWERS + GIVEN_SPANS}
            outputs = self._run_language_model(input_ids, attention_mask, **images.vlm_inputs, **vlm_inputs)
            hidden_states = outputs.last_hidden_state
        return images, hidden_states

    def _segment_tagged(self, sequences, attention_mask, answer_mask, is_truncated, hidden_states, images):
        """Tag the tokens of answers and segment the resulting spans."""
        if images.sam_embeddings is None and (sequences == self.config.vlm_config.image_token_id).any():
            raise ValueError(
                "The conversations have images, but nothing to segment them with; pass sam_pixel_values and the other "
                "image inputs of the processor, or sam_image_embeddings."
            )
        span_logits = self.tag_tokens(sequences, hidden_states, attention_mask)
        # A row without an image has nothing to segment.
        visible = answer_mask & (images.index >= 0)[:, None]
        spans = modules.decode_spans(span_logits.argmax(dim=-1), visible)
        tag_scores = 1 - span_logits.float().softmax(dim=-1)[..., modules.TAG_OUTSIDE, None]
        tag_scores = segmentation.mean_over_spans(tag_scores, spans)[:, 0]
        answers = {"sequences": sequences, "answer_mask": answer_mask, "is_truncated": is_truncated}
        answers |= {"span_logits": span_logits, "spans": spans, "tag_scores": tag_scores}
        return self._segment(hidden_states, images, answers)

    def _segment(self, hidden_states, images, answers: dict, given=None) -> PlumSegmentationOutput:
        """Segment the spans of answers, which are fields of the output; `given` are inputs of [`decode_masks`]."""
        size, spans = self.config.low_res_mask_size, answers["spans"]
        pred_masks, iou_scores = hidden_states.new_zeros((0, size, size)), hidden_states.new_zeros(0)
        windows = None
        if len(spans):
            pred_masks, iou_scores, windows = self.decode_corrected(hidden_states, spans, images, **(given or {}))
        return PlumSegmentationOutput(
            **answers,
            pred_masks=pred_masks,
            mask_windows=windows,
            iou_scores=iou_scores,
            sam_image_index=images.index,
            original_sizes=images.original_sizes,
            reshaped_input_sizes=images.reshaped_sizes,
            image_confidences=None if images.sam_embeddings is None else self.rate_images(images.sam_embeddings),
        )

    def _mask_given_answers(self, labels) -> torch.BoolTensor:
        """Return the tokens `(B, L)` of the last labelled answer of each row, without its stop token."""
        answers = modules.keep_last_answer(labels)
        absent = (answers == IGNORE_INDEX).all(dim=1).nonzero()[:, 0].tolist()
        if absent:
            raise ValueError(
                f"Rows {absent} have no answer in labels; give each row an answer, or call segment() with prompts to "
                "have all generated."
            )
        stop_tokens = generation.stop_tokens(self.generation_config, answers.device)
        return (answers != IGNORE_INDEX) & ~torch.isin(answers, stop_tokens)

    def _answer(self, prompt, attention_mask, vlm_inputs, inputs) -> tuple[torch.Tensor, ...]:
        """
        Return generated sequences with their attention mask, answer mask, truncation and the hidden states of
        `generate` itself.
        """
        with generation.GeneratedStates(self.get_decoder()) as observed:
            sequences, settings, rest = self._generate(prompt, attention_mask, **vlm_inputs, **inputs)
        sequences = sequences.sequences if isinstance(sequences, ModelOutput) else sequences
        if len(sequences) != len(prompt):
            raise ValueError(
                f"segment() gives one answer per prompt, found {len(sequences)} sequences for {len(prompt)} prompts; "
                "set num_return_sequences=1."
            )
        attention_mask, answer_mask, is_truncated = generation.find_ends(sequences, attention_mask, settings)
        hidden_states = observed.finish(sequences, attention_mask)
        if hidden_states is None:
            # Among the arguments that are not settings, tensors are inputs of the model; streamers are not.
            vlm_inputs |= {name: value for name, value in rest.items() if isinstance(value, torch.Tensor)}
            vlm_inputs = self._extend_to_answers(vlm_inputs, prompt, sequences)
            hidden_states = self._run_language_model(sequences, attention_mask, **vlm_inputs).last_hidden_state
        return sequences, attention_mask, answer_mask, is_truncated, hidden_states.to(sequences.device)

    def _extend_to_answers(self, vlm_inputs: dict, prompt, sequences) -> dict:
        """Return inputs per prompt token extended to the answers: embeddings, or type ids with 0 for text."""
        answers, extended = sequences[:, prompt.shape[1] :], dict(vlm_inputs)
        for name, value in vlm_inputs.items():
            if name == "inputs_embeds":
                extended[name] = torch.cat([value, self.get_input_embeddings()(answers)], dim=1)
            elif isinstance(value, torch.Tensor) and value.shape == prompt.shape:
                extended[name] = F.pad(value, (0, answers.shape[1]))
        return extended

    @torch.no_grad()
    def encode_conversations(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **inputs
    ) -> torch.FloatTensor:
        """
        Return the hidden states `(B, L, D)` of conversations, for [`score_choices`], [`segment_answers`] and
        [`segment_spans`] of the same rows. Inputs as in [`segment_answers`]; the labels of a batch are unused.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self._read_given(input_ids, attention_mask, None, inputs)[1]

    @torch.no_grad()
    def score_choices(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        num_choices: int,
        attention_mask: torch.Tensor | None = None,
        hidden_states: torch.FloatTensor | None = None,
        reduction: str = "answer_mean",
        **inputs,
    ) -> torch.FloatTensor:
        """
        Return the negative log-likelihood of candidate answers; the choice of the model is the argmin.

        Args:
            input_ids (`(B, L)`): Conversations; `num_choices` consecutive rows per question, each with one answer.
            labels (`(B, L)`): Tokens of the answers, -100 elsewhere.
            num_choices: Answers per question.
            hidden_states (`(B, L, D)`): Result of [`encode_conversations`] for these rows, if available.
            reduction: `"answer_mean"` and `"answer_sum"` over the answer's tokens; `"sequence_mean"`, over prompt and
                answer without image tokens and padding, as in the published protocol.
            inputs: Further inputs of [`encode_conversations`].

        Returns:
            Scores `(B / num_choices, num_choices)`.
        """
        if num_choices < 1 or len(input_ids) % num_choices:
            raise ValueError(f"Found {len(input_ids)} rows, which is not a multiple of num_choices={num_choices}.")
        if reduction not in ("answer_mean", "answer_sum", "sequence_mean"):
            raise ValueError(f"reduction must be answer_mean, answer_sum or sequence_mean, found {reduction!r}.")
        if hidden_states is None:
            hidden_states = self.encode_conversations(input_ids, attention_mask, **inputs)
        if reduction == "sequence_mean":
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            # The first token of a row is not predicted, with padding on either side.
            predicted = (real == 1) & (F.pad(real, (1, 0))[:, :-1] == 1)
            counted = predicted & (input_ids != self.config.vlm_config.image_token_id)
            labels = torch.where(counted, input_ids, IGNORE_INDEX)
        targets = labels[:, 1:]
        counted = targets != IGNORE_INDEX
        absent = (~counted.any(dim=1)).nonzero()[:, 0].tolist()
        if absent:
            raise ValueError(f"Rows {absent} have no answer in labels to score; give each row one.")
        states = hidden_states[:, :-1][counted]
        losses = []
        for some, their_targets in zip(states.split(LOGIT_ROWS), targets[counted].split(LOGIT_ROWS), strict=True):
            logits = backbones.next_token_logits(self.vlm, some[None])[0]
            losses.append(F.cross_entropy(logits.float(), their_targets, reduction="none"))
        rows = counted.nonzero()[:, 0]
        scores = torch.zeros(len(input_ids), device=states.device).index_add(0, rows, torch.cat(losses))
        if reduction != "answer_sum":
            scores = scores / counted.sum(1)
        return scores.view(-1, num_choices)


PlumForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["PlumForConditionalGeneration", "PlumOutput", "PlumPreTrainedModel", "PlumSegmentationOutput"]
