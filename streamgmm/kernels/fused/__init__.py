"""The fused E-step on GPUs, in Triton.

``kernel`` drives the launches of ``spherical``, ``diag`` and ``tied`` on rows in ``working`` form: ``half_form`` (fp16,
``medium``) or ``split_form`` (fp16 planes, ``high``). Device code follows the data's way: ``rows`` brings rows into the
frame, ``joint`` evaluates densities tile by tile, and ``sums`` adds up what matters, or ``stored`` where rows are wide;
``split`` and ``split_sums`` are the same for planes, and ``running`` is what both share. ``parameters``,
``split_parameters`` and ``whitening`` bring a mixture into the form they multiply by; ``configs`` chooses tiles.
``full*`` are the same for full covariances.
"""
