"""
Spans to masks: SAM's mask decoder, span after span, each shown the masks of the earlier spans of its conversation.

Shapes. B rows, L tokens, S spans of the whole batch, n of them at a time, N images, C SAM width, G grid side.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn

try:
    from .heads_plum import mean_over_spans
    from .losses_plum import MaskTargets
except ImportError:
    if __package__:
        raise
    from heads_plum import mean_over_spans
    from losses_plum import MaskTargets

# Mask prompts that are decoded at once: on a CPU so many that their image cells number these, elsewhere these.
CPU_CELLS_AT_ONCE = 16 * 16 * 16
PROMPTS_AT_ONCE = 64


@contextmanager
def weights_in_place(*modules: nn.Module):
    """While it lasts, offloaded weights of modules are there for the code of others, which reads but does not call."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        yield


class PlumMaskDecoding:
    """The part of [`PlumForConditionalGeneration`] that decodes the masks of spans."""

    def decode_masks(
        self,
        hidden_states: torch.Tensor,
        spans: torch.LongTensor,
        sam_image_embeddings: torch.Tensor,
        sam_image_index: torch.LongTensor,
        given_masks: dict[int, torch.Tensor] | None = None,
        targets: MaskTargets | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Masks of spans, conversations in lock-step: step t decodes the t-th span of every row that has one.

        Args:
            hidden_states: `(B, L, D)`.
            spans: `(S, 3)` rows `[row, start, end)`, rows ascending.
            sam_image_embeddings, sam_image_index: As in [`forward`].
            given_masks: Low-res logits `(4G, 4G)` by span index, which stand in for the prediction of that span.
            targets: In training, gets the prediction of each span as it is decoded, and says what is fed back.

        Returns:
            `(S, 4G, 4G)` low-res logits and `(S,)` predicted IoUs.
        """
        rows = spans[:, 0].contiguous()
        images = sam_image_index[rows]
        self._check_images_of_spans(rows, images, sam_image_embeddings)
        # The mask branch stays in the precision of its weights: bfloat16 autocast costs it visible accuracy.
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = self.sam.mask_decoder.iou_token.weight.dtype
            projected = self.span_projector(hidden_states.to(next(self.span_projector.parameters()).dtype))
            queries = mean_over_spans(projected.to(hidden_states.device), spans).to(dtype)  # (S, C)
            embeddings = sam_image_embeddings.to(queries)
            positions = self._grid_positions(queries)
            if self.mask_feedback is None and not given_masks and targets is None:
                return self._decode_step(queries, images, embeddings, positions, self._no_mask_prompt(queries))
            return self._decode_in_lock_step(queries, rows, images, embeddings, positions, given_masks or {}, targets)

    @staticmethod
    def _check_images_of_spans(rows, images, sam_image_embeddings):
        if sam_image_embeddings is None or (images < 0).any():
            missing = rows.tolist() if sam_image_embeddings is None else rows[images < 0].tolist()
            raise ValueError(f"Rows {sorted(set(missing))} have spans to segment but no image.")

    # A weight is read by calling its module and nothing else: where it is offloaded, the call brings it.

    def _grid_positions(self, like: torch.Tensor) -> torch.Tensor:
        """SAM's positions `(1, C, G, G)` of the cells of its grid, on the device and in the precision of `like`."""
        grid = self.config.sam_grid_size
        embedding = self.sam.shared_image_embedding
        centres = (torch.arange(grid, device=like.device, dtype=embedding.positional_embedding.dtype) + 0.5) / grid
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        return embedding(torch.stack([columns, rows], dim=-1)).permute(2, 0, 1)[None].to(like)

    def _no_mask_prompt(self, like: torch.Tensor) -> torch.Tensor:
        """SAM's dense prompt "no mask" for each of n queries `(n, C)`, as a view: `(n, C, G, G)`."""
        grid = self.config.sam_grid_size
        first = torch.zeros(1, dtype=torch.long, device=like.device)
        embedding = self.sam.prompt_encoder.no_mask_embed(first).to(like)  # (1, C)
        return embedding[..., None, None].expand(len(like), -1, grid, grid)

    def _decode_step(self, queries, images, embeddings, positions, dense) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM's mask decoder with one sparse and one dense prompt each: `(n, 4G, 4G)` logits, `(n,)` IoUs."""
        # A batch saves time while its images fit the caches of a CPU; 16 prompts at once on a grid of 64 x 64 take
        # twice as long as one by one.
        on_cpu = queries.device.type == "cpu"
        chunk = max(1, CPU_CELLS_AT_ONCE // self.config.sam_grid_size**2) if on_cpu else PROMPTS_AT_ONCE
        masks, iou_scores = [], []
        for start in range(0, len(queries), chunk):
            members = slice(start, start + chunk)
            with weights_in_place(self.sam.mask_decoder.iou_token, self.sam.mask_decoder.mask_tokens):
                decoded, scores = self.sam.mask_decoder(
                    embeddings[images[members]],
                    image_positional_embeddings=positions.expand(len(queries[members]), -1, -1, -1),
                    sparse_prompt_embeddings=queries[members, None, None],  # (n, 1, 1, C): one point prompt each
                    dense_prompt_embeddings=dense[members],
                    multimask_output=False,
                )
            masks.append(decoded[:, 0, 0].to(queries.device))
            iou_scores.append(scores[:, 0, 0].to(queries.device))
        return torch.cat(masks), torch.cat(iou_scores)

    def _decode_in_lock_step(self, queries, rows, images, embeddings, positions, given_masks, targets):
        first = torch.searchsorted(rows, rows)  # index of the first span of the same row
        step = torch.arange(len(rows), device=rows.device) - first
        last_step = step[torch.searchsorted(rows, rows, right=True) - 1]
        masks, iou_scores, members_of_step = [], [], []
        keys, values = None, None  # (n, t, G*G, C) of the earlier masks of the rows that go on
        for t in range(int(step.max()) + 1):
            members = (step == t).nonzero()[:, 0]
            dense = self._no_mask_prompt(queries[members])
            if keys is not None:
                dense = self.mask_feedback(keys, values)
            decoded, scores = self._decode_step(queries[members], images[members], embeddings, positions, dense)
            decoded, scores = self._replace_given(members, decoded, scores, given_masks)
            fed_back = decoded
            if targets is not None:
                targets.assign(members, decoded)
                fed_back = targets.feed_back(members, decoded)
            masks.append(decoded)
            iou_scores.append(scores)
            members_of_step.append(members)
            goes_on = last_step[members] > t
            if self.mask_feedback is not None and goes_on.any():
                new_keys, new_values = self.mask_feedback.embed(
                    fed_back[goes_on], queries[members[goes_on]], positions, self.sam.prompt_encoder.mask_embed
                )
                keys, values = (
                    new[:, None] if earlier is None else torch.cat([earlier[goes_on], new[:, None]], dim=1)
                    for earlier, new in ((keys, new_keys), (values, new_values))
                )
        order = torch.cat(members_of_step).argsort()
        return torch.cat(masks)[order], torch.cat(iou_scores)[order]

    @staticmethod
    def _replace_given(members, masks, iou_scores, given_masks):
        """The masks and scores of one step with the caller's masks, and a score of 1, in their places."""
        for place, span in enumerate(members.tolist() if given_masks else []):
            if span in given_masks:
                chosen = torch.arange(len(masks), device=masks.device) == place
                masks = torch.where(chosen[:, None, None], given_masks[span].to(masks), masks)
                iou_scores = torch.where(chosen, torch.ones_like(iou_scores), iou_scores)
        return masks, iou_scores
