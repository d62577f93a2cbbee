"""Scores of the candidates under a model: one class for each kind of model."""

from zokernels.lab.scoring.causal import CausalScorer, candidate_scores
from zokernels.lab.scoring.encoders import EncoderScorer, MaskedScorer
from zokernels.lab.scoring.scorer import NEW_TOKENS, OBJECTIVES, Batch, Scorer

__all__ = [
    "NEW_TOKENS",
    "OBJECTIVES",
    "SCORERS",
    "Batch",
    "CausalScorer",
    "Scorer",
    "candidate_scores",
]

SCORERS: dict[str, type[Scorer]] = {
    "causal": CausalScorer,
    "masked": MaskedScorer,
    "encoder": EncoderScorer,
}
