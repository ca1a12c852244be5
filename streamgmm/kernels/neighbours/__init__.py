"""The nearest centroids of rows on GPUs, in Triton, without writing down an N×K matrix.

``search`` drives three launches, whose device code is in ``narrowing``, ``scoring`` and ``refining``; ``grouping`` says
which centroids compete with one another, and with which tiles.
"""
