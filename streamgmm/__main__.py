"""``python -m streamgmm``."""

from streamgmm.cli import main

main()
