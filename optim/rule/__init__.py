"""The gradient rule: one step in sharpness.py, and each of its parts in a file of its own.

sharpness.py     the step: clean pass, move, moved pass, combination; and when it is taken
descent.py       what is evaluated at the moved point: SAM, Functional-SAM and their relatives
ascent.py        the clean pass: loss, ascent gradient g, cotangent r
directions.py    q, what the weights move along
metrics.py       P and n, how q is scaled
weights.py       of the instances in the ascent loss; delta.py has those of delta-SAM
combine.py       what is done with g and the moved gradient
axes.py          how the axes go together: contradictions, and what a step costs

perturbation.py  moving the weights and putting them back
scope.py         who shares one perturbation: batch, group or replica
fraction.py      an ascent on a part of the batch
cotangents.py    whether r is stored or rebuilt
parameters.py    which parameters move
diagnostics.py   what is logged of a move
conditions.py    random stream, buffers and precision of a pass
tensors.py       norms and inner products over shards
"""
