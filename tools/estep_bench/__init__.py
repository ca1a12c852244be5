"""What `tools/bench_estep.py` consists of, in the order of a measurement's way.

``workloads`` draws rows and fits parameters; ``errors`` holds a kernel against fp64; ``clocks`` and ``ceilings`` say
how long it took and could have taken; ``ours``, ``dense``, ``flash_kmeans`` and ``flash_gmm`` measure one
implementation each; ``timing`` and ``accuracy`` go through the cases; ``tables`` prints what they found.
"""
