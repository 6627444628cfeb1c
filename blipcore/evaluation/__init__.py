"""What a model can do, measured: retrieval, captioning, zero-shot classification, questions, calibration.

Each task is a function of its module's name that gives rows of figures; `report` shows them.
"""

from blipcore.evaluation import report
from blipcore.evaluation.captioning import captioning
from blipcore.evaluation.classification import classification, read_names
from blipcore.evaluation.retrieval import (
    Pool,
    candidate_likelihoods,
    candidate_margins,
    embed_pool,
    itc_recall,
    rerank_both_ways,
    retrieval,
)
from blipcore.evaluation.vqa import vqa

__all__ = [
    "Pool",
    "candidate_likelihoods",
    "candidate_margins",
    "captioning",
    "classification",
    "embed_pool",
    "itc_recall",
    "read_names",
    "report",
    "rerank_both_ways",
    "retrieval",
    "vqa",
]
