"""Dask's workers as the processes of a fit; and reaching a Dask scheduler at all."""
