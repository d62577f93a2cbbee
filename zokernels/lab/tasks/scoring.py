"""Scores of the candidates under a model: one class for each kind of model."""

from zokernels.lab.tasks.causal import CausalScorer, candidate_scores
from zokernels.lab.tasks.encoders import EncoderScorer, MaskedScorer
from zokernels.lab.tasks.scorer import OBJECTIVES, Batch, Scorer

__all__ = ["OBJECTIVES", "SCORERS", "Batch", "CausalScorer", "Scorer", "candidate_scores"]

SCORERS: dict[str, type[Scorer]] = {
    "causal": CausalScorer,
    "masked": MaskedScorer,
    "encoder": EncoderScorer,
}
