"""EM in few passes over the data: data sets, runs of the package on them, tables and curves."""
