"""What `tools/compile_report.py` consists of: ``cases`` are calls of the kernels, ``launches`` records what each would
launch instead of launching it, and ``binaries`` compiles that for a GPU that need not be there.
"""
