"""Posting lists, indexes and searches from a mixture: the coarse quantizer of nearest-neighbour search."""

from streamgmm.ann.assignment import assign
from streamgmm.ann.calibration import calibrate_probing
from streamgmm.ann.coding import Coding
from streamgmm.ann.evaluation import EvaluationRequest, evaluate
from streamgmm.ann.faiss_files import read_index, write_index
from streamgmm.ann.faiss_index import build_index, centroids_of
from streamgmm.ann.ground_truth import exact_neighbours, read_truth
from streamgmm.ann.hits import HitModel
from streamgmm.ann.policies import Policy
from streamgmm.ann.postings import PostingLists
from streamgmm.ann.probing import Probing
from streamgmm.ann.quantizer import Quantizer, quantizer_of, tempered
from streamgmm.ann.search import Searcher
from streamgmm.ann.table import Evaluation
from streamgmm.ann.training import train_quantizer
from streamgmm.ann.vectorchord import write_vectorchord

__all__ = [
    "Coding",
    "Evaluation",
    "EvaluationRequest",
    "HitModel",
    "Policy",
    "PostingLists",
    "Probing",
    "Quantizer",
    "Searcher",
    "assign",
    "build_index",
    "calibrate_probing",
    "centroids_of",
    "evaluate",
    "exact_neighbours",
    "quantizer_of",
    "read_index",
    "read_truth",
    "tempered",
    "train_quantizer",
    "write_index",
    "write_vectorchord",
]
