"""Predicting tokens from fused ones: causal masks, BERT's masking, and the head that gives a logit for each id.

Shape legend: P rows, L text tokens, T tokens to predict, D width, V ids of the vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.contract import TokenPredictions
from pretrain.data.text import Tokenizer
from pretrain.model.noise import derive_keys, uniform


class TokenWeights(NamedTuple):
    """The weight of a token in each loss: world / tokens of the global batch, so that the mean over ranks of the weighted
    sums is the mean over all tokens, however many each sample has."""

    captioning: Tensor  # []
    masked_language: Tensor  # []


def causal_mask(mask: Tensor) -> Tensor:
    """[P,L] bool -> [P,L,L] bool: each token may look at the real ones up to itself.

    Padding has to follow the text, as it does here, so that every row has something to look at.
    """
    return mask[:, None, :] & mask.new_ones(mask.shape[1], mask.shape[1]).tril()


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True; elsewhere as low as BERT and BLIP have it, which both of transformers' attentions take."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def mask_tokens(ids: Tensor, mask: Tensor, keys: Tensor, tokenizer: Tokenizer, share: float) -> tuple[Tensor, Tensor]:
    """Choose a `share` of the tokens, never special ones; of these 80 % become the mask, 10 % any id, 10 % stay.

    A function of each row's key [P], so the same wherever and whenever the sample is computed.

    Returns: ids [P,L] as the model reads them, and [P,L] bool, the chosen ones, whose ids are to be predicted.
    Source:  BERT, arXiv:1810.04805, section 3.1.
    """
    choice, fate, other = uniform(derive_keys(keys, "masked language"), 3 * ids.shape[1]).chunk(3, dim=1)
    chosen = mask & (choice < share)
    for special in tokenizer.special_ids:
        chosen &= ids != special
    replaced = torch.where(fate < 0.9, (other * tokenizer.vocab_size).long(), ids)
    replaced = torch.where(fate < 0.8, tokenizer.mask_id, replaced)
    return torch.where(chosen, replaced, ids), chosen


class TokenHead(nn.Module):
    """BERT's and BLIP's: a dense layer, GELU, layer norm, then the embedding of the ids, transposed, and a bias.

    The embedding is the text tower's. It comes in as a tensor that its own module gave, so that ZeRO-3 gathers it, and so
    that its weights have one name.
    """

    def __init__(self, width: int, embedding: nn.Embedding):
        super().__init__()
        self.dense = nn.Linear(width, embedding.embedding_dim)
        self.norm = nn.LayerNorm(embedding.embedding_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        nn.init.normal_(self.dense.weight, std=width**-0.5)
        nn.init.zeros_(self.dense.bias)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """[T,D] tokens, [V,D'] embedding -> logits [T,V], float32 or better."""
        logits = F.linear(self.norm(F.gelu(self.dense(tokens))), embedding, self.bias)
        return logits if logits.dtype == torch.float64 else logits.float()


def embedding_matrix(embedding: nn.Embedding) -> Tensor:
    """All rows [V,D'] by a call of the module. The row of padding, if it has one, gets no gradient here."""
    return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))


def predict(
    head: TokenHead, tokens: Tensor, chosen: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor
) -> TokenPredictions:
    """Predictions of `ids` [P,L] from `tokens` [P,L,D], where `chosen` [P,L]. There may be none: the head is called still."""
    return TokenPredictions(head(tokens[chosen], embedding), ids[chosen], weight)
