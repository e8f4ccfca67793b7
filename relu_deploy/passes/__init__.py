"""Graph passes: what a network computes stays, what it costs goes down.

The pipeline, in order. A pass takes a graphsurgeon graph, edits it in place and returns a ``PassReport``;
``run.rewrite`` applies them until none finds anything to do, and compares the result with the original.
"""

from __future__ import annotations

from relu_deploy.passes.affine import fold_affine
from relu_deploy.passes.batchnorm import fold_batchnorm
from relu_deploy.passes.branches import inline_branches
from relu_deploy.passes.collapse import collapse_relu
from relu_deploy.passes.constants import fold_constants
from relu_deploy.passes.dead import remove_dead_nodes
from relu_deploy.passes.duplicates import merge_duplicates
from relu_deploy.passes.focus import fold_focus
from relu_deploy.passes.gemm import matmul_add_to_gemm
from relu_deploy.passes.identity import remove_identities
from relu_deploy.passes.pad import fold_pad
from relu_deploy.passes.pwlu import fold_pwlu
from relu_deploy.passes.recognise import recognise_pwlu

PIPELINE = (
    fold_constants,  # side inputs such as 1 - gamma become numbers that the passes after it can read
    remove_identities,  # nothing stands between a layer and what follows it
    fold_batchnorm,  # before regions are looked at: a folded one ends in the layer, not in the activation
    collapse_relu,
    recognise_pwlu,  # what is not ReLU may be a learned activation spelled out
    fold_pwlu,
    fold_affine,  # after regions were looked at: what scales a ReLU is part of how it is spelled
    matmul_add_to_gemm,  # after what scales the product and its bias is in them
    fold_focus,
    fold_pad,
    inline_branches,  # what it brings in is looked at in the next round
    merge_duplicates,
    remove_dead_nodes,
)

__all__ = [
    "PIPELINE",
    "collapse_relu",
    "fold_affine",
    "fold_batchnorm",
    "fold_constants",
    "fold_focus",
    "fold_pad",
    "fold_pwlu",
    "inline_branches",
    "matmul_add_to_gemm",
    "merge_duplicates",
    "recognise_pwlu",
    "remove_dead_nodes",
    "remove_identities",
]
